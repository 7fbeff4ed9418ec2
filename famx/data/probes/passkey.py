"""The PassKey task: a key stated once, long filler, and a question about the key at the very end.

Section 3.2 of TransformerFAM. Layout of a row, in tokens:

    header, filler, key statement, filler[, second key statement, filler], question, answer[, padding]

With words and bytes the answer is the digits of the key, one token each. With any other vocabulary it is
the tokens of a space and the key, because a prompt that ends in "is" does not end in a space; there are
at most as many as digits plus one. `famx.data.probes.passkey_text` explains how texts are joined.

The key of an index is the same at every length. Training and evaluation must never share examples, so
every random stream is seeded by `(seed, split, index, stream)`: give evaluation `split="eval"`, and
another seed as well. (With five digits two streams still draw the same key now and then, as any two draws
from 100 000 do.)
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import MinLen

from famx.base.ranges import Amount, Expected, OneOf, Positive, Share
from famx.base.values import checked
from famx.data.probes.passkey_text import PasskeyTexts, passkey_words
from famx.data.probes.placement import BlockPlaces
from famx.data.probes.probe import CONTENT, FILLER, PLACES, Probe
from famx.data.vocabularies import AnyVocabulary, Vocabulary, WordVocabulary, as_vocabulary

FILLERS = ("repeated", "random_words", "python_stdlib")
_OneFiller = Annotated[str, OneOf((*FILLERS, "mixed"))]
_SeveralFillers = Annotated[
    Sequence[Annotated[str, OneOf(FILLERS)]],
    MinLen(1),
    Expected(f"a tuple of {', '.join(FILLERS)}", inside=True),
]
_MIXED = ("random_words", "repeated")  # the filler "mixed"


@checked
@dataclasses.dataclass(frozen=True)
class PasskeyTask(Probe):
    """PassKey rows in the paper's format; the module's docstring has the layout.

    Examples:
      >>> task = PasskeyTask(digits=2, header=False)
      >>> row = task.example(0, length=38)
      >>> task.vocab.decode(row["tokens"])  # doctest: +ELLIPSIS
      'The pass key is 86. Remember it. 86 is the pass key. The grass is green. ... The pass key is 86'
      >>> row["weights"][row["answer_start"] :].tolist()
      [1.0, 1.0]

    Attributes:
      vocabulary: "words" (fewer than 128 ids, every digit and word one token), "bytes", or anything
        that `famx.data.vocabularies.as_vocabulary` takes and that has a bos_id.
      digits: number of digits of a key; the first may be 0.
      filler: "repeated" (the paper's sentences, repeated), "random_words", "python_stdlib" (Python's
        documentation, from a random place on; not in words; the only filler with digits), or "mixed":
        one of the first two, drawn for each example. Or a tuple of the first three, of which one is
        drawn for each example.
      depth: fraction of the filler before the first key statement; None draws it for each example.
      second_key: probability of a second, different key; the answer is then the second key.
      second_key_depth: place of the second statement as a fraction of the filler that remains after
        the first; None draws it for each example.
      second_key_recent: draw the second statement's distance from the question log-uniformly, so that
        long rows have recent second keys as often as old ones; needs `second_key_depth=None`.
      header: begin rows with the paper's opening sentences; or the probability of that, drawn for each
        example. Without them, a row in other vocabularies than words and bytes begins with a space.
      block_size: if given, every key statement is moved to the nearest place where it is within one
        block of this number of tokens, both as targets and as inputs (one position later). Question
        and answer are the last tokens: they are within one block if the length is a multiple of it and
        there is no `padding`.
      mention_weight: loss weight of the second mention of a key in its statement. The answer has
        `answer_weight`, and all other tokens `text_weight`.

    Raises:
      ValueError: on construction, a setting is invalid.
    """

    vocabulary: AnyVocabulary = "words"
    digits: Positive = 5
    filler: _OneFiller | _SeveralFillers = "repeated"
    depth: Share | None = 0.0
    second_key: Share = 0.0
    second_key_depth: Share | None = None
    second_key_recent: bool = False
    header: bool | Share = True
    block_size: Positive | None = None
    mention_weight: Amount = 0.5

    _too_short: ClassVar[str] = "make the rows longer, or set header to False"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.filler, str):  # lists come from gin
            object.__setattr__(self, "filler", tuple(self.filler))
        if "python_stdlib" in self._fillers and isinstance(self.vocab, WordVocabulary):
            raise ValueError(
                "PassKey's filler 'python_stdlib' is real text, which the word vocabulary cannot "
                "spell; set vocabulary to 'bytes', or to a tokenizer's."
            )
        if self.second_key_recent and self.second_key_depth is not None:
            raise ValueError("PassKey's second_key_recent draws the place; leave second_key_depth None.")
        room = self._texts.statement_width + 1
        if self.block_size is not None and self.block_size < room:
            raise ValueError(
                f"A key statement of {self.digits} digits takes {room} positions and does not fit "
                f"into a block of {self.block_size}; use a block_size of at least {room}, or None."
            )

    @functools.cached_property
    def vocab(self) -> Vocabulary:
        return as_vocabulary(self.vocabulary, words=passkey_words)

    @property
    def answer_width(self) -> int:
        return self._texts.key_width

    @property
    def min_length(self) -> int:
        size = self._texts.statement_width
        end = self._blocks.later(len(self._header(self.header > 0))) + size
        end = self._blocks.later(end) + size if self.second_key > 0 else end
        return end + self.asked_width

    @property
    def asked_width(self) -> int:
        """Largest number of tokens of question and answer."""
        return len(self._texts.question) + self._texts.key_width

    def at_depth(self, depth, length):
        """With a second key in every row, `depth` is its place, since it is the one that is asked for."""
        if self.second_key == 0:
            return dataclasses.replace(self, depth=depth)
        if self.second_key == 1:
            return dataclasses.replace(self, second_key_depth=depth, second_key_recent=False)
        raise ValueError(
            f"PassKey's second_key is {self.second_key}, so that now one key and now the other is asked "
            "for: set second_key to 0, where depth is that of the only key, or to 1, where it is the "
            "second's."
        )

    def overhead(self, second_key: bool, header: bool | None = None) -> int:
        """Largest number of tokens of a row that are not filler.

        Args:
          second_key: whether the row has a second key.
          header: whether it begins with the header; None: if any row does.
        """
        statements = (2 if second_key else 1) * self._texts.statement_width
        header = self.header > 0 if header is None else header
        return len(self._header(header)) + statements + self.asked_width

    def _row(self, index, length):
        # Every draw is made in every case, so that no option shifts the draws of another.
        draw = self._rng(index, PLACES).random(5)
        two, opened = bool(draw[0] < self.second_key), bool(draw[4] < self.header)
        kind = self._fillers[int(draw[1] * len(self._fillers))]
        starts = self._place(length, two, opened, draw)
        texts, keys = self._texts, self._keys(index)[: 2 if two else 1]
        encoded = [texts.key(key) for key in keys]

        weights = np.zeros(length, np.float32)
        parts = [(0, self._header(opened))]
        for start, key in zip(starts, encoded):
            ids, mention = texts.statement(key)
            parts.append((start, ids))
            weights[start + mention.start : start + mention.stop] = self.mention_weight
        ending = np.concatenate([texts.question, encoded[-1]])
        parts.append((length - len(ending), ending))
        filler_tokens = length - sum(len(ids) for _, ids in parts)
        rng = self._rng(index, FILLER)
        filler = texts.filler(rng, kind, filler_tokens, evaluation=self.split == "eval")
        tokens = np.empty(length, np.int32)
        end = used = 0
        for start, ids in parts:
            used = texts.fill(tokens[end:start], filler, used)
            end = start + len(ids)
            tokens[start:end] = ids
        return dict(
            tokens=tokens,
            weights=weights,
            answer_start=length - len(encoded[-1]),
            positions=starts,
            filler_tokens=filler_tokens,
            references=[keys[-1]],
        )

    # ------ Parts of a row

    @functools.cached_property
    def _texts(self) -> PasskeyTexts:
        return PasskeyTexts(self.vocab, self.digits)

    @property
    def _fillers(self) -> tuple[str, ...]:
        """The fillers that an example's is drawn from."""
        if isinstance(self.filler, str):
            return _MIXED if self.filler == "mixed" else (self.filler,)
        return tuple(self.filler)

    def _header(self, opened: bool) -> np.ndarray:
        """The opening sentences of a row that is `opened` by them, or nothing."""
        return self._texts.header if opened else np.zeros(0, np.int32)

    def _keys(self, index: int) -> list[str]:
        """Two different keys."""
        rng = self._rng(index, CONTENT)
        digits = [rng.integers(0, 10, self.digits), rng.integers(0, 10, self.digits)]
        while np.array_equal(digits[0], digits[1]):
            digits[1] = rng.integers(0, 10, self.digits)
        return ["".join(map(str, key.tolist())) for key in digits]

    @functools.cached_property
    def _blocks(self) -> BlockPlaces:
        # The inputs of a statement are one position after its targets: both must fit.
        return BlockPlaces(size=self._texts.statement_width + 1, block_size=self.block_size)

    def _place(self, length: int, two: bool, opened: bool, draw: np.ndarray) -> list[int]:
        """Starts of the one or two statements in a row of `length` tokens, `opened` by the header or not.

        Uniform draws 2 and 3 place the first and the second statement if no depth is set.
        """
        size, header = self._texts.statement_width, len(self._header(opened))
        filler = length - self.overhead(two, opened)
        depth = draw[2] if self.depth is None else self.depth
        low = self._blocks.later(header)
        last = self._blocks.earlier(length - self.asked_width - size)
        high = self._blocks.earlier(last - size) if two else last
        first = self._blocks.nearest(header + round(depth * filler), low, high)
        if not two:
            return [first]
        second_depth = draw[3] if self.second_key_depth is None else self.second_key_depth
        if self.second_key_recent:
            room = max(filler, 1)
            second_depth = 1 - min(room ** draw[3] / room, 1.0)
        remaining = filler - (first - header)
        second = first + size + round(second_depth * remaining)
        return [first, self._blocks.nearest(second, self._blocks.later(first + size), last)]
