"""AutoCompressor (arXiv 2305.14788): a Recurrent Memory Transformer whose summaries pile up.

Behind each block `N` learned rows climb the layers; their output at the top is the block's summary. The
summaries of all blocks stand before the next block, the oldest first.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from famx.base.ranges import NonNegative, Positive
from famx.base.values import checked
from famx.memories.learned_rows import Rows
from famx.memories.summaries import read_rows, rows_flops, write_rows
from famx.modules.memory import Memory


@checked
@dataclasses.dataclass(frozen=True)
class AutoCompressor(Memory):
    """Summaries of `length` vectors of each of the last `most` blocks, in the whole model.

    The memory is `{"rows": [B, most * N, D], "count": [B]}`: the newest summaries last, and the number of
    blocks that they are of. Every row sees only what stands before it, as in a decoder without changes.
    The paper keeps no window (`memory_segments=0`) and has no limit of the number of summaries: `most` is
    ours, and the oldest leave first. Its positions are the places in the concatenation, as in the
    authors' code for Llama.

    Attributes:
      length: `N`, vectors of a summary; the paper's best is 50.
      most: largest number of blocks whose summaries are kept.
      stop_after: gradients go through at most this number of summaries, then the pile is cut off from
        them, as in the paper; 0: they are never stopped.
    """

    kind: ClassVar[str] = "auto_compressor"
    through_depth: ClassVar[bool] = True
    masks_columns: ClassVar[bool] = True
    length: Positive = 50
    most: Positive = 20
    stop_after: NonNegative = 2

    @property
    def columns(self):
        return self.most * self.length

    def parameters(self, config):
        return Rows(config, self.length)

    # The four moments.

    def prompt(self, decoder):
        return decoder.memory()

    def start(self, layer, climb, here):
        rows = jnp.zeros((self.columns, climb.shape[-1]), climb.dtype)
        return climb, {"rows": rows, "count": jnp.zeros(())}

    def enter(self, decoder, memory):
        summary = decoder.memory()
        return memory, jnp.broadcast_to(summary, (memory["count"].shape[0], *summary.shape))

    def open(self, layer, climb, memory, here):
        rows, count = climb["rows"], climb["count"]
        known = self.length * jax.lax.stop_gradient(count)
        visible = jnp.arange(self.columns) >= self.columns - known[:, None]
        rows, opened = read_rows(layer, rows, here, visible, causal=True)
        return {"rows": rows, "count": count}, opened

    def close(self, layer, climb, memory, opened, block, here):
        return write_rows(layer, climb, opened, block, here, causal=True), memory

    def leave(self, decoder, climb, memory):
        summary = decoder.final_norm(climb).astype(memory["rows"].dtype)
        rows = jnp.concatenate([memory["rows"][:, self.length :], summary], axis=1)
        count = memory["count"] + 1
        if self.stop_after:
            cut = (count % self.stop_after == 0)[:, None, None]
            rows = jnp.where(cut, jax.lax.stop_gradient(rows), rows)
        return {"rows": rows, "count": count}

    # Information for the rest of the package.

    def axes(self):
        return {"rows": ("memory", "embed"), "count": ()}

    def figures(self, parameters, memory):
        seen = jnp.minimum(memory["count"], self.most) * self.length
        squares = jnp.sum(jnp.mean(jnp.square(memory["rows"]), axis=-1), axis=-1)
        return {"rms": jnp.mean(jnp.sqrt(squares / jnp.maximum(seen, 1)))}

    def flops(self, config, price, length, from_start):
        return rows_flops(price, length, config.block_size, self.columns, self.length), 0
