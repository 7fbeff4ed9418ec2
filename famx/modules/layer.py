"""Algorithm 2 of the paper: one Transformer layer with block sliding window attention and FAM.

The paper's letters are kept in comments: `I` input, `A` after attention, `O` output, `F` memory.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from famx.modules import deferred, rope
from famx.modules.attention import attend, attend_parts, memory_mass, token_attention, visible
from famx.modules.components import FeedForward, Norm, Projection, rms_normalize
from famx.modules.config import DecoderConfig
from famx.modules.updates import get_update

# Collection of attention masses, kept where it is mutable: `apply(..., mutable=["attention_mass"])`.
# Per layer, mean over tokens: `memory_on_itself [layers, C, B, K, G]`, the rest of whose attention
# went to the block, and `tokens_on_memory [layers, B, C, K, G]`.
MASS = "attention_mass"


def batch_axis(shards: int) -> str:
    """Logical axis of a batch whose examples are cut into so many shards that count as examples."""
    return "batch" if shards == 1 else "context_batch"


@flax.struct.dataclass
class ChunkContext:
    """Where the `C` blocks of a chunk stand, and how the layer rotates; else the same for every layer.

    Under context parallelism `P` shards of a chunk are read side by side as if they were examples, the
    first shard of all examples first: `B` below is then `P` times the batch, and `C` the blocks of a
    shard (`shards`). Only what goes from shard to shard needs to know: the memory, and keys and values.

    Attributes:
      first_block: index in its sequence of each example's first block of the chunk, int32 `[B]`.
      offset: random position offset, int32 `[B]`.
      updates: memory updates before the chunk, int32 `[B]`.
      start: tokens of the first block that the state already holds, int32 `[B]`; None: zero.
      stop: slots of the chunk that hold a token after it was read, int32 `[B]`; None: all.
      rotation: of the layer; the decoder sets it.
    """

    first_block: jax.Array
    offset: jax.Array
    updates: jax.Array
    start: jax.Array | None = None
    stop: jax.Array | None = None
    rotation: rope.Rotation | None = None

    def complete(self, size: int):
        """Blocks of the chunk that are full after it was read, int32 `[B]`; None: all."""
        return None if self.stop is None else self.stop // size

    def shards(self, count: int, blocks: int, size: int) -> "ChunkContext":
        """Where `count` shards of `blocks` blocks of `size` tokens stand, one after another."""
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
        )


@flax.struct.dataclass
class TokenWindow:
    """Keys and values that the tokens of an incomplete block read, in the order of matrix products.

    Attributes:
      past_keys, past_values: of the past blocks `[layers, B, K, M * S, Dh]`; they stay the same until
        the block is complete.
      keys, values: of the memory and of the block itself `[layers, B, K, N + S, Dh]`.
    """

    past_keys: jax.Array
    past_values: jax.Array
    keys: jax.Array
    values: jax.Array


class Layer(nn.Module):
    """One layer. Block tokens and the memory share every weight, so FAM adds none."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        heads, kv_heads = ("heads", "kv"), ("kv_heads", "kv")
        self.attention_norm = Norm(c)
        self.query = Projection(c, (c.num_heads, c.head_dim), ("embed",), heads, c.qkv_bias)
        kv = lambda: Projection(c, (c.num_kv_heads, c.head_dim), ("embed",), kv_heads, c.qkv_bias)
        self.key, self.value = kv(), kv()
        self.output = Projection(c, (c.embed_dim,), heads, ("embed",), c.output_bias)
        self.mlp = FeedForward(c)
        if not c.parallel_block:
            self.mlp_norm = Norm(c)
        if c.post_norms:
            self.post_attention_norm, self.post_mlp_norm = Norm(c), Norm(c)
        if c.qk_norm:
            self.query_norm, self.key_norm = Norm(c, axis="kv"), Norm(c, axis="kv")

    # The layer's two halves, used alike for block tokens and for the memory.

    def qkv(self, x, angle, key_angle=None):
        """Rotated queries `[..., H, Dh]`, keys and values `[..., K, Dh]` of `Norm(x [..., D])`."""
        x = self.attention_norm(x)
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        return rope.rotate(q, angle), rope.rotate(k, angle if key_angle is None else key_angle), v

    def finish(self, x, attention, residual=None):
        """`O = FF(Norm(A)) + A` with `A = attention + residual`, `[..., D]`.

        `residual` is `x` unless given; it differs in the first update of the memory alone.
        """
        residual = x if residual is None else residual
        attention = self.output(attention)
        if self.config.post_norms:
            attention = self.post_attention_norm(attention)
        a = attention + residual
        out = self.mlp(self.attention_norm(x) if self.config.parallel_block else self.mlp_norm(a))
        if self.config.post_norms:
            out = self.post_mlp_norm(out)
        return out + a

    def angles(self, positions, context: ChunkContext, beyond=None):
        """RoPE angles of positions `[...]` in this layer, `[..., Dh / 2]`; `beyond` adds fractions."""
        dtype = jnp.promote_types(self.config.dtype, jnp.float32)
        return rope.angles(positions, context.rotation.token, beyond, dtype)

    def memory_angles(self, block, context: ChunkContext):
        """Angles of the memory that compressed `block` (int32 `[B]`; -1: the prompt), `[B, N, Dh / 2]`.

        Positions: the block's last `N`, or between this block and the next, or zero.
        """
        c = self.config
        n = np.arange(c.fam_length)
        if c.fam_positions == "zero":
            return self.angles(jnp.zeros((block.shape[0], c.fam_length), jnp.int32), context)
        end = ((block + 1) * c.block_size + context.offset)[:, None]
        if c.fam_positions == "last":
            return self.angles(end + (n - c.fam_length), context)
        return self.angles(end + np.full_like(n, -1), context, context.rotation.memory)

    # The memory.

    def prompt(self, x, context: ChunkContext):
        """One layer of the prompt, which attends to itself alone: `[N, D] -> [N, D]`."""
        q, k, v = self.qkv(x, self.memory_angles(context.first_block - 1, context)[0])
        return self.finish(x, attend(q, k, v, None, self.config)[0])

    def memory_qkv(self, memory, context: ChunkContext):
        """`qF` that compresses the first block, and `kF`, `vF` that its tokens read.

        As a query the memory stands at `block`, as a key still at the block that it was made from.
        """
        block = context.first_block
        angle, key_angle = (self.memory_angles(b, context) for b in (block, block - 1))
        return self.qkv(memory, angle, key_angle)

    def update_memory(self, memory, qkv, keys, values, updates):
        """`F_t` from `F_{t-1} [B, N, D]` and the keys and values `[B, S, K, Dh]` of block `t`.

        The paper's update is `fam_update="residual"` with scale 1. Additions of ours:
        `fam_update_scale` shrinks every update after the first, `normalize_memory` keeps each newly
        made `F` at RMS 1, and `fam_update` names another rule (`famx.modules.updates`).
        """
        c = self.config
        q, k, v = qkv
        keys, values = jnp.concatenate([k, keys], axis=1), jnp.concatenate([v, values], axis=1)
        attention, probabilities = attend(q, keys, values, None, c)
        own = probabilities[..., : c.fam_length]
        self._keep("memory_on_itself", lambda: jnp.mean(jnp.sum(own, -1), -1))
        first = (updates == 0)[:, None, None]
        new = self.finish(memory, attention, jnp.where(first, 0, memory))  # A_F, then F_t
        new = new.astype(memory.dtype)
        if c.fam_update_scale != 1.0:
            new = jnp.where(first, new, memory + c.fam_update_scale * (new - memory))
        if c.normalize_memory:
            new = rms_normalize(new, c.norm_epsilon)
        return jnp.where(first, new, get_update(c.fam_update)(memory, new, probabilities, c))

    def scan_memory(self, memory, keys, values, context: ChunkContext):
        """The only sequential part of a layer: `F` block after block.

        Args:
          memory: `F` before the chunk `[B, N, D]`.
          keys, values: of the chunk's blocks `[P * B, C, S, K, Dh]`.

        Returns:
          `F` after the chunk; `kF`, `vF` before each block `[P * B, C, N, K, Dh]`.
        """
        index = jnp.arange(keys.shape[1])
        xs = (index, keys.swapaxes(0, 1), values.swapaxes(0, 1))
        if self.is_initializing():  # makes variables, which no scan can
            read = []
            for i in index:
                memory, own = self.memory_step(memory, (i, keys[:, i], values[:, i]), context)
                read.append(own)
            return memory, jax.tree.map(lambda *x: jnp.stack(x, axis=1), *read)
        # The shards take turns: all work at once, and those whose turn it is not yet work in vain.
        shards = keys.shape[0] // memory.shape[0]
        before = jnp.tile(memory, (shards, 1, 1))
        for _ in range(shards - 1):
            after, _ = deferred.scan(self, "memory_step", before, xs, context)
            before = _next_shard(after, memory)
        if self.is_mutable_collection(MASS):
            scan = nn.scan(
                Layer.memory_step, variable_broadcast="params", variable_axes={MASS: 0},
                split_rngs={"params": False}, in_axes=(0, nn.broadcast),
            )  # fmt: skip
            after, read = scan(self, before, xs, context)
        else:
            after, read = deferred.scan(self, "memory_step", before, xs, context)
        return after[-memory.shape[0] :], jax.tree.map(lambda x: x.swapaxes(0, 1), read)

    def memory_step(self, memory, block, context: ChunkContext):
        """`F` after one block `(index in the chunk, its keys, its values)`, and `(kF, vF)` before it."""
        index, keys, values = block
        here = context.replace(first_block=context.first_block + index)
        qkv = self.memory_qkv(memory, here)
        new = self.update_memory(memory, qkv, keys, values, context.updates + index)
        complete = context.complete(self.config.block_size)
        if complete is not None:
            new = jnp.where((index < complete)[:, None, None], new, memory)
        return new, qkv[1:]

    def _keep(self, name, make):
        """Keeps `make()` in the collection MASS, if whoever applies the model asked for it."""
        if self.is_mutable_collection(MASS) and not self.is_initializing():
            self.sow(MASS, name, make())

    # Whole chunks.

    def read_chunk(self, x, memory, keys, values, context: ChunkContext):
        """Algorithm 2 for `C` blocks at once.

        Args:
          x: `I`, `[P * B, C, S, D]`, see `ChunkContext`.
          memory: `[B, N, D]`.
          keys, values: the window before the chunk `[B, M + 1, S, K, Dh]`, as in `DecoderState`.
          context: where the blocks stand.

        Returns:
          `O` `[P * B, C, S, D]`, then `memory`, `keys` and `values` after the chunk.
        """
        c = self.config
        blocks, slots = x.shape[1], jnp.arange(x.shape[1] * c.block_size)
        positions = context.first_block[:, None] * c.block_size + slots + context.offset[:, None]
        q, k, v = self.qkv(x, self.angles(positions.reshape(-1, blocks, c.block_size), context))
        k, v = (self._merge(new, old, context) for new, old in ((k, keys), (v, values)))
        if c.fam_length:
            memory, read = self.scan_memory(memory, k, v, context)
        else:
            empty = jnp.zeros(k.shape[:2] + (0,) + k.shape[3:], k.dtype)
            read = (empty, empty)
        batch, first = memory.shape[0], context.first_block
        past = lambda new, old: jnp.concatenate([self._before(new, old), new], axis=1)
        keys, values = past(k, keys), past(v, values)
        self._keep("tokens_on_memory", lambda: memory_mass(q, keys, read[0], first, c))
        examples = batch_axis(x.shape[0] // batch)
        attention = token_attention(q, keys, values, *read, first, c, examples)
        out = self.finish(x, attention)
        return out, memory, *(self._window(x, batch, context) for x in (keys, values))

    def _merge(self, new, window, context):
        """Keys or values of the chunk, the tokens that the state already held put in their slots."""
        if context.start is not None:
            batch = window.shape[0]
            held = jnp.arange(self.config.block_size) < context.start[:batch, None]
            first = jnp.where(held[..., None, None], window[:, -1], new[:batch, 0])
            new = new.at[:batch, 0].set(first)
        if context.stop is not None:
            shape = new.shape
            new = new.reshape(shape[0], -1, *shape[3:])
            written = jnp.arange(new.shape[1]) < context.stop[:, None]
            new = jnp.where(written[..., None, None], new, 0).reshape(shape)
        return new

    def _before(self, new, window):
        """The `M` blocks before each shard `[P * B, M, ...]`: the state's, or those of shards before it.

        Shards give their neighbours what these read and no more: `M` blocks each.
        """
        shards, blocks, past = new.shape[0] // window.shape[0], new.shape[1], self.config.memory_segments
        parts = []
        for distance in reversed(range(1, -(-past // blocks) + 1)):
            count = min(blocks, past - (distance - 1) * blocks)  # blocks from so many shards before
            ends = [past - (distance - 1 - i) * blocks for i in range(min(distance, shards))]
            own = [window[:, end - count : end] for end in ends]
            parts.append(_next_shard(new[:, blocks - count :], jnp.concatenate(own), distance))
        return jnp.concatenate(parts, axis=1) if parts else new[:, :0]

    def _window(self, blocks, batch, context):
        """The window after the chunk: of `[P * B, M + C, ...]` the last `M` full blocks and the next."""
        count, own = self.config.memory_segments + 1, blocks.shape[1] - self.config.memory_segments
        blocks = jnp.pad(blocks, [(0, 0), (0, 1)] + [(0, 0)] * (blocks.ndim - 2))
        complete = context.complete(self.config.block_size)
        if complete is None:
            return blocks[-batch:, -count:]
        index = complete[:, None] + jnp.arange(count)
        windows = jnp.take_along_axis(blocks, index[:, :, None, None, None], axis=1)
        shards = blocks.shape[0] // batch
        if shards == 1:
            return windows
        last = jnp.minimum(jnp.sum(complete.reshape(shards, batch), axis=0) // own, shards - 1)
        here = (jnp.arange(shards)[:, None] == last)[..., None, None, None, None]
        return jnp.sum(jnp.where(here, windows.reshape(shards, batch, *windows.shape[1:]), 0), axis=0)

    # Some tokens of an incomplete block.

    def open_window(self, memory, keys, values, context: ChunkContext):
        """What the tokens of a block read, heads in front, from a state's `memory`, `keys`, `values`.

        Returns:
          A `TokenWindow` of one layer, without the layers' axis.
        """
        c = self.config
        memory_keys, memory_values = self.memory_qkv(memory, context)[1:]
        past = lambda window: window[:, : c.memory_segments].reshape(
            window.shape[0], c.memory_segments * c.block_size, *window.shape[3:]
        )
        own = lambda memory, window: jnp.concatenate([memory, window[:, -1]], axis=1)
        parts = past(keys), past(values), own(memory_keys, keys), own(memory_values, values)
        return TokenWindow(*(part.swapaxes(1, 2) for part in parts))

    def read_tokens(self, x, window: "TokenWindow", context: ChunkContext):
        """`W` tokens that stay within each example's block: `[B, W, D] -> [B, W, D]`.

        Args:
          x: `I` of the next `W` tokens; what stands behind the last real one is padding.
          window: of this layer.
          context: where the blocks stand; `start` is the first token's slot.

        Returns:
          `O`, and the tokens' keys and values `[B, W, K, Dh]`, which the window does not hold yet.
        """
        c = self.config
        width, past = x.shape[1], c.memory_segments * c.block_size
        rows = context.start[:, None] + jnp.arange(width)
        positions = (context.first_block * c.block_size + context.offset)[:, None] + rows
        q, k, v = self.qkv(x, self.angles(positions, context))
        missing = jnp.maximum(c.memory_segments - context.first_block, 0)[:, None, None]
        mask = visible(c, rows[..., None], c.fam_length + jnp.arange(past), missing)[:, None, None]
        slots = jnp.arange(-c.fam_length, c.block_size)  # the memory's come before the block's
        written = (slots < context.start[:, None])[:, None, None, None]
        causal = jnp.tril(jnp.ones((width, width), bool))
        parts = (
            (window.past_keys, window.past_values, mask),
            (window.keys, window.values, written),
            (k.swapaxes(1, 2), v.swapaxes(1, 2), causal),
        )
        return self.finish(x, attend_parts(q, parts, c)[0]), k, v

    def complete_block(self, memory, keys, values, context: ChunkContext):
        """`F` `[B, N, D]` after the first block, which just became full; keys, values are a state's."""
        if not self.config.fam_length:
            return memory
        qkv = self.memory_qkv(memory, context)
        return self.update_memory(memory, qkv, keys[:, -1], values[:, -1], context.updates)


def _next_shard(x, first, distance: int = 1):
    """What the shard `distance` before each one has of `x [P * B, ...]`; `first` for the first ones.

    Written as a rotation, which is an exchange between neighbours where shards are cut over devices.
    """
    count = first.shape[0]
    if count == x.shape[0]:
        return first
    batch = count // distance
    rolled = jnp.roll(x, distance * batch, axis=0)
    first = jnp.pad(first, [(0, x.shape[0] - count)] + [(0, 0)] * (x.ndim - 1))
    begins = jnp.arange(x.shape[0]) < count
    return jnp.where(begins.reshape(-1, *[1] * (x.ndim - 1)), first, rolled)
