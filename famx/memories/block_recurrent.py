"""Block-Recurrent Transformer (arXiv 2203.07852): a recurrent state in a chosen layer.

States `c [Ns, D]` and tokens attend to each other; tokens see the states as they were before the block.
States have projections of their own, and a gate in place of the residual connection; they have no
feed-forward part (`skip`, the paper's best).
"""

import dataclasses
from fractions import Fraction
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from famx.base.ranges import Indices, OneOf, Positive
from famx.base.values import checked
from famx.modules.attention.common import MASKED
from famx.modules.components import partitioned, rms_normalize
from famx.modules.memory import Memory, Opened

GATES = ("fixed", "lstm")
_PROJECTIONS = (
    "query_kernel", "cross_query_kernel", "key_kernel", "value_kernel", "token_query_kernel",
    "token_output_kernel",
)  # fmt: skip


@checked
@dataclasses.dataclass(frozen=True)
class BlockRecurrent(Memory):
    """States `[B, layers, Ns, D]` of the layers chosen, float32 at least.

    Before a block, with `h = norm(c) + id`, a token adds to its attention to the window that of a second
    query to keys and values of `h`; when the block is full, states attend to themselves and, by a second
    query, to the block and the `M` blocks before it. These attentions compare directions, times a learned
    factor of each head, and no positions. The attention of tokens to the window is the layer's own.

    As in the authors' code, `z = W u + b` without a function: "fixed" is `g c + (1 - g) z` with a learned
    `g`, "lstm" is `f c + i z` with `f` and `i` made of `u`, the attention of the states.

    All layers of a block are read before the next block, though only one layer would have to wait.

    Attributes:
      length: `Ns`; the paper has 512.
      layers: indices of the layers that have states; None: one, at the place of the paper's (the 10th of
        12). More gained nothing there.
      gate: "fixed" or "lstm".
    """

    kind: ClassVar[str] = "block_recurrent"
    through_depth: ClassVar[bool] = True
    sees_past: ClassVar[bool] = True
    length: Positive = 512
    layers: Indices | None = None
    gate: Annotated[str, OneOf(GATES)] = "fixed"

    def __post_init__(self):
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))  # lists come from gin and JSON

    def check(self, config):
        chosen = self.chosen(config)
        if max(chosen) >= config.num_layers or len(set(chosen)) < len(chosen):
            return (
                f"BlockRecurrent.layers {chosen} must be different layers of the model's, 0 to"
                f" {config.num_layers - 1}."
            )
        return None

    def chosen(self, config) -> tuple[int, ...]:
        """Indices of the layers that have states, of a config."""
        return self._chosen(config.num_layers)

    def _chosen(self, count):
        return (max(count * 5 // 6 - 1, 0),) if self.layers is None else self.layers

    def parameters(self, config):
        return _States(config, len(self.chosen(config)))

    def shared(self, decoder):
        # Projections are cast once, and not by every token.
        cast = lambda name, w: w.astype(decoder.config.dtype) if name in _PROJECTIONS else w
        return {name: cast(name, w) for name, w in decoder.memory().items()}

    def turns(self, radians):
        # Which of the states a layer has; -1: none.
        chosen, slots = self._chosen(len(radians)), np.full(len(radians), -1, np.int32)
        slots[list(chosen)] = np.arange(len(chosen))
        return slots

    # The four moments.

    def prompt(self, decoder):
        return decoder.memory()["states"]

    def start(self, layer, climb, here):
        return climb, climb

    def enter(self, decoder, memory):
        w, c = self.shared(decoder), decoder.config
        of_state = {name: w[name] for name in ("norm_scale", "ids")}
        h = _identified(jax.tree.map(lambda w: w.reshape(len(w), -1, c.embed_dim), of_state), memory, c)
        project = lambda name: jnp.einsum("bznd,zdkh->bznkh", h, w[name])
        return {"keys": _direction(project("key_kernel")), "values": project("value_kernel")}, memory

    def open(self, layer, climb, memory, here):
        slot = jnp.maximum(here.rotation.memory, 0)
        return climb, Opened(extra=jax.tree.map(lambda x: x[:, slot], climb))

    def beside(self, layer, tokens, here):
        c, slot = layer.config, here.rotation.memory

        def read(x, states):
            w = jax.tree.map(lambda w: w[slot], here.shared)
            query = _direction(jnp.einsum("...sd,dhk->...shk", x, w["token_query_kernel"]))
            attention = _attend(query, states["keys"], states["values"], w["token_scale"], c)
            return jnp.einsum(
                "...shk,hkd->...sd", attention.astype(c.dtype), w["token_output_kernel"]
            )

        none = lambda x, states: jnp.zeros(x.shape, c.dtype)
        return jax.lax.cond(slot >= 0, read, none, layer.attention_norm(tokens.input), tokens.extra)

    def close(self, layer, climb, memory, opened, block, here):
        slot, c = here.rotation.memory, layer.config
        own = layer.unrotate(block.keys, block.index, here)
        past = block.index[:, None] + jnp.arange(-c.memory_segments, 0)
        past = layer.unrotate(block.past[0], past, here)
        flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
        keys = _direction(jnp.concatenate([flat(past), own], axis=1))
        values = jnp.concatenate([flat(block.past[1]), block.values], axis=1)
        # A state sees all of the window, whatever the mask of tokens.
        exists = jnp.arange(-c.memory_segments, 1) >= -block.index[:, None]
        exists = jnp.repeat(exists, c.block_size, axis=1)

        def write(climb):
            w, state = jax.tree.map(lambda w: w[slot], here.shared), climb[:, slot]
            h = _identified(w, state, c)
            project = lambda name: _direction(jnp.einsum("bnd,dhk->bnhk", h, w[name]))
            own = opened.extra["keys"], opened.extra["values"]
            itself = _attend(project("query_kernel"), *own, w["state_scale"], c)
            query = project("cross_query_kernel")
            on_block = _attend(query, keys, values, w["block_scale"], c, exists)
            u = jnp.concatenate([itself, on_block], axis=-1)
            return climb.at[:, slot].set(self._gated(w, state, u).astype(climb.dtype))

        return jax.lax.cond(slot >= 0, write, lambda climb: climb, climb), memory

    def _gated(self, w, state, u):
        """The states after a block, from those before it and their attention `u [B, Ns, H, 2 Dh]`."""
        made = lambda of: jnp.einsum("bnhk,hkd->bnd", u, w[f"{of}_kernel"]) + w[f"{of}_bias"]
        if self.gate == "fixed":
            kept = nn.sigmoid(w["gate_bias"])
            return kept * state + (1 - kept) * made("output")
        # Biased to remember.
        return nn.sigmoid(made("forget") + 1) * state + nn.sigmoid(made("input") - 1) * made("output")

    # Information for the rest of the package.

    def axes(self):
        return (None, "memory", "embed")

    def flops(self, config, price, length, from_start):
        c, n, blocks = config, self.length, -(-length // config.block_size)
        both = price.project - price.keys_values  # a projection to all heads, and one from them
        tokens = length * (both + n * price.score)
        # States give keys and values before every block; every block but the last updates them.
        gates = 2 if self.gate == "lstm" else 0
        update = 2 * both + gates * both + (n + (c.memory_segments + 1) * c.block_size) * price.score
        in_layer = tokens + blocks * n * price.keys_values + (blocks - 1) * n * update
        return Fraction(in_layer * len(self.chosen(c)), c.num_layers), 0

    def figures(self, parameters, memory):
        return {"rms": jnp.sqrt(jnp.mean(jnp.square(memory)))}


class _States(nn.Module):
    """Parameters of the states and of what tokens read of them, float32 at least, layers first."""

    config: object
    count: int

    @nn.compact
    def __call__(self):
        c, init = self.config, nn.initializers
        n, d, heads, width = c.memory.length, c.embed_dim, c.num_heads, c.head_dim
        wide = jnp.promote_types(c.dtype, jnp.float32)

        def make(name, init, **axes):
            names = (None if axis == "joined" else axis for axis in axes)
            shape = (self.count, *axes.values())
            found = self.param(name, partitioned(init, None, *names), shape, c.param_dtype)
            return found.astype(wide)

        def kernel(name, inputs, scale=1.0, **axes):
            start = init.variance_scaling(
                scale, "fan_in", "truncated_normal", in_axis=range(1, 1 + inputs),
                out_axis=range(1 + inputs, 1 + len(axes)), batch_axis=(0,),
            )  # fmt: skip
            return {name: make(name, start, **axes)}

        to_heads = dict(embed=d, heads=heads, kv=width)
        to_kv_heads = dict(embed=d, kv_heads=c.num_kv_heads, kv=width)
        joint = dict(heads=heads, joined=2 * width, embed=d)  # of both attentions
        small = init.normal(0.1)
        found = {
            "states": make("states", small, memory=n, embed=d),
            "ids": make("ids", init.normal(1.0), memory=n, embed=d),
            "norm_scale": make("norm_scale", init.ones, embed=d),
            **kernel("query_kernel", 1, **to_heads), **kernel("cross_query_kernel", 1, **to_heads),
            **kernel("key_kernel", 1, **to_kv_heads), **kernel("value_kernel", 1, **to_kv_heads),
            **kernel("output_kernel", 2, **joint),
            "output_bias": make("output_bias", init.zeros, embed=d),
            **kernel("token_query_kernel", 1, **to_heads),
            # Half of a joint kernel of the token's two attentions.
            **kernel("token_output_kernel", 2, 0.5, heads=heads, kv=width, embed=d),
            **{name: make(name, init.ones, heads=heads)
               for name in ("state_scale", "block_scale", "token_scale")},
        }  # fmt: skip
        if c.memory.gate == "fixed":
            return found | {"gate_bias": make("gate_bias", small, embed=d)}
        for name in ("forget", "input"):
            found |= kernel(f"{name}_kernel", 2, 0.1, **joint)
            found[f"{name}_bias"] = make(f"{name}_bias", small, embed=d)
        return found


def _identified(w, state, config):
    """`norm(c) + id` of the states of a layer `[B, Ns, D]`, in the compute dtype."""
    h = rms_normalize(state, config.norm_epsilon) * w["norm_scale"] + w["ids"]
    return h.astype(config.dtype)


def _direction(x):
    """Queries or keys `[..., Dh]` of length 1."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(squares + 1e-6)).astype(x.dtype)


def _attend(query, keys, values, scale, config, mask=None):
    """Attention of directions in one softmax, float32 at least; no position plays a part.

    Args:
      query: `[..., Q, H, Dh]`.
      keys, values: `[..., X, K, Dh]`.
      scale: factor of the scores in each head `[H]`.
      config: the decoder's config, of which `K` is used.
      mask: which keys exist, bool `[..., X]`; None: all.

    Returns:
      `[..., Q, H, Dh]`.
    """
    by_group = lambda x, axis: x.reshape(*x.shape[:axis], config.num_kv_heads, -1, *x.shape[axis:][1:])
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query, scale = by_group(query, query.ndim - 2), by_group(scale, 0)[..., None, None]
    scores = jnp.einsum("...qkgd,...xkd->...kgqx", query, keys, preferred_element_type=wide) * scale
    if mask is not None:
        scores = jnp.where(mask[..., None, None, None, :], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("...kgqx,...xkd->...qkgd", weights, values.astype(wide))
    return out.reshape(*out.shape[:-3], -1, out.shape[-1])
