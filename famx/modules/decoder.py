"""The decoder: embeddings, a scan over layers inside a scan over chunks of blocks, and the head."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from famx.modules import deferred, rope
from famx.modules.attention import ATTENTION_RESULT, softcap
from famx.modules.climb import scan_layers
from famx.modules.components import Norm, embedding_init
from famx.modules.config import DecoderConfig
from famx.modules.heads import ValueHead
from famx.modules.layer import INPUTS, MASS, Layer
from famx.modules.prepared import apart
from famx.modules.products import product
from famx.modules.state import DecoderState, where_examples
from famx.modules.weights import one_device
from famx.modules.window import ChunkContext, TokenWindow, batch_axis, column_count, columns_before

_LAYER_INPUT = "layer_input"
_WRITTEN = ("keys", "values")  # fields of a window that tokens are written to
# The memory before each block is always kept: to make it again is the one serial part of a layer.
_keep = jax.checkpoint_policies.save_only_these_names
_both = jax.checkpoint_policies.save_from_both_policies
_ATTENTION = _keep(deferred.CARRIES, ATTENTION_RESULT)
_POLICIES = {
    "full": _keep(deferred.CARRIES),
    "attention": _ATTENTION,
    "dots": _both(_ATTENTION, jax.checkpoint_policies.dots_saveable),
    "dots_no_batch": _both(_ATTENTION, jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[deferred.CARRIES], names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device", offload_dst="pinned_host",
    ),
}  # fmt: skip


class Decoder(nn.Module):
    """A decoder-only Transformer that reads any number of tokens with a state of constant size.

    `tokens` are int32 ids `[B, L]` or, for a `DecoderConfig.frontend` that reads something else, a dict
    of its features, each `[B, L, ...]`.
    """

    config: DecoderConfig

    def setup(self):
        c = self.config
        table = (c.vocab_size, c.embed_dim)
        self.embedding = self.param("embedding", embedding_init("vocab", "embed"), table, c.param_dtype)
        self.memory = c.memory.parameters(c)
        self.layers = Layer(c)
        self.final_norm = Norm(c)
        if not c.tied_embeddings:
            head = nn.with_logical_partitioning(
                nn.initializers.variance_scaling(1.0, "fan_in", "normal"), ("embed", "vocab")
            )
            self.head = self.param("head", head, table[::-1], c.param_dtype)
        if not c.frontend.is_tokens:
            self.frontend = c.frontend.build(c)
        if c.values is not None:
            self.value_head = ValueHead(c)

    def __call__(self, tokens, state: DecoderState | None = None, valid=None, aligned: bool = False):
        """Reads tokens.

        Args:
          tokens: int32 `[B, L]`, `L >= 1`, or features, see the class.
          state: state to resume from; None: the start.
          valid: bool `[B, L]`, right padding False; None: all valid. Padding changes neither logits
            at valid tokens nor the state.
          aligned: a promise that every example of `state` is at the start of a block, which saves
            the realignment. If it does not hold, results are wrong.

        Returns:
          Logits `[B, L, V]` in the compute dtype, and the `DecoderState` after the valid tokens.
        """
        hidden, state = self.read(tokens, state, valid, aligned)
        if self.config.values is not None and self.is_initializing():
            self.values(hidden)
        return self.logits(hidden), state

    def logits(self, hidden):
        """Logits `[..., V]` of the output `[..., D]` of `read`."""
        c = self.config
        x = self.final_norm(hidden)
        if c.tied_embeddings:
            logits = product(x, self.embedding.astype(c.dtype).T, 1)
        else:
            logits = product(x, self.head.astype(c.dtype), 1)
        return softcap(logits, c.logit_softcap)

    def values(self, hidden):
        """Predicted values `[..., width]` (`DecoderConfig.values`) of the output `[..., D]` of `read`."""
        return self.value_head(self.final_norm(hidden))

    def initial_state(self, batch_size: int) -> DecoderState:
        """The state before the first token, for `batch_size` examples."""
        c = self.config
        climb = c.memory.prompt(self)
        zero = jnp.zeros((1,), jnp.int32)
        context = ChunkContext(zero, zero, zero)
        if c.memory.through_depth:
            memory = jax.tree.map(lambda m: m[None], c.memory.start(None, climb, context)[1])
        elif c.memory.exists:
            memory = self._start(climb, context)
        else:
            memory = None
        return DecoderState.initial(c, batch_size, memory)

    def _start(self, climb, context: ChunkContext):
        """The memory of each layer before the first token; `climb` goes up the layers."""
        # On a mesh, gradients of all layers at once would gather the weights of all layers at once.
        if climb is None or self.is_initializing() or not one_device():
            step = lambda layer, climb, _, here: self.config.memory.start(layer, climb, here)
            return self._scan_layers(step, climb, None, context)[1]

        def step(layer, climb, rotation):
            here = context.replace(rotation=rotation)
            return layer.config.memory.start(layer, climb, here)

        rotations = jax.tree.map(jnp.asarray, rope.rotations(self.config))
        return scan_layers(self.layers, step, climb, rotations)[1]

    def read(self, tokens, state=None, valid=None, aligned=False, context_shards: int = 1):
        """As `__call__`, but returns the last layer's output `[B, L, D]` in place of logits.

        With `context_shards`, each chunk is cut into this number of shards of whole blocks, which are
        read side by side: over the devices of the mesh axis `context`, if there are several. The memory
        alone is updated shard after shard. No number changes beyond rounding.

        Raises:
          ValueError: `context_shards` does not divide the blocks of a chunk, or there are several shards
            and the memory is `through_depth`.
        """
        c = self.config
        if self.is_initializing() and c.memory.through_depth:
            # One block creates all variables.
            tokens, valid = jax.tree.map(lambda x: x[:, : c.block_size], tokens), None
        batch, length = shape_of(tokens)
        if state is None:
            state, aligned = self.initial_state(batch), True
        elif state.batch_size != batch:
            raise ValueError(f"tokens have batch {batch}, but the state has {state.batch_size}.")
        elif length == 1 and not self.is_initializing():
            count = jnp.ones((batch,), jnp.int32) if valid is None else valid[:, 0].astype(jnp.int32)
            return self.read_part(tokens, count, state)
        start = None if aligned else state.position % c.block_size
        count = jnp.full((batch,), length, jnp.int32)
        if valid is not None:
            count = jnp.sum(valid, axis=1, dtype=jnp.int32)
        whole = aligned and valid is None and length % c.block_size == 0
        blocks = -(-(length + (0 if aligned else c.block_size - 1)) // c.block_size)
        size = 1 if c.memory.through_depth else min(c.blocks_per_chunk or blocks, blocks)
        chunks = 1 if self.is_initializing() else -(-blocks // size)
        size = blocks if self.is_initializing() else size
        if context_shards > 1 and c.memory.through_depth:
            raise ValueError(
                f"A memory of the kind {c.memory.kind!r} is made at the top of the stack, so that blocks"
                " cannot be read side by side: set the mesh axis context to 1."
            )
        if size % context_shards:
            raise ValueError(
                f"{size} blocks that are read at once cannot be cut into {context_shards} shards of whole"
                " blocks: change the length, blocks_per_chunk or the mesh axis context."
            )
        whole = whole and chunks * size == blocks
        slots = chunks * size * c.block_size

        # Put each example's tokens into the slots of its own blocks.
        first = jnp.zeros((batch, 1), jnp.int32) if start is None else start[:, None]
        if not whole:
            source = jnp.clip(jnp.arange(slots) - first, 0, length - 1)
            tokens = jax.tree.map(lambda x: _at(x, source), tokens)
        chunked = lambda x: x.reshape(batch, chunks, size, c.block_size, *x.shape[2:]).swapaxes(0, 1)
        tokens = jax.tree.map(chunked, tokens)

        def read_chunk(decoder, state, xs):
            tokens, index = xs
            span = size * c.block_size
            context = decoder._here(state)
            if whole:
                return decoder._read_chunk(tokens, state, context, context_shards)
            end = count if start is None else count + start
            stop = jnp.clip(end - index * span, 0, span)
            if start is not None or chunks > 1:
                # An example without tokens in a later chunk keeps its incomplete block.
                held = state.position % c.block_size
                context, stop = context.replace(start=held), jnp.maximum(stop, held)
            return decoder._read_chunk(tokens, state, context.replace(stop=stop), context_shards)

        if chunks == 1:
            state, hidden = read_chunk(self, state, (jax.tree.map(lambda x: x[0], tokens), 0))
        else:
            scan = nn.scan(
                read_chunk, variable_broadcast="params", variable_axes={MASS: 0, INPUTS: 0},
                split_rngs={"params": False},
            )  # fmt: skip
            state, hidden = scan(self, state, (tokens, jnp.arange(chunks, dtype=jnp.int32)))
            hidden = hidden.swapaxes(0, 1)
        hidden = hidden.reshape(batch, slots, c.embed_dim)
        if not whole:
            source = jnp.arange(length) + first
            hidden = jnp.take_along_axis(hidden, source[..., None], axis=1)
        return hidden, state

    def _read_chunk(self, tokens, state: DecoderState, context: ChunkContext, shards: int):
        """Blocks `[B, C, S]` of tokens: the state after them and the output `[B, C, S, D]`."""
        c = self.config
        batch, blocks = shape_of(tokens)
        examples = batch_axis(shards)

        def layer_step(layer, carry, xs, context):
            x, climb = carry
            x = checkpoint_name(x, _LAYER_INPUT)
            x, climb, *after = layer.read_chunk(x, climb, *xs, context)
            x = nn.with_logical_constraint(x, (examples, "blocks", "block", "embed"))
            return (x, climb), after

        if c.remat != "none":
            layer_step = nn.remat(layer_step, prevent_cse=False, policy=_POLICIES[c.remat])
        folded = jax.tree.map(lambda x: _folded(x, shards), tokens)
        x = self._embed(folded)
        x = nn.with_logical_constraint(x, (examples, "blocks", "block", "embed"))
        rows = self._rows(x.shape[:2])
        if rows is not None:
            x = jnp.concatenate([x, rows], axis=2)
        here = context.shards(shards, blocks // shards, c.block_size)
        (x, climb), (memory, keys, values, features) = self._scan_layers(
            layer_step, (x, self._climbs(state)), self._by_layer(state), here, c.unroll_layers
        )
        x = x[:, :, : c.block_size]
        x = x.reshape(shards, batch, -1, c.embed_dim).swapaxes(0, 1).reshape(batch, -1, c.embed_dim)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        x = x.reshape(batch, blocks, c.block_size, c.embed_dim)
        if context.stop is None:
            complete, read = blocks, blocks * c.block_size
        else:
            complete = context.complete(c.block_size)
            read = context.stop if context.start is None else context.stop - context.start
        if c.memory.through_depth:
            memory = self._made(climb, state)
            if context.stop is not None:
                memory = where_examples(complete > 0, memory, state.memory, axis=1)
        state = DecoderState(
            memory, keys, values, state.position + read, state.updates + complete, state.offset,
            features,
        )  # fmt: skip
        return state, x

    # Tokens within an incomplete block, for decoding: open the window, read tokens as long as the block
    # has room, close the window, complete the blocks that became full.

    def open_window(self, state: DecoderState, layers=None):
        """What each example's incomplete block reads; valid until one of the blocks is full.

        Args:
          state: state to resume from.
          layers: as for `read_tokens`.

        Returns:
          A `TokenWindow` of all layers; a list of those of each layer if there are `layers`.
        """
        climb, context, xs = self._climbs(state), self._here(state), self._by_layer(state)
        opening = None if climb is None else climb[0]
        if layers is not None:
            return self._each_layer(layers, "open_window", opening, apart(xs), context)[1]
        step = lambda layer, climb, xs, context: layer.open_window(climb, *xs, context)
        return self._scan_layers(step, opening, xs, context)[1]

    def read_tokens(self, tokens, count, state: DecoderState, window: TokenWindow, layers=None):
        """Reads tokens that stay within each example's block, at the cost of these tokens alone.

        Args:
          tokens: int32 `[B, W]`, `W <= S`, or features.
          count: number of real tokens, int32 `[B]`; may be 0, and must not exceed the free slots of the
            example's block.
          state: state to resume from.
          window: window of `state`, made with the same `layers`.
          layers: list of the parameters of each layer (`prepared.apart`); None: the decoder's own, in a
            loop over the layers. Without that loop a token is one line of operations, which a GPU can
            record as one graph, but which takes longer to compile.

        Returns:
          The last layer's output `[B, W, D]`; the state, whose keys and values are not those of the
          window until `close_window`; and the window. Where the block became full (`position % S` is
          0 and `count` is not), `close_window` and `complete_blocks` must follow.
        """
        c = self.config
        slot = state.position % c.block_size
        context, x = self._here(state).replace(start=slot), self._embed(tokens)
        if layers is None:
            step = lambda layer, x, window, context: layer.read_tokens(x, window, context)
            hidden, (k, v, features) = self._scan_layers(step, x, window, context)
        else:
            xs = [(of_layer,) for of_layer in window]
            hidden, written = self._each_layer(layers, "read_tokens", x, xs, context)
            k, v, features = zip(*written, strict=True)
            features = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *features)
        rows, width = shape_of(tokens)
        index = jnp.arange(width)
        columns = columns_before(c) + slot[:, None] + index
        write = jnp.where(index < count[:, None], columns, column_count(c) + index)  # dropped there
        examples = jnp.arange(rows)[:, None]

        def put(window, k, v):
            set_ = lambda array, new: array.at[examples, :, write].set(
                new, mode="drop", unique_indices=True
            )
            return window.replace(keys=set_(window.keys, k), values=set_(window.values, v))

        window = jax.vmap(put)(window, k, v) if layers is None else [*map(put, window, k, v)]
        slots = jnp.where(index < count[:, None], slot[:, None] + index, c.block_size + index)
        note = lambda held, new: held.at[:, examples, -1, slots].set(
            new, mode="drop", unique_indices=True
        )
        features = jax.tree.map(note, state.features, features)
        return hidden, state.replace(position=state.position + count, features=features), window

    def close_window(self, state: DecoderState, window) -> DecoderState:
        """The state with the keys and values that `read_tokens` wrote to the window, or to a list."""
        start = columns_before(self.config)
        own = lambda x: x[..., start : start + self.config.block_size, :].swapaxes(-3, -2)
        if isinstance(window, list):
            keys, values = (jnp.stack([own(getattr(w, name)) for w in window]) for name in _WRITTEN)
        else:
            keys, values = (own(getattr(window, name)) for name in _WRITTEN)
        put = lambda blocks, new: blocks.at[:, :, -1].set(new)
        return state.replace(keys=put(state.keys, keys), values=put(state.values, values))

    def complete_blocks(self, state: DecoderState, full):
        """The state after the examples `full`, bool `[B]`, have filled their blocks."""
        here = self._here(state)
        context = here.replace(first_block=here.first_block - 1)
        memory = state.memory
        if self.config.memory.exists:
            step = lambda layer, climb, xs, here: layer.complete_block(climb, *xs, here)
            climb = self._climbs(state) if self.config.memory.through_depth else self._rows(full.shape)
            climb, memory = self._scan_layers(step, climb, self._by_layer(state), context)
        if self.config.memory.through_depth:
            memory = self._made(climb, state)
        shift = lambda x: jnp.pad(x[:, :, 1:], [(0, 0), (0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 3))
        done = state.replace(
            memory=memory,
            keys=shift(state.keys),
            values=shift(state.values),
            features=jax.tree.map(shift, state.features),
            updates=state.updates + 1,
        )
        return done.select(full, state)

    def read_part(self, tokens, count, state: DecoderState):
        """`read_tokens` and the steps that must follow it: hidden `[B, W, D]` and the state."""
        hidden, state, window = self.read_tokens(tokens, count, state, self.open_window(state))
        state = self.close_window(state, window)
        full = (count > 0) & (state.position % self.config.block_size == 0)
        state = nn.cond(
            jnp.any(full),
            lambda decoder, state: decoder.complete_blocks(state, full),
            lambda _, state: state,
            self,
            state,
        )
        return hidden, state

    def _embed(self, tokens):
        c = self.config
        rows = lambda ids: jnp.take(self.embedding, ids, axis=0).astype(c.dtype)
        features = isinstance(tokens, Mapping)
        if not c.frontend.accepts(features):
            raise ValueError(c.frontend.refusal(features))
        x = self.frontend(tokens, rows) if features else rows(tokens)
        return x * math.sqrt(c.embed_dim) if c.scale_embeddings else x

    def _rows(self, shape):
        """The memory's rows of blocks `[*shape, R, D]` before the first layer; None: it has none."""
        rows = self.config.memory.block_rows(self)
        if rows is None:
            return None
        return jnp.broadcast_to(rows.astype(self.config.dtype), (*shape, *rows.shape))

    # A memory `through_depth` belongs to the model: layers get `climb` in place of a memory.

    def _climbs(self, state: DecoderState):
        """First `climb` of `open` and of `close` for a memory `through_depth`; else None."""
        rule = self.config.memory
        if not rule.through_depth:
            return None
        memory = jax.tree.map(lambda m: m[0], state.memory)
        return rule.enter(self, memory)

    def _by_layer(self, state: DecoderState):
        """`(memory, keys, values, features)`, layers first; no memory if it is `through_depth`."""
        memory = None if self.config.memory.through_depth else state.memory
        return memory, state.keys, state.values, state.features

    def _made(self, climb, state: DecoderState):
        """The memory `through_depth` after a full block, from the `climb` of the last layer."""
        memory = jax.tree.map(lambda m: m[0], state.memory)
        made = self.config.memory.leave(self, climb[1], memory)
        return jax.tree.map(lambda m: m[None], made)

    def _here(self, state: DecoderState) -> ChunkContext:
        first, shared = state.position // self.config.block_size, self.config.memory.shared(self)
        return ChunkContext(first, state.offset, state.updates, shared=shared)

    def _each_layer(self, layers, method: str, x, xs, context: ChunkContext):
        """Like `_scan_layers` of `layer.method(x, *xs, context) -> (x, y)`, layer after layer.

        `layers` and `xs` are lists of what each layer has, and `ys` is one, too.
        """
        module = Layer(self.config, parent=None)

        @jax.jit  # traced once
        def step(params, *args):
            return module.apply({"params": params}, *args, method=method)

        ys, rotations = [], apart(rope.rotations(self.config))
        for params, of_layer, rotation in zip(layers, xs, rotations, strict=True):
            x, y = step(params, x, *of_layer, context.replace(rotation=rotation))
            ys.append(y)
        return x, ys

    def _scan_layers(self, step, carry, xs, context: ChunkContext, unroll: int = 1):
        """Scans `step(layer, carry, x, context) -> (carry, y)`, with each layer's own `context`."""

        def layer_step(layer, carry, xs):
            rotation, xs = xs
            return step(layer, carry, xs, context.replace(rotation=rotation))

        scan = nn.scan(
            layer_step,
            variable_axes={"params": 0, MASS: 0, INPUTS: 0},
            split_rngs={"params": True},
            length=self.config.num_layers,
            unroll=min(unroll, self.config.num_layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        rotations = jax.tree.map(jnp.asarray, rope.rotations(self.config))
        return scan(self.layers, carry, (rotations, xs))


def shape_of(tokens) -> tuple[int, int]:
    """The first two axes of tokens, or of features."""
    return jax.tree.leaves(tokens)[0].shape[:2]


def _at(x, source):
    """`x [B, L, ...]` at the positions `source [B, X]`."""
    return jnp.take_along_axis(x, source.reshape(source.shape + (1,) * (x.ndim - 2)), axis=1)


def _folded(x, shards: int):
    """`[B, C, S, ...]` as `[shards * B, C / shards, S, ...]`."""
    batch, _, *rest = x.shape
    x = x.reshape(batch, shards, -1, *rest).swapaxes(0, 1)
    return x.reshape(batch * shards, -1, *rest)
