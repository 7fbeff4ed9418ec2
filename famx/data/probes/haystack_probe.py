"""Probes that insert texts between the sentences of a haystack."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from famx.data.probes.checks import check_choice
from famx.data.probes.haystacks import (
    Units,
    cyclic_end,
    insert,
    nearest_places,
    noise_units,
    real_text_units,
)
from famx.data.probes.probe import FILLER, Parts, Probe


@dataclasses.dataclass(frozen=True)
class HaystackProbe(Probe):
    """Texts inserted between the sentences of a haystack, each at its own depth.

    The haystack is cut at its beginning to fit: all its sentences but the first are whole.

    Attributes:
      haystack: "noise" (one text repeated on every line) or "python_docs" (the documentation of the
        running Python's standard library, from a random sentence on; training reads the first four
        fifths of it, evaluation the rest).
    """

    haystack: str = "noise"

    HAYSTACKS: ClassVar[tuple[str, ...]] = ("noise", "python_docs")

    def __post_init__(self):
        super().__post_init__()
        check_choice("haystack", self.haystack, self.HAYSTACKS)

    def _parts(self, index: int) -> Parts:
        """The texts of example `index`."""
        raise NotImplementedError

    def _widest(self) -> Parts:
        """Texts of which each is at least as long as in any example."""
        raise NotImplementedError

    @property
    def separator(self) -> str:
        """The text before every text of the haystack, inserted or not."""
        return " " if self.haystack == "python_docs" else "\n"

    @functools.cached_property
    def min_length(self) -> int:
        parts = self._widest()
        texts = [parts.header, parts.question, parts.answer]
        return sum(map(self._bound, [*texts, *(self.separator + text for text in parts.hidden)]))

    @functools.cached_property
    def answer_width(self) -> int:
        return self._bound(self._widest().answer)

    def _row(self, index, length):
        parts = self._parts(index)
        header, question, answer = map(self._encode, (parts.header, parts.question, parts.answer))
        hidden = [self._encode(self.separator + text) for text in parts.hidden]
        used = len(header) + len(question) + len(answer) + sum(map(len, hidden))
        filler, places = self._filler(index, length - used)
        before = nearest_places(places, np.asarray(parts.depths) * len(filler))
        context, starts = insert(filler, before, hidden)
        return dict(
            tokens=np.concatenate([header, context, question, answer]),
            answer_start=length - len(answer),
            positions=[len(header) + start for start in starts],
            filler_tokens=len(filler),
            references=parts.references,
        )

    def _filler(self, index: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Int32 `[count]` filler, and the sorted places between its sentences."""
        units = self._units(index, count)
        separator = self._encode(self.separator)
        end = 0
        if self.haystack == "python_docs":
            end = int(self._rng(index, FILLER).integers(units.starts.sum()))
        return cyclic_end(units, end, count, separator)

    def _units(self, index: int, count: int) -> Units:
        """The haystack's sentences, of at least `count` tokens or to be read cyclically."""
        if self.haystack == "python_docs":
            return real_text_units(self.vocab, self.separator, self.split == "eval")
        return noise_units(self.vocab, self.separator)
