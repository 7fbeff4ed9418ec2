"""Reading a batch of documents of any length with a state of constant size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from famx.modules import Decoder, DecoderState

_BLOCKS = 8  # read per call: enough to hide the call, few enough to stay small


class Streamer:
    """Jitted reading of whole blocks by a decoder, one block after the other.

    Nothing is compiled again however long the text is: a chunk has either eight blocks or one.
    """

    def __init__(self, module: Decoder):
        config = dataclasses.replace(module.config, blocks_per_chunk=1)
        self.module = Decoder(config)
        self.block_size = config.block_size
        apply = functools.partial(self.module.apply, aligned=True)

        @functools.partial(jax.jit, donate_argnums=1)
        def advance(params, state, tokens):
            return apply({"params": params}, tokens, state=state, method="read")[1]

        @functools.partial(jax.jit, donate_argnums=1)
        def predict(params, state, tokens):
            logits, state = apply({"params": params}, tokens, state=state)
            return jnp.argmax(logits, axis=-1), state

        @functools.partial(jax.jit, static_argnums=1)
        def initial(params, batch_size):
            state = self.module.apply({"params": params}, batch_size, method="initial_state")
            return jax.tree.map(jnp.copy, state)  # keys and values may share a buffer of zeros

        self._advance, self._predict, self.initial_state = advance, predict, initial

    def read(self, params, state: DecoderState, tokens: np.ndarray) -> DecoderState:
        """The state after `tokens`, int32 `[B, blocks * S]`; `state` is given away.

        Raises:
          ValueError: the tokens do not fill whole blocks.
        """
        for piece in self._pieces(tokens):
            state = self._advance(params, state, piece)
        return state

    def predict(self, params, state: DecoderState, tokens: np.ndarray):
        """Arg-max of every next token, int32 `[B, L]` on the host, and the state after `tokens`."""
        out = []
        for piece in self._pieces(tokens):
            best, state = self._predict(params, state, piece)
            out.append(best)
        return np.concatenate([np.asarray(best) for best in out], axis=1), state

    def _pieces(self, tokens):
        length = tokens.shape[1]
        if length % self.block_size:
            raise ValueError(
                f"{length} tokens do not fill whole blocks of {self.block_size}; pad them or use "
                "Decoder.apply, which reads any number."
            )
        start = 0
        while start < length:
            size = _BLOCKS if length - start >= _BLOCKS * self.block_size else 1
            yield tokens[:, start : start + size * self.block_size]
            start += size * self.block_size
