"""Text generation token by token, in one compiled loop, from any state."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from famx.base.ranges import Amount, NonNegative, Positive, PositiveShare
from famx.base.values import checked
from famx.modules import Decoder, DecoderState
from famx.modules.prepared import apart, computing, with_joint_kernels
from famx.modules.weights import platform

# Tokens that are written before the host looks whether to go on: a GPU would stand still meanwhile. Those
# after the end of a block or of all texts write nothing.
_TOKENS_AT_ONCE = {"gpu": 8}


@checked
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is selected and when an example ends.

    Attributes:
      max_new_tokens: maximum number of tokens to write.
      temperature: divisor of the logits before sampling; 0 always takes the likeliest token.
      top_k: number of likeliest tokens to sample from; None samples from all.
      top_p: total probability, after temperature and `top_k`, of the likeliest tokens to sample from;
        at least one token remains.
      stop_tokens: token ids that end an example; the one that did is part of the output.
    """

    max_new_tokens: Positive = 256
    temperature: Amount = 0.0
    top_k: Positive | None = None
    top_p: PositiveShare = 1.0
    stop_tokens: tuple[NonNegative, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "stop_tokens", tuple(int(token) for token in self.stop_tokens))


@flax.struct.dataclass
class Generation:
    """Generated tokens and the state after them.

    Attributes:
      tokens: generated tokens, int32 `[B, max_new_tokens]`, 0 after an example's end.
      lengths: number of generated tokens, int32 `[B]`, a stop token included.
      log_likelihood: log-likelihood of the tokens under the model, at least float32 `[B]`; temperature,
        `top_k` and `top_p` do not change it.
      logits: logits after the last token, at least float32 `[B, V]`.
      state: `DecoderState` that has read each example's prompt and generated tokens, and no others.
    """

    tokens: jax.Array
    lengths: jax.Array
    log_likelihood: jax.Array
    logits: jax.Array
    state: DecoderState


def generate(
    module: Decoder, params, logits, state: DecoderState, sampling: Sampling, keys=None, room=None
) -> Generation:
    """Continues every example of `state`; a pure function, to be jitted.

    An inner loop writes tokens until some example's block is full; an outer one then updates the memory
    of exactly those examples. So no token pays for work that only the last one of a block needs. What a
    token needs of the weights is made once: cast to the compute dtype, and joined.

    Args:
      module: the decoder.
      params: parameters of the decoder.
      logits: logits after the last token read, `[B, V]`.
      state: state after the last token read.
      sampling: how tokens are selected.
      keys: a random key per example `[B]`; token `i` is drawn with `fold_in(key, i)`, so examples do not
        depend on each other. Needed only if the temperature is not 0.
      room: maximum number of tokens per example, int32 `[B]`; None: `max_new_tokens`.

    Raises:
      ValueError: the temperature is above 0 and there are no keys.
    """
    if sampling.temperature > 0 and keys is None:
        raise ValueError("Sampling at a temperature above 0 needs a random key for each example.")
    batch, limit = state.batch_size, sampling.max_new_tokens
    room = jnp.full((batch,), limit) if room is None else jnp.clip(room, 0, limit)
    size = module.config.block_size
    steps = min(_TOKENS_AT_ONCE.get(platform(), 1), limit)
    stops = jnp.asarray(sampling.stop_tokens, jnp.int32)
    examples = jnp.arange(batch)
    params = with_joint_kernels(computing(params, module.config, tables=True))
    layers = apart(params["layers"])

    def apply(method, *args):
        return module.apply({"params": params}, *args, method=method)

    def write(carry):
        out, active, full, window, goes_on = carry
        writes = active & goes_on
        token_keys = None if keys is None else jax.vmap(jax.random.fold_in)(keys, out.lengths)
        token = jnp.where(writes, choose(out.logits, sampling, token_keys), 0)
        picked = jnp.take_along_axis(out.logits, token[:, None], axis=1)[:, 0]
        picked -= jax.nn.logsumexp(out.logits, axis=1)
        count = writes.astype(jnp.int32)
        hidden, state, window = apply("read_tokens", token[:, None], count, out.state, window, layers)
        logits = apply("logits", hidden[:, 0]).astype(out.logits.dtype)
        index = jnp.where(writes, out.lengths, limit)  # `limit` is out of bounds: dropped
        out = Generation(
            out.tokens.at[examples, index].set(token, mode="drop"),
            out.lengths + count,
            out.log_likelihood + jnp.where(writes, picked, 0),
            jnp.where(writes[:, None], logits, out.logits),
            state,
        )
        full = full | writes & (state.position % size == 0)
        stopped = (out.lengths >= room) | jnp.any(token[:, None] == stops, axis=1)
        active = active & ~(writes & stopped)
        return out, active, full, window, jnp.any(active) & ~jnp.any(full)

    def write_some(carry):
        with jax.named_scope("tokens"):
            return jax.lax.fori_loop(0, steps, lambda _, carry: write(carry), carry)

    def write_to_end_of_block(carry):
        out, active = carry
        window = apply("open_window", out.state, layers)
        start = (out, active, jnp.zeros((batch,), bool), window, True)
        out, active, full, window, _ = jax.lax.while_loop(lambda carry: carry[-1], write_some, start)
        state = apply("close_window", out.state, window)
        return out.replace(state=apply("complete_blocks", state, full)), active

    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    zeros = jnp.zeros((batch,), jnp.int32)
    out = Generation(
        jnp.zeros((batch, limit), jnp.int32), zeros, jnp.zeros((batch,), logits.dtype), logits, state
    )
    start = (out, room > 0)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), write_to_end_of_block, start)[0]


def choose(logits, sampling: Sampling, keys=None):
    """Selects a token for each row of `logits [B, V]`, int32 `[B]`; sampling needs `keys [B]`."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = restrict(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def restrict(logits, top_k: int | None, top_p: float):
    """Sets all but the allowed tokens of `logits [B, V]` to minus infinity.

    Among equal logits the smallest ids are kept, so that no more than `top_k` tokens remain.
    """
    vocab_size = logits.shape[-1]
    if (top_k is None or top_k >= vocab_size) and top_p == 1:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    allowed = jnp.arange(vocab_size) < (top_k or vocab_size)
    if top_p < 1:
        p = jax.nn.softmax(jnp.where(allowed, ranked, -jnp.inf), axis=-1)
        allowed = allowed & (jnp.cumsum(p, axis=-1) - p < top_p)
    rows = jnp.arange(logits.shape[0])[:, None]
    allowed = jnp.broadcast_to(allowed, logits.shape)
    allowed = jnp.zeros(logits.shape, bool).at[rows, order].set(allowed)
    return jnp.where(allowed, logits, -jnp.inf)
