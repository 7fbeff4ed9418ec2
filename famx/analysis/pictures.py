"""Attention maps as the paper draws them (Fig. 11): the memory before each block."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from famx.modules.attention import visible

NO_TOKEN = -1  # id in a slot that holds no token, or one that was read before


@dataclasses.dataclass(frozen=True)
class Axis:
    """What stands along one axis of a picture.

    Attributes:
      block: index of the block, int32 `[n]`; for the memory the block that it is prepended to.
      slot: in the block, or in the memory, int32 `[n]`.
      memory: whether it is a memory token, bool `[n]`.
      labels: texts of the tokens.
    """

    block: np.ndarray
    slot: np.ndarray
    memory: np.ndarray
    labels: tuple[str, ...]

    def segments(self) -> list[tuple[int, int, int, bool]]:
        """Runs of one block's tokens or memory: `(first, end, block, whether memory)`."""
        changed = (np.diff(self.block) != 0) | (np.diff(self.memory.astype(int)) != 0)
        edges = [0, *(np.flatnonzero(changed) + 1).tolist(), len(self.block)]
        return [
            (a, b, int(self.block[a]), bool(self.memory[a])) for a, b in zip(edges, edges[1:]) if a < b
        ]


@dataclasses.dataclass(frozen=True)
class Picture:
    """One map as the paper draws it: queries downwards, keys to the right, the memory before each block.

    Attributes:
      values: probabilities `[rows, columns]`; NaN where the query does not see the key.
      rows, columns: what stands along the axes.
      layer: of the map.
      head: of the map; None: mean over the kept heads.
    """

    values: np.ndarray
    rows: Axis
    columns: Axis
    layer: int
    head: int | None


def make_picture(maps, layer: int, head: int | None, blocks: int | Sequence[int] | None) -> Picture:
    """`AttentionMaps.as_picture`."""
    blocks = sorted(set(maps.blocks if blocks is None else np.atleast_1d(blocks).tolist()))
    if not blocks:
        raise ValueError("There is nothing to draw: no block was kept.")
    places = {block: maps.index(layer, head, block) for block in blocks}
    n, segments, size = maps.memory_columns, maps.memory_segments, maps.block_size
    memory = lambda block: [(block, slot, True) for slot in range(n)]
    updated = lambda block: maps.memory.shape[3] and maps.completed(block)
    tokens = lambda block, first=0, end=size: [(block, slot, False) for slot in range(first, end)]

    shown, rows = {}, []  # shown: of each block with tokens in the picture, their ids
    for block, (i, *_) in places.items():
        first, end = maps.slots[i].tolist()
        past = range(max(block - segments, 0), block + 1)
        shown |= dict(zip(past, maps.ids[i].reshape(-1, size)[-len(past) :]))
        shown[block] = shown[block][:end]
        rows += (memory(block) if updated(block) else []) + tokens(block, first, end)
    columns = []
    for block in sorted(shown):
        columns += (memory(block) if block in places else []) + tokens(block, end=len(shown[block]))

    column_of = {entry: i for i, entry in enumerate(columns)}
    row_of = {entry: i for i, entry in enumerate(rows)}
    values = np.full((len(rows), len(columns)), np.nan, maps.tokens.dtype)

    def put(entries, keys, found):
        inside = [key in column_of for key in keys]
        at = [column_of[key] for key in keys if key in column_of]
        values[np.ix_([row_of[entry] for entry in entries], at)] = found[:, inside]

    slots = np.arange(size)
    for block, (i, j, h) in places.items():
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
