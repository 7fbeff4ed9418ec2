"""Full causal attention for comparison: the forward pass in tiles, without a table of all scores.

A block of the whole sequence is no size that the model's own backends are made for: one holds all
scores, the other compiles every tile apart. Here tiles above the diagonal are skipped, and memory
is linear in the length, so that the comparison does full attention no wrong.
"""

import math

import jax
import jax.numpy as jnp

from famx.modules.attention import softcap
from famx.modules.config import DecoderConfig

TILE = 512  # rows and columns


def full_attention(
    q, keys, values, memory_keys, memory_values, first_block, config: DecoderConfig, examples="batch"
):
    """Takes and returns what `famx.modules.attention.token_attention` does; no gradient.

    Raises:
      ValueError: unless there is one block, and neither past blocks nor a memory.
    """
    del memory_keys, memory_values, first_block, examples
    if q.shape[1] != 1 or config.memory_segments or config.memory_columns:
        raise ValueError("Full attention is one block without memory segments and without FAM.")
    batch, _, length, heads, width = q.shape
    tile = math.gcd(TILE, length)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def tiles(x):
        """`[B, 1, L, K * G, Dh]` to `[L / tile, B, K, G * tile, Dh]`, `K` key heads."""
        x = x.reshape(batch, length // tile, tile, config.num_kv_heads, -1, width)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(*x.shape[1::-1], x.shape[3], -1, width)

    q, keys, values = tiles(q), tiles(keys), tiles(values)
    slots = jnp.arange(q.shape[3]) % tile  # of each row: heads of a group stand in turn

    def rows(index):
        def column(j, carry):
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
        out, total, _ = jax.lax.fori_loop(0, index + 1, column, start)
        return (out / total[..., None]).astype(q.dtype)

    out = jax.lax.map(rows, jnp.arange(length // tile))
    out = out.reshape(length // tile, batch, config.num_kv_heads, -1, tile, width)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, 1, length, heads, width)
