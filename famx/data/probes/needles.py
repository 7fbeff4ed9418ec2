"""Needles in a haystack: RULER's eight retrieval variants (arXiv 2404.06654)."""

import dataclasses
import uuid
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Literal

import numpy as np

from famx.base.ranges import OneOf, Positive, Share
from famx.base.values import checked
from famx.data.probes import words
from famx.data.probes.haystack_probe import HaystackProbe
from famx.data.probes.probe import CONTENT, FILLER, PLACES, Parts

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {kind} afterwards.\n",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text? The special "
    "magic {kind} for {query} mentioned in the provided text are",
)
SINGLE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {kind} afterwards.\n",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text? The special magic "
    "{kind} for {query} mentioned in the provided text is",
)
KINDS = ("words", "numbers", "uuids")


@checked
@dataclasses.dataclass(frozen=True)
class NeedleProbe(HaystackProbe):
    """Keys with values, hidden in a haystack; the question asks for all values of some keys.

    The texts are RULER's, and so is the metric: the share of the references that the output contains
    (`string_match_all`). Unlike RULER's, keys and values of one example never repeat, not even in a
    haystack of needles (whose keys may repeat among themselves), and the essays are replaced by
    Python's documentation. Keys and values of an index are the same at every length.

    Attributes:
      haystack: "noise", "python_docs", or "needles": other keys with other values.
      keys, values: "words" (an adjective, a hyphen, a noun), "numbers" (seven digits) or "uuids".
      num_keys: number of keys in the haystack; there are at least `num_queries`.
      num_values: number of values of each key.
      num_queries: number of keys that the question asks for.
      depth: fraction of the haystack before a needle that is asked for; None draws it. The depths of
        other needles are drawn.
    """

    haystack: Literal["noise", "python_docs", "needles"] = "noise"
    keys: Annotated[str, OneOf(KINDS)] = "words"
    values: Annotated[str, OneOf(KINDS)] = "numbers"
    num_keys: Positive = 1
    num_values: Positive = 1
    num_queries: Positive = 1
    depth: Share | None = None

    def __post_init__(self):
        super().__post_init__()
        if self._num_keys * self.num_values > 1000:
            raise ValueError(
                f"{self._num_keys} keys of {self.num_values} values are more than 1000 needles; use "
                "fewer keys or values."
            )
        self._encode(self._widest().hidden[0])

    def at_depth(self, depth, length):
        if self.num_queries * self.num_values > 1:
            raise ValueError(
                "This NeedleProbe asks for several values, each at a depth of its own; set num_queries "
                "and num_values to 1, or choose another probe."
            )
        return dataclasses.replace(self, depth=depth)

    def _parts(self, index):
        keys, values, queried = self._content(index)
        needles = [(key, value) for key, of_key in zip(keys, values) for value in of_key]
        depths = self._rng(index, PLACES).random(len(needles))
        if self.depth is not None:
            depths[queried[0] * self.num_values] = self.depth
        order = np.argsort(depths, kind="stable")
        needles = [needles[i] for i in order]
        asked = [keys[i] for i in queried]
        answers = [value for key in asked for k, value in needles if k == key]
        return self._write(needles, depths[order], asked, answers)

    def _widest(self):
        key, value = _widest_word(self.keys), _widest_word(self.values)
        asked = [key] * self.num_queries
        needles = [(key, value)] * (self._num_keys * self.num_values)
        answers = [value] * (self.num_queries * self.num_values)
        return self._write(needles, np.zeros(len(needles)), asked, answers)

    @property
    def _num_keys(self) -> int:
        return max(self.num_keys, self.num_queries)

    def _content(self, index: int) -> tuple[list[str], list[list[str]], list[int]]:
        """Keys, the values of each, and the indices of the keys that are asked for, in that order."""
        rng = self._rng(index, CONTENT)
        keys = distinct(rng, self.keys, self._num_keys)
        values = distinct(rng, self.values, self._num_keys * self.num_values, keys)
        queried = rng.permutation(self._num_keys)[: self.num_queries].tolist()
        grouped = [values[i : i + self.num_values] for i in range(0, len(values), self.num_values)]
        return keys, grouped, queried

    def _write(self, needles, depths, asked: Sequence[str], answers: Sequence[str]) -> Parts:
        header, question = SINGLE if len(answers) == 1 else SEVERAL
        kind = self.values[:-1] if len(answers) == 1 else self.values
        query = ", and ".join(filter(None, [", ".join(asked[:-1]), asked[-1]]))
        return Parts(
            header=header.format(kind=kind),
            hidden=[NEEDLE.format(kind=self.values, key=key, value=value) for key, value in needles],
            depths=depths,
            question=question.format(kind=kind, query=query),
            answer=" " + ", ".join(answers),
            references=list(answers),
        )

    def _sentences(self, index):
        return self._other_needles(index) if self.haystack == "needles" else super()._sentences(index)

    def _other_needles(self, index: int) -> Iterator[str]:
        keys, values, _ = self._content(index)
        taken = {*keys, *(value for of_key in values for value in of_key)}
        rng = self._rng(index, FILLER)
        while True:
            (key,), (value,) = distinct(rng, self.keys, 1, taken), distinct(rng, self.values, 1, taken)
            yield NEEDLE.format(kind=self.values, key=key, value=value)


def distinct(
    rng: np.random.Generator, kind: str, number: int, taken: Collection[str] = ()
) -> list[str]:
    """Draw `number` different words, numbers or uuids, none of them in `taken`."""
    chosen: dict[str, None] = {}
    while len(chosen) < number:
        drawn = _draw(rng, kind)
        if drawn not in taken:
            chosen[drawn] = None
    return list(chosen)


def _draw(rng: np.random.Generator, kind: str) -> str:
    if kind == "numbers":
        return str(rng.integers(10**6, 10**7))
    if kind == "words":
        return words.compound(rng.integers(words.NUM_COMPOUNDS))
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _widest_word(kind: str) -> str:
    widest = {"words": words.LONGEST_COMPOUND, "numbers": "0" * 7, "uuids": str(uuid.UUID(int=0))}
    return widest[kind]
