"""Reference backend: the plain formula with one dense mask."""

import dataclasses

import jax
import jax.numpy as jnp

from famx.modules.attention.common import attend, attend_logsum, missing_blocks, visible
from famx.modules.config import DecoderConfig
from famx.modules.memory import Memory


def attention(config: DecoderConfig, *args):
    """`token_attention` with the config first."""
    return _attention(config, *args)[0]


def memory_mass(q, keys, memory_keys, first_block, config: DecoderConfig):
    """Share of the tokens' attention that goes to the memory; arguments as `token_attention`.

    Returns:
      Mean over the tokens of each block, `[B, C, K, G]` (at least float32).
    """
    *_, probabilities = _attention(config, q, keys, keys, memory_keys, memory_keys, first_block)
    return jnp.mean(jnp.sum(probabilities[..., : config.memory_columns], -1), -1)


def windows(config: DecoderConfig, keys, values, memory_keys, memory_values, first_block):
    """Each block's columns: keys and values `[B, C, X, K, Dh]`, and their mask, bool `[B, C, S, X]`.

    Arguments as `token_attention`; the keys of a block are copied for every block that sees them.
    """
    blocks, size = memory_keys.shape[1], config.block_size

    def window(x, memory):
        past = [x[:, m : m + blocks] for m in range(config.memory_segments)]
        if config.stop_gradient_segments:
            past = [jax.lax.stop_gradient(p) for p in past]
        return jnp.concatenate([memory, *past, x[:, config.memory_segments :]], axis=2)

    keys, values = window(keys, memory_keys), window(values, memory_values)
    missing = missing_blocks(first_block[:, None], jnp.arange(blocks), config)[..., None, None]
    mask = visible(config, jnp.arange(size)[:, None], jnp.arange(keys.shape[2]), missing)
    return keys, values, mask


def window_part(q, keys, values, slots, first_block, config: DecoderConfig):
    """Attention to the window alone, and the logarithm of the sum of its weights.

    Args:
      q: rotated queries `[B, C, Q, H, Dh]`, at `slots` (int `[Q]`) of each block.
      keys, values, first_block: as for `token_attention`.

    Returns:
      `[B, C, Q, H, Dh]` and `[B, C, Q, H]`, float32 at least.
    """
    none = jnp.zeros((*q.shape[:2], 0, *keys.shape[-2:]), keys.dtype)
    bare = dataclasses.replace(config, memory=Memory())
    keys, values, mask = windows(bare, keys, values, none, none, first_block)
    rows = mask[:, :, slots]
    heads_first = lambda x: jnp.swapaxes(x, -3, -2)
    return attend_logsum(q, heads_first(keys), heads_first(values), rows[:, :, None, None], bare)


def _attention(config, q, *rest):
    """Output and probabilities `[B, C, K, G, S, X]`."""
    keys, values, mask = windows(config, *rest)
    return attend(q, keys, values, mask[:, :, None, None], config)
