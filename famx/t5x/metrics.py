"""Metrics of a model in the types that t5x accepts."""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from clu.metrics import Metric
from t5x import metrics as t5x_metrics

from famx.models.metrics import Mean


@flax.struct.dataclass
class T5xMean(Mean, Metric):
    """A `Mean` that is also a metric of clu, since t5x accepts no other."""


def as_t5x(metrics: Mapping[str, Mean], tokens: jax.Array) -> dict[str, Metric]:
    """`metrics` in the type that t5x sums over microbatches and steps, and the speed under t5x's names.

    Args:
      metrics: metrics of a batch.
      tokens: its tokens, `[B, L]`.
    """
    is_mean = lambda x: isinstance(x, Mean)
    means = jax.tree.map(lambda m: T5xMean(m.total, m.count), dict(metrics), is_leaf=is_mean)
    rows, size, devices = tokens.shape[0], tokens.size, jax.device_count()
    rates = {
        "seqs_per_second": rows,
        "seqs_per_second_per_core": rows / devices,
        "target_tokens_per_second": size,
        "target_tokens_per_second_per_core": size / devices,
    }
    rate = t5x_metrics.TimeRate.from_model_output
    return {
        **means,
        "timing/seconds": t5x_metrics.Time(),
        "timing/seqs": t5x_metrics.Sum.from_model_output(rows),
        "timing/steps_per_second": t5x_metrics.StepsPerTime.from_model_output(),
        **{f"timing/{name}": rate(jnp.float32(amount)) for name, amount in rates.items()},
    }
