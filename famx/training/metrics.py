"""Metrics of the last steps, on the devices until the host needs them."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax

Sums = Mapping[str, Sequence[float]]  # name -> (total, count)


class RecentMetrics:
    """Metrics of steps that are not logged yet, or not yet observed.

    Args:
      saved: what `to_json` gave.
    """

    def __init__(self, saved: Sequence[Any] = ()):
        self._entries = {step: (blocks, sums) for step, blocks, sums in saved}

    def add(self, step: int, blocks: int | None, metrics: Any) -> None:
        """Notes what step `step` (counted from 0) returned, without waiting for it."""
        self._entries[step] = blocks, metrics

    def read(self, step: int) -> tuple[int | None, Sums] | None:
        """`(blocks, sums)` of a step, once it is done; None if its metrics are not here."""
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
        """Means over the steps from `since` on."""
        totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        for step in self._entries:
            if step >= since:
                for name, (total, count) in self.read(step)[1].items():
                    totals[name][0] += total
                    totals[name][1] += count
        return {name: total / count if count else 0.0 for name, (total, count) in totals.items()}

    def to_json(self) -> list[Any]:
        """All of them, as JSON can hold them; waits for the steps."""
        return [[step, *self.read(step)] for step in list(self._entries)]


def mean(sums: Sums, name: str) -> float:
    """The mean of a metric of one step; 0 without any weight."""
    total, count = sums.get(name, (0.0, 0.0))
    return total / count if count else 0.0
