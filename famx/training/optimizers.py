"""Optimisers: functions of gin settings that return an optax.GradientTransformation.

All clip the gradient's global norm first (`clip_norm`; None for no clipping) and decay only the weights
that `decay_mask` selects. `learning_rate` is a number or a schedule of famx.training.schedules.

`parts` names parts of the parameters that learn otherwise, in the words of `TRAINABLE`
(`famx.training.trainable`): `{"memory": Part(rate=10), "norms": Part(decay=0)}`. A parameter has the
settings of the first part that it is in.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias

import gin
import jax
import jax.numpy as jnp
import optax

from famx.base.describe import remembers
from famx.base.errors import ConfigError
from famx.base.ranges import Amount, Expected, Name, Positive, Rate, ShareBelowOne
from famx.base.values import checked
from famx.modules.memory import is_measured
from famx.training.trainable import in_part

_Rate: TypeAlias = Annotated[
    Rate | optax.Schedule, Expected("a number above 0, or a schedule such as @schedules.warmup_cosine()")
]
_Mask = Callable[[Any], Any]

# Words in the paths of parameters that are no matrices of linear maps, and of the memory's parameters.
NOT_DECAYED = ("embed", "norm", "bias", "scale", "memory")


@gin.configurable
@checked
@dataclasses.dataclass(frozen=True)
class Part:
    """What differs for a part of the parameters.

    Attributes:
      rate: factor of the learning rate; the decay is multiplied by it too, as it is by the rate.
      decay: weight decay of all its parameters, whatever the mask says; None: as for the others.
    """

    rate: Rate = 1.0
    decay: Amount | None = None


_Parts: TypeAlias = Mapping[Name, Part]
_NONE: _Parts = MappingProxyType({})


@gin.configurable
@checked
def decay_mask(params: Any, not_decayed: tuple[Name, ...] = NOT_DECAYED) -> Any:
    """True for each leaf that is at least 2-D and whose path contains none of the words `not_decayed`.

    The words are needed because norms and biases, stacked over layers, are 2-D too.
    """

    def decays(path, leaf):
        named = any(word in part.lower() for part in _names(path) for word in not_decayed)
        return leaf.ndim >= 2 and not named

    return jax.tree_util.tree_map_with_path(decays, params)


@gin.configurable
@checked
@remembers
def adamw(
    learning_rate: _Rate,
    b1: ShareBelowOne = 0.9,
    b2: ShareBelowOne = 0.99,
    eps: Rate = 1e-8,
    weight_decay: Amount = 0.0,
    clip_norm: Rate | None = 1.0,
    mask: _Mask = decay_mask,
    parts: _Parts = _NONE,
) -> optax.GradientTransformation:
    """AdamW; the decay is multiplied by the learning rate."""
    decay, rate = _decayed(weight_decay, mask, parts), _rated(learning_rate, parts)
    return _clipped(clip_norm, optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=eps), decay, *rate))


@gin.configurable
@checked
@remembers
def adafactor(
    learning_rate: _Rate,
    beta1: ShareBelowOne | None = 0.9,
    beta2: ShareBelowOne = 0.99,
    weight_decay: Amount = 0.0,
    clip_norm: Rate | None = 1.0,
    min_dim_size_to_factor: Positive = 128,
    multiply_by_parameter_scale: bool = False,
    mask: _Mask = decay_mask,
    parts: _Parts = _NONE,
) -> optax.GradientTransformation:
    """Adafactor with momentum `beta1` and second-moment decay `beta2`, as in the paper.

    The decay starts at 0 and grows as `1 - (step + 1) ** -0.8` up to `beta2`, which replaces a
    bias correction. Each parameter's update is clipped to a root mean square of 1.

    Second moments of matrices are stored as a row and a column (factored); those of vectors and of
    matrices narrower than `min_dim_size_to_factor` are stored in full. `multiply_by_parameter_scale`
    makes the learning rate relative to each parameter's size. The decay is multiplied by the learning
    rate.
    """
    steps = [
        optax.scale_by_factored_rms(
            decay_rate=beta2,
            min_dim_size_to_factor=min_dim_size_to_factor,
            decay_rate_fn=lambda step, rate: jnp.minimum(1.0 - (step + 1.0) ** -0.8, rate),
        ),
        optax.clip_by_block_rms(1.0),
    ]
    if multiply_by_parameter_scale:
        steps.append(optax.scale_by_param_block_rms())
    if beta1 is not None:
        steps.append(optax.ema(beta1, debias=False))
    steps += [_decayed(weight_decay, mask, parts), *_rated(learning_rate, parts)]
    return _clipped(clip_norm, *steps)


@gin.configurable
@checked
@remembers
def lion(
    learning_rate: _Rate,
    b1: ShareBelowOne = 0.9,
    b2: ShareBelowOne = 0.99,
    weight_decay: Amount = 0.0,
    clip_norm: Rate | None = 1.0,
    mask: _Mask = decay_mask,
    parts: _Parts = _NONE,
) -> optax.GradientTransformation:
    """Lion: sign updates and one moment; needs a learning rate 3 to 10 times below AdamW's."""
    decay, rate = _decayed(weight_decay, mask, parts), _rated(learning_rate, parts)
    return _clipped(clip_norm, optax.chain(optax.scale_by_lion(b1=b1, b2=b2), decay, *rate))


def _clipped(clip_norm: float | None, *steps: optax.GradientTransformation):
    if clip_norm is not None:
        steps = (optax.clip_by_global_norm(clip_norm), *steps)
    return optax.chain(*steps)


def _rated(learning_rate: _Rate, parts: _Parts) -> list[optax.GradientTransformation]:
    """Steps of the learning rate, in each part times its factor."""
    steps = [optax.scale_by_learning_rate(learning_rate)]
    if not parts:
        return steps

    def update(updates, state, params=None):
        def scaled(path, update):
            part = _part_of(path, parts)
            return update if part is None else update * jnp.asarray(part.rate, update.dtype)

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return [*steps, optax.GradientTransformation(lambda params: _check(params, parts), update)]


def _decayed(weight_decay: float, mask: _Mask, parts: _Parts) -> optax.GradientTransformation:
    """The weight decay, that of its part where one has a decay of its own."""
    own = any(part.decay is not None for part in parts.values())
    if not own:
        return optax.add_decayed_weights(weight_decay, mask=mask)

    def update(updates, state, params=None):
        def decayed(path, update, masked, leaf):
            part = _part_of(path, parts)
            rate = weight_decay if masked else 0.0
            rate = rate if part is None or part.decay is None else part.decay
            return update + rate * leaf if rate and not is_measured("/".join(_names(path))) else update

        masked = mask(params) if callable(mask) else mask
        return jax.tree_util.tree_map_with_path(decayed, updates, masked, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _check(params: Any, parts: _Parts) -> optax.EmptyState:
    """The state of a step without one; ConfigError if no parameter that learns is in one of the parts."""
    paths = ["/".join(_names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    # Without names it is optax, which makes a state of a placeholder to see what is of parameters in it.
    for name in parts if any(paths) else ():
        if not any(in_part(name, path) for path in paths):
            raise ConfigError(
                f"The optimiser's part {name!r} has no parameter that learns; these learn: "
                f"{', '.join(paths)}."
            )
    return optax.EmptyState()


def _part_of(path, parts: _Parts) -> Part | None:
    """The first part that a parameter is in, or None."""
    name = "/".join(_names(path))
    return next((parts[part] for part in parts if in_part(part, name)), None)


def _names(path) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
