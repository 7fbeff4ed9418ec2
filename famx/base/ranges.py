"""Types of settings with a range: annotations for the parameters of whatever gin configures.

    def warmup_cosine(learning_rate: Rate, steps: Positive, floor: Amount = 0.0): ...

Gin's bindings are checked against the annotations before anything is built, and calls of what is
`famx.base.values.checked` are too. Numbers are finite; a whole number is also a number, but True, '4' and
4.0 are no whole numbers.
"""

import dataclasses
import os
import re
from collections.abc import Collection, Sequence
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt, MinLen


@dataclasses.dataclass(frozen=True)
class Expected:
    """Annotation: how error sentences name what is expected, such as "a dict of lengths by feature".

    Attributes:
      text: the words.
      inside: whether what is wrong inside of a list or dict is named by itself.
    """

    text: str
    inside: bool = False


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Annotation: the value is one of these."""

    choices: tuple[Any, ...]


_LITERALS = (bool, int, float, complex, str, bytes, list, tuple, dict, set)


class Test:
    """Annotation: base class of a test that an annotation of a type cannot express."""

    def complaint(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of a sentence that begins with the setting's name.

        None if nothing is; "" if the type's own sentence says it.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Built(Test):
    """Test for objects that something builds: no class, and nothing that a gin file writes out.

    Attributes:
      optional: whether None is allowed.
    """

    optional: bool = False

    def complaint(self, value):
        if value is None:
            return None if self.optional else ""
        return "" if isinstance(value, type) or type(value) in _LITERALS else None


@dataclasses.dataclass(frozen=True)
class LocalPath(Test):
    """Test for paths of files: not empty, and no URL; `~` at the beginning is the home directory.

    Attributes:
      or_remote: whether a URL of any store is allowed, too.
      or_bucket: whether a directory of Google Cloud Storage is allowed, too, as gs://bucket/name.
    """

    or_remote: bool = False
    or_bucket: bool = False

    def complaint(self, value):
        text = os.fspath(value)
        if not text:
            return "is an empty text: give a path, such as '/some/path'."
        if self.or_remote and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://.", text):
            return None
        if self.or_bucket and text.startswith("gs:/"):
            if re.fullmatch(r"gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](/[^/]+)+/?", text):
                return None
            return f"is {text}, which is no directory of a bucket: write it as gs://bucket/name."
        if match := re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
            also = "gs:// and " if self.or_bucket else ""
            return (
                f"is the URL {text}, and famx reads and writes files of {also}mounted file systems only:"
                f" mount what {match[0]}/ names, and give the path of the mount."
            )
        return None


Positive = Annotated[int, Ge(1)]
NonNegative = Annotated[int, Ge(0)]
AtLeastTwo = Annotated[int, Ge(2)]
Seed = Annotated[int, Ge(0)]
Sizes = Annotated[tuple[Positive, ...], MinLen(1)]
Indices = Annotated[tuple[NonNegative, ...], MinLen(1)]
Number = float  # finite
Rate = Annotated[float, Gt(0)]
Amount = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
Name = Annotated[str, MinLen(1)]
Path = Annotated[str | os.PathLike, LocalPath(), Expected("a path, such as '/some/path'")]
# A directory of checkpoints or the like, which may also be in Google Cloud Storage.
Directory = Annotated[
    str | os.PathLike, LocalPath(or_bucket=True), Expected("a path, such as '/some/path' or gs://bucket/name")
]
_Place = Annotated[str | os.PathLike, LocalPath(or_remote=True), Expected("a path, such as '/some/path'")]
Paths = Annotated[
    _Place | Annotated[Sequence[_Place], MinLen(1)],
    Expected("a path or glob pattern, such as '/some/dir/*.txt', or several of them"),
]
# What a call in a gin file returns, where no common type exists.
Object = Annotated[Any, Built(), Expected("an object that a call such as @name() makes")]
OptionalObject = Annotated[
    Any, Built(optional=True), Expected("an object that a call such as @name() makes, or None")
]


def one_of(value: Any, choices: Collection[Any]) -> bool:
    """Whether a value is one of the choices, where True and 1 are not the same."""
    of_same_kind = lambda choice: isinstance(value, bool) == isinstance(choice, bool)
    return any(of_same_kind(choice) and value == choice for choice in choices)
