"""An optax transformation as t5x's optimizer, and t5x's Adafactor for famx's axes."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.core import freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from t5x import adafactor
from t5x.optimizers import OptaxStatePartitionRules, OptaxWrapper, OptimizerState

from famx.lora import combine
from famx.mesh import LOGICAL_AXES
from famx.training.trainable import Trainable


class OptaxOptimizer(OptaxWrapper):
    """An optax transformation of the trainable parameters.

    The others stay bit for bit and have no optimizer state, so that the optimizer state in checkpoints is
    that of `famx.train`. The transformation has its own learning rate: t5x's trainer only logs one.

    Args:
      optimizer: the transformation.
      trainable: which parameters are trained.
    """

    def __init__(self, optimizer: optax.GradientTransformation, trainable: Trainable = Trainable()):
        super().__init__(optimizer)
        self.trainable = trainable

    def init_state(self, params):
        """Optimizer state of the trainable parameters."""
        return super().init_state(self.part(params))

    def apply_gradient(self, hyper_params, params, state: OptimizerState, grads):
        """Updates the trainable parameters and returns the others unchanged."""
        part, grads = self.part(params), self.part(grads)
        part, state = super().apply_gradient(hyper_params, part, state, grads)
        return (part if self.trainable.name == "all" else freeze(combine(params, part))), state

    def derive_logical_axes(self, optimizer, param_logical_axes):
        """Logical axes of all parameters and of the optimizer state."""
        optimizer = optimizer.replace(target=self.part(optimizer.target))
        axes = super().derive_logical_axes(optimizer, self.part(param_logical_axes))
        return axes.replace(target=param_logical_axes)

    def part(self, tree: Any) -> Any:
        """The trainable part of a tree of parameters, or of another tree with the same paths."""
        if self.trainable.name == "all":
            return tree
        flat = flatten_dict(unfreeze(tree), sep="/")
        learns = {path: leaf for path, leaf in flat.items() if self.trainable.learns(path)}
        return freeze(unflatten_dict(learns, sep="/"))


def with_factor_rules(optimizer: Any) -> Any:
    """`optimizer`; t5x's Adafactor as a copy that knows how to factor each logical axis of famx.

    Its own rules win, then t5x's. Other axes are columns, as heads are in t5x. An Adafactor that is not
    factored, or that has a `factor_map`, is left as it is.
    """
    if not isinstance(optimizer, adafactor.Adafactor):
        return optimizer
    settings = optimizer.hyper_params
    if not settings.factored or (settings.factor_map and settings.logical_factor_rules is None):
        return optimizer
    ours = dict.fromkeys(LOGICAL_AXES, adafactor.FactorDim.COLUMN)
    rules = {**ours, **adafactor.standard_logical_factor_rules(), **(settings.logical_factor_rules or {})}
    optimizer = copy.copy(optimizer)
    optimizer.hyper_params = settings.replace(logical_factor_rules=freeze(rules))
    return optimizer


def learning_rate_fn(learning_rate: float | optax.Schedule) -> optax.Schedule:
    """The learning rate by step, for the log of t5x's trainer."""
    return learning_rate if callable(learning_rate) else lambda step: jnp.float32(learning_rate)


def _factored_axes(state: optax.FactoredState, params_axes) -> optax.FactoredState:
    """Logical axes of moments: the parameter's for unfactored ones, none for rows and columns."""

    def unfactored(axes, moment):
        if isinstance(moment, optax.MaskedNode):
            return moment
        return axes if moment.ndim == len(axes) else None

    def none(axes, moment):
        return moment if isinstance(moment, optax.MaskedNode) else None

    return optax.FactoredState(
        count=None,
        v_row=jax.tree.map(none, params_axes, state.v_row),
        v_col=jax.tree.map(none, params_axes, state.v_col),
        v=jax.tree.map(unfactored, params_axes, state.v),
    )


OptaxStatePartitionRules._RULES[optax.FactoredState] = _factored_axes
