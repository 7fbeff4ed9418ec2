"""Trace of a token through the memory, back to block 0: products of attention.

Within a block this is attention rollout (Abnar and Zuidema, arXiv 2005.00928): the output of a layer is
taken as one half its input and one half what it attends to, mean over heads, layer upon layer. What this
puts on the memory is followed through the memory's updates, each layer's memory by itself: a memory token
after block `t` is made of the memory tokens before it and of the block's tokens, by its attention in the
update, and of what it was before. A key or value of a token counts as that token.

Attention is not causation: weights say what was looked at, not what changed the answer.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from famx.analysis.maps import AttentionMaps
from famx.analysis.records import BlockRecords


@dataclasses.dataclass(frozen=True)
class Trace:
    """Where a token or a memory token comes from, by products of attention; all weights add up to 1.

    Attributes:
      weights: weight of each token `[S]`, by the index of its block; blocks descend.
      start: weight that is left on the memory before the last of these blocks, `[layers, N]`: the
        memory that the model starts with, or one whose updates were not recorded.
    """

    weights: dict[int, np.ndarray]
    start: np.ndarray

    def strongest(self, maps: AttentionMaps, count: int = 8) -> list[tuple[int, int, str, float]]:
        """The tokens of largest weight, as `(block, slot, text, weight)`, strongest first."""
        places = [(b, slot, w) for b, row in self.weights.items() for slot, w in enumerate(row)]
        places.sort(key=lambda place: -place[2])
        ids = dict(zip(maps.records.blocks, maps.records.ids)) | {
            block - back: row
            for block, rows in zip(maps.blocks, maps.ids)
            for back, row in enumerate(rows.reshape(-1, maps.block_size)[::-1])
        }
        return [(b, slot, maps.text(ids[b][slot]), float(w)) for b, slot, w in places[:count]]


def trace(maps: AttentionMaps, block: int, slot: int) -> Trace:
    """Traces a token of a kept block.

    Raises:
      ValueError: the block was not kept, or the slot was not read.
    """
    i = maps.index(block=block)[0]
    first, end = maps.slots[i].tolist()
    if not first <= slot < end:
        raise ValueError(
            f"There is no token in slot {slot}: block {block} has slots {first} to {end - 1}."
        )
    size, segments = maps.block_size, maps.memory_segments
    row = maps.rollout[i, slot]
    cells = len(row) - (segments + 1) * size
    window = row[cells:].reshape(segments + 1, size)
    weights = {block - back: window[segments - back] for back in range(min(segments, block) + 1)}
    memory = row[:cells].reshape(-1, maps.memory_columns) if cells else np.zeros((1, 0), row.dtype)
    return _back(maps.records, block, memory, weights)


def trace_memory(records: BlockRecords, block: int, layer: int, number: int) -> Trace:
    """Traces memory token `number` of a layer, as `block` reads it; the first block's has no sources.

    Raises:
      ValueError: the memory does not attend, or there is no such layer or memory token.
    """
    layers, count = records.shares.shape[1:]
    if not (0 <= layer < layers and 0 <= number < count):
        raise ValueError(
            f"There is no memory token {number} of layer {layer} that can be traced: the memory has"
            f" {count} tokens that attend in {layers} layers."
        )
    memory = np.zeros((layers, count), records.shares.dtype)
    memory[layer, number] = 1
    return _back(records, block, memory, {})


def _back(records: BlockRecords, block: int, memory: np.ndarray, weights: dict[int, np.ndarray]) -> Trace:
    """Follows `memory` `[layers, N]`, weights of the memory that `block` reads, through its updates."""
    weights, count = dict(weights), records.shares.shape[2]
    while count and records.completed(block - 1):
        block -= 1
        i = records.blocks.index(block)
        attended = memory * records.shares[i]
        on_memory, on_block = np.split(records.updates[i], [count], axis=-1)
        written = np.einsum("ln,lns->s", attended, on_block)
        weights[block] = weights.get(block, 0) + written
        memory = memory - attended + np.einsum("ln,lnm->lm", attended, on_memory)
    return Trace(dict(sorted(weights.items(), reverse=True)), memory)


def rollout(maps, columns: int):
    """Attention rollout of one block.

    Args:
      maps: attention of the block's tokens in every layer, mean over heads, `[layers, S, N + M * S + S]`.
      columns: `N`.

    Returns:
      `[S, layers * N + M * S + S]`: weights of the memory's tokens of every layer, of the past blocks'
      tokens and of the block's own, for the output of each token; rows add up to 1 if those of `maps` do.
    """
    layers, size, width = maps.shape
    past = width - columns - size

    def step(weights, layer):
        index, attention = layer
        on_memory = jnp.zeros((layers, size, columns), maps.dtype).at[index].set(attention[:, :columns])
        on_memory = on_memory.swapaxes(0, 1).reshape(size, layers * columns)
        on_past = attention[:, columns : columns + past]
        outside = jnp.concatenate([on_memory, on_past, jnp.zeros((size, size), maps.dtype)], axis=1)
        attended = outside + attention[:, columns + past :] @ weights
        return (weights + attended) / 2, None

    itself = jnp.pad(jnp.eye(size, dtype=maps.dtype), [(0, 0), (layers * columns + past, 0)])
    return jax.lax.scan(step, itself, (jnp.arange(layers), maps))[0]
