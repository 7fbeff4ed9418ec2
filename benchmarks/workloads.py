"""What is measured: training steps of the engine and forward passes, compiled ahead of time.

Workloads are kept, so that sections that measure the same thing compile it once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import unbox

from benchmarks.full_attention import full_attention
from famx.mesh import batch_sharding
from famx.models import DecoderModel
from famx.modules import Decoder, DecoderConfig, layer
from famx.training import optimizers
from famx.training.run import Data, Run
from famx.training.step import make_initializer, make_train_step


@dataclasses.dataclass(frozen=True)
class Workload:
    """A compiled function without arguments, and the bytes it needs beside inputs and outputs."""

    run: Callable[[], Any]
    temp_bytes: int


@functools.cache
def train_step(
    config: DecoderConfig, batch: int, length: int, loss_chunk: int | None = None
) -> Workload:
    """The engine's own step on one device: loss, gradient, and an update by AdamW.

    Every call goes on from the parameters that the last one left, which all steps of models with the
    same parameters share, so that several fit into the device.
    """
    run = _training(config, batch, length, loss_chunk)
    rows = random_tokens(config, batch, length + 1)
    inputs = {"decoder_input_tokens": rows[:, :-1], "decoder_target_tokens": rows[:, 1:]}
    _, abstract = make_initializer(run)
    kept = _training_state(
        dataclasses.replace(config, blocks_per_chunk=None, remat="none", attention_backend="auto")
    )
    inputs = jax.device_put(inputs, batch_sharding(run.mesh))
    with run.on_mesh():
        compiled = make_train_step(run, abstract).lower(kept[0], inputs).compile()

    def step():
        kept[0], metrics = compiled(kept[0], inputs)
        return kept[0], metrics

    return Workload(step, _temp_bytes(compiled))


def _training(config: DecoderConfig, batch: int, length: int, loss_chunk: int | None = None) -> Run:
    """A run on one device, without a task."""
    model = DecoderModel(Decoder(config), loss_chunk=loss_chunk)
    data = Data(None, {"targets": length}, batch)
    return Run(model, data, optimizers.adamw(1e-4), steps=1).ready(jax.devices()[:1])


@functools.cache
def _training_state(config: DecoderConfig) -> list:
    """The one training state of this config, in a list whose owner replaces it at every step."""
    initialize, _ = make_initializer(_training(config, 1, config.block_size))
    return [initialize(jax.random.key(0))]


@functools.cache
def forward(
    config: DecoderConfig, batch: int, length: int, logits: bool, full: bool = False
) -> Workload:
    """Reads `length` tokens; returns the state after them and, if asked for, the last logits.

    Without logits, what a block-outer order holds does not grow with the length. With `full`, token
    attention is `benchmarks.full_attention`, for a `config` of one block and no memory.
    """
    decoder = Decoder(config)
    tokens = jnp.asarray(random_tokens(config, batch, length))
    # The parameters do not depend on how blocks are cut, and a short block is traced soon.
    params = parameters(
        dataclasses.replace(config, block_size=max(1, config.memory_columns), blocks_per_chunk=None)
    )

    def read(params, tokens):
        hidden, state = decoder.apply({"params": params}, tokens, method="read")
        last = decoder.apply({"params": params}, hidden[:, -1], method="logits") if logits else None
        return last, state

    attention = full_attention if full else layer.token_attention
    with mock.patch.object(layer, "token_attention", attention):
        compiled = jax.jit(read).lower(params, tokens).compile()
    return Workload(lambda: compiled(params, tokens), _temp_bytes(compiled))


def matrix_product(size: int) -> tuple[Workload, int]:
    """A float32 product of two square matrices, and its operations."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32)
    compiled = jax.jit(jnp.matmul).lower(a, b).compile()
    return Workload(lambda: compiled(a, b), _temp_bytes(compiled)), 2 * size**3


@functools.cache
def parameters(config: DecoderConfig):
    """Random parameters, unboxed."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return unbox(jax.jit(Decoder(config).init)(jax.random.key(0), tokens))["params"]


def random_tokens(config: DecoderConfig, batch: int, length: int) -> np.ndarray:
    """Random tokens without padding, int32 `[batch, length]`."""
    rng = np.random.default_rng(0)
    return rng.integers(1, config.vocab_size, (batch, length), dtype=np.int32)


def _temp_bytes(compiled) -> int:
    return int(compiled.memory_analysis().temp_size_in_bytes)
