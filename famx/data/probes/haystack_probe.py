"""Probes that insert texts between the sentences of a haystack."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from famx.base.values import checked
from famx.data.probes.fitting import largest
from famx.data.probes.haystacks import (
    Units,
    cyclic_end,
    insert,
    join_units,
    nearest_places,
    noise_units,
    real_text_units,
)
from famx.data.probes.passkey_text import REPEATED_FILLER
from famx.data.probes.probe import FILLER, Parts, Probe, check_index
from famx.data.probes.python_docs import python_docs_sentences


@checked
@dataclasses.dataclass(frozen=True)
class HaystackProbe(Probe):
    """Texts inserted between the sentences of a haystack, each at its own depth.

    The haystack of a row is cut at its beginning to fit: all its sentences but the first are whole. That
    of a prompt is not cut: it has as many whole sentences as fit, joined by the separator.

    Attributes:
      haystack: "noise" (one text repeated on every line) or "python_docs" (the documentation of the
        running Python's standard library, from a random sentence on; training reads the first four
        fifths of it, evaluation the rest).
    """

    haystack: Literal["noise", "python_docs"] = "noise"

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
        texts = [self._header_of_row(parts), parts.question, parts.answer]
        return sum(map(self._bound, [*texts, *(self.separator + text for text in parts.hidden)]))

    @functools.cached_property
    def answer_width(self) -> int:
        return self._bound(self._widest().answer)

    def _row(self, index, length):
        parts = self._parts(index)
        texts = (self._header_of_row(parts), parts.question, parts.answer)
        header, question, answer = map(self._encode, texts)
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

    def prompt(self, index, length, room=0):
        check_index(index)
        parts = self._parts(index)
        source, sentences = self._sentences(index), list[str]()

        def text(number: int) -> str:
            """The prompt with `number` sentences."""
            sentences.extend(itertools.islice(source, max(number - len(sentences), 0)))
            pieces, used = [], 0
            for hidden, depth in zip(parts.hidden, parts.depths):
                place = int(depth * number)
                pieces += [*sentences[used:place], hidden]
                used = place
            context = self.separator.join([*pieces, *sentences[used:number]])
            return parts.header + context + parts.question

        number = largest(lambda n: 1 + len(self._encode(text(n))) + room, length)
        if number is None:
            raise ValueError(
                f"Example {index} of {type(self).__name__} does not fit into {length} tokens, of which "
                f"{room} are for the answer, even without a haystack; {self._too_short}."
            )
        extra = dict(question=parts.question, sentences=number)
        return dict(inputs=text(number), references=parts.references, **extra)

    def _header_of_row(self, parts: Parts) -> str:
        """The header of a row, in which the separator before the first sentence may be its line break."""
        return parts.header.removesuffix(self.separator)

    def _sentences(self, index: int) -> Iterator[str]:
        """The sentences of the haystack without separators, in order and without end."""
        if self.haystack == "noise":
            return itertools.repeat(REPEATED_FILLER)
        sentences = python_docs_sentences(self.split == "eval")
        start = int(self._rng(index, FILLER).integers(len(sentences)))
        return itertools.islice(itertools.cycle(sentences), start, None)

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
        if self.haystack == "noise":
            return noise_units(self.vocab, self.separator)
        encoded, size = [], 0
        for sentence in self._sentences(index):
            encoded.append(self._encode(self.separator + sentence))
            size += len(encoded[-1])
            if size >= count:
                break
        return join_units(encoded)
