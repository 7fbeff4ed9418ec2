"""Metrics of a model in the type that t5x accepts."""

from collections.abc import Mapping

import flax.struct
import jax
from clu.metrics import Metric

from famx.models.metrics import Mean


@flax.struct.dataclass
class T5xMean(Mean, Metric):
    """A `Mean` that is also a metric of clu, since t5x accepts no other."""


def as_t5x(metrics: Mapping[str, Mean]) -> dict[str, T5xMean]:
    """`metrics` in the type that t5x sums over microbatches and steps."""
    is_mean = lambda x: isinstance(x, Mean)
    return jax.tree.map(lambda m: T5xMean(m.total, m.count), dict(metrics), is_leaf=is_mean)
