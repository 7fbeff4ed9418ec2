"""Workloads to measure: training steps and forward passes, compiled ahead of time.

They are cached, so that sections that measure the same workload compile it once.
"""

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import unbox

from famx.decoding import Sampling, Streamer
from famx.mesh import batch_sharding, make_mesh
from famx.models import DecoderModel
from famx.modules import Decoder, DecoderConfig
from famx.scale import full_attention
from famx.training import optimizers
from famx.training.run import Data, Every, Run
from famx.training.step import make_initializer, make_train_step
from famx.training.trainable import Trainable


@dataclasses.dataclass(frozen=True)
class Workload:
    """A compiled function.

    Attributes:
      run: calls it, without arguments, and returns its outputs.
      temp_bytes: memory it allocates in addition to inputs and outputs; None if it is not known.
      parameters: number of the model's parameters; None if it is not known.
      close: frees what it holds outside this process.
    """

    run: Callable[[], Any]
    temp_bytes: int | None = None
    parameters: int | None = None
    close: Callable[[], None] = lambda: None


@functools.cache
def train_step(
    config: DecoderConfig, batch: int, length: int, loss_chunk: int | None = None
) -> Workload:
    """The step of `famx.training.step` on one device: loss, gradient, and an AdamW update.

    Every call continues from the parameters of the previous call. Workloads whose models have the same
    parameters share one training state, so that several workloads fit on the device; the first call
    makes it, and so does one that follows a call that failed, for instance for lack of memory.
    """
    run = _training(config, batch, length, loss_chunk)
    rows = random_tokens(config, batch, length + 1)
    inputs = {"decoder_input_tokens": rows[:, :-1], "decoder_target_tokens": rows[:, 1:]}
    _, abstract = make_initializer(run)
    inputs = jax.device_put(inputs, batch_sharding(run.mesh))
    with run.on_mesh():
        compiled = make_train_step(run, abstract).lower(abstract, inputs).compile()

    def step():
        states = _training_states(config)
        state = states.pop() if states else _initial(config)
        state, metrics = jax.block_until_ready(compiled(state, inputs))
        states.append(state)
        return state, metrics

    count = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    return Workload(step, _temp_bytes(compiled), count)


def _training(config: DecoderConfig, batch: int, length: int, loss_chunk: int | None = None) -> Run:
    """A run on one device, without a task."""
    model = DecoderModel(Decoder(config), loss_chunk=loss_chunk)
    data = Data(None, {"targets": length}, batch)
    return Run(model, data, optimizers.adamw(1e-4), steps=1).ready(jax.devices()[:1])


def _training_states(config: DecoderConfig) -> list:
    """A list of at most one element, the training state of all configs with these parameters.

    A step takes the state and returns the next one, since it donates its input.
    """
    return _states_of(
        dataclasses.replace(config, blocks_per_chunk=None, remat="none", attention_backend="auto")
    )


@functools.cache
def _states_of(config: DecoderConfig) -> list:
    return []


def _initial(config: DecoderConfig):
    initialize, _ = make_initializer(_training(config, 1, config.block_size))
    return initialize(jax.random.key(0))


@functools.cache
def forward(
    config: DecoderConfig, batch: int, length: int, logits: bool, full: bool = False
) -> Workload:
    """Forward pass over `length` tokens.

    Args:
      config: the model.
      batch: number of examples.
      length: number of tokens.
      logits: also return the last token's logits. Without them, the memory of reading block by block
        does not grow with the length.
      full: use `famx.scale.full_attention`; `config` must have one block and no memory.
    """
    decoder = Decoder(config)
    tokens = jnp.asarray(random_tokens(config, batch, length))
    # Parameters do not depend on the block size, and initialisation compiles faster with short blocks.
    params = parameters(
        dataclasses.replace(config, block_size=max(1, config.memory_columns), blocks_per_chunk=None)
    )

    def read(params, tokens):
        hidden, state = decoder.apply({"params": params}, tokens, method="read")
        last = decoder.apply({"params": params}, hidden[:, -1], method="logits") if logits else None
        return last, state

    with full_attention.replaced() if full else contextlib.nullcontext():
        compiled = jax.jit(read).lower(params, tokens).compile()
    return Workload(lambda: compiled(params, tokens), _temp_bytes(compiled))


def prefill(config: DecoderConfig, batch: int, length: int) -> Workload:
    """`Streamer.read` of whole blocks; every call reads on from where the previous one ended."""
    streamer, params = Streamer(Decoder(config)), parameters(config)
    tokens, states = random_tokens(config, batch, length), []

    def read():
        state = states.pop() if states else streamer.initial_state(params, batch)
        logits, state = jax.block_until_ready(streamer.read(params, state, tokens, aligned=True))
        states.append(state)
        return logits

    read()  # compiles
    return Workload(read)


def decode(config: DecoderConfig, batch: int, tokens: int) -> Workload:
    """`Streamer.generate`, greedily; every call writes on from where the previous one ended."""
    streamer, params = Streamer(Decoder(config)), parameters(config)
    sampling, ends = Sampling(tokens), []

    def write():
        if ends:
            logits, state = ends.pop()
        else:
            logits = jnp.asarray(random_tokens(config, batch, config.vocab_size), jnp.float32)
            state = streamer.initial_state(params, batch)
        end = jax.block_until_ready(streamer.generate(params, logits, state, sampling))
        ends.append((end.logits, end.state))
        return end.tokens

    write()  # compiles
    return Workload(write)


def finetuning(model: DecoderModel, batch: int, length: int, steps: int, log: int) -> Run:
    """A run on one device that finetunes the adapters of a model on PassKey, from random parameters.

    Args:
      model: a model with adapters.
      batch: rows per step.
      length: tokens of a row.
      steps: number of steps.
      log: steps between two lines of the log.
    """
    return Run(
        model=model,
        data=Data("passkey_words", {"targets": length}, batch, {"filler": "mixed", "header": False}),
        optimizer=optimizers.adamw(1e-4),
        steps=steps,
        trainable=Trainable("lora", frozen_dtype="bfloat16"),
        every=Every(log=log, checkpoint=steps),
        mesh=make_mesh(devices=jax.devices()[:1]),
    )


def forget() -> None:
    """Frees the parameters and states of all workloads that are no longer used elsewhere."""
    for function in (train_step, _states_of, forward, parameters):
        function.cache_clear()
    gc.collect()


def matrix_product(size: int) -> tuple[Workload, int]:
    """A float32 product of two `[size, size]` matrices, and its number of operations."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32)
    compiled = jax.jit(jnp.matmul).lower(a, b).compile()
    return Workload(lambda: compiled(a, b), _temp_bytes(compiled)), 2 * size**3


@functools.cache
def parameters(config: DecoderConfig):
    """Randomly initialised parameters, without sharding boxes."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return unbox(jax.jit(Decoder(config).init)(jax.random.key(0), tokens))["params"]


def random_tokens(config: DecoderConfig, batch: int, length: int) -> np.ndarray:
    """Random token ids other than padding, int32 `[batch, length]`."""
    rng = np.random.default_rng(0)
    return rng.integers(1, config.vocab_size, (batch, length), dtype=np.int32)


def _temp_bytes(compiled) -> int:
    return int(compiled.memory_analysis().temp_size_in_bytes)
