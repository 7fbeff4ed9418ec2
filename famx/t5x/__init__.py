"""Training, evaluation and inference of famx's models with t5x.

Needs t5x, which is on no package index; docs/t5x.md says how to get it. Gin files name what this package
exports.
"""

try:
    import t5x.trainer  # noqa: F401, a bare `t5x` may be any folder of that name
except ImportError as error:
    raise ImportError(
        f"famx.t5x needs t5x, airio and jestimator, and one of them cannot be imported ({error}):"
        " docs/t5x.md says how to get them."
    ) from error

from famx.t5x.data import get_dataset, latest_checkpoint, seqio_task
from famx.t5x.model import Initializer, T5xModel
from famx.t5x.optimizers import OptaxOptimizer, learning_rate_fn
from famx.t5x.partitioning import logical_axis_rules

__all__ = [
    "Initializer",
    "OptaxOptimizer",
    "T5xModel",
    "get_dataset",
    "latest_checkpoint",
    "learning_rate_fn",
    "logical_axis_rules",
    "seqio_task",
]
