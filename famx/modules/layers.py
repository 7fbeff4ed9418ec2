"""Norms, projections and the feed-forward: the parts of a Transformer layer that know no memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from famx.modules.config import DecoderConfig

_KERNEL = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_EMBEDDING = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
_ACTIVATION = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
    "relu": nn.relu,
    "squared_relu": lambda x: jnp.square(nn.relu(x)),
}


def partitioned(init, *axes: str):
    """`init` with the logical names of the axes of what it makes."""
    return nn.with_logical_partitioning(init, axes)


def embedding_init(*axes: str):
    """Rows of unit norm in expectation, with logical axes."""
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


def projection(config: DecoderConfig, features, in_axes, out_axes, use_bias, name):
    """A linear map `[..., *in_axes] -> [..., *out_axes]` with logical axis names."""
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-len(in_axes), 0)),
        use_bias=use_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=partitioned(_KERNEL, *in_axes, *out_axes),
        bias_init=partitioned(nn.initializers.zeros, *out_axes),
        name=name,
    )


class FeedForward(nn.Module):
    """`[..., D] -> [..., D]`, gated (`activation(x W_g) * x W_u`) or plain."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        up = lambda name: projection(c, (c.mlp_dim,), ("embed",), ("mlp",), c.mlp_bias, name)(x)
        hidden = _ACTIVATION[c.activation](up("gate" if c.gated_mlp else "up"))
        if c.gated_mlp:
            hidden = hidden * up("up")
        return projection(c, (c.embed_dim,), ("mlp",), ("embed",), c.mlp_bias, "down")(hidden)
