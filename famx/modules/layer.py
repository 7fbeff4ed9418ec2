"""One Transformer layer with block sliding window attention (Algorithms 1 and 2 of the paper).

Comments use the paper's letters: `I` input, `A` after attention, `O` output. `DecoderConfig.memory`
(`famx.modules.memory`) defines what a layer keeps beyond its window.
"""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from famx.modules import deferred, rope
from famx.modules import window as windows
from famx.modules.attention import (
    attend_apart,
    attend_logsum,
    column_dimensions,
    memory_mass,
    token_attention,
    visible,
    window_part,
)
from famx.modules.components import FeedForward, Norm, Projection, adapted
from famx.modules.config import DecoderConfig
from famx.modules.memory import Block, Opened
from famx.modules.state import where_examples
from famx.modules.window import ChunkContext, Tokens, TokenWindow

# Collection of shares of attention, filled if it is mutable: `apply(..., mutable=["attention_mass"])`.
# Per layer, mean over tokens: `tokens_on_memory [layers, B, C, K, G]`, and what the memory adds.
MASS = "attention_mass"
# Collection of the inputs of the attention of the chunk's first block, filled likewise. Per layer:
# `queries [B, S, H, Dh]`, `keys [B, M + 1, S, K, Dh]`, `memory_keys [B, N, K, Dh]` and, for every block,
# `memory_queries [C, B, N, H, Dh]`.
INPUTS = "attention_inputs"


class Layer(nn.Module):
    """One layer. Tokens and memory may share its projections, so that FAM adds no weights."""

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
        self.memory = c.memory.layer_parameters(c)

    # The layer's two halves, for block tokens and for memories. `adapters`: a function of `(names, x,
    # ys)` that changes the results `ys` of the projections `names` of `x`, for a memory that has such.

    def project(self, x, adapters=None):
        """Queries `[..., H, Dh]`, keys and values `[..., K, Dh]` of `Norm(x [..., D])`, not rotated."""
        x = self.attention_norm(x)
        results = self.query.jointly(x, self.key, self.value)
        q, k, v = adapted(adapters, ("query", "key", "value"), x, results)
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def qkv(self, x, angle, key_angle=None, adapters=None):
        """`project`, queries rotated by `angle [..., Dh / 2]`, keys by `key_angle` (None: the same)."""
        q, k, v = self.project(x, adapters)
        return rope.rotate(q, angle), rope.rotate(k, angle if key_angle is None else key_angle), v

    def finish(self, x, attention, residual=None, adapters=None):
        """`O = FF(Norm(A)) + A` with `A = attention + residual`, `[..., D]`.

        `residual` is `x` unless given; it differs only in the first update of FAM.
        """
        residual = x if residual is None else residual
        (attention,) = adapted(adapters, ("output",), attention, [self.output(attention)])
        if self.config.post_norms:
            attention = self.post_attention_norm(attention)
        a = attention + residual
        x = self.attention_norm(x) if self.config.parallel_block else self.mlp_norm(a)
        out = self.mlp(x, adapters)
        if self.config.post_norms:
            out = self.post_mlp_norm(out)
        return out + a

    def _finish(self, x, attention, beside):
        """`finish` with `Memory.beside` added to the residual, if there is any."""
        return self.finish(x, attention, None if beside is None else x + beside)

    def angles(self, positions, here: ChunkContext, beyond=None):
        """RoPE angles of positions `[...]` in this layer, `[..., Dh / 2]`; `beyond` adds fractions."""
        dtype = jnp.promote_types(self.config.dtype, jnp.float32)
        return rope.angles(positions, here.rotation.token, beyond, dtype)

    def unrotate(self, keys, index, here: ChunkContext):
        """Keys `[B, ..., S, K, Dh]` of the blocks `index`, int32 `[B, ...]`, without their rotation.

        Angles are fixed-point, so this inverts the rotation up to rounding at any position.
        """
        offset = here.offset.reshape(here.offset.shape + (1,) * index.ndim)
        positions = index[..., None] * self.config.block_size + jnp.arange(keys.shape[-3]) + offset
        return self.unrotated(keys, positions, here)

    def unrotated(self, keys, positions, here: ChunkContext):
        """Keys `[..., X, K, Dh]` at positions `[..., X]` without their rotation."""
        return rope.rotate(keys, -self.angles(positions, here))

    def keep(self, collection: str, name: str, make):
        """Stores `make()` in a collection, if the caller of `apply` made it mutable."""
        if self.is_mutable_collection(collection) and not self.is_initializing():
            self.sow(collection, name, make())

    # Whole chunks.

    def read_chunk(self, x, climb, memory, keys, values, features, context: ChunkContext):
        """Algorithm 2 for `C` blocks at once.

        Args:
          x: `I`, `[P * B, C, S + R, D]`, see `ChunkContext`: the tokens of each block, and behind them
            the `R` rows of the memory (`Memory.row_slots`), if it has any.
          climb: the pair of `climb` values that `open` and `close` of the layer below returned, for a
            memory `through_depth`; else None.
          memory: the layer's memory before the chunk, leaves `[B, ...]`.
          keys, values: the window before the chunk `[B, M + 1, S, K, Dh]`, as in `DecoderState`.
          features: what the memory keeps of its tokens, likewise, or None.
          context: positions of the blocks.

        Returns:
          `O` `[P * B, C, S + R, D]`; `climb`, `memory`, `keys`, `values` and `features` after the chunk.
        """
        c, past, size = self.config, self.config.memory_segments, self.config.block_size
        batch, first, shards = keys.shape[0], context.first_block, x.shape[0] // keys.shape[0]
        row_slots = np.array(c.memory.row_slots(c), np.int32)
        slots = np.arange(x.shape[1])[:, None] * size + np.concatenate([np.arange(size), row_slots])
        angle = self.angles((first * size + context.offset)[:, None, None] + slots, context)
        plain, k, v = self.project(x)
        q, k = rope.rotate(plain, angle), rope.rotate(k, angle)
        of_tokens, of_rows = (lambda y: y[:, :, :size]), (lambda y: y[:, :, size:])
        rows = (of_rows(k), of_rows(v)) if row_slots.size else None
        held = keys, values, features
        merge = lambda new, old: windows.merge(of_tokens(new), old, context, size)
        new = jax.tree.map(merge, (k, v, c.memory.features(self, x)), held)
        with_past = lambda new, old: jnp.concatenate([windows.before(new, old, past), new], axis=1)
        window = jax.tree.map(with_past, new, held)
        climb, memory, opened = self._remember(climb, memory, new, window, rows, context)
        keys, values, _ = window
        widen_query, widen_keys = column_dimensions(c.memory.column_bias(self), c)
        seen = widen_keys(keys, False)
        if opened.keys is None:
            opened = opened.replace(keys=_no_columns(new[0]), values=_no_columns(new[0]))
        else:
            opened = opened.replace(keys=widen_keys(opened.keys, True, opened.visible))
            query = lambda: widen_query(of_tokens(q), of_tokens(plain))
            mass = lambda: memory_mass(query(), seen, opened.keys, first, c)
            self.keep(MASS, "tokens_on_memory", mass)
        self.keep(INPUTS, "queries", lambda: widen_query(of_tokens(q), of_tokens(plain))[:, 0])
        self.keep(INPUTS, "keys", lambda: seen[:, : past + 1])
        self.keep(INPUTS, "memory_keys", lambda: opened.keys[:, 0])

        attend = lambda query, plain=of_tokens(plain): token_attention(
            widen_query(query, plain), seen, values, opened.keys, opened.values, first, c,
            windows.batch_axis(shards),
        )  # fmt: skip

        def read(of_part, slots, attend):
            part = lambda query: window_part(query, keys, values, slots, first, c)
            tokens = Tokens(of_part(x), of_part(q), of_part(plain), attend, opened.extra, part)
            return c.memory.attend(self, tokens, context), c.memory.beside(self, tokens, context)

        attended, beside = read(of_tokens, np.arange(size), attend)
        if rows is not None:
            of_rows = read(of_rows, row_slots, None)
            both = lambda *parts: jnp.concatenate(parts, axis=2)
            attended, beside = jax.tree.map(both, (attended, beside), of_rows)
        after = lambda y: windows.after(y, batch, context, past, size)
        return self._finish(x, attended, beside), climb, memory, *jax.tree.map(after, window)

    def _remember(self, climb, memory, new, window, rows, context: ChunkContext):
        """`(climb, memory)` after the chunk, and `Opened` of its blocks, leaves `[P * B, C, ...]`.

        `new` are the chunk's keys, values and features, `window` also has the `M` blocks before each
        shard; `rows` are keys and values of the blocks' rows.
        """
        c, blocks = self.config, new[0].shape[1]
        lag = c.memory_segments if c.memory.closes_oldest else 0
        index = context.first_block[:, None] + jnp.arange(blocks) - lag
        keys, values, features = jax.tree.map(lambda y: y[:, :blocks], window) if lag else new
        past = self._past(windows.past_of_each(y, c.memory_segments) for y in window[:2])
        to_close = Block(keys, values, index, features, rows, past)
        if not c.memory.through_depth:
            return climb, *c.memory.scan(self, memory, to_close, context)
        block = jax.tree.map(lambda y: y[:, 0], to_close)
        climb, opened = self._climb(climb, memory, block, context)
        opened = jax.tree.map(lambda y: y[:, None], opened.replace(held=None))
        return climb, memory, opened

    def _past(self, keys_values):
        """`Block.past` of keys and values, which are made only if the memory asks for it."""
        if not self.config.memory.sees_past:
            return None
        stopped = jax.lax.stop_gradient if self.config.stop_gradient_segments else lambda y: y
        return tuple(map(stopped, keys_values))

    def sees_past(self, block: Block):
        """Which tokens of `block.past` each of the block's tokens sees, bool `[B, S, M * S]`."""
        c = self.config
        past = c.memory_segments * c.block_size
        missing = jnp.maximum(c.memory_segments - block.index, 0)[:, None, None]
        columns = c.memory_columns + jnp.arange(past)
        return visible(c, jnp.arange(c.block_size)[:, None], columns, missing)

    def _climb(self, climb, memory, block: Block, here: ChunkContext):
        """`climb` for the layer above, and `Opened`, of a memory `through_depth` after a full block."""
        rule, (opening, closing) = self.config.memory, climb
        opening, opened = rule.open(self, opening, memory, here)
        closing, _ = rule.close(self, closing, memory, opened, block, here)
        return (opening, closing), opened

    def scan_memory(self, memory, blocks: Block, context: ChunkContext):
        """Updates the memory block by block, the only sequential part of a layer; see `Memory.scan`."""
        index = jnp.arange(blocks.keys.shape[1])
        xs = index, jax.tree.map(lambda y: y.swapaxes(0, 1), blocks)
        if self.is_initializing():  # this creates variables, which a scan cannot
            opened = []
            for i in index:
                x = jax.tree.map(operator.itemgetter(i), xs)
                memory, of_block = self.memory_step(memory, x, context)
                opened.append(of_block)
            return memory, jax.tree.map(lambda *x: jnp.stack(x, axis=1), *opened)
        # Shards take turns. All compute at once; what a shard computes ahead of its turn is discarded.
        batch = jax.tree.leaves(memory)[0].shape[0]
        shards = blocks.keys.shape[0] // batch
        first = jax.tree.map(lambda m: jnp.tile(m, (shards,) + (1,) * (m.ndim - 1)), memory)
        scan = functools.partial(deferred.scan, rematerialized=self.config.remat != "none")
        for _ in range(shards - 1):
            last, _ = scan(self, "memory_step", first, xs, context)
            first = jax.tree.map(windows.next_shard, last, memory)
        if self.is_mutable_collection(MASS) or self.is_mutable_collection(INPUTS):
            kept = nn.scan(
                Layer.memory_step, variable_broadcast="params", variable_axes={MASS: 0, INPUTS: 0},
                split_rngs={"params": False}, in_axes=(0, nn.broadcast),
            )  # fmt: skip
            last, opened = kept(self, first, xs, context)
        else:
            last, opened = scan(self, "memory_step", first, xs, context)
        last = jax.tree.map(lambda m: m[-batch:], last)
        return last, jax.tree.map(lambda x: x.swapaxes(0, 1), opened)

    def memory_step(self, memory, xs, context: ChunkContext):
        """The memory after one block, and `Opened` of that block.

        `xs`: index in the chunk, and the `Block` that closes.
        """
        number, block = xs
        here = context.block(number)
        _, opened = self.config.memory.open(self, None, memory, here)
        new = self._close(memory, opened, block, here)
        complete = context.complete(self.config.block_size)
        if complete is not None:
            new = where_examples(number < complete, new, memory)
        return new, opened.replace(held=None)

    def _close(self, memory, opened: Opened, block: Block, here: ChunkContext):
        """The memory of this layer after a full block; unchanged where `block` is before the start."""
        rule = self.config.memory
        if rule.attends:
            self.keep(INPUTS, "memory_queries", lambda: rule.queries(opened))
        _, new = rule.close(self, None, memory, opened, block, here)
        if rule.closes_oldest and self.config.memory_segments:
            new = where_examples(block.index >= 0, new, memory)
        return new

    # Tokens within an incomplete block.

    def open_window(self, climb, memory, keys, values, features, context: ChunkContext):
        """What the tokens of a block read, heads first, from a state's `memory`, `keys`, `values`.

        Returns:
          `climb` for the layer above, and a `TokenWindow` of one layer, without the layers' axis.
        """
        c = self.config
        climb, opened = c.memory.open(self, climb, memory, context)

        def with_columns(columns, window):
            blocks = window.reshape(window.shape[0], -1, *window.shape[3:])
            x = blocks if columns is None else jnp.concatenate([columns, blocks], axis=1)
            unused = windows.column_count(c) - x.shape[1]
            return jnp.pad(x, [(0, 0), (0, unused), (0, 0), (0, 0)]).swapaxes(1, 2)

        parts = with_columns(opened.keys, keys), with_columns(opened.values, values)
        return climb, TokenWindow(*parts, opened.visible, opened.extra)

    def read_tokens(self, x, window: TokenWindow, context: ChunkContext):
        """`W` tokens that stay within each example's block: `[B, W, D] -> [B, W, D]`.

        Args:
          x: `I` of the next `W` tokens; those after the last real one are padding.
          window: window of this layer.
          context: positions of the blocks; `start` is the first token's slot.

        Returns:
          `O`, and the tokens' `(keys, values)` `[B, W, K, Dh]`, which the window does not hold yet, with
          their features.
        """
        c, index = self.config, jnp.arange(x.shape[1])
        rows = context.start[:, None] + index
        positions = (context.first_block * c.block_size + context.offset)[:, None] + rows
        angle = self.angles(positions, context)
        plain, k, v = self.project(x)
        rotated = rope.rotate(jnp.concatenate([plain, k], axis=-2), angle)
        q, k = rotated[..., : c.num_heads, :], rotated[..., c.num_heads :, :]
        missing = jnp.maximum(c.memory_segments - context.first_block, 0)[:, None, None]
        columns, block = jnp.arange(window.keys.shape[-2]), windows.columns_before(c)
        written = columns < block + context.start[:, None, None]
        seen = visible(c, rows[..., None], columns, missing) & written
        if window.visible is not None:
            rest = seen.shape[-1] - window.visible.shape[-1]
            seen &= jnp.pad(window.visible, [(0, 0), (0, rest)], constant_values=True)[:, None]
        parts = (
            (window.keys, window.values, seen[:, None, None]),
            (k.swapaxes(1, 2), v.swapaxes(1, 2), visible(c, index[:, None], block + index, 0)),
        )
        bias = c.memory.column_bias(self)
        attend = lambda query, plain=plain: attend_apart(query, parts, c, bias, plain)


        def part(query):
            (keys, values, mask), own = parts
            n = c.memory_columns
            before = keys[..., n:, :], values[..., n:, :], mask[..., n:]
            return windows.joined(*(attend_logsum(query, *of_part, c) for of_part in (before, own)))

        tokens = Tokens(x, q, plain, attend, window.extra, part)
        attention, beside = (f(self, tokens, context) for f in (c.memory.attend, c.memory.beside))
        return self._finish(x, attention, beside), (k, v, c.memory.features(self, x))

    def complete_block(self, climb, memory, keys, values, features, context: ChunkContext):
        """`(climb, memory)` after the block of `context` became full; the rest is a state's."""
        rule = self.config.memory
        slot, lag = (0, self.config.memory_segments) if rule.closes_oldest else (-1, 0)
        _, opened = (None, None) if rule.through_depth else rule.open(self, None, memory, context)
        rows = None
        if rule.row_slots(self.config):
            climb, rows = self._read_rows(climb, opened, keys, values, context)
        past = self._past(y[:, :-1] for y in (keys, values))
        keys, values, features = jax.tree.map(lambda y: y[:, slot], (keys, values, features))
        block = Block(keys, values, context.first_block - lag, features, rows, past)
        if rule.through_depth:
            return self._climb(climb, memory, block, context)[0], memory
        return climb, self._close(memory, opened, block, context)

    def _read_rows(self, x, opened: Opened, keys, values, context: ChunkContext):
        """`O` of the rows `[B, R, D]` of the block that became full, and their keys and values."""
        c, first = self.config, context.first_block
        slots = np.array(c.memory.row_slots(c), np.int32)
        angle = self.angles((first * c.block_size + context.offset)[:, None] + slots, context)
        plain, k, v = self.project(x)
        q, k = rope.rotate(plain, angle), rope.rotate(k, angle)

        def part(query):
            found = window_part(query[:, None], keys, values, slots, first, c)
            return jax.tree.map(lambda y: y[:, 0], found)

        tokens = Tokens(x, q, plain, None, opened.extra, part)
        attention, beside = (f(self, tokens, context) for f in (c.memory.attend, c.memory.beside))
        return self._finish(x, attention, beside), (k, v)


def _no_columns(x):
    """Keys or values of a memory without columns, `[B, C, 0, K, Dh]`, from `x [B, C, S, K, Dh]`."""
    return jnp.zeros(x.shape[:2] + (0,) + x.shape[3:], x.dtype)
