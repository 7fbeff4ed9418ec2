"""The decoder: embeddings, a scan over layers inside a scan over chunks of blocks, and the head."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from famx.modules.attention import softcap
from famx.modules.config import DecoderConfig
from famx.modules.layer import ChunkContext, Layer
from famx.modules.layers import Norm, embedding_init
from famx.modules.state import DecoderState

_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Decoder(nn.Module):
    """A decoder-only Transformer that reads any number of tokens with a state of constant size."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        table = (c.vocab_size, c.embed_dim)
        self.embedding = self.param("embedding", embedding_init("vocab", "embed"), table, c.param_dtype)
        if c.fam_length:
            shape, axes = (c.fam_length, c.embed_dim), ("fam", "embed")
            if c.fam_start == "prefix":
                shape, axes = (c.num_layers, *shape), ("layers", *axes)
            init = nn.with_logical_partitioning(nn.initializers.normal(c.embed_dim**-0.5), axes)
            self.fam = self.param("fam", init, shape, c.param_dtype)
        self.layers = Layer(c)
        self.final_norm = Norm(c)
        if not c.tied_embeddings:
            head = nn.with_logical_partitioning(
                nn.initializers.variance_scaling(1.0, "fan_in", "normal"), ("embed", "vocab")
            )
            self.head = self.param("head", head, table[::-1], c.param_dtype)

    def __call__(self, tokens, state: DecoderState | None = None, valid=None, aligned: bool = False):
        """Reads tokens.

        Args:
          tokens: int32 `[B, L]`, `L >= 1`.
          state: where to go on reading; None: from the start.
          valid: bool `[B, L]`, right padding False; None: all valid. What stands at padding
            touches neither logits at valid tokens nor the state.
          aligned: a promise that every example of `state` stands at the start of a block, which
            saves the realignment. Broken, it gives wrong numbers.

        Returns:
          Logits `[B, L, V]` in the compute dtype, and the `DecoderState` after the valid tokens.
        """
        hidden, state = self.read(tokens, state, valid, aligned)
        return self.logits(hidden), state

    def logits(self, hidden):
        """Logits `[..., V]` of the output `[..., D]` of `read`."""
        c = self.config
        x = self.final_norm(hidden)
        if c.tied_embeddings:
            logits = jnp.einsum("...d,vd->...v", x, self.embedding.astype(c.dtype))
        else:
            logits = jnp.einsum("...d,dv->...v", x, self.head.astype(c.dtype))
        return softcap(logits, c.logit_softcap)

    def initial_state(self, batch_size: int) -> DecoderState:
        """The state before the first token: each layer's memory is the prompt run up to it."""
        c = self.config
        dtype = jnp.promote_types(c.dtype, jnp.float32)
        if not c.fam_length:
            memory = jnp.zeros((c.num_layers, 0, c.embed_dim), dtype)
        elif c.fam_start == "prefix":
            memory = self.fam.astype(dtype)
        else:
            climb = lambda layer, x, _: (layer.prompt(x).astype(dtype), x)
            _, memory = self._scan_layers(climb, self.fam.astype(dtype), None)
        return DecoderState.initial(c, batch_size, memory)

    def read(self, tokens, state=None, valid=None, aligned=False):
        """As `__call__`, but returns the last layer's output `[B, L, D]` in place of logits."""
        c = self.config
        batch, length = tokens.shape
        if state is None:
            state, aligned = self.initial_state(batch), True
        elif state.batch_size != batch:
            raise ValueError(f"tokens have batch {batch}, but the state has {state.batch_size}.")
        elif length == 1 and not self.is_initializing():
            return self._read_one(tokens, state, valid)
        start = None if aligned else state.position % c.block_size
        count = jnp.full((batch,), length, jnp.int32)
        if valid is not None:
            count = jnp.sum(valid, axis=1, dtype=jnp.int32)
        whole = aligned and valid is None and length % c.block_size == 0
        blocks = -(-(length + (0 if aligned else c.block_size - 1)) // c.block_size)
        size = min(c.blocks_per_chunk or blocks, blocks)
        chunks = 1 if self.is_initializing() else -(-blocks // size)
        size = blocks if self.is_initializing() else size
        whole = whole and chunks * size == blocks
        slots = chunks * size * c.block_size

        # Put each example's tokens into the slots of its own blocks.
        first = jnp.zeros((batch, 1), jnp.int32) if start is None else start[:, None]
        if not whole:
            source = jnp.clip(jnp.arange(slots) - first, 0, length - 1)
            tokens = jnp.take_along_axis(tokens, source, axis=1)
        tokens = tokens.reshape(batch, chunks, size, c.block_size).swapaxes(0, 1)

        def read_chunk(decoder, state, xs):
            tokens, index = xs
            span = size * c.block_size
            context = ChunkContext(state.position // c.block_size, state.offset, state.updates)
            if whole:
                return decoder._read_chunk(tokens, state, context)
            end = count if start is None else count + start
            stop = jnp.clip(end - index * span, 0, span)
            if start is not None or chunks > 1:
                # An example without tokens in a later chunk keeps its incomplete block.
                held = state.position % c.block_size
                context, stop = context.replace(start=held), jnp.maximum(stop, held)
            return decoder._read_chunk(tokens, state, context.replace(stop=stop))

        if chunks == 1:
            state, hidden = read_chunk(self, state, (tokens[0], 0))
        else:
            scan = nn.scan(
                read_chunk, variable_broadcast="params", split_rngs={"params": False}
            )
            state, hidden = scan(self, state, (tokens, jnp.arange(chunks, dtype=jnp.int32)))
            hidden = hidden.swapaxes(0, 1)
        hidden = hidden.reshape(batch, slots, c.embed_dim)
        if not whole:
            own = jnp.arange(length) + first
            hidden = jnp.take_along_axis(hidden, own[..., None], axis=1)
        return hidden, state

    def _read_chunk(self, tokens, state: DecoderState, context: ChunkContext):
        """Blocks `[B, C, S]` of tokens: the state after them and the output `[B, C, S, D]`."""
        c = self.config

        def layer_step(layer, x, xs):
            x, memory, keys, values = layer.read_chunk(x, *xs, context)
            x = nn.with_logical_constraint(x, ("batch", "blocks", "length", "embed"))
            return x, (memory, keys, values)

        if c.remat != "none":
            layer_step = nn.remat(layer_step, prevent_cse=False, policy=_POLICIES[c.remat])
        x, (memory, keys, values) = self._scan_layers(
            layer_step, self._embed(tokens), (state.memory, state.keys, state.values)
        )
        if context.stop is None:
            complete, read = tokens.shape[1], tokens.shape[1] * c.block_size
        else:
            complete = context.complete(c.block_size)
            read = context.stop if context.start is None else context.stop - context.start
        state = DecoderState(
            memory, keys, values, state.position + read, state.updates + complete, state.offset
        )
        return state, x

    def _read_one(self, tokens, state: DecoderState, valid):
        """One token per example, at the cost of one token: `[B, 1] -> [B, 1, D]`, state."""
        c = self.config
        slot = state.position % c.block_size
        block = state.position // c.block_size
        context = ChunkContext(block, state.offset, state.updates, slot)

        def layer_step(layer, x, xs):
            x, k, v = layer.read_token(x, *xs, context)
            return x, (k, v)

        hidden, (k, v) = self._scan_layers(
            layer_step, self._embed(tokens[:, 0]), (state.memory, state.keys, state.values)
        )
        read = jnp.ones_like(slot) if valid is None else valid[:, 0].astype(jnp.int32)
        write = jnp.where(read > 0, slot, c.block_size)  # out of bounds: dropped
        examples = jnp.arange(tokens.shape[0])
        put = lambda window, new: window.at[:, examples, -1, write].set(new, mode="drop")
        state = state.replace(
            keys=put(state.keys, k), values=put(state.values, v), position=state.position + read
        )
        full = (slot + read) == c.block_size

        def complete(decoder, state):
            def layer_step(layer, _, xs):
                memory, keys, values = xs
                return None, layer.complete_block(
                    memory, keys, values, block, state.offset, state.updates
                )

            xs = (state.memory, state.keys, state.values)
            memory = decoder._scan_layers(layer_step, None, xs)[1]
            shift = lambda window: jnp.pad(
                window[:, :, 1:], [(0, 0), (0, 0), (0, 1), (0, 0), (0, 0), (0, 0)]
            )
            done = state.replace(
                memory=memory,
                keys=shift(state.keys),
                values=shift(state.values),
                updates=state.updates + 1,
            )
            return done.select(full, state)

        state = nn.cond(jnp.any(full), complete, lambda _, state: state, self, state)
        return hidden[:, None], state

    def _embed(self, tokens):
        c = self.config
        x = jnp.take(self.embedding, tokens, axis=0).astype(c.dtype)
        return x * math.sqrt(c.embed_dim) if c.scale_embeddings else x

    def _scan_layers(self, step, carry, xs):
        scan = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self.layers, carry, xs)
