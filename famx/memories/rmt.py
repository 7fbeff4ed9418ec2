"""Recurrent Memory Transformer (arXiv 2207.06881).

One memory `m [N, D]` belongs to the whole model. Before a block it climbs the layers as `N` rows, whose
keys and values the tokens see; behind the block the same rows climb again and see all before them. Their
output at the top, after the model's final norm, is the memory of the next block.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from famx.base.ranges import Positive
from famx.base.values import checked
from famx.memories.learned_rows import Rows
from famx.memories.summaries import read_rows, rows_flops, write_rows
from famx.modules.memory import Memory


@checked
@dataclasses.dataclass(frozen=True)
class Rmt(Memory):
    """Memory of `length` vectors in the whole model. The paper keeps no window: `memory_segments=0`.

    What the paper leaves open, or its codes do differently from each other: the rows that are read see
    each other both ways, and so do those that are written (as in the paper; a later code has a causal
    mask); positions are the places in the order rows, block, rows; the memory has passed the final norm,
    as in the authors' code for GPT-2. With a window beside it, the rows do not see the past blocks.

    Attributes:
      length: `N`; the paper has 10 to 25, and more than 10 adds little.
    """

    kind: ClassVar[str] = "rmt"
    through_depth: ClassVar[bool] = True
    length: Positive = 10

    @property
    def columns(self):
        return self.length

    def parameters(self, config):
        return Rows(config, self.length)

    # The four moments.

    def prompt(self, decoder):
        return decoder.memory()

    def start(self, layer, climb, here):
        return climb, climb

    def open(self, layer, climb, memory, here):
        return read_rows(layer, climb, here)

    def close(self, layer, climb, memory, opened, block, here):
        return write_rows(layer, climb, opened, block, here), memory

    def leave(self, decoder, climb, memory):
        return decoder.final_norm(climb).astype(memory.dtype)

    # Information for the rest of the package.

    def axes(self):
        return ("memory", "embed")

    def figures(self, parameters, memory):
        return {"rms": jnp.sqrt(jnp.mean(jnp.square(memory)))}

    def flops(self, config, price, length, from_start):
        return rows_flops(price, length, config.block_size, self.length, self.length), 0
