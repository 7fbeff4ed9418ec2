"""The window of a layer: keys and values of the last `M` blocks and of the incomplete one.

Pure functions on arrays of blocks, and dataclasses that describe their positions. Arrays of a state have
the axes `[B, M + 1, S, ...]`, oldest block first.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from famx.modules import rope


def batch_axis(shards: int) -> str:
    """Logical axis of a batch into which this number of shards of the length is folded."""
    return "batch" if shards == 1 else "context_batch"


def columns_before(config) -> int:
    """Columns that a block's tokens attend to before those of the block itself: `N + M * S`."""
    return config.memory_columns + config.memory_segments * config.block_size


def column_count(config) -> int:
    """Columns of a `TokenWindow`: `N + (M + 1) * S`, and some that nothing reads if they are few.

    In a number of columns that is no multiple of 128, XLA may copy a GPU's window in every product.
    """
    count = columns_before(config) + config.block_size
    more = -count % 128
    return count + more if more * 32 <= count else count


@flax.struct.dataclass
class ChunkContext:
    """Positions of the chunk's blocks; shared by all layers except `rotation`.

    Under context parallelism `P` shards of a chunk are read side by side as if they were examples, the
    first shard of all examples first: `B` below is then `P` times the batch, and `C` the blocks of a
    shard (`shards`). Only what passes from shard to shard depends on it: memory, keys and values.

    Attributes:
      first_block: index in its sequence of each example's first block of the chunk, int32 `[B]`.
      offset: random position offset, int32 `[B]`.
      updates: number of memory updates before the chunk, int32 `[B]`.
      start: number of tokens of the first block that the state already holds, int32 `[B]`; None: zero.
      stop: number of slots of the chunk that hold a token after it was read, int32 `[B]`; None: all.
      rotation: rotation of the layer; the decoder sets it.
      shared: `Memory.shared`, the same in all layers.
      batch_axis: logical name of the axis `B`.
    """

    first_block: jax.Array
    offset: jax.Array
    updates: jax.Array
    start: jax.Array | None = None
    stop: jax.Array | None = None
    rotation: rope.Rotation | None = None
    shared: Any = None
    batch_axis: str = flax.struct.field(pytree_node=False, default="batch")

    def complete(self, size: int):
        """Number of blocks of the chunk that are full after it was read, int32 `[B]`; None: all."""
        return None if self.stop is None else self.stop // size

    def block(self, index) -> "ChunkContext":
        """The context of block `index` of the chunk."""
        return self.replace(first_block=self.first_block + index, updates=self.updates + index)

    def shards(self, count: int, blocks: int, size: int) -> "ChunkContext":
        """The context of `count` consecutive shards of `blocks` blocks of `size` tokens."""
        if count == 1:
            return self
        shard = jnp.repeat(jnp.arange(count), self.first_block.shape[0])
        tile = lambda x: jnp.tile(x, count)
        start, stop = self.start, self.stop
        return self.replace(
            first_block=tile(self.first_block) + shard * blocks,
            offset=tile(self.offset),
            updates=tile(self.updates) + shard * blocks,
            start=start if start is None else jnp.where(shard == 0, tile(start), 0),
            stop=stop if stop is None else jnp.clip(tile(stop) - shard * blocks * size, 0, blocks * size),
            batch_axis=batch_axis(count),
        )


@flax.struct.dataclass
class TokenWindow:
    """What the tokens of an incomplete block read, in the order of matrix products.

    Attributes:
      keys, values: of the memory's columns, the past blocks and the block's own tokens,
        `[layers, B, K, X, Dh]` with `X` of `column_count`; all but the own stay the same until the
        block is full.
      visible: `Opened.visible` of the block, `[layers, B, N]`, or None.
      extra: `Opened.extra` of the block, leaves `[layers, B, ...]`.
    """

    keys: jax.Array
    values: jax.Array
    visible: Any = None
    extra: Any = None


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens while they attend: of `C` whole blocks, leading axes `[B, C, S]`, or some of one, `[B, W]`.

    Attributes:
      input: the layer's input `[..., D]`.
      query: rotated queries `[..., H, Dh]`.
      plain_query: queries before the rotation; they cost nothing if unused.
      attend: function from rotated queries to attention `[..., H, Dh]`, in one softmax over the window
        and the memory's columns; a second argument are queries before the rotation, for a memory with
        `plain_columns`. None for rows.
      extra: `Opened.extra`, leaves `[B, C, ...]` or `[B, ...]`.
      part: function from rotated queries to attention to the window alone and the logarithm of the sum
        of its weights, `[..., H]`, float32 at least, for `joined`. It does not use the fused kernels.
    """

    input: jax.Array
    query: jax.Array
    plain_query: jax.Array
    attend: Callable[..., jax.Array]
    extra: Any
    part: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def joined(*parts):
    """Attention in one softmax, from that to each of several parts.

    Args:
      *parts: attention `[..., H, Dh]` and the logarithm of the sum of its weights `[..., H]`.

    Returns:
      The same of all parts together.
    """
    log_sum = functools.reduce(jnp.logaddexp, (log_sum for _, log_sum in parts))
    share = lambda of_part: jnp.exp(of_part - log_sum)[..., None]
    return sum(share(of_part) * attention for attention, of_part in parts), log_sum


def merge(new, window, context: ChunkContext, size: int):
    """Keys or values of the chunk, with those of tokens that the state already holds in their slots.

    Args:
      new: keys or values of the chunk `[P * B, C, S, ...]`.
      window: those of the state `[B, M + 1, S, ...]`.
      context: gives where tokens begin (`start`) and end (`stop`); slots without a token become zero.
      size: `S`.
    """
    if context.start is not None:
        batch = window.shape[0]
        held = jnp.arange(size) < context.start[:batch, None]
        first = jnp.where(_expand(held, new[:batch, 0]), window[:, -1], new[:batch, 0])
        new = new.at[:batch, 0].set(first)
    if context.stop is not None:
        shape = new.shape
        new = new.reshape(shape[0], -1, *shape[3:])
        written = jnp.arange(new.shape[1]) < context.stop[:, None]
        new = jnp.where(_expand(written, new), new, 0).reshape(shape)
    return new


def before(new, window, past: int):
    """The `past` blocks before each shard `[P * B, M, ...]`: the state's, or those of earlier shards.

    A shard sends its neighbours only the blocks that they read: `M` blocks each.
    """
    shards, blocks = new.shape[0] // window.shape[0], new.shape[1]
    parts = []
    for distance in reversed(range(1, -(-past // blocks) + 1)):
        count = min(blocks, past - (distance - 1) * blocks)  # blocks of the shard `distance` before
        ends = [past - (distance - 1 - i) * blocks for i in range(min(distance, shards))]
        of_state = [window[:, end - count : end] for end in ends]
        parts.append(next_shard(new[:, blocks - count :], jnp.concatenate(of_state), distance))
    return jnp.concatenate(parts, axis=1) if parts else new[:, :0]


def past_of_each(blocks, past: int):
    """The `past` blocks before each of `C` blocks: of `[B, M + C, ...]`, `[B, C, M, ...]`."""
    count = blocks.shape[1] - past
    return blocks[:, jnp.arange(count)[:, None] + jnp.arange(past)]


def after(blocks, batch: int, context: ChunkContext, past: int, size: int):
    """The window after the chunk: of `[P * B, M + C, S, ...]` the last `M` full blocks and the next."""
    count, of_shard = past + 1, blocks.shape[1] - past
    blocks = jnp.pad(blocks, [(0, 0), (0, 1)] + [(0, 0)] * (blocks.ndim - 2))
    complete = context.complete(size)
    if complete is None:
        return blocks[-batch:, -count:]
    index = complete[:, None] + jnp.arange(count)
    windows = jnp.take_along_axis(blocks, _expand(index, blocks), axis=1)
    shards = blocks.shape[0] // batch
    if shards == 1:
        return windows
    last = jnp.minimum(jnp.sum(complete.reshape(shards, batch), axis=0) // of_shard, shards - 1)
    windows = windows.reshape(shards, batch, *windows.shape[1:])
    chosen = _expand(jnp.arange(shards)[:, None] == last, windows)
    return jnp.sum(jnp.where(chosen, windows, 0), axis=0)


def next_shard(x, first, distance: int = 1):
    """`x [P * B, ...]` of the shard `distance` before each; `first` for the first `distance` shards.

    Written as a rotation, which is an exchange between neighbours if devices hold different shards.
    """
    count = first.shape[0]
    if count == x.shape[0]:
        return first
    batch = count // distance
    rolled = jnp.roll(x, distance * batch, axis=0)
    first = jnp.pad(first, [(0, x.shape[0] - count)] + [(0, 0)] * (x.ndim - 1))
    begins = jnp.arange(x.shape[0]) < count
    return jnp.where(begins.reshape(-1, *[1] * (x.ndim - 1)), first, rolled)


def taken(index, context: ChunkContext, size: int):
    """Whether the memory takes in each block: it exists and the chunk's is full, bool `[P * B, C]`.

    Args:
      index: `Block.index`, int32 `[P * B, C]`.
      context: context of the chunk.
      size: `S`.
    """
    complete, exists = context.complete(size), index >= 0
    return exists if complete is None else exists & (jnp.arange(index.shape[1]) < complete[:, None])


def running_sum(start, steps, mask):
    """Sums over the blocks of a chunk, for memories to which each block is added.

    Args:
      start: sums before the chunk, leaves `[B, ...]`.
      steps: what each block adds, leaves `[P * B, C, ...]`.
      mask: which blocks count, bool `[P * B, C]`.

    Returns:
      The sums after the chunk, leaves `[B, ...]`, and those before each block, `[P * B, C, ...]`.
    """

    def one(start, steps):
        steps = jnp.where(_expand(mask, steps), steps, 0)
        totals = jnp.sum(steps, axis=1).reshape(-1, *start.shape)
        bounds = jnp.cumsum(jnp.concatenate([start[None], totals]), axis=0)
        within = jnp.cumsum(steps, axis=1)
        before = jnp.concatenate([jnp.zeros_like(steps[:, :1]), within[:, :-1]], axis=1)
        return bounds[-1], bounds[:-1].reshape(-1, 1, *start.shape[1:]) + before

    pairs = jax.tree.map(one, start, steps)
    return jax.tree.transpose(jax.tree.structure(start), jax.tree.structure((0, 0)), pairs)


def _expand(x, like):
    """`x` with axes of size 1 appended, up to the rank of `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
