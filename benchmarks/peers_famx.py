"""famx's entry in the comparison: the training step of `famx.training`."""

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks import workloads
from benchmarks.peer_shape import Shape
from benchmarks.turns import Peer
from famx.memories import Fam
from famx.modules import Decoder, DecoderConfig, Memory


def config_of(
    shape: Shape, segments: int, memory: bool = True, kv_heads: int | None = None
) -> DecoderConfig:
    """FAM, or BSWA if `memory` is False, with `segments` past blocks in the window."""
    return DecoderConfig(
        vocab_size=shape.vocabulary, num_layers=shape.layers, embed_dim=shape.width,
        num_heads=shape.heads, num_kv_heads=kv_heads, mlp_dim=shape.feed_forward,
        block_size=shape.block, memory_segments=segments,
        memory=Fam(shape.memory_length) if memory else Memory(), tied_embeddings=False,
        dtype=shape.dtype,
    )  # fmt: skip


def build(shape: dict, segments: int, memory: bool, kv_heads: int | None = None) -> Peer:
    """Builds the model of `config_of`, with all layers unrolled."""
    shape = Shape(**shape)
    config = dataclasses.replace(
        config_of(shape, segments, memory, kv_heads), unroll_layers=shape.layers
    )
    params = workloads.parameters(config)
    facts = {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "reach": float(jax.jit(_reach, static_argnums=(1, 2))(params, config, shape)),
        "version": f"jax {jax.__version__}",
    }
    workload = workloads.train_step(config, shape.batch, shape.length)
    return Peer(lambda: float(workload.run()[1]["loss"].compute()), facts)


def _reach(params, config, shape):
    """Norm of the gradient from the last block's logits at the landmark's embedding."""
    inputs, _ = shape.tokens()

    def last_block(params):
        logits, _ = Decoder(config).apply({"params": params}, jnp.asarray(inputs, jnp.int32))
        return jnp.mean(jax.nn.logsumexp(logits[:, -shape.block :, : shape.landmark], -1))

    return jnp.linalg.norm(jax.grad(last_block)(params)["embedding"][shape.landmark])
