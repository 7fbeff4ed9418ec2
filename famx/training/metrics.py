"""Metrics of recent steps, which stay on the devices until the host needs them."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax

Sums = Mapping[str, Sequence[float]]  # name -> (total, count)


class RecentMetrics:
    """Metrics of the steps that are not yet logged or not yet observed by a curriculum.

    Args:
      saved: entries that `to_json` returned.
    """

    def __init__(self, saved: Sequence[Any] = ()):
        self._entries = {step: (blocks, sums) for step, blocks, sums in saved}

    def add(self, step: int, blocks: int | None, metrics: Any) -> None:
        """Adds the metrics that step `step` (counted from 0) returned, without waiting for them."""
        self._entries[step] = blocks, metrics

    def read(self, step: int) -> tuple[int | None, Sums] | None:
        """`(blocks, sums)` of a step, after waiting for it; None if there is no entry for it."""
        if step not in self._entries:
            return None
        blocks, metrics = self._entries[step]
        if not all(isinstance(value, list) for value in metrics.values()):
            read = jax.device_get(metrics)
            metrics = {name: [float(mean.total), float(mean.count)] for name, mean in read.items()}
            self._entries[step] = blocks, metrics
        return blocks, metrics

    def drop(self, before: int) -> None:
        """Forgets the steps before `before`."""
        for step in [step for step in self._entries if step < before]:
            del self._entries[step]

    def means(self, since: int) -> dict[str, float]:
        """Means over the steps from `since` on, of those metrics that had a weight in one of them.

        So there is no loss if none of the steps had a token to predict.
        """
        totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        for step in self._entries:
            if step >= since:
                for name, (total, count) in self.read(step)[1].items():
                    totals[name][0] += total
                    totals[name][1] += count
        return {name: total / count for name, (total, count) in totals.items() if count}

    def to_json(self) -> list[Any]:
        """All entries as JSON values; waits for their steps."""
        return [[step, *self.read(step)] for step in list(self._entries)]


def mean(sums: Sums, name: str) -> float:
    """Mean of a metric of one step; 0 if its weights sum to 0."""
    total, count = sums.get(name, (0.0, 0.0))
    return total / count if count else 0.0
