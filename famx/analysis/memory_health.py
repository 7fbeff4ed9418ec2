"""Memory health: whether a memory is read, still written, and stays in bounds, block by block.

Of FAM, a healthy memory is read by the tokens (`tokens_on_memory` well above 0), is still written
(`memory_on_itself` below 1) and neither grows nor fades from update to update (`rms` level).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from famx.modules import Decoder
from famx.modules.layer import MASS
from famx.modules.memory import COLLECTION


@dataclasses.dataclass(frozen=True)
class MemoryHealth:
    """Figures of one reading.

    Attributes:
      shares: by name the shares of attention that the layers and the memory keep while they read, mean
        over examples, blocks, tokens and heads, float64 `[layers]`. `tokens_on_memory`: of the tokens'
        attention on the memory. FAM adds `memory_on_itself`: of the memory's own attention, what goes
        to the memory and not to the block that it compresses.
      updates: number of updates after which `figures` were taken: 1, 2, 4, ... and the last.
      figures: by name the scalars of `Memory.figures`, float64 `[len(updates), layers]`; of FAM `rms`.
    """

    shares: Mapping[str, np.ndarray]
    updates: tuple[int, ...]
    figures: Mapping[str, np.ndarray]

    def scalars(self) -> dict[str, float]:
        """Logged scalars: shares, first and last figures by layer, and the curves over all layers."""
        by_layer = dict(self.shares)
        for name, curve in self.figures.items():
            by_layer |= {f"{name}_first": curve[0], f"{name}_last": curve[-1]}
        scalars = {
            f"memory/{name}/layer_{layer}": float(value)
            for name, values in by_layer.items()
            for layer, value in enumerate(values)
        }
        for name, curve in self.figures.items():
            means = np.sqrt(np.mean(np.square(curve), axis=1))
            scalars |= {f"memory/{name}/update_{n}": float(v) for n, v in zip(self.updates, means)}
        return scalars


class MemoryMonitor:
    """Reads tokens and watches the memory; one block per call, so that nothing grows with the length.

    Args:
      module: the decoder; its computation settings (chunks, remat) do not matter.
    """

    def __init__(self, module: Decoder):
        self.config = dataclasses.replace(module.config, blocks_per_chunk=1, remat="none")
        decoder = Decoder(self.config)
        figures = jax.vmap(self.config.memory.figures)  # of each layer

        @jax.jit
        def step(params, state, tokens):
            (_, state), collections = decoder.apply(
                {"params": params}, tokens, state, aligned=True, method="read", mutable=[MASS]
            )
            kept = collections.get(MASS, {}).get("layers", {})
            shares = {name: jnp.mean(x[0], axis=range(1, x[0].ndim)) for name, x in kept.items()}
            return state, shares, figures(params["layers"].get(COLLECTION), state.memory)

        self._step = step
        self._initial = jax.jit(
            lambda params, batch: decoder.apply({"params": params}, batch, method="initial_state"),
            static_argnums=1,
        )

    def measure(self, params, tokens) -> MemoryHealth | None:
        """Reads a batch from its start and returns the memory's figures.

        Args:
          params: the decoder's parameters.
          tokens: what the model reads, int32 `[B, L]` on the host, bos included; a rest after the last
            whole block is not read.

        Returns:
          The figures, or None where there are none: no memory (BSWA), or not one whole block.
        """
        c = self.config
        blocks = tokens.shape[1] // c.block_size
        if not c.memory.exists or not blocks:
            return None
        state = self._initial(params, tokens.shape[0])
        sums, taken = None, {}
        for block in range(blocks):
            part = tokens[:, block * c.block_size : (block + 1) * c.block_size]
            state, shares, figures = self._step(params, state, part)
            sums = shares if sums is None else jax.tree.map(jnp.add, sums, shares)
            update = block + 1
            if update == blocks or update & (update - 1) == 0:
                taken[update] = figures
        mean = lambda total: np.asarray(total, np.float64) / blocks
        stack = lambda *figures: np.stack([np.asarray(figure, np.float64) for figure in figures])
        curves = jax.tree.map(stack, *taken.values())
        return MemoryHealth(jax.tree.map(mean, sums), tuple(taken), curves)
