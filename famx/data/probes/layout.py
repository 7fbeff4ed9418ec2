"""What all generated probes share: rows that are a pure function of `(seed, split, index, length)`.

A probe hides something in a long row and asks for it at the end. Layout, in tokens:

    header, context of exactly the room that is left, question, answer

The answer is the last thing in the row and alone has a loss weight. The parts are encoded one by one,
so a prompt in text (`inputs`) is the decoded prompt ids. With bytes both are the same text; another
vocabulary may cut the text differently when it encodes it as a whole.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from famx.data.probes.haystacks import (
    Units,
    cyclic_end,
    insert,
    nearest_places,
    noise_units,
    real_text_units,
)
from famx.data.probes.passkey import SPLITS
from famx.data.storage.text_files import as_vocabulary, token_ids
from famx.data.vocabularies import ByteVocabulary, Vocabulary

CONTENT, PLACES, FILLER = range(3)  # random streams of an example


@dataclasses.dataclass(frozen=True)
class Probe:
    """Rows `example(index, length)` and batches of them; what is hidden is up to the subclass.

    Attributes:
      vocabulary: see `famx.data.storage.text_files.as_vocabulary`; it must have a bos_id.
      answer_weight: loss weight of the tokens of the answer. All other tokens weigh 0.
      seed: seed of all examples, at least 0.
      split: "train" or "eval"; examples of the two are drawn from disjoint random streams.

    Raises:
      ValueError: on construction, with a sentence, if a value makes no sense.
    """

    vocabulary: str | Vocabulary = "bytes"
    answer_weight: float = 1.0
    seed: int = 0
    split: str = "train"

    def __post_init__(self):
        if self.vocab.bos_id is None:
            raise ValueError(
                "The vocabulary has no bos_id, with which the inputs of every row begin; open it with "
                "one, such as its eos_id."
            )
        check_choice("split", self.split, SPLITS)
        if self.answer_weight < 0:
            raise ValueError(f"A probe's answer_weight is {self.answer_weight}; it must not be negative.")
        if self.seed < 0:
            raise ValueError(f"A probe's seed must be at least 0, but it is {self.seed}.")

    @functools.cached_property
    def vocab(self) -> Vocabulary:
        """The vocabulary object of the rows."""
        return as_vocabulary(self.vocabulary)

    @property
    def min_length(self) -> int:
        """The shortest row that holds every example that the probe may draw."""
        raise NotImplementedError

    @property
    def answer_width(self) -> int:
        """Number of tokens that hold every answer."""
        raise NotImplementedError

    def _row(self, index: int, length: int) -> dict[str, Any]:
        """tokens int32 [length], answer_start and positions of example `index`; more if there is more."""
        raise NotImplementedError

    def example(self, index: int, length: int) -> dict[str, Any]:
        """Row `index` at `length` tokens.

        Args:
          index: which example, at least 0.
          length: exact number of tokens of the row.

        Returns:
          tokens int32 [length] (targets), weights float32 [length], answer int32 [n] (ids of the
          answer, which ends the row), answer_start int, positions list of int (where each hidden part
          begins, in the order of the row), inputs str (the prompt), references list of str (what a
          right answer names). A subclass may add more.

        Raises:
          ValueError: the row is too short for the probe, or the index is negative.
        """
        row = self._weighted_row(index, length)
        return {**row, **_texts(self.vocab, row)}

    def _weighted_row(self, index: int, length: int) -> dict[str, Any]:
        """An example without its prompt in text, which batches do without."""
        if index < 0:
            raise ValueError(f"Probe examples are numbered from 0, but index is {index}.")
        if length < self.min_length:
            raise ValueError(
                f"A row of {type(self).__name__} needs at least {self.min_length} tokens, but the "
                f"length is {length}; make the rows longer."
            )
        row = self._row(index, length)
        answer_start = row["answer_start"]
        row["answer"] = row["tokens"][answer_start:]
        row["weights"] = np.zeros(length, np.float32)
        row["weights"][answer_start:] = self.answer_weight
        return row

    def batch(self, indices: Sequence[int], length: int) -> dict[str, np.ndarray]:
        """Rows `indices` as a batch for a decoder.

        Returns:
          decoder_input_tokens int32 [B, L] (the targets one step later, bos in front),
          decoder_target_tokens int32 [B, L], decoder_loss_weights float32 [B, L],
          answer int32 [B, answer_width] (padded at its end) and answer_start int32 [B].
        """
        if not len(indices):
            raise ValueError("A batch of probes needs at least one index.")
        rows = [self._weighted_row(int(i), length) for i in indices]
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

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), index, stream])

    def _encode(self, text: str) -> np.ndarray:
        """int32 [n] ids of `text`, every one of them known."""
        ids = token_ids(text, self.vocab)
        self._check_known(ids, text)
        return ids

    def _check_known(self, ids: Sequence[int], text: str) -> None:
        if self.vocab.unk_id is not None and self.vocab.unk_id in ids:
            raise ValueError(
                f"The vocabulary cannot spell '{text.strip()[:60]}', which {type(self).__name__} needs; "
                "leave it at its default, or give one that knows these words."
            )

    def _bound(self, text: str) -> int:
        """How many tokens a text no longer than `text` has at most."""
        size = len(text.encode("utf-8"))
        # A token stands for a byte or more, but for the space that some vocabularies put in front.
        return size if isinstance(self.vocab, ByteVocabulary) else size + 1


def text_form(probe: Any, index: int, length: int) -> dict[str, Any]:
    """`inputs` str and `references` list of str of an example of any probe, PassKey included."""
    return _texts(probe.vocab, probe.example(index, length))


def _texts(vocabulary: Vocabulary, row: dict[str, Any]) -> dict[str, Any]:
    inputs = vocabulary.decode(row["tokens"][: row["answer_start"]])
    references = row.get("references") or [vocabulary.decode(row["answer"])]
    return dict(inputs=inputs, references=references)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The texts of an example. The answer begins with the space that parts it from the question.

    Attributes:
      hidden: texts to insert, in the order of their depths.
      depths: for each, the fraction of the filler before it.
      context: for probes without filler, all that stands between header and question.
    """

    header: str
    question: str
    answer: str
    references: list[str]
    hidden: Sequence[str] = ()
    depths: Sequence[float] = ()
    context: str = ""


@dataclasses.dataclass(frozen=True)
class HaystackProbe(Probe):
    """Texts inserted between the sentences of a haystack, each at a depth of its own.

    The haystack is cut to fit at its beginning: it consists of whole sentences but for the first.

    Attributes:
      haystack: "noise" (one text on every line again and again) or "python_docs" (the documentation of
        the running Python's standard library, from a random sentence on; training reads the first four
        fifths of it and evaluation the rest).
    """

    haystack: str = "noise"

    HAYSTACKS: ClassVar[tuple[str, ...]] = ("noise", "python_docs")

    def __post_init__(self):
        super().__post_init__()
        check_choice("haystack", self.haystack, self.HAYSTACKS)

    def _parts(self, index: int) -> Parts:
        raise NotImplementedError

    def _widest(self) -> Parts:
        """Parts of which each is at least as long as in any example."""
        raise NotImplementedError

    @property
    def separator(self) -> str:
        """What stands before every text of the haystack, inserted or not."""
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
        """int32 [count] filler, and the sorted places between its sentences."""
        units = self._units(index, count)
        separator = self._encode(self.separator)
        end = 0
        if self.haystack == "python_docs":
            end = int(self._rng(index, FILLER).integers(units.starts.sum()))
        return cyclic_end(units, end, count, separator)

    def _units(self, index: int, count: int) -> Units:
        """The haystack's sentences, enough for `count` tokens or to be read round and round."""
        if self.haystack == "python_docs":
            return real_text_units(self.vocab, self.separator, self.split == "eval")
        return noise_units(self.vocab, self.separator)


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"A probe's {name} is '{value}'; choose one of {', '.join(known)}.")


def check_counts(**counts: int) -> None:
    """Raises ValueError unless every count is at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"A probe's {name} must be at least 1, but it is {count}.")


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless `value` lies between 0 and 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"A probe's {name} is {value}; it must lie between 0 and 1.")
