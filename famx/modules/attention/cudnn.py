"""cuDNN's fused attention through `jax.nn.dot_product_attention`; blocks are its batch.

Column layout here: `[S own block | N memory | M * S past, newest first]`. Past blocks before the start
of a sequence are then the last columns, and a length for each block masks them. So the mask of the
rest is one `[S, X]` for all blocks, which matters: cuDNN takes it as an array of biases in memory, and
also writes a gradient for it. Past keys are copied for each block.
"""

import jax
import jax.numpy as jnp

from famx.modules.attention.common import missing_blocks, visible


def attention(config, q, keys, values, memory_keys, memory_values, first_block, implementation="cudnn"):
    """`token_attention` with the config first.

    `implementation="xla"` computes the same with XLA on any platform.
    """
    batch, blocks, size, heads, width = q.shape
    segments, n = config.memory_segments, config.memory_columns

    def window(x, memory):
        past = [x[:, m : m + blocks] for m in reversed(range(segments))]
        if config.stop_gradient_segments:
            past = [jax.lax.stop_gradient(p) for p in past]
        x = jnp.concatenate([x[:, segments:], memory, *past], axis=2)
        return x.reshape(batch * blocks, -1, *x.shape[3:])

    # The same columns in the order of `visible`, with no past block missing.
    past = jnp.arange(segments * size).reshape(segments, size)[::-1].reshape(-1)
    order = jnp.concatenate([n + segments * size + jnp.arange(size), jnp.arange(n), n + past])
    mask = visible(config, jnp.arange(size)[:, None], order, 0)
    missing = missing_blocks(first_block[:, None], jnp.arange(blocks), config).reshape(-1)
    out = jax.nn.dot_product_attention(
        q.reshape(batch * blocks, size, heads, width),
        window(keys, memory_keys),
        window(values, memory_values),
        mask=mask[None, None],
        scale=config.query_scale,
        key_value_seq_lengths=(order.size - missing * size).astype(jnp.int32),
        implementation=implementation,
    )
    return out.reshape(q.shape)
