"""Applying a decoder to parameters with adapters or int8 kernels."""

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from famx.lora.adapters import SCALE, Lora
from famx.modules.components import Projection
from famx.modules.products import product


def intercept(lora: Lora | float | None = None, rng=None):
    """Context manager in which projections use the adapters and int8 scales next to their kernels.

    Enter it inside the jitted function, since it takes effect when the function is traced. Projections
    without such leaves compute as usual.

    Args:
      lora: settings of the adapters, or the factor of `A B`; None: a factor of 1.
      rng: key of the dropout in `lora`; None: no dropout. Each layer and projection draws its own mask;
        all steps of the scans over blocks and chunks share it.
    """
    scale = lora.scale if isinstance(lora, Lora) else 1.0 if lora is None else lora
    rate = lora.dropout if isinstance(lora, Lora) and rng is not None else 0.0

    def project(call, args, kwargs, context):
        module = context.module
        if not isinstance(module, Projection) or context.method_name != "__call__":
            return call(*args, **kwargs)
        (x,), dtype, n = args, module.config.dtype, len(module.in_axes)
        quantized = module.has_variable("params", SCALE)
        y = _int8_projection(module, x) if quantized else call(x)
        if module.has_variable("params", "lora_a"):
            a, b = (module.get_variable("params", name) for name in ("lora_a", "lora_b"))
            if rate:
                x = _dropout(x, rate, _dropout_key(rng, module, x, a))
            low = scale * product(x.astype(dtype), a.astype(dtype), n)
            y = y + product(low, b.astype(dtype), 1)
        return y

    return nn.intercept_methods(project)


def _int8_projection(module: Projection, x):
    """Compute a `Projection` whose kernel is int8, with a scale per output channel."""
    dtype, n = module.config.dtype, len(module.in_axes)
    leaf = lambda name: module.get_variable("params", name)
    wide = jnp.promote_types(dtype, jnp.float32)
    y = product(x.astype(dtype), leaf("kernel").astype(dtype), n, wide)
    y = (y * leaf(SCALE)).astype(dtype)
    return y + leaf("bias").astype(dtype) if module.use_bias else y


def _dropout_key(rng, module, x, a):
    """Random key that depends on the projection, the shape of its input, and the layer.

    All layers share one trace, so the layer is told by data that differs between layers: the first
    element of its `A`.
    """
    place = f"{'/'.join(module.path)} {x.shape}"
    key = jax.random.fold_in(rng, zlib.crc32(place.encode()))
    first = jax.lax.stop_gradient(a).reshape(-1)[0].astype(jnp.float32)
    return jax.random.fold_in(key, jax.lax.bitcast_convert_type(first, jnp.uint32))


def _dropout(x, rate, key):
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
