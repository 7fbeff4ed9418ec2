"""Parts shared by all attention backends: visibility, scores and softmax.

Column layout of all scores: `[N memory | M * S past, oldest first | S own block]`.
"""

import functools

import jax
import jax.numpy as jnp

from famx.modules.config import DecoderConfig

MASKED = -1e30
_HIDDEN = -1e9  # added to the scores of hidden columns; products with it are finite in bfloat16
# Name, for rematerialisation policies, of a kernel's output and log-sum-exp: where these are kept, the
# backward pass does not run the kernel again.
ATTENTION_RESULT = "attention_result"


def visible(config: DecoderConfig, rows, columns, missing):
    """Whether the token in slot `rows` of a block sees column `columns` of its window.

    Args:
      config: `DecoderConfig`, of which `N`, `M`, `S` and the window mask are used.
      rows: slots in the block, int, broadcastable against `columns`.
      columns: int, columns in the layout above.
      missing: number of the `M` past blocks that are before the start of the sequence.

    Returns:
      bool, of the broadcast shape.
    """
    n, past = config.memory_columns, config.memory_segments * config.block_size
    token = columns - n - past  # slot relative to the query's own block
    seen = (token <= rows) & (token + past >= missing * config.block_size)
    if config.window_mask:
        seen &= token >= rows - past
    return (columns < n) | seen


def missing_blocks(first_block, block, config):
    """Number of past blocks before the start of the sequence: `max(0, M - index of the block)`."""
    return jnp.maximum(config.memory_segments - (first_block + block), 0)


def softcap(scores, cap):
    """`cap * tanh(scores / cap)`, or `scores` where `cap` is None."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def column_dimensions(bias, config: DecoderConfig):
    """Functions that change or mask the scores of the memory's columns, in every backend.

    For a bias per head, queries and keys get two dimensions more: the bias in those of the queries, ones
    in those of the memory's keys and zeros in those of all other keys. So no kernel needs to know of the
    bias or of its gradient. The second dimension holds what the compute dtype rounds off in the first.
    For a memory that `masks_columns` they get another one, which lowers the scores of hidden columns
    until their weight is zero. For one with `plain_columns` they get `Dh` more, in which queries before
    their rotation meet the memory's keys, while the rest of these keys is zero.

    Args:
      bias: `[H]`, added to the scores before a softcap, or None.
      config: `DecoderConfig`, of which the scale and the memory are used.

    Returns:
      A function of queries `[..., H, Dh]`, rotated and as they were before, and one of keys `[..., K,
      Dh]`, whether they are the memory's, and which of them are visible, bool `[...]` or None for all.
      They change nothing for a memory that needs none of this.
    """
    masks, plain_columns = config.memory.masks_columns, config.memory.plain_columns

    def widen_query(q, plain=None):
        if plain_columns:
            q = jnp.concatenate([q, plain], axis=-1)
        more = []
        if bias is not None:
            wide = bias.astype(jnp.promote_types(q.dtype, jnp.float32)) / config.query_scale
            high = wide.astype(q.dtype)
            more += [high, (wide - high).astype(q.dtype)]
        if masks:
            more.append(jnp.full(q.shape[-2:-1], _HIDDEN / config.query_scale, q.dtype))
        if not more:
            return q
        more = jnp.stack(more, axis=-1)
        return jnp.concatenate([q, jnp.broadcast_to(more, (*q.shape[:-1], more.shape[-1]))], axis=-1)

    def widen_keys(keys, of_memory, seen=None):
        if plain_columns:
            none = jnp.zeros_like(keys)
            keys = jnp.concatenate([none, keys] if of_memory else [keys, none], axis=-1)
        more = [] if bias is None else [jnp.full((*keys.shape[:-1], 2), of_memory, keys.dtype)]
        if masks:
            hidden = jnp.zeros(keys.shape[:-2], bool) if seen is None else ~seen
            hidden = jnp.broadcast_to(hidden[..., None, None], (*keys.shape[:-1], 1))
            more.append(hidden.astype(keys.dtype))
        return jnp.concatenate([keys, *more], axis=-1) if more else keys

    return widen_query, widen_keys


def attend(q, keys, values, mask, config: DecoderConfig):
    """Softmax attention over one set of keys, with the probabilities.

    Args:
      q: `[..., Q, H, Dh]`; here and below, of the width of the keys, which may not be the values'.
      keys, values: `[..., X, K, Dh]`.
      mask: bool, broadcastable to `[..., 1, 1, Q, X]`, or None.
      config: `DecoderConfig`, of which scale and softcap are used.

    Returns:
      Output `[..., Q, H, Dh]` and probabilities `[..., K, G, Q, X]` (at least float32).
    """
    heads_first = lambda x: jnp.swapaxes(x, -3, -2)
    return attend_parts(q, ((heads_first(keys), heads_first(values), mask),), config)


def attend_apart(q, parts, config: DecoderConfig, bias=None, plain=None):
    """`attend_parts` without the probabilities, for few queries: nothing as wide as a part is copied.

    Scores are `[..., K, G * Q, X]`, rows of a matrix product, and their sum divides its result. `bias`
    `[H]` is added to the scores of the memory's columns, the first `N` of the first part, and `plain`,
    queries before their rotation, are compared with the columns of a memory with `plain_columns`.
    """
    groups, n = config.num_kv_heads, config.memory_columns
    by_group = lambda q: jnp.moveaxis(q.reshape(q.shape[:-2] + (groups, -1, q.shape[-1])), -4, -2)
    q = by_group(q)
    shape, wide = q.shape, jnp.promote_types(q.dtype, jnp.float32)
    rows = q.reshape(shape[:-3] + (-1, shape[-1]))
    product = lambda rows, keys: jnp.matmul(
        rows, jnp.swapaxes(keys, -1, -2), preferred_element_type=wide
    )
    scores = []
    for keys, _, mask in parts:
        if config.memory.plain_columns and not scores:
            on_columns = product(by_group(plain).reshape(rows.shape), keys[..., :n, :])
            score = jnp.concatenate([on_columns, product(rows, keys[..., n:, :])], axis=-1)
        else:
            score = product(rows, keys)
        score = score.reshape(shape[:-1] + score.shape[-1:]) * config.query_scale
        if bias is not None and not scores:
            of_heads = bias.astype(wide).reshape(groups, -1, 1, 1)
            score += jnp.where(jnp.arange(score.shape[-1]) < n, of_heads, 0)
        score = softcap(score, config.attention_softcap)
        scores.append(score if mask is None else jnp.where(mask, score, MASKED))
    highest = functools.reduce(jnp.maximum, (jnp.max(s, axis=-1, keepdims=True) for s in scores))
    out, total = 0, 0
    for score, (_, values, _) in zip(scores, parts, strict=True):
        weights = jnp.exp(score - highest)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(values.dtype).reshape(rows.shape[:-1] + weights.shape[-1:])
        out += jnp.matmul(weights, values, preferred_element_type=wide).reshape(shape)
    out = jnp.moveaxis((out / total).astype(values.dtype), -2, -4)
    return out.reshape(out.shape[:-3] + (-1, out.shape[-1]))


def attend_logsum(q, keys, values, mask, config: DecoderConfig):
    """Attention to one part, to be joined with others in one softmax.

    Args:
      q: `[..., Q, H, Dh]`.
      keys, values: `[..., K, X, Dh]`.
      mask: bool, broadcastable to `[..., K, G, Q, X]`.
      config: `DecoderConfig`, of which scale and softcap are used.

    Returns:
      Output `[..., Q, H, Dh]` and the logarithm of the sum of the weights `[..., Q, H]`, float32 at
      least.
    """
    groups, wide = config.num_kv_heads, jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(q.shape[:-2] + (groups, -1, q.shape[-1]))
    scores = jnp.einsum("...skgd,...kxd->...kgsx", q, keys, preferred_element_type=wide)
    scores = jnp.where(mask, softcap(scores * config.query_scale, config.attention_softcap), MASKED)
    log_sum = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - log_sum)
    out = jnp.einsum("...kgsx,...kxd->...skgd", weights, values.astype(wide))
    out = out.reshape(out.shape[:-3] + (-1, out.shape[-1]))
    log_sum = jnp.moveaxis(log_sum[..., 0], -1, -3)
    return out, log_sum.reshape(log_sum.shape[:-2] + (-1,))


def attend_parts(q, parts, config: DecoderConfig):
    """`attend` over several sets `(keys, values, mask)` in one softmax, without concatenating the keys.

    Keys and values have the heads first, `[..., K, X, Dh]`, the order of matrix products. The columns of
    the probabilities are those of all parts, in order.
    """
    groups = config.num_kv_heads
    q = q.reshape(q.shape[:-2] + (groups, -1, q.shape[-1]))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = []
    for keys, _, mask in parts:
        score = jnp.einsum("...skgd,...kxd->...kgsx", q, keys, preferred_element_type=wide)
        score = softcap(score * config.query_scale, config.attention_softcap)
        scores.append(score if mask is None else jnp.where(mask, score, MASKED))
    probabilities = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    out, start = 0, 0
    for _, values, _ in parts:
        part = probabilities[..., start : start + values.shape[-2]].astype(values.dtype)
        out += jnp.einsum("...kgsx,...kxd->...skgd", part, values)
        start += values.shape[-2]
    return out.reshape(out.shape[:-3] + (-1, out.shape[-1])), probabilities
