"""Frozen kernels in int8: a quarter of float32's memory."""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from famx.lora.adapters import GROUPS, SCALE, inputs_end, select


def quantize(params, targets: Iterable[str] = tuple(GROUPS)) -> dict[str, Any]:
    """The tree with the kernels of `targets` in int8, to be applied under `intercept`.

    Each output channel of a layer has a float32 scale of its own, the leaf `kernel_scale [layers, *out]`
    beside the kernel, so that a weight is off by half its channel's scale at most; the largest of a
    channel becomes 127. Everything else, adapters too, stays as it is. Boxed leaves stay boxed.

    Args:
      params: the decoder's parameters; under `jax.eval_shape` ShapeDtypeStructs.
      targets: as in `Lora`. Kernels that are int8 already stay as they are.

    Raises:
      ConfigError: a target fits no projection.
    """
    flat = flatten_dict(params, sep="/")
    for path, boxed in select(params, targets).items():
        box = boxed if isinstance(boxed, nn.Partitioned) else None
        kernel, n = boxed if box is None else box.value, inputs_end(path)
        if kernel.dtype == jnp.int8:
            continue
        kernel = kernel.astype(jnp.float32)
        inputs = tuple(range(1, n))
        largest = jnp.max(jnp.abs(kernel), axis=inputs, keepdims=True)
        scale = jnp.where(largest > 0, largest / 127, 1.0)
        kernel = jnp.clip(jnp.round(kernel / scale), -127, 127).astype(jnp.int8)
        scale = jnp.squeeze(scale, inputs)
        if box is not None:
            kernel = box.replace(value=kernel)
            scale = box.replace(value=scale, names=(box.names[0], *box.names[n:]))
        flat[f"{path}/kernel"], flat[f"{path}/{SCALE}"] = kernel, scale
    return unflatten_dict(flat, sep="/")
