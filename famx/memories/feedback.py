"""Feedback of whole blocks, FM: an ablation of TransformerFAM (arXiv 2404.09173, appendix C).

Past blocks are seen through the layer's own outputs: keys and values of block `t - 1` are made of its
outputs `O_{t-1}`, those of the block itself of its inputs, as always. So nothing is compressed, and yet
information passes from block to block without end.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from famx.base.ranges import Positive
from famx.base.values import checked
from famx.modules import rope
from famx.modules.attention import attend_parts
from famx.modules.memory import Memory, Opened


@checked
@dataclasses.dataclass(frozen=True)
class Feedback(Memory):
    """Outputs `[B, length, D]` of the last tokens of each layer, the newest last, at their positions.

    In the paper it takes the place of the window: set `memory_segments` to 0. The tokens of a block,
    which attend in parallel, are made once more when it is full, for their outputs. So reading
    costs about twice as much as with BSWA, and in a layer blocks wait for each other.

    Attributes:
      length: number of past tokens, a multiple of `block_size`; the paper's FM1 has one block, FM4 four.
    """

    kind: ClassVar[str] = "feedback"
    masks_columns: ClassVar[bool] = True  # tokens before the first one
    sees_past: ClassVar[bool] = True
    length: Positive = 1024

    @property
    def columns(self):
        return self.length

    def check(self, config):
        if self.length % config.block_size:
            return f"Feedback.length {self.length} must be a multiple of block_size {config.block_size}."
        return None

    def feature_shape(self, config):
        return (config.embed_dim,)

    @property
    def feature_axes(self):
        return ("embed",)

    # The four moments.

    def start(self, layer, climb, here):
        return climb, jnp.zeros((self.length, layer.config.embed_dim), layer.config.dtype)

    def open(self, layer, climb, memory, here):
        start = here.first_block * layer.config.block_size
        angle = layer.angles(start[:, None] + here.offset[:, None] + jnp.arange(-self.length, 0), here)
        visible = jnp.arange(-self.length, 0) >= -start[:, None]
        x = layer.attention_norm(memory)
        key, value = layer.key.jointly(x, layer.value)
        if layer.config.qk_norm:
            key = layer.key_norm(key)
        return climb, Opened(rope.rotate(key, angle), value, visible)

    def features(self, layer, x):
        return x.astype(layer.config.dtype)

    def close(self, layer, climb, memory, opened, block, here):
        # The block's tokens once more, for their outputs.
        c, x = layer.config, block.features
        query = layer.query(layer.attention_norm(x))
        if c.qk_norm:
            query = layer.query_norm(query)
        start = (block.index * c.block_size + here.offset)[:, None]
        query = rope.rotate(query, layer.angles(start + jnp.arange(c.block_size), here))
        past = (y.reshape(y.shape[0], -1, *y.shape[3:]) for y in block.past)
        slots = jnp.arange(c.block_size)
        causal = slots[:, None] >= slots
        if c.window_mask:
            causal &= slots[:, None] - slots <= c.memory_segments * c.block_size
        masks = opened.visible[:, None], layer.sees_past(block), causal[None]
        parts = (opened.keys, opened.values), past, (block.keys, block.values)
        attention, _ = attend_parts(
            query,
            [(*(y.swapaxes(1, 2) for y in part), mask[:, None, None])
             for part, mask in zip(parts, masks, strict=True)],
            c,
        )  # fmt: skip
        outputs = layer.finish(x, attention).astype(memory.dtype)
        return climb, jnp.concatenate([memory, outputs], axis=1)[:, c.block_size :]

    # Information for the rest of the package.

    def axes(self):
        return ("memory", "embed")

    def figures(self, parameters, memory):
        return {"rms": jnp.sqrt(jnp.mean(jnp.square(memory)))}

    def flops(self, config, price, length, from_start):
        size, blocks = config.block_size, -(-length // config.block_size)
        past = config.memory_segments * size
        # Every token sees all columns; keys and values are made of the past outputs before every block.
        read = length * self.length * price.score + blocks * self.length * price.keys_values
        # The tokens of every block but the last once more; their keys and values exist already.
        row = price.project - price.keys_values + price.feed_forward
        seen = size * (self.length + past) + size * (size + 1) // 2
        again = size * row + seen * price.score
        return read + (blocks - 1) * again, 0
