"""The base class of generated probes: rows that are a pure function of `(seed, split, index, length)`.

A probe hides something in a long row and asks for it at the end. Layout, in tokens:

    header, context that fills the row, question, answer[, padding]

The parts are encoded one by one, so a row's prompt as text (`inputs`) is the decoded prompt ids. With
bytes both are the same text; another vocabulary may split the text differently when it encodes it as a
whole. `prompt` is the example as its benchmark publishes it, a text without any part that is cut, for
answers that a model writes; `score` is the benchmark's metric of these.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np

from famx.base.ranges import Amount, NonNegative, OneOf, Seed
from famx.base.values import checked
from famx.data.metrics import string_match_all
from famx.data.rows import decoder_batch, draw_padding, padded
from famx.data.tasks.kinds import SPLITS
from famx.data.vocabularies import AnyVocabulary, ByteVocabulary, Vocabulary, as_vocabulary, token_ids

# Random streams of an example: what is hidden, where, in what, and how much padding follows the answer.
CONTENT, PLACES, FILLER, PADDING = range(4)


@checked
@dataclasses.dataclass(frozen=True)
class Probe:
    """A task made by index; subclasses define what is hidden.

    Attributes:
      vocabulary: see `famx.data.vocabularies.as_vocabulary`; it must have a bos_id.
      answer_weight: loss weight of the tokens of the answer.
      text_weight: loss weight of all other tokens, unless a subclass gives some of them a larger one.
        Above 0, a pretrained model also trains on such texts while it learns the task.
      padding: largest number of padding tokens after the answer, without loss; their number is drawn
        for each example from 0 to this, or to what the row has room for. Without it every answer is at
        the end of a block if rows are whole blocks, and a model may then learn to answer nowhere else;
        with the block size less one the answer is at any place of a block.
      seed: seed of all examples, at least 0.
      split: "train" or "eval"; examples of the two are drawn from disjoint random streams.

    Raises:
      ValueError: on construction, a setting is invalid.
    """

    vocabulary: AnyVocabulary = "bytes"
    answer_weight: Amount = 1.0
    text_weight: Amount = 0.0
    padding: NonNegative = 0
    seed: Seed = 0
    split: Annotated[str, OneOf(SPLITS)] = "train"

    written_tokens: ClassVar[int] = 128  # number of tokens that an answer may have, as in RULER
    _too_short: ClassVar[str] = "make the rows longer"  # the advice if a row is too short

    def __post_init__(self):
        if self.vocab.bos_id is None:
            raise ValueError(
                "The vocabulary has no bos_id, with which the inputs of every row begin; open it with "
                "one, such as its eos_id."
            )
        if self.seed < 0:
            raise ValueError(f"A probe's seed must be at least 0, but it is {self.seed}.")

    @functools.cached_property
    def vocab(self) -> Vocabulary:
        """The vocabulary object of the rows."""
        return as_vocabulary(self.vocabulary)

    @property
    def min_length(self) -> int:
        """The shortest row into which every example of the probe fits."""
        raise NotImplementedError

    @property
    def answer_width(self) -> int:
        """Number of tokens into which every answer fits."""
        raise NotImplementedError

    def _row(self, index: int, length: int) -> dict[str, Any]:
        """Make example `index`: `tokens`, `answer_start`, `positions`, `references`, optionally more.

        Loss weights of other tokens than the answer's are given as `weights` float32 `[length]`.
        """
        raise NotImplementedError

    def _room(self, length: int) -> int:
        """Largest number of tokens of a row that may be padding."""
        return length - self.min_length

    def example(self, index: int, length: int) -> dict[str, Any]:
        """Make row `index` with `length` tokens.

        Args:
          index: number of the example, at least 0.
          length: exact number of tokens of the row.

        Returns:
          tokens int32 `[length]`: the targets.
          weights float32 `[length]`: their loss weights.
          answer int32 `[n]`: ids of the answer, which ends the row but for its padding.
          answer_start int: where it begins.
          positions list of int: where each hidden part begins, in the order of the row.
          inputs str: the prompt.
          references list of str: the strings that a right answer contains.
          A subclass may add more.

        Raises:
          ValueError: the row is too short for the probe, or the index is negative.
        """
        row = self._weighted_row(index, length)
        return {**row, "inputs": self.vocab.decode(row["tokens"][: row["answer_start"]])}

    def _weighted_row(self, index: int, length: int) -> dict[str, Any]:
        """An example without the prompt as text, which batches do not need."""
        check_index(index)
        if length < self.min_length:
            raise ValueError(
                f"A row of {type(self).__name__} needs at least {self.min_length} tokens, but the "
                f"length is {length}; {self._too_short}."
            )
        padding = draw_padding(self.padding, self._room(length), self._seed(index, PADDING))
        row = self._row(index, length - padding)
        answer_start = row["answer_start"]
        row["answer"] = row["tokens"][answer_start:]
        weights = row.setdefault("weights", np.zeros(length - padding, np.float32))
        weights[:answer_start] = np.maximum(weights[:answer_start], self.text_weight)
        weights[answer_start:] = self.answer_weight
        return padded(row, padding, self.vocab.pad_id)

    def prompt(self, index: int, length: int, room: int = 0) -> dict[str, Any]:
        """Make example `index` as text, whose answer is to be written.

        Unless a subclass has a published text, it is the row of `length` tokens without its answer.

        Args:
          index: number of the example, at least 0.
          length: largest number of tokens of bos, the text (encoded as a whole) and `room`.
          room: number of tokens that are kept free for the answer.

        Returns:
          inputs str: the prompt.
          references list of str: the strings that a right answer contains.
          A subclass may add more, which its `score` reads.

        Raises:
          ValueError: the length is too short for the probe, or the index is negative.
        """
        row = self.example(index, length)
        return {name: row[name] for name in ("inputs", "references")}

    def at_depth(self, depth: float, length: int) -> "Probe":
        """The probe with what the question asks for at one place of every row.

        Args:
          depth: the place, as a fraction of the context: 0 is its beginning, 1 its end.
          length: number of tokens of the rows.

        Raises:
          ValueError: the probe, with these settings, has no such place.
        """
        raise ValueError(
            f"{type(self).__name__} asks about its whole text, not about one place in it, so it has no "
            "depth; choose another probe."
        )

    def score(
        self, examples: Sequence[Mapping[str, Any]], predictions: Sequence[str]
    ) -> dict[str, float]:
        """The benchmark's metric of written answers to prompts, by its name, on a scale of 0 to 100.

        Unless a subclass says otherwise, RULER's `string_match_all`.
        """
        return string_match_all([example["references"] for example in examples], predictions)

    def batch(self, indices: Sequence[int], length: int) -> dict[str, np.ndarray]:
        """Make the rows `indices` as a batch for a decoder.

        Returns:
          decoder_input_tokens int32 `[B, L]`: the targets shifted by one, with bos first.
          decoder_target_tokens int32 `[B, L]`.
          decoder_loss_weights float32 `[B, L]`.
          answer int32 `[B, answer_width]`: padded at the end.
          answer_start int32 `[B]`.

        Raises:
          ValueError: there is no index, or as `example`.
        """
        rows = [self._weighted_row(int(i), length) for i in indices]
        return decoder_batch(rows, self.vocab, self.answer_width)

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng(self._seed(index, stream))

    def _seed(self, index: int, stream: int) -> list[int]:
        return [self.seed, SPLITS.index(self.split), index, stream]

    def _encode(self, text: str) -> np.ndarray:
        """Int32 `[n]` ids of `text`; raises ValueError if one of them is the unknown id."""
        ids = token_ids(text, self.vocab)
        self._check_known(ids, text)
        return ids

    def _check_known(self, ids: np.ndarray | Sequence[int], text: str) -> None:
        if self.vocab.unk_id is not None and self.vocab.unk_id in ids:
            raise ValueError(
                f"The vocabulary cannot spell '{text.strip()[:60]}', which {type(self).__name__} needs; "
                "leave it at its default, or give one that knows these words."
            )

    def _bound(self, text: str) -> int:
        """An upper bound on the number of tokens of a text that is not longer than `text`."""
        size = len(text.encode("utf-8"))
        # Every token spells at least a byte, except the space that some vocabularies put first.
        return size if isinstance(self.vocab, ByteVocabulary) else size + 1


@dataclasses.dataclass(frozen=True)
class Parts:
    """The texts of an example. The answer begins with what separates it from the question.

    Attributes:
      header, question, answer: see the module's docstring. Of a probe with a haystack, the header ends
        with the line break before the first sentence.
      references: the strings that a right answer contains.
      hidden: texts to insert, in the order of their depths.
      depths: for each of them, the fraction of the filler that precedes it.
      context: for probes without filler, everything between header and question.
    """

    header: str
    question: str
    answer: str
    references: list[str]
    hidden: Sequence[str] = ()
    depths: Sequence[float] = ()
    context: str = ""


def check_index(index: int) -> None:
    """Raise ValueError if the number of an example is negative."""
    if index < 0:
        raise ValueError(f"Probe examples are numbered from 0, but index is {index}.")
