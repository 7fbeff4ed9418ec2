"""Learned rows `[N, D]` of memories, which begin like token embeddings."""

import flax.linen as nn
import jax.numpy as jnp

from famx.modules.components import partitioned


def learned_rows(module: nn.Module, name: str, count: int):
    """The parameter `name` of a module: `count` rows, initialised with the expected RMS of embeddings."""
    c = module.config
    init = partitioned(nn.initializers.normal(c.embed_dim**-0.5), "memory", "embed")
    return module.param(name, init, (count, c.embed_dim), c.param_dtype)


class Rows(nn.Module):
    """The rows of a whole model, float32 at least."""

    config: object
    length: int

    @nn.compact
    def __call__(self):
        rows = learned_rows(self, "prompt", self.length)
        return rows.astype(jnp.promote_types(self.config.dtype, jnp.float32))
