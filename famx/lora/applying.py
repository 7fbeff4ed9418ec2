"""Applying a decoder whose tree holds adapters or int8 kernels."""

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from famx.lora.adapters import SCALE, Lora
from famx.modules.components import Projection, product


def intercept(lora: Lora | float | None = None, rng=None):
    """A context in which projections use the adapters and the int8 scales beside their kernels.

    Enter it inside the function that is jitted: a program that was compiled without it stays as it
    is. Projections that have nothing beside their kernel compute as ever.

    Args:
      lora: what the adapters belong to, or the scale of `A B` itself; None: 1.
      rng: key of the dropout in `lora`; None: no dropout. Layers and projections drop different
        numbers; the steps of the scans over blocks and chunks drop the same ones.
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
                x = _dropout(x, rate, _own_key(rng, module, x, a))
            low = scale * product(x.astype(dtype), a.astype(dtype), n)
            y = y + product(low, b.astype(dtype), 1)
        return y

    return nn.intercept_methods(project)


def _int8_projection(module: Projection, x):
    """What `Projection` computes, its int8 kernel multiplied by the scale of each output."""
    dtype, n = module.config.dtype, len(module.in_axes)
    leaf = lambda name: module.get_variable("params", name)
    wide = jnp.promote_types(dtype, jnp.float32)
    y = product(x.astype(dtype), leaf("kernel").astype(dtype), n, preferred_element_type=wide)
    y = (y * leaf(SCALE)).astype(dtype)
    return y + leaf("bias").astype(dtype) if module.use_bias else y


def _own_key(rng, module, x, a):
    """A key of the projection, of the shape that it reads, and of the layer.

    Layers are traced once for all: what tells them apart is the first number of their own `A`.
    """
    where = f"{'/'.join(module.path)} {x.shape}"
    key = jax.random.fold_in(rng, zlib.crc32(where.encode()))
    first = jax.lax.stop_gradient(a).reshape(-1)[0].astype(jnp.float32)
    return jax.random.fold_in(key, jax.lax.bitcast_convert_type(first, jnp.uint32))


def _dropout(x, rate, key):
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
