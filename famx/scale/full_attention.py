"""Full causal attention as a baseline on a CPU, in tiles, so that it never holds all scores.

The model's own CPU backends are not made for a block as long as the sequence: `xla` materialises all
scores, and `blockwise` would compile each tile separately. This implementation skips the tiles above the
diagonal and needs memory linear in the length, also for its gradient, so that the comparison is fair to
full attention. The fused kernels of TPUs and GPUs need no replacement.
"""

import contextlib
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from famx.modules import layer
from famx.modules.attention import softcap
from famx.modules.config import DecoderConfig

TILE = 512  # rows and columns of a tile


@contextlib.contextmanager
def replaced() -> Iterator[None]:
    """A context in which models that are traced compute their attention by `full_attention`."""
    before = layer.token_attention
    layer.token_attention = full_attention
    try:
        yield
    finally:
        layer.token_attention = before


def full_attention(
    q, keys, values, memory_keys, memory_values, first_block, config: DecoderConfig, batch_axis="batch"
):
    """Replacement for `famx.modules.attention.token_attention`.

    Arguments and result are those of `token_attention`; `memory_keys`, `memory_values`, `first_block`
    and `batch_axis` are ignored.

    Raises:
      ValueError: there is more than one block, or the config has memory segments or FAM.
    """
    del memory_keys, memory_values, first_block, batch_axis
    if q.shape[1] != 1 or config.memory_segments or config.memory_columns:
        raise ValueError("Full attention needs one block without memory segments and without FAM.")
    batch, _, length, heads, width = q.shape
    tile = math.gcd(TILE, length)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def tiles(x):
        """Reshapes `[B, 1, L, K * G, Dh]` to `[L / tile, B, K, G * tile, Dh]` for `K` key heads."""
        x = x.reshape(batch, length // tile, tile, config.num_kv_heads, -1, width)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(*x.shape[1::-1], x.shape[3], -1, width)

    q, keys, values = tiles(q), tiles(keys), tiles(values)
    slots = jnp.arange(q.shape[3]) % tile  # position within the tile of each row: G heads, one by one

    @jax.checkpoint  # or the gradient would keep the scores
    def rows(index):
        def column(carry, j):
            return jax.lax.cond(j <= index, lambda x: add(x, j), lambda x: x, carry), None

        @jax.checkpoint
        def add(carry, j):
            out, total, top = carry
            scores = jnp.einsum("bkrd,bkxd->bkrx", q[index], keys[j], preferred_element_type=wide)
            scores = softcap(scores * config.query_scale, config.attention_softcap)
            seen = j * tile + jnp.arange(tile) <= index * tile + slots[:, None]
            scores = jnp.where(seen, scores, -jnp.inf)
            higher = jnp.maximum(top, scores.max(-1))
            weights, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            part = jnp.einsum(
                "bkrx,bkxd->bkrd", weights.astype(values.dtype), values[j],
                preferred_element_type=wide,
            )  # fmt: skip
            total = total * shrink + weights.sum(-1)
            return out * shrink[..., None] + part, total, higher

        shape = q.shape[1:4]
        zeros = jnp.zeros((*shape, width), wide), jnp.zeros(shape, wide)
        start = (*zeros, jnp.full(shape, -1e30, wide))
        (out, total, _), _ = jax.lax.scan(column, start, jnp.arange(length // tile))
        return (out / total[..., None]).astype(q.dtype)

    out = jax.lax.map(rows, jnp.arange(length // tile))
    out = out.reshape(length // tile, batch, config.num_kv_heads, -1, tile, width)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, 1, length, heads, width)
