"""What the gin files that come with famx say about themselves in the comment at their top."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

from famx.base.errors import ConfigError
from famx.base.gin_arguments import find_gin_file, shipped_files
from famx.base.text import columns, first_command

_LONG = 110  # characters


@dataclasses.dataclass(frozen=True)
class Example:
    """A gin file.

    Attributes:
      name: its name, which the commands take.
      comment: the comment at its top, without its marks.
    """

    name: str
    comment: str

    @property
    def about(self) -> str:
        """The first sentence of the comment; of a long one, what comes before its colon or comma."""
        paragraph = " ".join(self.comment.split("\n\n")[0].split())
        found = re.split(r"(?<=[a-z)])\. ", f"{paragraph} ")[0]
        for end in (": ", ", "):
            found = found if len(found) <= _LONG else found.partition(end)[0]
        return found.strip().rstrip(".")

    @property
    def command(self) -> str:
        """The first command in the comment, in one line; "" if there is none."""
        return first_command(self.comment)


def read_example(path: pathlib.Path) -> Example:
    """The description of a gin file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return Example(path.stem, "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end]))


def example_table(root: pathlib.Path) -> str:
    """A table of the gin files of gin_configs/: those that are complete runs, then the parts of runs.

    Args:
      root: directory that contains gin_configs/.
    """
    found: dict[str, list[Example]] = {}
    for path in shipped_files([str(root)]):
        found.setdefault(path.parent.name, []).append(read_example(root / path))
    examples = found.pop("examples")
    parts = [(x.name, folder, x.about) for folder, files in found.items() for x in files]
    return "\n\n".join([
        columns(("EXAMPLE", "WHAT IT DOES"), [(x.name, x.about) for x in examples]),
        columns(("PART", "OF", "WHAT IT SETS"), parts),
        "famx examples NAME shows the command, the cost and the path of one.",
    ])  # fmt: skip


def example_text(name: str, root: pathlib.Path, directories: Sequence[str]) -> str:
    """The comment of a gin file, and its path.

    Args:
      name: its name, or a path.
      root: directory that contains gin_configs/.
      directories: directories to look in.

    Raises:
      ConfigError: there is no such file.
    """
    found = find_gin_file(name, directories)
    path = next((p for p in (pathlib.Path(found), root / found) if p.is_file()), None)
    if path is None:
        raise ConfigError(f"There is no gin file {name}.")
    return f"{read_example(path).comment}\n\n{path}"
