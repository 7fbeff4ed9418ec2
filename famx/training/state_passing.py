"""Training-only techniques that decide from which state an example begins.

| `state_passing` | an example begins from | paper |
|---|---|---|
| `none` | the prompt | |
| `random` | with a probability, the memory that the last step's first example ended with | RSP |
| `continuous` | where its lane's document was left by the last step | named as the ideal |
| `aged` | a state of a pool that has read a random number of blocks | ours |

Gradients never cross the step boundary. `random` lives here because t5x does it too; `continuous`
and `aged` belong to `famx.training`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from famx.modules import Decoder, DecoderConfig, DecoderState

MODES = ("none", "random", "continuous", "aged")


@dataclasses.dataclass(frozen=True)
class RandomState:
    """Random state passing (RSP).

    Attributes:
      probability: that a step's examples all begin from the kept memory.
      start_step: first step that does so; from scratch, RSP at step 0 keeps a model from learning.
    """

    probability: float = 0.8
    start_step: int = 0

    def __post_init__(self):
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"RSP's probability must lie in [0, 1], got {self.probability}.")

    def initial(self, config: DecoderConfig) -> dict[str, jax.Array]:
        """Nothing kept yet: `memory`, leaves `[layers, ...]`, `updates` and `steps` int32 scalars."""
        module, key = Decoder(config), jax.random.key(0)
        make = lambda: module.init_with_output(key, 1, method="initial_state")[0].memory
        zeros = lambda x: jnp.zeros(x.shape[:1] + x.shape[2:], x.dtype)
        memory = jax.tree.map(zeros, jax.eval_shape(make))
        return {"memory": memory, "updates": jnp.int32(0), "steps": jnp.int32(0)}

    def start(self, kept, state: DecoderState, rng) -> DecoderState:
        """`state` (nothing read), or for the whole batch one that begins with the kept memory."""
        use = jax.random.bernoulli(rng, float(self.probability))
        use &= (kept["updates"] > 0) & (kept["steps"] >= self.start_step)
        choose = lambda old, new: jnp.where(use, jax.lax.stop_gradient(new)[:, None], old)
        return state.replace(
            memory=jax.tree.map(choose, state.memory, kept["memory"]),
            updates=jnp.where(use, kept["updates"], state.updates),
        )

    def keep(self, kept, state: DecoderState) -> dict[str, jax.Array]:
        """What is kept of the final state: the memory of the batch's first example."""
        return {
            "memory": jax.tree.map(lambda x: jax.lax.stop_gradient(x[:, 0]), state.memory),
            "updates": state.updates[0],
            "steps": kept["steps"] + 1,
        }


def random_offset(rng, batch_size: int, rope_base: float):
    """Random position offsets (RPO), int32 `[B]`: `U(0, 2 pi base)`, or 0 half of the time."""
    size, coin = jax.random.split(rng)
    offset = jax.random.uniform(size, (batch_size,), maxval=2 * np.pi * rope_base)
    return jnp.where(jax.random.bernoulli(coin, 0.5, (batch_size,)), offset, 0).astype(jnp.int32)


def continue_lanes(lanes: DecoderState, initial: DecoderState, reset) -> DecoderState:
    """Where each lane reads on: its last state without gradient, or the start where `reset`."""
    return initial.select(reset, jax.lax.stop_gradient(lanes))


def continue_aged(pool: DecoderState, initial: DecoderState, lane) -> DecoderState:
    """State `lane` (int32 `[B]`) of the pool without gradient, or the start where it is -1."""
    aged = jax.lax.stop_gradient(pool.take(jnp.maximum(lane, 0)))
    return initial.select(lane < 0, aged)
