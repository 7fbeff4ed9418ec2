"""Norms, projections and the feed-forward part of a Transformer layer."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from famx.modules.config import DecoderConfig
from famx.modules.weights import gathered

_EMBEDDING = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
_ACTIVATION = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
    "relu": nn.relu,
    "squared_relu": lambda x: jnp.square(nn.relu(x)),
}


def partitioned(init, *axes: str):
    """`init` with logical names for the axes of its result."""
    return nn.with_logical_partitioning(init, axes)


def embedding_init(*axes: str):
    """Initializer of embeddings: rows of expected norm 1, with logical axes."""
    return partitioned(_EMBEDDING, *axes)


def rms_normalize(x, epsilon: float):
    """RMS norm over the last axis without weights, computed in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(x.dtype)


class Norm(nn.Module):
    """RMS or layer norm over the last axis, statistics in float32, output in the compute dtype."""

    config: DecoderConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        layer_norm = c.norm == "layer" and self.axis == "embed"
        if layer_norm:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = rms_normalize(x, c.norm_epsilon)
        make = lambda name, init: self.param(
            name, partitioned(init, self.axis), x.shape[-1:], c.param_dtype
        )
        x = x * make("scale", nn.initializers.ones)
        if layer_norm:
            x = x + make("bias", nn.initializers.zeros)
        return x.astype(c.dtype)


def product(x, kernel, axes: int, **kwargs):
    """`tensordot` of the last `axes` axes of `x` with the first of `kernel`, as one of two matrices.

    With several token axes, the CPU compiler chooses a slow layout for the gradient.
    """
    inner, outer = kernel.shape[:axes], kernel.shape[axes:]
    rows = x.reshape(-1, math.prod(inner))
    y = jnp.matmul(rows, kernel.reshape(rows.shape[1], -1), **kwargs)
    return y.reshape(x.shape[: x.ndim - axes] + outer)


class Projection(nn.Module):
    """A linear map `[..., *in_axes] -> [..., *out_axes]` whose axes have logical names."""

    config: DecoderConfig
    features: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        c, n = self.config, len(self.in_axes)
        rank = n + len(self.features)
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=range(n), out_axis=range(n, rank)
        )
        shape = x.shape[-n:] + self.features
        kernel = self.param(
            "kernel", partitioned(init, *self.in_axes, *self.out_axes), shape, c.param_dtype
        )
        kernel = gathered(kernel.astype(c.dtype), (*self.in_axes, *self.out_axes), x.size)
        x = product(x.astype(c.dtype), kernel, n)
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, *self.out_axes)
            x = x + self.param("bias", zeros, self.features, c.param_dtype).astype(c.dtype)
        return x


class FeedForward(nn.Module):
    """`[..., D] -> [..., D]`, gated (`activation(x W_g) * x W_u`) or plain."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        up = lambda name: Projection(c, (c.mlp_dim,), ("embed",), ("mlp",), c.mlp_bias, name=name)(x)
        hidden = _ACTIVATION[c.activation](up("gate" if c.gated_mlp else "up"))
        if c.gated_mlp:
            hidden = hidden * up("up")
        return Projection(c, (c.embed_dim,), ("mlp",), ("embed",), c.mlp_bias, name="down")(hidden)
