"""The two passes of a fused attention by their formulas, in place of cuDNN's on any platform."""

import jax
import jax.numpy as jnp

from famx.modules.attention.common import MASKED
from famx.modules.attention.cudnn import Kernels


def scores(scale, causal, q, k, lengths):
    """`[X, K, G, S, Y]`, and the queries as `[X, S, K, G, Dh]`."""
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = scale * jnp.einsum("xskgd,xykd->xkgsy", q, k)
    columns = jnp.arange(k.shape[1])
    if causal:
        scores = jnp.where(columns <= jnp.arange(q.shape[1])[:, None], scores, MASKED)
    if lengths is not None:
        scores = jnp.where((columns < lengths[:, None])[:, None, None, None], scores, MASKED)
    return scores, q


def forward(scale, causal, q, k, v, lengths):
    s, _ = scores(scale, causal, q, k, lengths)
    out = jnp.einsum("xkgsy,xykd->xskgd", jax.nn.softmax(s), v).reshape(q.shape)
    return out, jax.nn.logsumexp(s, axis=-1).reshape(q.shape[0], q.shape[2], q.shape[1])


def backward(scale, causal, q, k, v, lengths, out, lse, grad):
    """A causal mask and lengths hide columns here as there; `out` and `lse` may be of more columns."""
    s, grouped = scores(scale, causal, q, k, lengths)
    grad, out = grad.reshape(grouped.shape), out.reshape(grouped.shape)
    p = jnp.exp(s - lse.reshape(s.shape[:-1])[..., None])
    delta = jnp.einsum("xskgd,xskgd->xkgs", grad, out)
    ds = scale * p * (jnp.einsum("xskgd,xykd->xkgsy", grad, v) - delta[..., None])
    dq = jnp.einsum("xkgsy,xykd->xskgd", ds, k).reshape(q.shape)
    dk = jnp.einsum("xkgsy,xskgd->xykd", ds, grouped)
    return dq, dk, jnp.einsum("xkgsy,xskgd->xykd", p, grad)


PLAIN = Kernels(forward, backward)
