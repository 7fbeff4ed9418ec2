"""The base class of generated sequences: features at each position, and words or values to predict."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np

from famx.base.features import Feature
from famx.base.ranges import NonNegative, OneOf, Seed
from famx.base.values import checked
from famx.data.rows.batches import decoder_batch, draw_padding, padded
from famx.data.tasks.kinds import SPLITS
from famx.data.vocabularies import Vocabulary, WordVocabulary

DIGITS = tuple("0123456789")


@checked
@dataclasses.dataclass(frozen=True)
class SequenceTask:
    """A task made by index, whose positions hold features. For data of your own, subclass it.

    A subclass is a frozen dataclass with `features`, `words` (those of the answers), `min_length` and
    `row`. One that predicts numbers sets `value_width`, how many at each position.

    Attributes:
      seed: seed of all examples.
      split: "train" or "eval"; examples of the two are drawn from disjoint random streams.
      padding: largest number of positions of padding after the answer, as in
        `famx.data.probes.probe.Probe`.
    """

    seed: Seed = 0
    split: Annotated[str, OneOf(SPLITS)] = "train"
    padding: NonNegative = 0

    value_width: ClassVar[int] = 0
    words: ClassVar[tuple[str, ...]] = ()

    @property
    def features(self) -> tuple[Feature, ...]:
        """The features of a position, besides tokens; a subclass may set them as a class attribute."""
        return ()

    @functools.cached_property
    def vocab(self) -> Vocabulary:
        """The vocabulary of the answers, and of the words among the features."""
        return WordVocabulary(self.words)

    @property
    def min_length(self) -> int:
        """The shortest length into which every example fits."""
        raise NotImplementedError

    def row(self, rng: np.random.Generator, length: int) -> dict[str, Any]:
        """Makes an example of `length` positions with a random generator of its own.

        Returns:
          features dict: an array `[length, width]` of each feature, by name.
          answer list of str: the words to predict at the last positions, one at each; or, in its place,
          tokens int32 `[length]` and weights float32 `[length]`: what to predict at every position.
          values float32 `[length, value_width]`, value_weights float32 `[length]`: of a task with values.
        """
        raise NotImplementedError

    def example(self, index: int, length: int) -> dict[str, Any]:
        """Example `index` with exactly `length` positions: what `row` made, as `famx.data.rows` reads it.

        Raises:
          ValueError: the length is too short for the task, or the index is negative.
        """
        if index < 0:
            raise ValueError(f"Examples are numbered from 0, but index is {index}.")
        if length < self.min_length:
            raise ValueError(
                f"A sequence of {type(self).__name__} needs at least {self.min_length} positions, but the"
                f" length is {length}."
            )
        stream = [self.seed, SPLITS.index(self.split), index]
        padding = draw_padding(self.padding, length - self.min_length, [*stream, 1])
        length -= padding
        row = self.row(np.random.default_rng(stream), length)
        answer = row.pop("answer", ())
        row.setdefault("tokens", np.full(length, self.vocab.pad_id, np.int32))
        row.setdefault("weights", np.zeros(length, np.float32))
        if answer:
            row["answer_start"] = length - len(answer)
            row["tokens"][row["answer_start"] :] = self.vocab.encode(" ".join(answer))
            row["weights"][row["answer_start"] :] = 1
            row["references"] = [" ".join(answer)]
        return padded(row, padding, self.vocab.pad_id)

    def batch(self, indices: Sequence[int], length: int) -> dict[str, np.ndarray]:
        """The examples `indices` as a batch, see `famx.data.rows.decoder_batch`."""
        rows = [self.example(int(i), length) for i in indices]
        return decoder_batch(rows, self.vocab, None, self.features, self.value_width)


def mixed_row(
    content: Sequence[Mapping[str, np.ndarray]], vocabulary: Vocabulary, answer: int, name: str
) -> dict[str, Any]:
    """An example of words and vectors, which are read one position after they are predicted.

    Kind 0 is words, kind 1 vectors.

    Args:
      content: the parts of the sequence: `{"words": int32 [n]}` or `{"vectors": [n, width]}`.
      vocabulary: that of the words.
      answer: number of words at the end that are the answer.
      name: name of the vectors' feature.
    """
    count = lambda part: len(next(iter(part.values())))
    length = sum(map(count, content))
    width = next(part["vectors"].shape[1] for part in content if "vectors" in part)
    tokens = np.full(length, vocabulary.pad_id, np.int32)
    vectors, kinds = np.zeros((length, width), np.float32), np.zeros(length, np.int32)
    place = 0
    for part in content:
        end = place + count(part)
        if "words" in part:
            tokens[place:end] = part["words"]
        else:
            vectors[place:end], kinds[place:end] = part["vectors"], 1
        place = end
    weights = np.zeros(length, np.float32)
    weights[length - answer :] = 1
    read = lambda x: np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    return dict(
        tokens=tokens, weights=weights, answer_start=length - answer,
        features={name: read(vectors), "kinds": read(kinds)},
        references=[vocabulary.decode(tokens[length - answer :])],
    )  # fmt: skip
