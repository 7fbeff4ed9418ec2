"""The PassKey task: a key stated once, long filler, and a question about the key at the very end.

A row is a pure function of `(seed, split, index)` and of its length: nothing is stored, any row
can be made again, and the key of an index is the same at every length. Layout, in tokens:

    header, filler, key statement, filler[, second key statement, filler], question, answer

With words and bytes the answer is the key's digits, a token each. With any other vocabulary it is the
tokens that it spells a space and the key with, since a prompt that ends in "is" ends in no space: as
many as there are, up to a token more than digits. `famx.data.probes.passkey_text` says how texts are
joined.

Training and evaluation must never share examples. So every random stream is seeded by
`(seed, split, index, stream)`: give evaluation `split="eval"`, and another seed as well. (With five
digits two streams still draw the same key now and then, as any two draws from 100 000 do.)
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from famx.data.metrics import digit_accuracy, exact_match
from famx.data.probes.passkey_text import PasskeyTexts, passkey_words
from famx.data.probes.placement import BlockPlaces
from famx.data.storage.text_files import as_vocabulary
from famx.data.vocabularies import WordVocabulary
from famx.data.vocabularies.base import Vocabulary

__all__ = ["PasskeyTask", "digit_accuracy", "exact_match"]

FILLERS = ("repeated", "random_words", "python_stdlib", "mixed")
SPLITS = ("train", "eval")
_KEY_STREAM, _LAYOUT_STREAM, _FILLER_STREAM = range(3)
_UNSET: Any = object()


@dataclasses.dataclass(frozen=True)
class PasskeyTask:
    """PassKey rows in the paper's format. See the module's docstring for the layout.

    Examples:
      >>> task = PasskeyTask(digits=2, header=False)
      >>> row = task.example(0, length=38)
      >>> task.vocab.decode(row["tokens"])  # doctest: +ELLIPSIS
      'The pass key is 86. Remember it. 86 is the pass key. The grass is green. ... The pass key is 86'
      >>> row["weights"][row["answer_start"] :].tolist()
      [1.0, 1.0]

    Attributes:
      vocabulary: "words" (fewer than 128 ids, every digit and word one token), "bytes", or any that
        `famx.data.storage.text_files.as_vocabulary` takes and that has a bos_id.
      digits: number of digits of a key; the first may be 0.
      filler: "repeated" (the paper's sentence again and again), "random_words", "python_stdlib"
        (Python's documentation, from a random place; not in words; the only filler with digits), or
        "mixed": one of the first two, drawn per example.
      depth: fraction of the filler before the first key statement; None draws it per example.
      second_key: probability of a second, different key; the answer is then that last key.
      second_key_depth: place of the second statement as a fraction of the filler that remains after
        the first; None draws it per example.
      second_key_recent: draw the second statement's distance from the question uniformly in its
        logarithm, so that long rows have recent second keys as often as old ones; needs
        `second_key_depth=None`.
      header: whether the long opening sentences are there. Without them, a row of neither words nor
        bytes begins with a space.
      block_size: if given, every key statement is moved to the nearest place where it lies within
        one block of so many tokens, both as targets and as inputs (one position later). Question
        and answer are the last tokens: they lie within one block if the length is a multiple of it.
      mention_weight: loss weight of the second mention of a key in its statement.
      answer_weight: loss weight of the answer. All other tokens weigh 0.
      seed: seed of all examples, at least 0.
      split: "train" or "eval"; examples of the two are drawn from disjoint random streams.

    Raises:
      ValueError: on construction, with a sentence, if a value makes no sense.
    """

    vocabulary: str | Vocabulary = "words"
    digits: int = 5
    filler: str = "repeated"
    depth: float | None = 0.0
    second_key: float = 0.0
    second_key_depth: float | None = None
    second_key_recent: bool = False
    header: bool = True
    block_size: int | None = None
    mention_weight: float = 0.5
    answer_weight: float = 1.0
    seed: int = 0
    split: str = "train"

    def __post_init__(self):
        for name, known in (("filler", FILLERS), ("split", SPLITS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"PassKey's {name} is '{getattr(self, name)}'; "
                    f"choose one of {', '.join(known)}."
                )
        if self.filler == "python_stdlib" and isinstance(self.vocab, WordVocabulary):
            raise ValueError(
                "PassKey's filler 'python_stdlib' is real text, which the word vocabulary cannot "
                "spell; set vocabulary to 'bytes', or to a tokenizer's."
            )
        if self.vocab.bos_id is None:
            raise ValueError(
                "PassKey's vocabulary has no bos_id, with which the inputs of every row begin; open it "
                "with one, such as its eos_id."
            )
        if self.digits < 1:
            raise ValueError(f"A pass key needs at least 1 digit, but digits is {self.digits}.")
        _check_fraction("depth", self.depth, optional=True)
        _check_fraction("second_key", self.second_key, optional=False)
        _check_fraction("second_key_depth", self.second_key_depth, optional=True)
        if self.second_key_recent and self.second_key_depth is not None:
            raise ValueError("PassKey's second_key_recent draws the place; leave second_key_depth None.")
        if self.mention_weight < 0 or self.answer_weight < 0:
            raise ValueError("PassKey's mention_weight and answer_weight must not be negative.")
        if self.seed < 0:
            raise ValueError(f"PassKey's seed must be at least 0, but it is {self.seed}.")
        room = self._texts.statement_width + 1
        if self.block_size is not None and self.block_size < room:
            raise ValueError(
                f"A key statement of {self.digits} digits takes {room} positions and does not fit "
                f"into a block of {self.block_size}; use a block_size of at least {room}, or None."
            )

    @functools.cached_property
    def vocab(self) -> Vocabulary:
        """The vocabulary object of the rows."""
        return as_vocabulary(self.vocabulary, words=passkey_words)

    @property
    def answer_width(self) -> int:
        """Number of tokens that hold every answer."""
        return self._texts.key_width

    def overhead(self, second_key: bool) -> int:
        """Number of tokens of a row that are not filler, with or without a second key, at most."""
        statements = (2 if second_key else 1) * self._texts.statement_width
        return len(self._header) + statements + self._asked_width

    @property
    def min_length(self) -> int:
        """The shortest row that holds every example that the task may draw."""
        return self._min_length(self.second_key > 0)

    def example(
        self, index: int, length: int, second_key: bool | None = None, depth: float | None = _UNSET
    ) -> dict[str, Any]:
        """Row `index` at `length` tokens.

        Args:
          index: which example, at least 0.
          length: exact number of tokens of the row.
          second_key: whether there is a second key; None draws it with the task's probability.
          depth: place of the first statement, in place of the task's own `depth`.

        Returns:
          tokens int32 [length] (targets), weights float32 [length], answer int32 [n] (ids),
          answer_start int, key_positions list of int (starts of the statements), filler_tokens int,
          references list of str (the key that is asked for).

        Raises:
          ValueError: the row is too short for the task, or an argument is out of range.
        """
        if index < 0:
            raise ValueError(f"PassKey examples are numbered from 0, but index is {index}.")
        depth = self.depth if depth is _UNSET else depth
        _check_fraction("depth", depth, optional=True)
        # Every draw is made in every case, so that no option shifts the draws of another.
        draw = self._rng(index, _LAYOUT_STREAM).random(4)
        two = bool(draw[0] < self.second_key) if second_key is None else bool(second_key)
        kind = ("repeated", "random_words")[int(draw[1] < 0.5)]
        depth = draw[2] if depth is None else depth
        second_depth = draw[3] if self.second_key_depth is None else self.second_key_depth
        if self.second_key_recent:
            room = max(length - self.overhead(two), 1)
            second_depth = 1 - min(room ** draw[3] / room, 1.0)
        texts, keys = self._texts, self._keys(index)[: 2 if two else 1]
        encoded = [texts.key(key) for key in keys]
        statements = [texts.statement(key) for key in encoded]

        starts = self._place(length, two, depth, second_depth)
        tokens, weights = np.empty(length, np.int32), np.zeros(length, np.float32)
        answer_start = length - len(encoded[-1])
        ending = np.concatenate([texts.question, encoded[-1]])
        parts = [(0, self._header)]
        for start, (ids, mention) in zip(starts, statements):
            parts.append((start, ids))
            weights[start + mention.start : start + mention.stop] = self.mention_weight
        parts.append((length - len(ending), ending))
        weights[answer_start:] = self.answer_weight
        filler_tokens = length - sum(len(ids) for _, ids in parts)
        kind = kind if self.filler == "mixed" else self.filler
        rng = self._rng(index, _FILLER_STREAM)
        filler = texts.filler(rng, kind, filler_tokens, evaluation=self.split == "eval")
        end = used = 0
        for start, ids in parts:
            used = texts.fill(tokens[end:start], filler, used)
            end = start + len(ids)
            tokens[start:end] = ids
        return dict(
            tokens=tokens,
            weights=weights,
            answer=encoded[-1],
            answer_start=answer_start,
            key_positions=starts,
            filler_tokens=filler_tokens,
            references=[keys[-1]],
        )

    def batch(self, indices: Sequence[int], length: int, **example_kwargs) -> dict[str, np.ndarray]:
        """Rows `indices` as a batch for a decoder; keywords go to `example`.

        Returns:
          decoder_input_tokens int32 [B, L] (the targets one step later, bos in front),
          decoder_target_tokens int32 [B, L], decoder_loss_weights float32 [B, L],
          answer int32 [B, answer_width] (padded at its end) and answer_start int32 [B].
        """
        if not len(indices):
            raise ValueError("A PassKey batch needs at least one index.")
        rows = [self.example(int(i), length, **example_kwargs) for i in indices]
        targets = np.stack([row["tokens"] for row in rows])
        inputs = np.empty_like(targets)
        inputs[:, 0] = self.vocab.bos_id
        inputs[:, 1:] = targets[:, :-1]
        answer = np.full((len(rows), self.answer_width), self.vocab.pad_id, np.int32)
        for padded, row in zip(answer, rows):
            padded[: len(row["answer"])] = row["answer"]
        return dict(
            decoder_input_tokens=inputs,
            decoder_target_tokens=targets,
            decoder_loss_weights=np.stack([row["weights"] for row in rows]),
            answer=answer,
            answer_start=np.array([row["answer_start"] for row in rows], np.int32),
        )

    # Parts of a row.

    @functools.cached_property
    def _texts(self) -> PasskeyTexts:
        return PasskeyTexts(self.vocab, self.digits)

    @property
    def _header(self) -> np.ndarray:
        return self._texts.header if self.header else np.zeros(0, np.int32)

    @property
    def _asked_width(self) -> int:
        """Most tokens of question and answer."""
        return len(self._texts.question) + self._texts.key_width

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), index, stream])

    def _keys(self, index: int) -> list[str]:
        """Two different keys."""
        rng = self._rng(index, _KEY_STREAM)
        digits = [rng.integers(0, 10, self.digits), rng.integers(0, 10, self.digits)]
        while np.array_equal(digits[0], digits[1]):
            digits[1] = rng.integers(0, 10, self.digits)
        return ["".join(map(str, key.tolist())) for key in digits]

    @functools.cached_property
    def _blocks(self) -> BlockPlaces:
        # A statement's inputs stand one position after its targets: both must fit.
        return BlockPlaces(size=self._texts.statement_width + 1, block_size=self.block_size)

    def _min_length(self, two: bool) -> int:
        size = self._texts.statement_width
        end = self._blocks.later(len(self._header)) + size
        end = self._blocks.later(end) + size if two else end
        return end + self._asked_width

    def _place(self, length: int, two: bool, depth: float, second_depth: float) -> list[int]:
        """Starts of the one or two statements in a row of `length` tokens."""
        if length < self._min_length(two):
            raise ValueError(
                f"A PassKey row with {'two keys' if two else 'one key'} needs at least "
                f"{self._min_length(two)} tokens, but the length is {length}; "
                "make the rows longer, or set header to False."
            )
        size = self._texts.statement_width
        filler = length - self.overhead(two)
        low = self._blocks.later(len(self._header))
        last = self._blocks.earlier(length - self._asked_width - size)
        high = self._blocks.earlier(last - size) if two else last
        first = self._blocks.nearest(len(self._header) + round(depth * filler), low, high)
        if not two:
            return [first]
        remaining = filler - (first - len(self._header))
        wanted = first + size + round(second_depth * remaining)
        return [first, self._blocks.nearest(wanted, self._blocks.later(first + size), last)]


def _check_fraction(name: str, value: float | None, optional: bool) -> None:
    if value is None and optional:
        return
    if value is None or not 0 <= value <= 1:
        end = " or None" if optional else ""
        raise ValueError(f"PassKey's {name} is {value}; it must lie between 0 and 1{end}.")
