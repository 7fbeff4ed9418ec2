"""What a memory costs beyond the window: bytes of state, parameters, operations and waiting.

Everything is computed from a config, without arrays.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from famx.modules import Decoder, DecoderConfig, Memory
from famx.modules.frontends import Frontend
from famx.training.flops import Learning, train_flops


@dataclasses.dataclass(frozen=True)
class MemoryCosts:
    """What the memory of a decoder adds to block sliding window attention.

    Attributes:
      state_bytes: bytes of the memory of an example in all layers, with what is kept in the window for it
        besides keys and values.
      window_bytes: bytes of the keys and values of an example's window in all layers, for comparison.
      parameters: number of the memory's parameters.
      flops_per_token: matrix-product operations of reading a token, in the mean over a long text.
      share_of_flops: the same as a share of those of the layers without the memory.
      waits: what waits from block to block. "nothing": all blocks are read at once. "memory": in each
        layer the memory is updated block after block, and then all tokens are read at once. "tokens":
        blocks are read one after another through all layers.
    """

    state_bytes: int
    window_bytes: int
    parameters: int
    flops_per_token: float
    share_of_flops: float
    waits: str

    def serial_steps(self, layers: int, blocks: int) -> int:
        """Steps of loops over layers and blocks that wait for each other, for a text of some blocks."""
        return layers * (1 if self.waits == "nothing" else blocks)


def memory_costs(config: DecoderConfig) -> MemoryCosts:
    """The costs of the memory of a config."""
    without = dataclasses.replace(config, memory=Memory())
    params, bare = _shapes(config), _shapes(without)
    module = Decoder(config)
    start = functools.partial(module.apply, batch_size=1, method="initial_state")
    with jax.enable_x64(config.dtype == "float64"):
        state = jax.eval_shape(lambda params: start({"params": params}), params)
    layers = _flops_of_token(config)
    memory = layers.pop("memory")
    rest = layers["projections"] + layers["attention"] + layers["feed_forward"]
    waits = "memory" if config.memory.updates_in_order else "nothing"
    return MemoryCosts(
        state_bytes=_bytes((state.memory, state.features)),
        window_bytes=_bytes((state.keys, state.values)),
        parameters=_count(params) - _count(bare),
        flops_per_token=memory,
        share_of_flops=memory / rest,
        waits="tokens" if config.memory.through_depth else waits,
    )


def _flops_of_token(config: DecoderConfig) -> dict[str, float]:
    """Operations of the forward pass for a token of a long text, by kind."""
    length = 8 * (config.memory_segments + 1) * config.block_size
    forward = Learning(paths=frozenset())
    short, long = (train_flops(config, 1, n, False, forward) for n in (length, 2 * length))
    return {kind: (long[kind] - short[kind]) / length for kind in long}


def _shapes(config: DecoderConfig) -> Any:
    config = dataclasses.replace(config, frontend=Frontend())  # which costs the same with any memory
    init = functools.partial(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    with jax.enable_x64(config.dtype == "float64"):
        return nn.unbox(jax.eval_shape(init))["params"]


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
