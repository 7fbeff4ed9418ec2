"""Suites: text tasks that are scored together."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from famx.base.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks that are scored together, each on its `scored_split`.

    Attributes:
      name: name for messages.
      tasks: the text tasks.
      headlines: metric of a task that enters the average, by name of the task; "accuracy" by default.
    """

    name: str
    tasks: tuple[Any, ...]
    headlines: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def evaluate(
        self,
        predictions: Mapping[str, Sequence[Any]],
        indices: Mapping[str, Sequence[int]] | None = None,
    ) -> dict[str, float]:
        """Score the predictions of all tasks; returns what `summary` does.

        Args:
          predictions: the predictions for each task, by its name, as its `evaluate` takes them.
          indices: indices of the predicted examples, by name of the task; None: all.

        Raises:
          ConfigError, ValueError: as the tasks' `evaluate`, or the predictions of a task are missing.
        """
        for task in self.tasks:
            if task.name not in predictions:
                raise ConfigError(f"'{self.name}' got no predictions of '{task.name}'; give all.")
        scores = {}
        for task in self.tasks:
            chosen = None if indices is None else indices.get(task.name)
            scores[task.name] = task.evaluate(task.scored_split, predictions[task.name], chosen)
        return self.summary(scores)

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """`TASK/METRIC` of every task, and `average`, the mean of their headline metrics."""
        headlines = [scores[t.name][self.headlines.get(t.name, "accuracy")] for t in self.tasks]
        return named_scores(scores) | {"average": float(np.mean(headlines))}


def named_scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The scores of all tasks as `TASK/METRIC`."""
    return {
        f"{name}/{metric}": value
        for name, task_scores in scores.items()
        for metric, value in task_scores.items()
    }
