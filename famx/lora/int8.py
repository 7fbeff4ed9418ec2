"""Frozen kernels in int8, which take a quarter of the memory of float32."""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from famx.lora.adapters import GROUPS, SCALE, inputs_end, select


def quantize(params, targets: Iterable[str] = tuple(GROUPS)) -> dict[str, Any]:
    """Quantize the kernels of `targets` to int8; apply the result under `intercept`.

    Each output channel of each layer has a float32 scale, the leaf `kernel_scale [layers, *out]` next to
    the kernel, which maps the channel's largest absolute weight to 127. The error of a weight is at most
    half its channel's scale. All other leaves stay as they are, including adapters and kernels that are
    int8 already. Boxed leaves stay boxed.

    Args:
      params: the decoder's parameters; may be ShapeDtypeStructs under `jax.eval_shape`.
      targets: as in `Lora`.

    Raises:
      ConfigError: a target matches no projection.
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
