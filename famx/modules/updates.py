"""How a memory takes up what a block had to say: rules by the name that `DecoderConfig.fam_update` gives.

A rule is a pure function `(memory, new, probabilities, config) -> F_t`, called in every layer and
update but the first, which always takes `new`:

* memory: `F_{t-1}`, `[B, N, D]`, float32 at least.
* new: what Algorithm 2 makes of it and block `t`, of the same shape and dtype; normalised, if
  `normalize_memory` says so.
* probabilities: the attention of the memory's queries, `[B, K, G, N, N + S]`; the first `N` columns
  are the memory itself, the rest is the block.
* config: the `DecoderConfig`.

Tokens of the block see `F_{t-1}`, so that no rule can break causality, nor the equality of all ways
to cut a text.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Update = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


def residual(memory, new, probabilities, config):
    """The paper's: `F_t` is what Algorithm 2 makes."""
    return new


def gated(memory, new, probabilities, config):
    """Ours: each memory token is written as far as `write_gate` opens, and else kept bit for bit."""
    gate = write_gate(probabilities, config).astype(memory.dtype)
    return memory + gate * (new - memory)


def write_gate(probabilities, config):
    """`max(0, 2 m - 1)` of the attention mass `m` on the block, mean over heads: `[B, N, 1]`.

    The gradient passes a closed gate as if it were open, or a memory that learned to hold could not
    learn to write.
    """
    mass = jnp.mean(jnp.sum(probabilities[..., config.fam_length :], -1), axis=(1, 2))
    gate = (2 * mass - 1)[..., None]
    return gate + jax.lax.stop_gradient(nn.relu(gate) - gate)


_UPDATES: dict[str, Update] = {"residual": residual, "gated": gated}


def register_update(name: str, update: Update) -> None:
    """Let `DecoderConfig(fam_update=name)` update memories by `update`; see the module for what it is.

    Raises:
      ValueError: the name is taken by another rule.
    """
    if _UPDATES.setdefault(name, update) is not update:
        raise ValueError(f"A memory update named '{name}' is registered already; choose another name.")


def update_names() -> tuple[str, ...]:
    """Names of all rules, in the order in which they were registered."""
    return tuple(_UPDATES)


def get_update(name: str) -> Update:
    """The rule of that name."""
    return _UPDATES[name]
