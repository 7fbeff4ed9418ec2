"""What memories have in common whose rows climb the layers: a block reads rows and writes rows.

Both are rows `[B, N, D]` among the tokens, with the layer's own weights. Rows that are read stand before
the block and see each other; rows that are written stand behind it and see the rows that are read, the
block and each other. Positions are the places in that order.
"""

import jax.numpy as jnp

from famx.modules.attention import attend_parts
from famx.modules.memory import Opened


def read_rows(layer, rows, here, visible=None, causal: bool = False):
    """`(rows for the layer above, Opened)` of rows that stand before the block of `here`.

    Args:
      layer: the bound layer.
      rows: `[B, N, D]`.
      here: context of the block.
      visible: which rows exist, bool `[B, N]`; None: all.
      causal: whether a row sees only the rows before it, and itself.
    """
    count = rows.shape[1]
    start = here.first_block * layer.config.block_size + here.offset
    positions = start[:, None] + jnp.arange(-count, 0)
    q, k, v = layer.qkv(rows, layer.angles(positions, here))
    mask = _mask(count, visible, causal)
    attention, _ = attend_parts(q, [_part(k, v, mask)], layer.config)
    return layer.finish(rows, attention).astype(rows.dtype), Opened(k, v, visible)


def write_rows(layer, rows, opened: Opened, block, here, causal: bool = False):
    """Rows `[B, N, D]` for the layer above, that stand behind a full block; see `read_rows`."""
    count, size = rows.shape[1], layer.config.block_size
    positions = ((block.index + 1) * size + here.offset)[:, None] + jnp.arange(count)
    q, k, v = layer.qkv(rows, layer.angles(positions, here))
    seen = None if opened.visible is None else opened.visible[:, None, None, None]
    parts = [
        _part(opened.keys, opened.values, seen),
        _part(block.keys, block.values, None),
        _part(k, v, _mask(count, None, causal)),
    ]
    attention, _ = attend_parts(q, parts, layer.config)
    return layer.finish(rows, attention).astype(rows.dtype)


def rows_flops(price, length: int, size: int, read: int, written: int) -> int:
    """Operations of a layer for the rows of a text of `length` tokens in blocks of `size`.

    The last block is not counted as written: nothing reads what it writes.
    """
    row = price.project + price.feed_forward
    blocks = -(-length // size)
    reading = blocks * read * (row + read * price.score) + length * read * price.score
    seen = read + size + written
    return reading + (blocks - 1) * written * (row + seen * price.score)


def _part(keys, values, mask):
    return keys.swapaxes(1, 2), values.swapaxes(1, 2), mask


def _mask(count: int, visible, causal: bool):
    """Mask of rows among themselves, broadcastable to `[B, K, G, N, N]`; None: all are seen."""
    if visible is None:
        return jnp.tril(jnp.ones((count, count), bool)) if causal else None
    # A row that does not exist sees itself, so that its numbers are finite.
    seen = visible[:, None, :] | jnp.eye(count, dtype=bool)
    return (seen & jnp.tril(jnp.ones((count, count), bool)) if causal else seen)[:, None, None]
