"""A memory made at the top of the stack, as in the Recurrent Memory Transformer; for tests only."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from famx.modules.attention import attend
from famx.modules.components import partitioned, rms_normalize
from famx.modules.memory import Memory, Opened


@dataclasses.dataclass(frozen=True)
class Relay(Memory):
    """`length` rows that climb the layers before a block's tokens, and again when the block is full.

    Their output at the top after a block is the memory `[B, N, D]`. Residual connections let it grow from
    block to block, so it is normalised to RMS 1.
    """

    kind: ClassVar[str] = "relay"
    through_depth: ClassVar[bool] = True
    length: int = 2

    @property
    def columns(self):
        return self.length

    def parameters(self, config):
        return _Rows(config, self.length)

    def prompt(self, parameters, config):
        return parameters().astype(jnp.promote_types(config.dtype, jnp.float32))

    def start(self, layer, climb, here):
        return climb, climb

    def open(self, layer, climb, memory, here):
        q, k, v = layer.qkv(climb, self._angles(layer, here.first_block - 1, here))
        attention, _ = attend(q, k, v, None, layer.config)
        return layer.finish(climb, attention).astype(climb.dtype), Opened(k, v)

    def close(self, layer, climb, memory, opened, block, here):
        q, k, v = layer.qkv(climb, self._angles(layer, block.index, here))
        keys = jnp.concatenate([opened.keys, block.keys, k], axis=1)
        values = jnp.concatenate([opened.values, block.values, v], axis=1)
        attention, _ = attend(q, keys, values, None, layer.config)
        return layer.finish(climb, attention).astype(climb.dtype), memory

    def leave(self, parameters, climb, memory, config):
        return rms_normalize(climb, config.norm_epsilon)

    def axes(self):
        return ("memory", "embed")

    def figures(self, parameters, memory):
        return {"rms": jnp.sqrt(jnp.mean(jnp.square(memory)))}

    def _angles(self, layer, block, here):
        end = ((block + 1) * layer.config.block_size + here.offset)[:, None]
        return layer.angles(end - self.length + jnp.arange(self.length), here)


class _Rows(nn.Module):
    """The rows before the first block, `[N, D]`."""

    config: object
    length: int

    @nn.compact
    def __call__(self):
        c = self.config
        init = partitioned(nn.initializers.normal(1.0), "memory", "embed")
        return self.param("rows", init, (self.length, c.embed_dim), c.param_dtype)
