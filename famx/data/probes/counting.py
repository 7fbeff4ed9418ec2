"""Counting words: RULER's common words and frequent words extraction (arXiv 2404.06654)."""

import dataclasses
import functools
import itertools
import string
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Le

from famx.base.ranges import NonNegative, Positive
from famx.base.values import checked
from famx.data.probes import words
from famx.data.probes.fitting import largest
from famx.data.probes.probe import CONTENT, FILLER, PLACES, Parts, Probe, check_index
from famx.data.vocabularies import ByteVocabulary

COMMON_HEADER = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
    "ones that appear most often.\n"
)
COMMON_QUESTION = (
    "\nQuestion: What are the {number} most common words in the above list? Answer: The top {number} "
    "words that appear most often in the list are:"
)
CODED_HEADER = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. "
)
CODED_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)
NOISE = "..."
LETTERS = np.array([*string.ascii_lowercase])


@checked
@dataclasses.dataclass(frozen=True)
class CountingProbe(Probe):
    """As much text as fits; in a row, dots before the question fill the remaining tokens."""

    def _parts(self, index: int, length: int, size: int) -> Parts:
        """The example for a row of `length` tokens; a larger `size` has more context."""
        raise NotImplementedError

    def _has_one_answer(self, size: int) -> bool:
        """True if the frequencies of the words determine the answer and its order."""
        return True

    @property
    def _sizes(self) -> range:
        """All sizes; the first has one answer."""
        raise NotImplementedError

    def _widest(self) -> Parts:
        """Parts of the smallest size, each at least as long as in any example of that size."""
        raise NotImplementedError

    @functools.cached_property
    def min_length(self) -> int:
        parts = self._widest()
        return sum(map(self._bound, (parts.header, parts.context, parts.question, parts.answer)))

    @functools.cached_property
    def answer_width(self) -> int:
        return self._bound(self._widest().answer)

    def _row(self, index, length):
        @functools.cache
        def encoded(size: int) -> tuple[Parts, list[np.ndarray]]:
            parts = self._parts(index, length, size)
            texts = (parts.header, parts.context, parts.question, parts.answer)
            return parts, [self._encode(text) for text in texts]

        size = self._largest(lambda size: sum(map(len, encoded(size)[1])), length)
        parts, (header, context, question, answer) = encoded(size)
        count = length - sum(map(len, (header, context, question, answer)))
        dots = np.full(count, self._encode(".")[-1], np.int32)
        space = self._encode(" ")[:count]
        dots[: len(space)] = space
        return dict(
            tokens=np.concatenate([header, context, dots, question, answer]),
            answer_start=length - len(answer),
            positions=[len(header)],
            filler_tokens=count,
            references=parts.references,
        )

    def prompt(self, index, length, room=0):
        check_index(index)

        @functools.cache
        def made(size: int) -> tuple[str, list[str]]:
            parts = self._parts(index, length, size)
            return parts.header + parts.context + parts.question, parts.references

        size = self._largest(lambda size: 1 + len(self._encode(made(size)[0])) + room, length)
        inputs, references = made(size)
        return dict(inputs=inputs, references=references)

    def _largest(self, size_of: Callable[[int], int], length: int) -> int:
        """The largest size with one answer whose text has at most `length` tokens."""
        size = largest(size_of, length, self._sizes[0], self._sizes[-1])
        if size is None:
            raise ValueError(
                f"{type(self).__name__} does not fit into {length} tokens at its smallest; make the rows "
                "longer, or let each word appear less often."
            )
        while not self._has_one_answer(size):
            size -= 1
        return size


@checked
@dataclasses.dataclass(frozen=True)
class CommonWordsProbe(CountingProbe):
    """A numbered list in which ten words appear more often than all others: which are they?

    The texts are RULER's, and so is the metric (`string_match_all`), which ignores the order of the
    words. All are equally frequent, so the answer names them in alphabetical order, as the demonstration
    does; RULER's order is that in which they were drawn, which no reader can know. A longer row has more
    uncommon words; the answer of an index is the same at every length. Every word is an adjective, a
    hyphen and a noun, because the word lists here are too short for single words, which RULER has.

    Attributes:
      num_common: number of common words.
      repeats: number of times that each common word and each other word appears.
      short_repeats: the same for rows shorter than `short_below`.
      short_below: length from which rows are not short; None: RULER's 4096 tokens, or 16384 bytes, or
        5 / 4 of the tokens of the shortest list with `repeats` if these are more.
      demonstration: begin with a solved example with a short list, as in RULER.
    """

    written_tokens: ClassVar[int] = 120

    num_common: Annotated[int, Ge(1), Le(100)] = 10
    repeats: tuple[Positive, Positive] = (30, 3)
    short_repeats: tuple[Positive, Positive] = (6, 1)
    short_below: NonNegative | None = None
    demonstration: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("repeats", "short_repeats"):
            common, others = getattr(self, name)
            if common <= others:
                raise ValueError(
                    f"A probe's {name} is {(common, others)}; a common word must appear more often than "
                    "the others, and these at least once."
                )
        self._encode(self._widest().context)

    @property
    def _sizes(self):
        return range(self.num_common + 1, words.NUM_COMPOUNDS + 1)

    def _is_short(self, length: int) -> bool:
        return length < (self._default_short_below if self.short_below is None else self.short_below)

    @functools.cached_property
    def _default_short_below(self) -> int:
        if isinstance(self.vocab, ByteVocabulary):
            return 16384
        parts = self._widest(short=False)
        texts = (parts.header, parts.context, parts.question, parts.answer)
        return max(4096, 5 * sum(len(self._encode(text)) for text in texts) // 4)

    def _parts(self, index, length, size):
        shown = ""
        if self.demonstration:
            numbers = (2, 3, 1) if self._is_short(length) else (4, 10, 3)
            rng = self._rng(index, FILLER)
            few = self._write("", _words(rng, numbers[0] * self.num_common), numbers[1:], rng)
            shown = few.header + few.context + few.question + few.answer + "\n"
        repeats = self.short_repeats if self._is_short(length) else self.repeats
        drawn = _words(self._rng(index, CONTENT), size)
        return self._write(shown, drawn, repeats, self._rng(index, PLACES))

    def _widest(self, short: bool = True):
        rng = np.random.default_rng(0)
        word = words.LONGEST_COMPOUND
        shown = ""
        if self.demonstration:
            number, repeats = (2, (3, 1)) if short else (4, (10, 3))
            few = self._write("", [word] * (number * self.num_common), repeats, rng)
            shown = few.header + few.context + few.question + few.answer + "\n"
        repeats = self.short_repeats if short else self.repeats
        return self._write(shown, [word] * self._sizes[0], repeats, rng)

    def _write(self, shown: str, drawn: Sequence[str], repeats, rng: np.random.Generator) -> Parts:
        """Write a list of the words `drawn`, whose first ones are the common ones, in random order."""
        common, others = sorted(drawn[: self.num_common]), list(drawn[self.num_common :])
        listed = common * repeats[0] + others * repeats[1]
        order = rng.permutation(len(listed))
        return Parts(
            header=shown + COMMON_HEADER,
            context=" ".join(f"{i}. {listed[place]}" for i, place in enumerate(order, 1)),
            question=COMMON_QUESTION.format(number=self.num_common),
            answer=" " + " ".join(f"{i}. {word}" for i, word in enumerate(common, 1)),
            references=common,
        )


@checked
@dataclasses.dataclass(frozen=True)
class CodedWordsProbe(CountingProbe):
    """Coded words whose frequency falls with their rank: which are the three most frequent?

    The texts are RULER's, and so is the metric (`string_match_all`). The word of rank k appears
    `floor(n k ** -alpha)` times, with n as large as the row allows; rank 1 is the noise `...`, ranks 2
    to 4 are the answer, which is the same at every length. If rounding would make two of the first five
    ranks equally frequent, n is smaller.

    Attributes:
      alpha: exponent of the zeta distribution, above 1.
      letters: number of letters of a coded word.
    """

    written_tokens: ClassVar[int] = 50

    alpha: Annotated[float, Gt(1), Le(6)] = 2.0
    letters: Annotated[int, Ge(4), Le(12)] = 6

    def __post_init__(self):
        super().__post_init__()
        self._encode(self._widest().context)

    @functools.cached_property
    def _sizes(self):
        return range(next(n for n in itertools.count(1) if self._has_one_answer(n)), 2**40)

    def _has_one_answer(self, size):
        return bool(np.all(np.diff(self._counts(size, 5))))

    def _counts(self, size: int, ranks: int) -> np.ndarray:
        """Number of times that the word of each rank appears, int64 `[ranks]`."""
        return np.floor(size * np.arange(1, ranks + 1) ** -self.alpha).astype(int)

    def _parts(self, index, length, size):
        ranks = max(length // 50, 5)
        counts = self._counts(size, ranks)
        known = [NOISE, *self._coded(index, int(np.count_nonzero(counts)) - 1)]
        order = self._rng(index, PLACES).permutation(counts.sum())
        ranked = np.repeat(np.arange(ranks), counts)[order]
        answer = known[1:4]
        return Parts(
            header=CODED_HEADER,
            context=" ".join([known[rank] for rank in ranked.tolist()]),
            question=CODED_QUESTION,
            answer=" " + ", ".join(answer),
            references=answer,
        )

    def _widest(self):
        return self._parts(0, 0, self._sizes[0])  # all coded words have one length

    def _coded(self, index: int, count: int) -> list[str]:
        """The first `count` different coded words of the example."""
        codes = np.array(_distinct(self._rng(index, CONTENT), 26**self.letters, count))
        spelled = LETTERS[codes[:, None] // 26 ** np.arange(self.letters) % 26]
        return ["".join(word) for word in spelled]


def _words(rng: np.random.Generator, count: int) -> list[str]:
    return [words.compound(i) for i in _distinct(rng, words.NUM_COMPOUNDS, count)]


def _distinct(rng: np.random.Generator, bound: int, count: int) -> list[int]:
    """The first `count` different numbers below `bound` of the generator's stream."""
    numbers: dict[int, None] = {}
    while len(numbers) < count:
        numbers.update(dict.fromkeys(rng.integers(bound, size=count).tolist()))
    return list(numbers)[:count]
