"""Optimisers: functions of gin settings that return an optax.GradientTransformation.

All clip the gradient's global norm first (`clip_norm`; None for no clipping) and decay only the weights
that `decay_mask` selects. `learning_rate` is a number or a schedule of famx.training.schedules.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import gin
import jax
import jax.numpy as jnp
import optax

_Rate: TypeAlias = float | optax.Schedule
_Mask = Callable[[Any], Any]

# Words in the paths of parameters that are no matrices of linear maps, and of the memory's parameters.
NOT_DECAYED = ("embed", "norm", "bias", "scale", "memory")


@gin.configurable
def decay_mask(params: Any, not_decayed: tuple[str, ...] = NOT_DECAYED) -> Any:
    """True for each leaf that is at least 2-D and whose path contains none of the words `not_decayed`.

    The words are needed because norms and biases, stacked over layers, are 2-D too.
    """

    def decays(path, leaf):
        parts = [str(getattr(key, "key", getattr(key, "name", ""))).lower() for key in path]
        named = any(word in part for part in parts for word in not_decayed)
        return leaf.ndim >= 2 and not named

    return jax.tree_util.tree_map_with_path(decays, params)


@gin.configurable
def adamw(
    learning_rate: _Rate,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    mask: _Mask = decay_mask,
) -> optax.GradientTransformation:
    """AdamW; the decay is multiplied by the learning rate."""
    adam = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    return _clipped(clip_norm, adam)


@gin.configurable
def adafactor(
    learning_rate: _Rate,
    beta1: float | None = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    min_dim_size_to_factor: int = 128,
    multiply_by_parameter_scale: bool = False,
    mask: _Mask = decay_mask,
) -> optax.GradientTransformation:
    """Adafactor with momentum `beta1` and second-moment decay `beta2`, as in the paper.

    The decay starts at 0 and grows as `1 - (step + 1) ** -0.8` up to `beta2`, which replaces a
    bias correction. Each parameter's update is clipped to a root mean square of 1.

    Second moments of matrices are stored as a row and a column (factored); those of vectors and of
    matrices narrower than `min_dim_size_to_factor` are stored in full. `multiply_by_parameter_scale`
    makes the learning rate relative to each parameter's size. The decay is multiplied by the learning
    rate.
    """
    parts = [
        optax.scale_by_factored_rms(
            decay_rate=beta2,
            min_dim_size_to_factor=min_dim_size_to_factor,
            decay_rate_fn=lambda step, rate: jnp.minimum(1.0 - (step + 1.0) ** -0.8, rate),
        ),
        optax.clip_by_block_rms(1.0),
    ]
    if multiply_by_parameter_scale:
        parts.append(optax.scale_by_param_block_rms())
    if beta1 is not None:
        parts.append(optax.ema(beta1, debias=False))
    parts.append(optax.add_decayed_weights(weight_decay, mask=mask))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    return _clipped(clip_norm, *parts)


@gin.configurable
def lion(
    learning_rate: _Rate,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    mask: _Mask = decay_mask,
) -> optax.GradientTransformation:
    """Lion: sign updates and one moment; needs a learning rate 3 to 10 times below AdamW's."""
    return _clipped(
        clip_norm, optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)
    )


def _clipped(clip_norm: float | None, *parts: optax.GradientTransformation):
    if clip_norm is not None:
        parts = (optax.clip_by_global_norm(clip_norm), *parts)
    return optax.chain(*parts)
