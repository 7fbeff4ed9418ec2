"""Infini-attention: a linear-attention memory in every layer (arXiv 2404.07143).

Per key/value head a matrix `A [Dh, Dh]` and a normaliser `z [Dh]` hold the blocks that left the window.
With `s(x) = elu(x) + 1` of queries and keys before their rotation, a token reads `s(q) A / (s(q) z)`; a
learned gate per query head mixes it with the attention to the window.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from famx.base.ranges import Number
from famx.base.values import checked
from famx.modules import window
from famx.modules.components import partitioned
from famx.modules.layer import MASS
from famx.modules.memory import Memory, Opened


@checked
@dataclasses.dataclass(frozen=True)
class Infini(Memory):
    """Infini-attention inside block sliding window attention.

    A block is written when it leaves the window, so that no token is in the window and in the memory at
    once (the paper keeps no window: `memory_segments=0`). As long as nothing is written, tokens use only
    the attention to the window. The memory `{"matrix": [B, K, Dh, Dh], "normaliser": [B, K, Dh]}` is
    float32: sums over a long text overflow half precision.

    Attributes:
      delta: whether a block writes only the difference from what its keys recall (delta rule). Blocks
        are then written one after another; without it, all at once by a cumulative sum.
      gate_init: initial gate of every head; the memory's share is its sigmoid, and 0 is one half.
    """

    kind: ClassVar[str] = "infini"
    closes_oldest: ClassVar[bool] = True
    delta: bool = False
    gate_init: Number = 0.0

    @property
    def updates_in_order(self):
        return self.delta

    def layer_parameters(self, config):
        return _Gate(config, self.gate_init)

    # The four moments.

    def start(self, layer, climb, here):
        heads, width = layer.config.num_kv_heads, layer.config.head_dim
        zeros = lambda *shape: jnp.zeros((heads, *shape), _wide(layer.config))
        return climb, {"matrix": zeros(width, width), "normaliser": zeros(width)}

    def open(self, layer, climb, memory, here):
        return climb, Opened(extra=memory)

    def attend(self, layer, tokens, here):
        in_window, query = tokens.attend(tokens.query), tokens.plain_query
        by_key_head = (layer.config.num_kv_heads, -1)
        query = query.reshape(*query.shape[:-2], *by_key_head, query.shape[-1])
        recalled, written = _recall(query, tokens.extra)
        gate = layer.memory().astype(recalled.dtype).reshape(*by_key_head, 1)
        share = jnp.where(written, nn.sigmoid(gate), 0)
        layer.keep(MASS, "tokens_on_memory", lambda: jnp.mean(share[..., 0], axis=-3))
        mixed = share * recalled + (1 - share) * in_window.reshape(recalled.shape)
        return mixed.reshape(in_window.shape).astype(in_window.dtype)

    def close(self, layer, climb, memory, opened, block, here):
        return climb, jax.tree.map(jnp.add, memory, self._increment(layer, memory, block, here))

    def scan(self, layer, memory, blocks, here):
        if self.delta:
            return super().scan(layer, memory, blocks, here)
        steps = self._increment(layer, None, blocks, here)
        taken = window.taken(blocks.index, here, layer.config.block_size)
        memory, before = window.running_sum(memory, steps, taken)
        return memory, Opened(extra=before)

    def _increment(self, layer, memory, block, here):
        """What blocks `[B, ...]` add to the memory; only the delta rule needs the earlier memory."""
        keys, values = (x.astype(_wide(layer.config)) for x in (block.keys, block.values))
        keys = layer.unrotate(keys, block.index, here)
        if self.delta:
            recalled, _ = _recall(keys[..., None, :], memory)
            values = values - recalled[..., 0, :]
        keys = _feature(keys)
        matrix = jnp.einsum("...skd,...ske->...kde", keys, values)
        return {"matrix": matrix, "normaliser": jnp.sum(keys, axis=-3)}

    # Information for the rest of the package.

    def axes(self):
        return {"matrix": ("kv_heads", "kv", None), "normaliser": ("kv_heads", "kv")}

    def figures(self, parameters, memory):
        rms = jnp.sqrt(jnp.mean(jnp.square(memory["matrix"])))
        return {"rms": rms, "gate": jnp.mean(nn.sigmoid(parameters["gate"]))}

    def flops(self, config, price, length, from_start):
        group, width = config.num_heads // config.num_kv_heads, config.head_dim
        # From the start, nothing is written yet for tokens of the first M + 1 blocks, and the last block
        # that is written is the one that leaves the window before the last block.
        missing = config.memory_segments if from_start else 0
        read = max(length - (missing + 1) * config.block_size, 0) if from_start else length
        blocks = max(-(-length // config.block_size) - 1 - missing, 0)
        # A score and its share of a value are 2 Dh products in each query head; a row of `A` and `z`
        # Dh + 1 times Dh, and a written row Dh times Dh in each key head.
        recalled = read + self.delta * blocks * config.block_size / group
        written = blocks * config.block_size / group
        return round(price.score * (recalled * (width + 1) + written * width) / 2), 0


class _Gate(nn.Module):
    """The gate of each query head, `[H]`."""

    config: object
    initial: float

    @nn.compact
    def __call__(self):
        init = partitioned(nn.initializers.constant(self.initial), "heads")
        return self.param("gate", init, (self.config.num_heads,), self.config.param_dtype)


def _wide(config):
    """Dtype of the memory: float32 at least."""
    return jnp.promote_types(config.dtype, jnp.float32)


def _feature(x):
    """`s(x) = elu(x) + 1`, accurate near zero."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def _recall(x, memory):
    """What the memory recalls for queries or keys, and whether anything is written.

    Args:
      x: queries or keys before rotation `[..., S, K, G, Dh]`.
      memory: `matrix [..., K, Dh, Dh]` and `normaliser [..., K, Dh]`.

    Returns:
      `s(x) A / (s(x) z) [..., S, K, G, Dh]`, zero where nothing is written; bool `[..., S, K, G, 1]`.
    """
    x = _feature(x.astype(memory["matrix"].dtype))
    weighted = jnp.einsum("...skgd,...kde->...skge", x, memory["matrix"])
    total = jnp.einsum("...skgd,...kd->...skg", x, memory["normaliser"])[..., None]
    written = total > 0
    return jnp.where(written, weighted / jnp.where(written, total, 1), 0), written
