"""An optax transformation as t5x's optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.core import freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from t5x.optimizers import OptaxStatePartitionRules, OptaxWrapper, OptimizerState

from famx.lora import combine
from famx.training.trainable import Trainable


class OptaxOptimizer(OptaxWrapper):
    """An optax transformation of the parameters that learn.

    The others stay bit for bit and have no state, so that checkpoints hold the optimizer's state as
    our engine's do. The learning rate is the transformation's own: t5x's trainer only logs one.

    Args:
      optimizer: the transformation.
      trainable: what learns.
    """

    def __init__(
        self, optimizer: optax.GradientTransformation, trainable: Trainable = Trainable()
    ):
        super().__init__(optimizer)
        self.trainable = trainable

    def init_state(self, params):
        """State of what learns alone."""
        return super().init_state(self.part(params))

    def apply_gradient(self, hyper_params, params, state: OptimizerState, grads):
        """Updates what learns and hands the rest on as it is."""
        part, grads = self.part(params), self.part(grads)
        part, state = super().apply_gradient(hyper_params, part, state, grads)
        return (part if self.trainable.name == "all" else freeze(combine(params, part))), state

    def derive_logical_axes(self, optimizer, param_logical_axes):
        """Logical axes of parameters and of the state of what learns."""
        optimizer = optimizer.replace(target=self.part(optimizer.target))
        axes = super().derive_logical_axes(optimizer, self.part(param_logical_axes))
        return axes.replace(target=param_logical_axes)

    def part(self, tree: Any) -> Any:
        """What learns of a tree of parameters, or of another tree with their names."""
        if self.trainable.name == "all":
            return tree
        flat = flatten_dict(unfreeze(tree), sep="/")
        learns = {path: leaf for path, leaf in flat.items() if self.trainable.learns(path)}
        return freeze(unflatten_dict(learns, sep="/"))


def learning_rate_fn(learning_rate: float | optax.Schedule) -> optax.Schedule:
    """What t5x's trainer logs as the learning rate: that of the transformation, by step."""
    return learning_rate if callable(learning_rate) else lambda step: jnp.float32(learning_rate)


def _factored_axes(state: optax.FactoredState, params_axes) -> optax.FactoredState:
    """Moments that are kept whole are cut as their parameter is; rows and columns are not cut."""

    def whole(axes, moment):
        if isinstance(moment, optax.MaskedNode):
            return moment
        return axes if moment.ndim == len(axes) else None

    def none(axes, moment):
        return moment if isinstance(moment, optax.MaskedNode) else None

    return optax.FactoredState(
        count=None,
        v_row=jax.tree.map(none, params_axes, state.v_row),
        v_col=jax.tree.map(none, params_axes, state.v_col),
        v=jax.tree.map(whole, params_axes, state.v),
    )


OptaxStatePartitionRules._RULES[optax.FactoredState] = _factored_axes
