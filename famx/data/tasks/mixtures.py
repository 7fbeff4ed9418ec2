"""Mixtures: several text tasks as one, each at its rate, in an order given by a seed."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from famx.base.errors import ConfigError
from famx.base.ranges import Name, Positive, Rate, Seed
from famx.base.values import checked
from famx.data.storage.records import where
from famx.data.tasks.examples import Example, Numbered
from famx.data.tasks.suites import named_scores
from famx.data.tasks.text_task import TextTask
from famx.data.vocabularies import Vocabulary


@checked
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Text tasks as one task, with the same `examples`, `documents` and `evaluate`.

    Without rates, every example of every task occurs once. With rates, the mixture is long enough
    that every example occurs; examples of tasks with a higher rate are repeated, in a new order for each
    pass over a task. Item `i` is the same in every process; lanes shuffle the items again.

    Args:
      name: name for messages.
      tasks: the tasks; their vocabulary and lengths are those of the mixture.
      rates: a positive rate for the name of each task, or a function from its number of examples to
        its rate, such as `lambda count: min(count, 3000)`; None: the number of examples.
      size: number of items of a split; None: the length described above.
      seed: seed of the order.
      split: the split to read when the mixture is used as documents.

    Raises:
      ConfigError: on construction, there is no task, two have the same name, their vocabularies
        differ, a setting is out of range, or the rates name other tasks.
    """

    name: Name
    tasks: tuple[TextTask, ...]
    rates: Mapping[Name, Rate] | Callable[[int], float] | None = None
    size: Positive | None = None
    seed: Seed = 0
    split: Name = "train"

    def __post_init__(self):
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"Mixture '{self.name}' needs tasks, each once, but has {names}.")
        if any(task.vocab != self.vocab for task in self.tasks):
            raise ConfigError(f"The tasks of mixture '{self.name}' must have the same vocabulary.")
        if isinstance(self.rates, Mapping):
            for name in names:
                if name not in self.rates:
                    raise ConfigError(f"Mixture '{self.name}' has no rate for '{name}'; give it one.")
            for name in self.rates:
                if name not in names:
                    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                    raise ConfigError(
                        f"Mixture '{self.name}' has a rate for '{name}', which is not one of its "
                        f"tasks; the nearest name is '{near}'."
                    )

    @property
    def vocab(self) -> Vocabulary:
        """The vocabulary object of all tasks."""
        return self.tasks[0].vocab

    def order(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Task, int32 `[n]`, and example, int64 `[n]`, of every item of a split.

        Raises:
          ConfigError, ValueError: as `TextTask.examples`, or a rate is not positive.
        """
        counts = np.array([len(task.examples(split)) for task in self.tasks])
        rates = counts.astype(np.float64)
        if isinstance(self.rates, Mapping):
            rates = np.array([float(self.rates[task.name]) for task in self.tasks])
        elif self.rates is not None:
            rates = np.array([float(self.rates(int(count))) for count in counts])
        if not (np.isfinite(rates) & (rates > 0)).all():
            raise ConfigError(
                f"The rates of mixture '{self.name}' are {rates.tolist()}; each must be above 0. "
                "To leave out a task, remove it."
            )
        shares = rates / rates.sum()
        size = int(counts.sum()) if self.rates is None else int(np.ceil((counts / shares).max() - 1e-6))
        items = _apportion(self.size or size, shares)
        rng = np.random.default_rng(self.seed)
        tasks = rng.permutation(np.repeat(np.arange(len(counts), dtype=np.int32), items))
        examples = np.empty(len(tasks), np.int64)
        for k, (count, num_items) in enumerate(zip(counts, items)):
            passes = [rng.permutation(count) for _ in range(-(-num_items // count))]
            examples[tasks == k] = np.concatenate([*passes, np.zeros(0, np.int64)])[:num_items]
        return tasks, examples

    def examples(self, split: str) -> Numbered[Example]:
        """The examples of a split, in the order of the mixture."""
        return _Mixed([task.examples(split) for task in self.tasks], self.order(split))

    def documents(
        self,
        split: str,
        vocabulary: str | Vocabulary | None = None,
        max_tokens: int | None = None,
        cut: str | None = None,
    ) -> Numbered[tuple[np.ndarray, np.ndarray]]:
        """The examples of a split as documents; see `TextTask.documents`."""
        parts = [task.documents(split, vocabulary, max_tokens, cut) for task in self.tasks]
        return _Mixed(parts, self.order(split))

    def evaluate(
        self, split: str, predictions: Sequence[Any], indices: Sequence[int] | None = None
    ) -> dict[str, float]:
        """Score each task as `task/metric`, and average over all items as `metric`.

        Args:
          split: name of the split.
          predictions: one per item, of the type that the item's task takes.
          indices: indices of the predicted items; None: all, in order.

        Raises:
          ConfigError, ValueError: as `TextTask.evaluate`.
        """
        tasks, examples = self.order(split)
        indices = np.arange(len(tasks)) if indices is None else np.asarray(indices, np.int64)
        if len(predictions) != len(indices):
            raise ValueError(
                f"{len(predictions)} predictions were given for {len(indices)} items of the {split} "
                f"split of '{self.name}'; give one per item."
            )
        scores: dict[str, dict[str, float]] = {}
        sums: dict[str, np.ndarray] = {}  # metric -> (sum over items, items)
        for k, task in enumerate(self.tasks):
            items = np.flatnonzero(tasks[indices] == k)
            if not len(items):
                continue
            scores[task.name] = task.evaluate(
                split, [predictions[i] for i in items], examples[indices[items]])
            for metric, value in scores[task.name].items():
                sums[metric] = sums.get(metric, 0) + np.array([value * len(items), len(items)])
        if not scores:
            raise ValueError(f"No predictions of '{self.name}' were given; give at least one.")
        means = {metric: float(total / count) for metric, (total, count) in sums.items()}
        return named_scores(scores) | means

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """`task/metric` of every task, and the unweighted mean over the tasks as `metric`."""
        values: dict[str, list[float]] = {}
        for task_scores in scores.values():
            for metric, value in task_scores.items():
                values.setdefault(metric, []).append(value)
        return named_scores(scores) | {metric: float(np.mean(x)) for metric, x in values.items()}

    @functools.cached_property
    def _training_documents(self) -> Numbered[tuple[np.ndarray, np.ndarray]]:
        return self.documents(self.split)

    def __len__(self) -> int:
        return len(self._training_documents)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self._training_documents[i]

    def check(self, i: int) -> None:
        """Raises BadRecord if document `i` of the split cannot be used; makes no tokens."""
        self._training_documents.check(i)

    def where(self, i: int) -> str:
        """The place of document `i` of the split for a message."""
        return where(self._training_documents, i)


class _Mixed:
    """Items of several sequences in a given order."""

    def __init__(self, parts: Sequence[Any], order: tuple[np.ndarray, np.ndarray]):
        self.parts, self.order = parts, order

    def __len__(self) -> int:
        return len(self.order[0])

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(f"Item {i} is not one of {len(self)} items.")
        part, number = self._place(i)
        return part[number]

    def check(self, i: int) -> None:
        """Raises BadRecord if document `i` cannot be used; makes no tokens."""
        part, number = self._place(i)
        part.check(number)

    def where(self, i: int) -> str:
        """The place of item `i` for a message."""
        return where(*self._place(i))

    def _place(self, i: int) -> tuple[Any, int]:
        """The sequence with item `i`, and its number there."""
        return self.parts[self.order[0][i]], int(self.order[1][i])


def _apportion(size: int, shares: np.ndarray) -> np.ndarray:
    """Divide `size` into whole numbers in proportion to the shares (largest remainders)."""
    exact = size * shares
    numbers = np.floor(exact + 1e-9).astype(np.int64)
    largest = np.argsort(numbers - exact, kind="stable")[: size - numbers.sum()]
    numbers[largest] += 1
    return numbers
