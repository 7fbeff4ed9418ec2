"""Kinds of tasks: the protocols that the rest of famx programs against, and `kind_of`.

A task needs no base class. It is one of these kinds by the attributes and methods that it has:

| kind | protocol | training reads | examples |
|---|---|---|---|
| `Kind.MADE` | `Made` | rows of any length, made by index | PassKey, the other probes, `flan_packed` |
| `Kind.DOCUMENTS` | `Documents` | documents, in lanes or packed rows | `TextFiles`, a list of arrays |
| `Kind.SCORED` | `Scored` | documents, as above | `TextTask`, `Mixture` |
| `Kind.SEQIO` | `SeqioTask` | rows of SeqIO's pipeline | SeqIO's tasks and mixtures |

A scored task can be trained on like any documents and also be evaluated: it has examples with
references, and metrics. A `Suite` is a group of scored tasks with a common score; it is not a task.

To write a task of your own, give a class the members of `Made` and register it, or describe a format
with `TextTask`; docs/tutorials/new_task.md does both.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from famx.base.errors import ConfigError
from famx.data.rows.documents import Documents
from famx.data.tasks.examples import Numbered
from famx.data.tasks.suites import Suite
from famx.data.vocabularies import Vocabulary

SPLITS = ("train", "eval")  # values of the field `split` of a task made by index


class Kind(enum.Enum):
    """Kinds of tasks; the module's docstring has a table."""

    MADE = "made by index"
    DOCUMENTS = "documents"
    SCORED = "scored documents"
    SEQIO = "a SeqIO task"


@runtime_checkable
class Made(Protocol):
    """Examples made by index, of any length that is at least `min_length`.

    An example is a pure function of its index, its length and the task's settings, so nothing is stored
    and any example can be made again. A task that is a dataclass with the fields `seed` and `split`
    ("train" or "eval") can also be evaluated: examples of the two splits must differ.
    """

    @property
    def vocab(self) -> Vocabulary:
        """The vocabulary of the tokens."""
        ...

    @property
    def min_length(self) -> int:
        """The shortest length into which every example fits."""
        ...

    def example(self, index: int, length: int) -> dict[str, Any]:
        """Example `index` with exactly `length` tokens.

        Returns:
          at least `tokens` int32 `[length]`, the targets, and `weights` float32 `[length]`, their loss
          weights; if an answer ends the row, also `answer_start`, its first position.
        """
        ...

    def batch(self, indices: Sequence[int], length: int) -> dict[str, np.ndarray]:
        """The examples `indices` as a batch; `famx.data.rows.decoder_batch` makes it of examples.

        Returns:
          `decoder_input_tokens` int32 `[B, L]`, the targets shifted by one with bos first,
          `decoder_target_tokens` int32 `[B, L]`, `decoder_loss_weights` float32 `[B, L]`, and
          optionally `answer_start` int32 `[B]`, with which training and evaluation report exact match.
        """
        ...


@runtime_checkable
class Scored(Documents, Protocol):
    """Documents that are examples with references, and metrics of the answers to them."""

    @property
    def name(self) -> str:
        """The name of the task."""
        ...

    @property
    def vocab(self) -> Vocabulary:
        """The vocabulary of the documents."""
        ...

    @property
    def tasks(self) -> tuple[Any, ...]:
        """The text tasks of a mixture; for a text task, the task itself."""
        ...

    def examples(self, split: str) -> Numbered[Mapping[str, Any]]:
        """The examples of a split; `famx.data.tasks.text_task` lists what an example has."""
        ...

    def evaluate(
        self, split: str, predictions: Sequence[Any], indices: Sequence[int] | None = None
    ) -> dict[str, float]:
        """Score one prediction for each of the examples `indices` (None: all); scores are 0..100."""
        ...

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Combine the scores of `tasks`, by name of the task, into one dict."""
        ...


@runtime_checkable
class SeqioTask(Protocol):
    """A task or mixture of SeqIO."""

    @property
    def name(self) -> str:
        """The name in SeqIO's registry."""
        ...

    @property
    def output_features(self) -> Mapping[str, Any]:
        """SeqIO's features, each with its vocabulary."""
        ...


_MADE = ("vocab", "min_length", "example", "batch")


def kind_of(task: Any) -> Kind:
    """Return the kind of a task, as `famx.data.get` makes it.

    Raises:
      ConfigError: the object is a suite, a task made by index that lacks a member of `Made`, or not a
        task at all.
    """
    if isinstance(task, Suite):
        names = ", ".join(member.name for member in task.tasks)
        raise ConfigError(f"'{task.name}' is a suite; choose one of its tasks: {names}.")
    if isinstance(task, Made):
        return Kind.MADE
    if hasattr(task, "batch"):
        missing = ", ".join(name for name in _MADE if not hasattr(task, name))
        raise ConfigError(
            f"{type(task).__name__} has a method batch, so its examples are made by index, but it lacks "
            f"{missing}; add all members of `famx.data.tasks.Made`."
        )
    if isinstance(task, Scored):
        return Kind.SCORED
    if isinstance(task, Documents):
        return Kind.DOCUMENTS
    if isinstance(task, SeqioTask):
        return Kind.SEQIO
    raise ConfigError(
        f"{type(task).__name__} is not a task: it has neither examples made by index "
        f"({', '.join(_MADE)}) nor documents (a length and items); see `famx.data.tasks.kinds`."
    )


def has_settings(task: Any, *names: str) -> bool:
    """True if a task is a dataclass with fields of these names, for `dataclasses.replace`."""
    fields = dataclasses.fields(task) if dataclasses.is_dataclass(task) else ()
    return set(names) <= {field.name for field in fields}


def vocabulary_of(task: Any) -> Vocabulary | None:
    """The vocabulary of a task or of documents; None for documents without one, and for SeqIO's."""
    return getattr(task, "vocab", None)
