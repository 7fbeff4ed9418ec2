"""Statistics of a memory while text is read: attention on it, attention of it, and its magnitude.

In a healthy FAM the tokens attend to the memory (`tokens_on_memory` well above 0), it still takes in new
blocks (`memory_on_itself` below 1), and its magnitude stays level from update to update (`rms`).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from famx.base.distributed import on_host
from famx.modules import Decoder
from famx.modules.layer import MASS
from famx.modules.memory import COLLECTION


@dataclasses.dataclass(frozen=True)
class MemoryHealth:
    """Statistics of the memory over a batch of texts.

    Attributes:
      shares: shares of attention, `{name: float64 [layers]}`, averaged over examples, blocks, tokens and
        heads. `tokens_on_memory` is the share of the tokens' attention on the memory. FAM adds
        `memory_on_itself`, the share of the memory's attention on itself rather than on the block that
        it compresses.
      updates: numbers of updates after which `figures` were measured: 1, 2, 4, ... and the last.
      figures: scalars of `Memory.figures`, `{name: float64 [len(updates), layers]}`, with one layer for a
        memory `through_depth`. FAM has `rms`, the root mean square over examples, memory tokens and
        width.
    """

    shares: Mapping[str, np.ndarray]
    updates: tuple[int, ...]
    figures: Mapping[str, np.ndarray]

    def scalars(self) -> dict[str, float]:
        """Scalars for logging, by name.

        Per layer the shares and the first and last value of each figure, and each figure over all
        layers (as a root mean square) after each of `updates`.
        """
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
    """Measures `MemoryHealth` while reading texts, one block per call, in constant device memory.

    Args:
      module: the decoder. Its settings for chunks and rematerialisation are overridden.
    """

    def __init__(self, module: Decoder):
        self.config = dataclasses.replace(module.config, blocks_per_chunk=1, remat="none")
        decoder = Decoder(self.config)
        # Over layers, of which a memory `through_depth` has one, and the parameters of all.
        axes = None if self.config.memory.through_depth else 0, 0
        figures = jax.vmap(self.config.memory.figures, axes)

        @jax.jit
        def step(params, state, tokens):
            (_, state), collections = decoder.apply(
                {"params": params}, tokens, state, aligned=True, method="read", mutable=[MASS]
            )
            masses = collections.get(MASS, {}).get("layers", {})
            shares = {name: jnp.mean(x[0], axis=range(1, x[0].ndim)) for name, x in masses.items()}
            return state, shares, figures(params["layers"].get(COLLECTION), state.memory)

        self._step = step
        self._initial = jax.jit(
            lambda params, batch: decoder.apply({"params": params}, batch, method="initial_state"),
            static_argnums=1,
        )

    def measure(self, params, tokens) -> MemoryHealth | None:
        """Reads a batch of texts from their start.

        Args:
          params: the decoder's parameters.
          tokens: input tokens on the host, int32 `[B, L]`, including begin of text, or a dict of features
            `[B, L, ...]`. What comes after the last whole block is not read.

        Returns:
          The statistics; None if the model has no memory (BSWA) or there is no whole block.
        """
        c = self.config
        rows, length = jax.tree.leaves(tokens)[0].shape[:2]
        blocks = length // c.block_size
        if not c.memory.exists or not blocks:
            return None
        state = self._initial(params, rows)
        sums, figures_at = None, {}
        for block in range(blocks):
            slots = slice(block * c.block_size, (block + 1) * c.block_size)
            part = jax.tree.map(lambda x: x[:, slots], tokens)  # noqa: B023, called at once
            state, shares, figures = self._step(params, state, part)
            sums = shares if sums is None else jax.tree.map(jnp.add, sums, shares)
            update = block + 1
            if update == blocks or update & (update - 1) == 0:
                figures_at[update] = figures
        mean = lambda total: on_host(total).astype(np.float64) / blocks
        stack = lambda *figures: np.stack([on_host(figure).astype(np.float64) for figure in figures])
        curves = jax.tree.map(stack, *figures_at.values())
        return MemoryHealth(jax.tree.map(mean, sums), tuple(figures_at), curves)
