"""Streaming: reads a batch of texts, or of other sequences, of any length in pieces, with a state of
constant size."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from famx.base.distributed import on_host
from famx.base.features import TOKENS
from famx.base.waiting import Announced
from famx.decoding.generation import Generation, Sampling, generate
from famx.modules import Decoder, DecoderState
from famx.modules.prepared import computing, with_joint_kernels

_BLOCKS = 8  # whole blocks per call: enough to hide the cost of a call, few enough for a small program
_PART_WIDTHS = (1, 16, 256)
_HEAD_TOKENS = 256  # tokens whose logits exist at the same time
_MAX_POSITION = 2**31 - 1  # int32


class Streamer:
    """Jitted reading and generation of a decoder; the state stays on the device and is donated.

    Only a handful of programs are compiled per batch size, whatever the lengths: texts are cut into
    pieces of eight blocks, of one block, and of a few widths within a block. Examples may have different
    lengths and different positions in their blocks. Wherever tokens are read, a model with a frontend
    reads a dict of its features, each `[B, L, ...]` (`DecoderModel.inputs` takes them from a batch).

    Args:
      module: the decoder.
      zero_memory: set the memory to zero before every piece that is read, to measure what it contributes;
        `generate` leaves it as it is.
      widths: numbers of tokens that are read in one call within a block; each is a program of its own.
    """

    def __init__(
        self, module: Decoder, zero_memory: bool = False, widths: Sequence[int] = _PART_WIDTHS
    ):
        config = dataclasses.replace(module.config, blocks_per_chunk=1)
        self.module = Decoder(config)
        self._blocks = 1 if zero_memory else _BLOCKS
        self._widths = sorted({min(width, config.block_size) for width in widths})
        apply = lambda params, method, *args, **kwargs: self.module.apply(
            {"params": params}, *args, method=method, **kwargs
        )

        reset = lambda state: state.zero_memory() if zero_memory else state

        def head(params, hidden, targets, kind):
            """Per-token outputs of `hidden [B, L, D]`; logits of a few tokens exist at a time."""
            if kind == "state":
                return None
            if kind == "values":
                return apply(params, "values", hidden)
            batch, length, width = hidden.shape
            step = next(n for n in range(min(_HEAD_TOKENS, length), 0, -1) if length % n == 0)

            def outputs(hidden, targets):
                logits = apply(params, "logits", hidden)
                if kind == "logits":
                    return logits
                best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
                if kind == "best":
                    return best
                wide = jnp.promote_types(logits.dtype, jnp.float32)
                log_p = jax.nn.log_softmax(logits.astype(wide))
                picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
                return picked, best == targets

            cut = lambda x: x.reshape(batch, length // step, step, *x.shape[2:]).swapaxes(0, 1)
            out = jax.lax.map(lambda xs: outputs(*xs), (cut(hidden), cut(targets)))
            return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, length, *x.shape[3:]), out)

        def keep_last(last, hidden, count):
            index = jnp.maximum(count - 1, 0)[:, None, None]
            newest = jnp.take_along_axis(hidden, index, axis=1)[:, 0]
            return jnp.where((count > 0)[:, None], newest, last)

        @functools.partial(jax.jit, donate_argnums=(1, 2), static_argnames=("kind", "all_read"))
        def read_blocks(params, state, last, tokens, targets, reads, kind, all_read):
            params = with_joint_kernels(computing(params, config, tables=kind != "state"))
            hidden, new = apply(params, "read", tokens, reset(state), aligned=True)
            new = new if all_read else new.select(reads, state)
            last = keep_last(last, hidden, jnp.where(reads, hidden.shape[1], 0))
            return head(params, hidden, targets, kind), new, last

        @functools.partial(jax.jit, donate_argnums=(1, 2), static_argnames="kind")
        def read_part(params, state, last, tokens, targets, count, kind):
            params = computing(params, config, tables=kind != "state")
            hidden, state = apply(params, "read_part", tokens, count, reset(state))
            return head(params, hidden, targets, kind), state, keep_last(last, hidden, count)

        @functools.partial(jax.jit, static_argnums=1)
        def initial(params, batch_size):
            state = apply(params, "initial_state", batch_size)
            state = jax.tree.map(jnp.copy, state)  # keys and values may share a buffer of zeros
            # Split over a mesh as after reading, or the first reading would be compiled twice.
            names = lambda x, axis: tuple("batch" if i == axis else None for i in range(x.ndim))
            return state.map_examples(lambda x, axis: nn.with_logical_constraint(x, names(x, axis)))

        @functools.partial(jax.jit, donate_argnums=(2,), static_argnames="sampling")
        def write(params, logits, state, seeds, samples, room=None, *, sampling):
            keys = jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(seeds, samples)
            return generate(self.module, params, logits, state, sampling, keys, room)

        @functools.partial(jax.jit, static_argnums=2)
        def repeat(logits, state, samples):
            rows = np.repeat(np.arange(state.batch_size), samples)
            return logits[rows], state.take(rows)

        self._initial = initial
        self._read_blocks = Announced(read_blocks, "the reading of blocks")
        self._read_part = Announced(read_part, "the reading of parts of a block")
        self._logits = jax.jit(lambda params, hidden: apply(params, "logits", hidden))
        self._write, self._repeat = Announced(write, "the writing of text"), repeat

    def initial_state(self, params, batch_size: int) -> DecoderState:
        """State before the first token.

        Raises:
          ValueError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"A batch needs at least one example, not {batch_size}.")
        return self._initial(params, batch_size)

    def read(self, params, state: DecoderState, tokens, lengths=None, aligned: bool = False):
        """Reads tokens.

        Args:
          params: the decoder's parameters.
          state: state to resume from; it is donated.
          tokens: int32 `[B, L]`, any `L`.
          lengths: number of tokens of each example, int `[B]`, the rest being padding; None: all `L`.
          aligned: a promise that every example is at the start of a block and that the tokens fill whole
            blocks. Nothing of the state is then copied to the host.

        Returns:
          Logits `[B, V]` after each example's last token (meaningless where the length is 0), and the
          state.

        Raises:
          ValueError: a token is outside the vocabulary, shapes do not fit, or there is no token.
        """
        _, state, last = self._run(params, state, tokens, None, lengths, "state", aligned)
        return self._logits(params, last), state

    def logits(self, params, state: DecoderState, tokens, lengths=None):
        """Logits of every token `[B, L, V]` on the host, 0 at padding, and the state; see `read`."""
        out, state, _ = self._run(params, state, tokens, None, lengths, "logits")
        return out[0], state

    def predict(self, params, state: DecoderState, tokens, lengths=None):
        """Arg-max of every next token, int32 `[B, L]` on the host, and the state; see `read`."""
        out, state, _ = self._run(params, state, tokens, None, lengths, "best")
        return out[0], state

    def score(self, params, state: DecoderState, tokens, targets, lengths=None):
        """Log-likelihood of each next token; see `read`.

        Args:
          targets: int32 `[B, L]`, the token that follows each of `tokens`.

        Returns:
          `(log-likelihood of the target [B, L] (at least float32), whether it is the likeliest token
          bool [B, L])` on the host, 0 and False at padding; and the state.
        """
        out, state, _ = self._run(params, state, tokens, targets, lengths, "score")
        return tuple(out), state

    def values(self, params, state: DecoderState, tokens, lengths=None):
        """Values that are predicted at each position (`DecoderConfig.values`); see `read`.

        Returns:
          `[B, L, width]` on the host, 0 at padding; and the state.
        """
        out, state, _ = self._run(params, state, tokens, None, lengths, "values")
        return out[0], state

    def generate(
        self,
        params,
        logits,
        state: DecoderState,
        sampling: Sampling,
        seeds=None,
        samples: int = 1,
        room=None,
    ) -> Generation:
        """Continues each example; `logits` and `state` as `read` returned them, the state is donated.

        Args:
          seeds: random seed of each example, int `[B]`; None: 0, 1, ...
          samples: continuations per example; row `i * samples + j` is sample `j` of example `i`.
          room: maximum number of tokens of each continuation, int `[B * samples]`; None:
            `sampling.max_new_tokens`.

        Returns:
          A `Generation` of `B * samples` rows, on the device.

        Raises:
          ValueError: `samples` is below 1, or a position would exceed int32.
        """
        if samples < 1:
            raise ValueError(f"There must be at least one sample per prompt, not {samples}.")
        check_position(on_host(state.position).astype(np.int64) + sampling.max_new_tokens)
        seeds = np.arange(state.batch_size) if seeds is None else np.asarray(seeds, np.int64)
        numbers = np.tile(np.arange(samples, dtype=np.uint32), state.batch_size)
        if samples > 1:
            seeds = np.repeat(seeds, samples)
            logits, state = self._repeat(logits, state, samples)
        seeds = (seeds % 2**32).astype(np.uint32)
        room = None if room is None else np.asarray(room, np.int32)
        return self._write(params, logits, state, seeds, numbers, room, sampling=sampling)

    def lower_read(self, params, state: DecoderState, rows=None):
        """Lowers the step that reads most of a long text; returns it with its number of tokens.

        Args:
          params, state: arrays or ShapeDtypeStructs.
          rows: sharding of arrays whose first axis is the batch; None leaves it to the compiler.
        """
        batch_size, config = state.batch_size, self.module.config
        length = self._blocks * config.block_size
        make = lambda dtype, *shape: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows)
        targets = make(jnp.int32, length)
        tokens: Any = targets
        if not config.frontend.is_tokens:
            tokens = {x.name: make(x.dtype, length, *x.shape) for x in config.frontend.features}
        lowered = self._read_blocks.lower(
            params, state, make(config.dtype, config.embed_dim), tokens, targets, make(jnp.bool_),
            kind="state", all_read=True,
        )  # fmt: skip
        return lowered, length

    def lower_write(self, params, state: DecoderState, sampling: Sampling, rows=None):
        """Lowers the program of `generate`; arguments as for `lower_read`."""
        make = lambda dtype, *shape: jax.ShapeDtypeStruct(
            (state.batch_size, *shape), dtype, sharding=rows
        )
        numbers = make(jnp.uint32)
        logits = make(self.module.config.dtype, self.module.config.vocab_size)
        return self._write.lower(params, logits, state, numbers, numbers, sampling=sampling)

    # Cutting.

    def _run(self, params, state, tokens, targets, lengths, kind, aligned=False):
        """`(outputs [B, L, ...] on the host, the state, hidden [B, D] after the last token)`."""
        config, size = self.module.config, self.module.config.block_size
        batch, length = self._check(state, tokens, targets, lengths)
        if targets is None:  # nothing reads them
            features = isinstance(tokens, Mapping)
            targets = np.zeros((batch, length), np.int32) if features else tokens
        last = jnp.zeros((batch, config.embed_dim), config.dtype)
        left = np.full(batch, length, np.int64)
        if lengths is not None:
            left = np.asarray(lengths, np.int64).copy()
        if aligned and (lengths is not None or length % size):
            raise ValueError(
                f"{length} tokens do not fill whole blocks of {size}: pad them, or leave out `aligned`."
            )
        position = np.zeros(batch, np.int64) if aligned else on_host(state.position).astype(np.int64)
        check_position(position + left)
        if not left.any():
            raise ValueError("There is nothing to read: give at least one token.")
        phase, done = position % size, np.zeros(batch, np.int64)
        pieces = []
        while left.any():
            full = (phase == 0) & (left >= size)
            # Examples within a block are first read to its end; the remainders of all come last.
            parts = (left > 0) & (phase > 0 if full.any() else True)
            if parts.any():
                count = np.where(parts, np.minimum(left, size - phase), 0)
                width = next((w for w in self._widths if w >= count.max()), self._widths[-1])
                count = np.minimum(count, width)
                piece = _cut((tokens, targets), done, width)
                out, state, last = self._read_part(
                    params, state, last, *piece, count.astype(np.int32), kind=kind
                )
            else:
                blocks = self._blocks if left[full].min() >= self._blocks * size else 1
                count = np.where(full, blocks * size, 0)
                piece = _cut((tokens, targets), done, blocks * size)
                out, state, last = self._read_blocks(
                    params, state, last, *piece, full, kind=kind, all_read=bool(full.all())
                )
            pieces.append((done.copy(), count, out))
            done, left, phase = done + count, left - count, (phase + count) % size
        return _gather(pieces, batch, length, kind), state, last

    def _check(self, state, tokens, targets, lengths):
        arrays = self._arrays(tokens)
        shapes = {x.shape[:2] for x in arrays} | ({targets.shape} if targets is not None else set())
        if len(shapes) > 1:
            raise ValueError(f"tokens and targets must be [batch, length], got {arrays[0].shape}.")
        batch, length = shapes.pop()
        if batch < 1:
            raise ValueError("A batch needs at least one example, but tokens has none.")
        if state.batch_size != batch:
            raise ValueError(f"tokens have batch {batch}, but the state has {state.batch_size}.")
        if lengths is not None:
            given = np.asarray(lengths)
            if given.shape != (batch,) or given.min() < 0 or given.max() > length:
                raise ValueError(
                    f"lengths must be {batch} numbers from 0 to {length}, got {given.tolist()}."
                )
        if isinstance(tokens, Mapping):
            tokens = tokens.get(TOKENS.name)
        for ids in (tokens, targets):
            check_ids(ids, self.module.config.vocab_size)
        return batch, length

    def _arrays(self, tokens) -> list:
        """The arrays that are read.

        Raises:
          ValueError: they are not those that the model reads.
        """
        frontend, given = self.module.config.frontend, isinstance(tokens, Mapping)
        if not frontend.accepts(given):
            raise ValueError(frontend.refusal(given))
        if not given:
            if tokens.ndim != 2:
                raise ValueError(f"tokens and targets must be [batch, length], got {tokens.shape}.")
            return [tokens]
        for feature in frontend.features:
            if feature.name not in tokens or tokens[feature.name].shape[2:] != feature.shape:
                raise ValueError(frontend.refusal(False))
        return [tokens[feature.name] for feature in frontend.features]


def check_ids(ids, vocab_size: int) -> None:
    """Raises ValueError if one of the numpy ids lies outside the vocabulary."""
    if isinstance(ids, np.ndarray) and ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise ValueError(
            f"Token id {wrong} is not in the vocabulary: the model knows the ids 0 to {vocab_size - 1}."
        )


def check_position(end):
    """Raises ValueError if reading up to the positions `end` (numpy int64) goes beyond the last one."""
    if end.max(initial=0) > _MAX_POSITION:
        raise ValueError(
            f"This would be token {int(end.max()):,}, and positions end at {_MAX_POSITION:,}: begin"
            " from a new state."
        )


def _cut(arrays, start, width):
    """`width` tokens of each row of a tree of arrays `[B, L, ...]`, from the row's `start` on; the last
    token is repeated beyond the end of a row."""
    first, length = int(start[0]), jax.tree.leaves(arrays)[0].shape[1]
    if (start == first).all() and first + width <= length:
        return jax.tree.map(lambda x: x[:, first : first + width], arrays)
    index = np.minimum(start[:, None] + np.arange(width), length - 1)
    rows = np.arange(len(index))[:, None]
    return jax.tree.map(lambda x: np.asarray(x)[rows, index], arrays)


def _gather(pieces, batch, length, kind):
    """Copies the outputs of all pieces to the host: a list of arrays `[B, L, ...]`."""
    if kind == "state":
        return None
    outs = None
    for start, count, out in pieces:
        leaves = [on_host(leaf) for leaf in jax.tree.leaves(out)]
        if outs is None:
            outs = [np.zeros((batch, length, *x.shape[2:]), x.dtype) for x in leaves]
        for row in np.flatnonzero(count):
            begin, n = start[row], count[row]
            for output, leaf in zip(outs, leaves):
                output[row, begin : begin + n] = leaf[row, :n]
    return outs
