"""Norms, projections and the feed-forward part of a Transformer layer."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from famx.modules.config import DecoderConfig
from famx.modules.products import product
from famx.modules.weights import gathered, one_device

_EMBEDDING = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
_PLAIN = ({"kernel"}, {"kernel", "bias"})  # leaves of a projection without adapters and scales
_ACTIVATION = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
    "relu": nn.relu,
    "squared_relu": lambda x: jnp.square(nn.relu(x)),
}

JOINT = "joint_kernel"  # leaf of the first of several projections: the kernels of all, side by side


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


def adapted(adapters, names: Sequence[str], x, ys) -> Sequence:
    """What the projections `names` make of `x`, `ys`, with what `adapters` add to it; None: nothing."""
    return ys if adapters is None else adapters(names, x, ys)


class Projection(nn.Module):
    """A linear map `[..., *in_axes] -> [..., *out_axes]` whose axes have logical names.

    Its kernel is drawn by its number of inputs, or is zero at first if `starts_at_zero`.
    """

    config: DecoderConfig
    features: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    use_bias: bool = False
    starts_at_zero: bool = False

    @nn.compact
    def __call__(self, x):
        c, n = self.config, len(self.in_axes)
        rank = n + len(self.features)
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=range(n), out_axis=range(n, rank)
        )
        init = nn.initializers.zeros if self.starts_at_zero else init
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

    def jointly(self, x, *others: "Projection") -> list:
        """What this projection and others make of the same array: by one product if that pays.

        It does with a `JOINT` kernel, which was made beforehand. Else it does if there are more rows than
        it takes to make that kernel, and if it is not so wide that to take the results apart costs more
        than to read the rows for each.
        """
        members, kernel = (self, *others), joint_kernel((self, *others))
        if kernel is not None:
            rows, columns = kernel.shape
            pays = kernel.size <= x.size and columns <= len(members) * rows
            if pays or self.has_variable("params", JOINT):
                return separate(product(x.astype(self.config.dtype), kernel, 1), members)
        return [p(x) for p in members]


def can_join(members: Sequence[Projection]) -> bool:
    """Whether projections of one array can be one product: plain ones, on one device.

    On a mesh the gradient of a joint kernel would be exchanged apart from those of its parts.
    """
    plain = lambda p: len(p.in_axes) == 1 and set(p.variables.get("params", ())) in _PLAIN
    return one_device() and all(map(plain, members))


def joint_kernel(members: Sequence[Projection]):
    """The kernel `[in, sum of out]` of projections of one array; None if they cannot be one product."""
    leaf = lambda p, name: nn.unbox(p.get_variable("params", name))
    if members[0].has_variable("params", JOINT):
        return leaf(members[0], JOINT)
    if can_join(members):
        return joint([leaf(p, "kernel") for p in members]).astype(members[0].config.dtype)
    return None


def joint(kernels):
    """Kernels `[in, *out]` next to each other, `[in, sum of out]`."""
    return jnp.concatenate([k.reshape(k.shape[0], -1) for k in kernels], axis=1)


def separate(y, members: Sequence[Projection]) -> list:
    """The results of projections, biases added, from those of their joint kernel without."""
    ends = np.cumsum([math.prod(p.features) for p in members])[:-1]
    parts = [
        part.reshape(*part.shape[:-1], *p.features)
        for part, p in zip(jnp.split(y, ends, axis=-1), members, strict=True)
    ]
    bias = lambda p: nn.unbox(p.get_variable("params", "bias")).astype(p.config.dtype)
    return [part + bias(p) if p.use_bias else part for part, p in zip(parts, members, strict=True)]


class FeedForward(nn.Module):
    """`[..., D] -> [..., D]`, gated (`activation(x W_g) * x W_u`) or plain."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, adapters=None):
        c = self.config
        up = lambda name: Projection(c, (c.mlp_dim,), ("embed",), ("mlp",), c.mlp_bias, name=name)
        if c.gated_mlp:
            both = up("gate").jointly(x, up("up"))
            gate, linear = adapted(adapters, ("gate", "up"), x, both)
            hidden = _ACTIVATION[c.activation](gate) * linear
        else:
            (linear,) = adapted(adapters, ("up",), x, [up("up")(x)])
            hidden = _ACTIVATION[c.activation](linear)
        down = Projection(c, (c.embed_dim,), ("mlp",), ("embed",), c.mlp_bias, name="down")
        return adapted(adapters, ("down",), hidden, [down(hidden)])[0]
