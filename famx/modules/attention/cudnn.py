"""cuDNN's fused attention without an array of biases: one call for each kind of mask.

A block's tokens attend to their own block (causal), and to the memory with the past blocks (all of them;
a length for each block masks what is before the start of a sequence). With a window mask the oldest past
block is a call of its own: backwards in time its mask is causal. A mask of any other shape would be an
array of biases to cuDNN, which computes all masked scores and writes a gradient for the biases.

The calls are merged by the log-sum-exp of their scores. The gradient calls the backward pass of each with
the output and the log-sum-exp of the whole, as ring attention does: `P = exp(S - lse)` and `dS = P *
(dO V^T - rowsum(dO * O))` are then those of the whole softmax. Automatic differentiation would be wrong
without a word: to JAX the log-sum-exp of cuDNN has no gradient. So the two passes are called as JAX's
own primitives, whose arguments are private and have changed with its versions (`_call`).
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from famx.modules.attention.common import ATTENTION_RESULT, MASKED, missing_blocks


class Kernels(NamedTuple):
    """The two passes of a fused attention of queries `q [X, S, H, Dh]` to `k, v [X, Y, K, Dh]`.

    Attributes:
      forward: function of `(scale, causal, q, k, v, lengths)` that gives the output, like `q`, and the
        log-sum-exp of the scores, float32 `[X, H, S]`.
      backward: function of `(scale, causal, q, k, v, lengths, out, lse, grad)` that gives the gradients
        of `q`, `k` and `v`.

    Row `i` sees column `j` if not `causal` or `j <= i`, and if `lengths` (int32 `[X]`, at least 1, or
    None) exceeds `j`.
    """

    forward: Callable
    backward: Callable


class _Mask(NamedTuple):
    """Mask of a part: causal or none; of rows and columns in order, or of both backwards."""

    causal: bool
    backwards: bool = False


def _call(primitive: str, scale, causal, lengths, q, k, v, *rest):
    """Calls cuDNN's forward ("fwd") or backward ("bwd") pass by JAX's primitive."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    empty = jnp.zeros(0, q.dtype)
    kind = fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    pair = empty, empty
    if lengths is not None:
        kind = fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING
        pair = jnp.full(q.shape[:1], q.shape[1], jnp.int32), lengths
    options = dict(
        scale=scale, seed=42, dropout_rate=0.0, variadic_args=(False, False), mask_type=kind,
        layout=fused.AttentionLayout.BTNH.value, sliding_window_length=None,
    )  # fmt: skip
    if "score_mod" in inspect.signature(fused._dot_product_attention_fwd).parameters:  # jax 0.12
        options["score_mod"] = None
    if primitive == "fwd":
        options["is_training"] = True  # gives the log-sum-exp, too
    bind = getattr(fused, f"_dot_product_attention_{primitive}_p_wrapper").bind
    # No bias, the lengths, and neither offsets of packed sequences nor tables of pages.
    return bind(q, k, v, empty, *pair, *[empty] * 4, *rest, **options)


CUDNN = Kernels(
    lambda scale, causal, q, k, v, lengths: _call("fwd", scale, causal, lengths, q, k, v),
    lambda scale, causal, q, k, v, lengths, out, lse, grad: _call(
        "bwd", scale, causal, lengths, q, k, v, lse, out, grad
    ),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def merged(kernels: Kernels, scale: float, masks: tuple[_Mask, ...], q, parts):
    """One softmax over the columns of all parts, the first of which every row sees something of.

    Args:
      kernels: the fused attention of one part.
      scale: factor of the scores.
      masks: mask of each part.
      q: `[X, S, H, Dh]`.
      parts: of each `(keys, values, lengths)`: `[X, Y, K, Dh]` and int32 `[X]`, the number of columns
        that exist, possibly 0; None: all.

    Returns:
      `[X, S, H, Dh]`.
    """
    return _merged_forward(kernels, scale, masks, q, parts)[0]


def _merged_forward(kernels, scale, masks, q, parts):
    outs, lses = [], []
    for mask, (k, v, lengths) in zip(masks, parts, strict=True):
        out, lse = kernels.forward(scale, mask.causal, *_turned(mask, q, k, v), _at_least_one(lengths))
        if mask.backwards:
            out, lse = out[:, ::-1], lse[..., ::-1]
        if lengths is not None:
            # Without columns the kernel's result may be anything, even NaN.
            exists = (lengths > 0)[:, None, None]
            out, lse = jnp.where(exists[..., None], out, 0), jnp.where(exists, lse, MASKED)
        outs.append(out)
        lses.append(lse)
    out, lse = outs[0], lses[0]
    if len(parts) > 1:
        lse = functools.reduce(jnp.logaddexp, lses)
        share = lambda part: jnp.exp(part - lse).swapaxes(1, 2)[..., None]
        out = sum(out * share(part) for out, part in zip(outs, lses)).astype(q.dtype)
    out, lse = (checkpoint_name(x, ATTENTION_RESULT) for x in (out, lse))
    return out, (q, parts, out, lse)


def _merged_backward(kernels, scale, masks, residuals, grad):
    q, parts, out, lse = residuals
    grad_q, grads = 0, []
    for mask, (k, v, lengths) in zip(masks, parts, strict=True):
        whole = (x[:, ::-1] if mask.backwards else x for x in (out, lse.swapaxes(1, 2), grad))
        turned_out, turned_lse, turned_grad = whole
        dq, dk, dv = kernels.backward(
            scale, mask.causal, *_turned(mask, q, k, v), _at_least_one(lengths),
            turned_out, turned_lse.swapaxes(1, 2), turned_grad,
        )  # fmt: skip
        if mask.backwards:
            dq, dk, dv = dq[:, ::-1], dk[:, ::-1], dv[:, ::-1]
        if lengths is not None:
            exists = (lengths > 0)[:, None, None, None]
            dq, dk, dv = (jnp.where(exists, x, 0) for x in (dq, dk, dv))
        grad_q += dq
        grads.append((dk, dv, None))
    return grad_q, tuple(grads)


merged.defvjp(_merged_forward, _merged_backward)


def _turned(mask, *arrays):
    return tuple(x[:, ::-1] for x in arrays) if mask.backwards else arrays


def _at_least_one(lengths):
    return None if lengths is None else jnp.maximum(lengths, 1)


def attention(
    config, q, keys, values, memory_keys, memory_values, first_block, kernels: Kernels = CUDNN
):
    """`token_attention` with the config first; blocks are the kernels' batch.

    Column layout of the memory and the past: `[N memory | M * S past, newest first]`, so that missing
    blocks are the last columns. They are copied for each block.
    """
    batch, blocks, size, *_ = q.shape
    segments, n = config.memory_segments, config.memory_columns
    flat = lambda x: x.reshape(batch * blocks, -1, *x.shape[3:])
    missing = missing_blocks(first_block[:, None], jnp.arange(blocks), config).reshape(-1)

    def past(x, m):
        x = x[:, m : m + blocks]
        return jax.lax.stop_gradient(x) if config.stop_gradient_segments else x

    own = flat(keys[:, segments:]), flat(values[:, segments:]), None
    masks, parts = [_Mask(causal=True)], [own]
    # A window mask hides a part of the oldest past block alone.
    oldest = 1 if config.window_mask and segments else 0
    if n or segments > oldest:
        newest_first = range(segments - 1, oldest - 1, -1)
        join = lambda x, memory: flat(
            jnp.concatenate([memory, *(past(x, m) for m in newest_first)], axis=2)
        )
        lengths = n + jnp.minimum(segments - missing, segments - oldest) * size
        masks.append(_Mask(causal=False))
        lengths = lengths.astype(jnp.int32) if segments > oldest else None
        parts.append((join(keys, memory_keys), join(values, memory_values), lengths))
    if oldest:
        # Slot `j` of the block is seen by the rows up to `j`.
        masks.append(_Mask(causal=True, backwards=True))
        lengths = jnp.where(missing > 0, 0, size).astype(jnp.int32)
        parts.append((flat(past(keys, 0)), flat(past(values, 0)), lengths))
    out = merged(kernels, config.query_scale, tuple(masks), flat(q), tuple(parts))
    return out.reshape(q.shape)


def attend_all(config, q, keys, values, kernels: Kernels = CUDNN):
    """Queries `[B, 1, N, H, Dh]` to all columns of keys and values `[B, 1, X, K, Dh]`."""
    part = keys[:, 0], values[:, 0], None
    return merged(kernels, config.query_scale, (_Mask(causal=False),), q[:, 0], (part,))[:, None]
