"""Attention maps arranged as pictures: as in the paper's Fig. 11, the memory before each block, and over
an image that the model reads."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from famx.modules.attention import visible

NO_TOKEN = -1  # id of a slot without a token, or with one that was read before the maps begin


@dataclasses.dataclass(frozen=True)
class Axis:
    """The tokens along one axis of a picture.

    Attributes:
      block: block index of each token, int32 `[n]`; of a memory token, the block that it precedes.
      slot: position within the block or the memory, int32 `[n]`.
      memory: whether it is a memory token, bool `[n]`.
      labels: text of each token.
    """

    block: np.ndarray
    slot: np.ndarray
    memory: np.ndarray
    labels: tuple[str, ...]

    def segments(self) -> list[tuple[int, int, int, bool]]:
        """Consecutive tokens of one block or memory, as `(first, end, block, whether it is memory)`."""
        changed = (np.diff(self.block) != 0) | (np.diff(self.memory.astype(int)) != 0)
        edges = [0, *(np.flatnonzero(changed) + 1).tolist(), len(self.block)]
        return [
            (a, b, int(self.block[a]), bool(self.memory[a])) for a, b in zip(edges, edges[1:]) if a < b
        ]


@dataclasses.dataclass(frozen=True)
class Picture:
    """One attention map: queries in rows, keys in columns, the memory before each block.

    Attributes:
      values: attention probabilities `[rows, columns]`; NaN where the query does not see the key.
      rows: the queries.
      columns: the keys.
      layer: layer of the map.
      head: head of the map; None for the mean over the kept heads.
    """

    values: np.ndarray
    rows: Axis
    columns: Axis
    layer: int
    head: int | None


def make_picture(maps, layer: int, head: int | None, blocks: int | Sequence[int] | None) -> Picture:
    """Implements `AttentionMaps.as_picture`."""
    blocks = sorted(set(maps.blocks if blocks is None else np.atleast_1d(blocks).tolist()))
    if not blocks:
        raise ValueError("There is nothing to draw: no block was kept.")
    indices = {block: maps.index(layer, head, block) for block in blocks}
    n, segments, size = maps.memory_columns, maps.memory_segments, maps.block_size
    memory = lambda block: [(block, slot, True) for slot in range(n)]
    updated = lambda block: maps.memory.shape[3] and maps.completed(block)
    tokens = lambda block, first=0, end=size: [(block, slot, False) for slot in range(first, end)]

    shown, rows = {}, []  # shown: token ids of each block in the picture
    for block, (i, *_) in indices.items():
        first, end = maps.slots[i].tolist()
        past = range(max(block - segments, 0), block + 1)
        shown |= dict(zip(past, maps.ids[i].reshape(-1, size)[-len(past) :]))
        shown[block] = shown[block][:end]
        rows += (memory(block) if updated(block) else []) + tokens(block, first, end)
    columns = []
    for block in sorted(shown):
        columns += (memory(block) if block in indices else []) + tokens(block, end=len(shown[block]))

    column_of = {entry: i for i, entry in enumerate(columns)}
    row_of = {entry: i for i, entry in enumerate(rows)}
    values = np.full((len(rows), len(columns)), np.nan, maps.tokens.dtype)

    def put(queries, keys, probabilities):
        # Keys of the window that hold no token have no column.
        exists = [key in column_of for key in keys]
        column = [column_of[key] for key in keys if key in column_of]
        values[np.ix_([row_of[query] for query in queries], column)] = probabilities[:, exists]

    slots = np.arange(size)
    for block, (i, j, h) in indices.items():
        of_memory, of_tokens = (
            x.mean(axis=0) if h is None else x[h] for x in (maps.memory[i, j], maps.tokens[i, j])
        )
        if updated(block):
            put(memory(block), memory(block) + tokens(block), of_memory)
        keys = memory(block)
        for b in range(block - segments, block + 1):
            keys = keys + tokens(b)
        seen = visible(maps, slots[:, None], np.arange(len(keys)), max(segments - block, 0))
        first, end = maps.slots[i]
        put(tokens(block, first, end), keys, np.where(seen, of_tokens, np.nan)[first:end])

    label = lambda block, slot, is_memory: f"F{slot}" if is_memory else maps.text(shown[block][slot])

    def axis(entries):
        block, slot, is_memory = np.array(entries, np.int32).reshape(-1, 3).T
        return Axis(block, slot, is_memory.astype(bool), tuple(label(*entry) for entry in entries))

    return Picture(values, axis(rows), axis(columns), layer, head)


def memory_on_grid(
    maps, layer: int, block: int, shape: tuple[int, int], first: int = 0, head: int | None = None
) -> np.ndarray:
    """Attention of the memory on positions that form a grid, such as the patches of an image.

    Args:
      maps: `AttentionMaps`.
      layer, block: a kept layer, and a kept block that was read to its end.
      shape: rows and columns of the grid, whose positions are in the block one after another, row by row.
      first: slot of the first of them.
      head: a kept head; None averages over the kept heads.

    Returns:
      The attention of each memory token while it compresses the block, `[N, rows, columns]`. What is
      missing to 1 is on the rest of the block and on the memory.

    Raises:
      ValueError: the layer, head or block was not kept, the memory did not attend to the block, or the
        grid does not fit into the block.
    """
    i, j, h = maps.index(layer, head, block)
    if not (maps.memory.shape[3] and maps.completed(block)):
        raise ValueError(f"The memory did not attend to block {block}, so there is nothing to draw.")
    end = first + shape[0] * shape[1]
    if first < 0 or min(shape) < 1 or end > maps.block_size:
        raise ValueError(
            f"A grid of {shape[0]} x {shape[1]} positions from slot {first} does not fit into a block of"
            f" {maps.block_size}."
        )
    attention = maps.memory[i, j].mean(axis=0) if h is None else maps.memory[i, j, h]
    on_grid = attention[:, maps.memory_columns + first : maps.memory_columns + end]
    return on_grid.reshape(-1, *shape)
