"""The programs of a run, lowered for devices that need not exist: nothing is computed or stored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from famx.decoding import Sampling, Streamer
from famx.mesh import BATCH_AXES, check_batch_size, logical_to_sharding, on_mesh, state_sharding
from famx.models.inputs import check_reads_text
from famx.modules import DecoderConfig
from famx.modules.prepared import computing
from famx.training.flops import train_flops
from famx.training.run import Run
from famx.training.step import make_initializer, make_train_step

PROGRAMS = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered program and its properties that are known before it is compiled.

    Attributes:
      name: one of `PROGRAMS`, or "at_once"; with stages, that of the training step names its stage.
      lowered: the program, to be compiled.
      arguments: its arguments by kind, as ShapeDtypeStructs with shardings.
      parameters: number of parameters of the model.
      batch: rows of the global batch.
      length: tokens per row that are read or written.
      model_flops: operations that the result depends on, on all devices; None: not counted.
      config: configuration of the model.
    """

    name: str
    lowered: Any
    arguments: Mapping[str, Any]
    parameters: int
    batch: int
    length: int
    model_flops: int | None
    config: DecoderConfig

    def argument_bytes(self) -> dict[str, int]:
        """Bytes on one device, by kind."""
        return {kind: sum(map(_bytes, jax.tree.leaves(x))) for kind, x in self.arguments.items()}


def train(run: Run) -> Program:
    """The training step of a run that is `ready`, as `famx.train` compiles it."""
    _, abstract = make_initializer(run)
    batch = run.abstract_batch()
    with on_mesh(run.mesh, run.rules):
        lowered = make_train_step(run, abstract).lower(abstract, batch)
    arguments = {
        "parameters": abstract.params,
        "optimiser": abstract.opt_state,
        "states": abstract.kept,
        "batch": batch,
    }
    config, rows, length = run.model.config, run.data.batch_size, run.data.length
    flops = None
    if run.trainable.name == "all":  # otherwise parts of the backward pass are omitted
        flops = sum(train_flops(config, rows, length, run.state_passing.from_prompt).values())
    count = _count(abstract.params)
    return Program("train", lowered, arguments, count, rows, length, flops, config)


def read_and_write(run: Run, batch_size: int) -> tuple[Program, Program]:
    """Prefill, the step that reads most of a long prompt, and decode, a block written token by token."""
    config = run.model.config
    params, state, rows = _reader(run, batch_size)
    streamer = Streamer(run.model.module)
    sampling = Sampling(max_new_tokens=config.block_size)
    with on_mesh(run.mesh, run.rules):
        reading, length = streamer.lower_read(params, state, rows)
        writing = streamer.lower_write(params, state, sampling, rows)
    arguments, count = {"parameters": params, "states": state}, _count(params)
    # Tokens in the middle of a text, whose last block updates the memory too; no logits. A training step
    # is three such passes.
    both, first = (train_flops(config, batch_size, n * length, from_start=False) for n in (2, 1))
    flops = sum(both[kind] - first[kind] for kind in both if kind != "head") // 3
    return (
        Program("prefill", reading, arguments, count, batch_size, length, flops, config),
        Program("decode", writing, arguments, count, batch_size, config.block_size, None, config),
    )


def read_at_once(run: Run, batch_size: int, length: int) -> Program:
    """Reads whole texts from their beginning in one call, layer by layer; no logits.

    The arguments that it takes are the parameters, the state before the first token, and the tokens.
    """
    config = run.model.config
    params, state, rows = _reader(run, batch_size)
    tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=rows)

    def read(params, state, tokens):
        variables = {"params": computing(params, config, tables=False)}
        hidden, state = run.model.module.apply(variables, tokens, state, aligned=True, method="read")
        return hidden[:, -1], state

    with on_mesh(run.mesh, run.rules):
        lowered = jax.jit(read, donate_argnums=1, keep_unused=True).lower(params, state, tokens)
    arguments = {"parameters": params, "states": state, "batch": tokens}
    flops = train_flops(config, batch_size, length)
    forward = sum(flops[kind] for kind in flops if kind != "head") // 3
    return Program(
        "at_once", lowered, arguments, _count(params), batch_size, length, forward, config
    )


def _reader(run: Run, batch_size: int) -> tuple[Any, Any, NamedSharding]:
    """Shapes of the parameters and of the state of a model that reads, and the sharding of its rows."""
    model, mesh = run.model, run.mesh
    check_batch_size(batch_size, mesh, setting="--inference_batch_size")
    check_reads_text(model, "The programs of inference")
    config = model.config
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    boxed = jax.eval_shape(
        lambda key: model.module.init(key, model.no_inputs(1, config.block_size))["params"],
        jax.random.key(0),
    )
    shardings = logical_to_sharding(boxed, mesh, run.rules)
    params = jax.tree.map(place, nn.unbox(boxed), shardings)
    apply = lambda params: model.module.apply({"params": params}, batch_size, method="initial_state")
    state = jax.eval_shape(apply, params)
    state = jax.tree.map(place, state, state_sharding(state, config, mesh, run.rules))
    return params, state, NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    size = 1
    for n in shape:
        size *= n
    return size * leaf.dtype.itemsize
