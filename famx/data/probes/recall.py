"""Copying letters and recalling associations at an exact distance in blocks."""

import dataclasses
import functools
import string
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le

from famx.base.ranges import NonNegative, OneOf, Positive, Share
from famx.base.values import checked
from famx.data.probes.passkey_text import FILLER_WORDS
from famx.data.probes.probe import CONTENT, FILLER, PLACES, Probe
from famx.data.vocabularies import AnyVocabulary, Vocabulary, WordVocabulary, as_vocabulary, encode_after

SYMBOLS = tuple(string.ascii_lowercase)
KEYS = tuple(
    "Ada Bo Cleo Dan Eve Finn Gus Hal Ida Jon Kim Leo Mia Ned Ola Pam Rex Sue Tim Uma Vic Wim Yan Zoe"
    .split()
)
FILLERS = ("random_words", "repeated")


@functools.cache
def recall_words() -> WordVocabulary:
    """The word vocabulary of both probes: fewer than 128 ids."""
    return WordVocabulary([".", ",", "?", "remember", "recall", "is", *SYMBOLS, *KEYS, *FILLER_WORDS])


@functools.cache
def joined_words() -> WordVocabulary:
    """`recall_words()`, and each key joined to each letter as one word: fewer than 768 ids."""
    return WordVocabulary([*recall_words().words, *_joined_pairs()])


def _joined_pairs() -> list[str]:
    return [_joined(key, symbol) for key in KEYS for symbol in SYMBOLS]


def _joined(key: str, symbol: str) -> str:
    return f"{key}={symbol}"


@checked
@dataclasses.dataclass(frozen=True)
class DistanceProbe(Probe):
    """A statement within one block, and a question about it within the last block of the row.

    A statement is within one block both as targets and as inputs (one position later); so are question
    and answer, which end the row. The statement does not depend on length or distance.

    Attributes:
      vocabulary: "words" (`recall_words()`, or `joined_words()` for pairs of one word), or anything that
        `as_vocabulary` takes, that has a bos_id and can spell these words. Each word is encoded with the
        space before it.
      block_size: number of tokens of a block.
      distance: number of blocks from that of the statement to that of the answer, at least 1; None: the
        statement is in the row's first block, so that longer rows ask over a longer distance.
      filler: "random_words", or "repeated": one word, repeated.
    """

    vocabulary: AnyVocabulary = "words"
    block_size: Positive = 32
    distance: Positive | None = None
    filler: Annotated[str, OneOf(FILLERS)] = "random_words"

    def __post_init__(self):
        super().__post_init__()
        self._encode(" ".join(self._words.words))
        needed = max(self._statement_size + 1, self._question_size)
        if self.block_size < needed:
            raise ValueError(
                f"{type(self).__name__} has statements of {self._statement_size} tokens and questions of "
                f"{self._question_size} and does not fit into a block of {self.block_size}; use a "
                f"block_size of at least {needed}."
            )

    @functools.cached_property
    def vocab(self) -> Vocabulary:
        return as_vocabulary(self.vocabulary, words=lambda: self._words)

    @property
    def _words(self) -> WordVocabulary:
        """All words that rows are made of."""
        return recall_words()

    def _encode(self, text: str) -> np.ndarray:
        if isinstance(self.vocab, WordVocabulary):
            return super()._encode(text)
        ids = [i for word in text.split() for i in encode_after(self.vocab, f" {word}", ".")]
        self._check_known(ids, text)
        return np.array(ids, np.int32)

    def _width(self, words: Sequence[str]) -> int:
        """Largest number of tokens of one of the words."""
        return max(len(self._encode(word)) for word in words)

    @functools.cached_property
    def _filler_ids(self) -> np.ndarray:
        """Tokens to draw filler from: words of one token, or those of all words if there are none."""
        words = FILLER_WORDS if self.filler == "random_words" else FILLER_WORDS[:1]
        encoded = [self._encode(word) for word in words]
        return np.concatenate([ids for ids in encoded if len(ids) == 1] or encoded)

    @property
    def _statement_size(self) -> int:
        """Number of tokens of the longest statement."""
        raise NotImplementedError

    @property
    def _question_size(self) -> int:
        """Number of tokens of question and answer."""
        raise NotImplementedError

    @property
    def _min_distance(self) -> int:
        return 1

    @property
    def _joint(self) -> str:
        """What stands between two parts of a statement."""
        return " "

    def _content(self, index: int) -> tuple[list[list[str]], list[str], str, dict[str, Any]]:
        """The parts of each statement, the question, the answer, and additional entries of the example.

        Every other part of the question, from the second on, has the loss weight of the answer.
        """
        raise NotImplementedError

    def _placed(
        self, statements: Sequence[list[str]], first: int, last: int, rng: np.random.Generator
    ) -> Iterable[tuple[int, float, list[str]]]:
        """(block, place within the block from 0 to 1, parts) of each statement as it is written.

        The first statement is in the block `first`, a second one between it and the question's, `last`.
        """
        draw = rng.random(3)
        between = first + 1 + int(draw[2] * (last - first - 1))
        return zip((first, between), draw, statements)

    @property
    def min_length(self) -> int:
        return (self.distance or self._min_distance) * self.block_size + self._question_size

    def at_depth(self, depth, length):
        """In whole blocks: 0 is the row's first block, 1 as near to the question as the probe allows."""
        last = (length - 1) // self.block_size
        blocks = last - round(depth * (last - self._min_distance))
        return dataclasses.replace(self, distance=max(blocks, self._min_distance))

    def _room(self, length):  # question and answer stay in the last block
        return length - (length - 1) // self.block_size * self.block_size - self._question_size

    def _row(self, index, length):
        size, last = self.block_size, (length - 1) // self.block_size
        if length - last * size < self._question_size:
            raise ValueError(
                f"The last block of a row of {length} tokens has {length - last * size} of them, but "
                f"question and answer need {self._question_size}; use a multiple of the block, {size}."
            )
        statements, question, answer, extra = self._content(index)
        filler = self._filler_ids
        tokens = filler[self._rng(index, FILLER).integers(0, len(filler), length)]
        first = 0 if self.distance is None else last - self.distance
        starts = []
        for block, place, parts in self._placed(statements, first, last, self._rng(index, PLACES)):
            ids = self._encode(f"remember {self._joint.join(parts)} .")
            starts.append(block * size + int(place * (size - len(ids))))
            tokens[starts[-1] : starts[-1] + len(ids)] = ids
        parts = [self._encode(text) for text in [*question, answer]]
        ends = length - sum(map(len, parts)) + np.cumsum([len(ids) for ids in parts])
        weights = np.zeros(length, np.float32)
        for i, (end, ids) in enumerate(zip(ends, parts)):
            tokens[end - len(ids) : end] = ids
            weights[end - len(ids) : end] = i % 2 * self.answer_weight
        return dict(
            tokens=tokens, answer_start=length - len(parts[-1]), weights=weights,
            positions=starts, references=[answer], **extra,
        )  # fmt: skip


@checked
@dataclasses.dataclass(frozen=True)
class CopyProbe(DistanceProbe):
    """The statement is `remember q f z .`; some blocks later the row ends with `recall q f z`.

    Attributes:
      num_symbols: number of letters to copy, drawn independently.
    """

    num_symbols: Positive = 8

    @functools.cached_property
    def answer_width(self) -> int:
        return self.num_symbols * self._width(SYMBOLS)

    @functools.cached_property
    def _statement_size(self):
        return len(self._encode("remember .")) + self.answer_width

    @functools.cached_property
    def _question_size(self):
        return len(self._encode("recall")) + self.answer_width

    def _content(self, index):
        drawn = self._rng(index, CONTENT).integers(len(SYMBOLS), size=self.num_symbols)
        symbols = " ".join(SYMBOLS[i] for i in drawn)
        return [[symbols]], ["recall"], symbols, {}


@checked
@dataclasses.dataclass(frozen=True)
class RecallProbe(DistanceProbe):
    """The statement is `remember Ada is q , Bo is z .`; the row ends with `recall Bo is z`.

    A small model first has to learn that a letter belongs to the key before it. Which seeds learn that
    within some thousand steps is a matter of chance, whatever the memory; with `joined` there is nothing
    of it to learn, and `more_questions` makes rows teach more.

    An example also has `overwritten`, which is True if a second statement changed the letter of the key
    that is asked for.

    Attributes:
      num_pairs: number of keys, each with a letter.
      overwrite: probability of a second statement that gives one key another letter, in a block between
        the pairs and the question; the distance must then be at least 2. With several pairs, it is the
        key that is asked for in half of these examples.
      num_keys: number of keys that a row's are drawn from, at least `num_pairs`.
      joined: a pair is one word, `remember Ada=q Bo=z .`, and the question has no "is" and no ",":
        `recall Bo z`. In the probe's own vocabulary this word is one token, with which the model reads
        key and letter at once: what is left is to keep four of them and to find the one asked for.
      more_questions: number of other keys that are asked for, with their letters, before the one that
        counts: `recall Ada is q , Bo is z`. Their letters have the loss weight of the answer, so that a
        row teaches as much as several, like the rows of multi-query associative recall (Arora et al.
        2023, arXiv 2312.04927). The answer is still one letter, and fewer are left for it: leave it 0 in
        evaluations.
      spread: each pair has a block of its own choice, from that of the first statement to the last one
        before the question, like the needles of RULER's `niah_multikey_1`. Pairs of one block are in one
        statement, in their order.
    """

    num_pairs: Annotated[int, Ge(1), Le(len(KEYS))] = 4
    overwrite: Share = 0.0
    num_keys: Annotated[int, Ge(1), Le(len(KEYS))] = len(KEYS)
    joined: bool = False
    more_questions: NonNegative = 0
    spread: bool = False

    def __post_init__(self):
        if self.num_pairs > self.num_keys:
            raise ValueError(
                f"RecallProbe.num_pairs must be at most num_keys, which is {self.num_keys}, but it is "
                f"{self.num_pairs}."
            )
        if self.more_questions >= self.num_pairs:
            raise ValueError(
                "Each question is about another key, so RecallProbe.more_questions must be less than "
                f"num_pairs, which is {self.num_pairs}, but it is {self.more_questions}."
            )
        if self.overwrite and self.distance == 1:
            raise ValueError(
                "A key is overwritten in a block between statement and question; set distance to 2 or "
                "more, or overwrite to 0."
            )
        if self.overwrite and self.spread:
            raise ValueError(
                "RecallProbe.overwrite needs all pairs in the first statement; set it to 0, or spread to "
                "False."
            )
        super().__post_init__()

    def at_depth(self, depth, length):
        if self.overwrite:
            raise ValueError(
                "RecallProbe with overwrite asks now for the first statement and now for a later one, so "
                "it has no depth; set overwrite to 0."
            )
        if self.spread:
            raise ValueError("RecallProbe with spread has pairs at several depths; set spread to False.")
        return super().at_depth(depth, length)

    @property
    def _words(self):
        return joined_words() if self.joined else recall_words()

    @functools.cached_property
    def answer_width(self) -> int:
        return self._width(SYMBOLS)

    def _placed(self, statements, first, last, rng):
        if not self.spread:
            return super()._placed(statements, first, last, rng)
        blocks = rng.integers(first, last, len(statements)).tolist()
        places = rng.random(len(statements))
        together = {block: [] for block in sorted(set(blocks))}
        for block, parts in zip(blocks, statements):
            together[block] += parts
        return zip(together, places, together.values())

    @property
    def _joint(self):
        return f"{self._between[1]} "

    @property
    def _between(self) -> tuple[str, str]:
        """What stands between a key and its letter, and after each pair but the last."""
        return ("", "") if self.joined else (" is", " ,")

    def _stated(self, key: str, symbol: str) -> str:
        """A pair as the statement has it."""
        return _joined(key, symbol) if self.joined else f"{key}{self._between[0]} {symbol}"

    def _pairs_size(self, number: int, pair: int) -> int:
        """Largest number of tokens of that many pairs of `pair` tokens."""
        return number * pair + (number - 1) * len(self._encode(self._between[1]))

    @property
    def _asked_size(self) -> int:
        """Largest number of tokens of a key and its letter as the question has them."""
        return self._width(KEYS) + len(self._encode(self._between[0])) + self.answer_width

    @functools.cached_property
    def _statement_size(self):
        pair = self._width(_joined_pairs()) if self.joined else self._asked_size
        return len(self._encode("remember .")) + self._pairs_size(self.num_pairs, pair)

    @functools.cached_property
    def _question_size(self):
        return len(self._encode("recall")) + self._pairs_size(1 + self.more_questions, self._asked_size)

    @property
    def _min_distance(self):
        return 2 if self.overwrite else 1

    def _content(self, index):
        rng = self._rng(index, CONTENT)
        keys = [KEYS[i] for i in rng.permutation(self.num_keys)[: self.num_pairs]]
        values = [SYMBOLS[i] for i in rng.integers(len(SYMBOLS), size=self.num_pairs)]
        asked = int(rng.integers(self.num_pairs))
        overwrites, same_key = rng.random(2)  # draws
        # Every draw is made in every case, so that no option shifts the draws of another.
        other = (asked + 1 + int(rng.integers(max(self.num_pairs - 1, 1)))) % self.num_pairs
        step = 1 + int(rng.integers(len(SYMBOLS) - 1))
        verb, comma = self._between
        pairs = [self._stated(key, value) for key, value in zip(keys, values)]
        statements = [[one] for one in pairs] if self.spread else [pairs]
        overwritten = bool(overwrites < self.overwrite and (same_key < 0.5 or self.num_pairs == 1))
        if overwrites < self.overwrite:
            target = asked if overwritten else other
            values[target] = SYMBOLS[(SYMBOLS.index(values[target]) + step) % len(SYMBOLS)]
            statements.append([self._stated(keys[target], values[target])])
        others = [i for i in rng.permutation(self.num_pairs) if i != asked][: self.more_questions]
        question, start = [], "recall"
        for i in others:
            question += [f"{start} {keys[i]}{verb}", values[i]]
            start = comma
        question.append(f"{start} {keys[asked]}{verb}")
        return statements, question, values[asked], dict(overwritten=overwritten)
