"""What a run computes with, apart from its data: checked and put together, for training and compiling."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from famx.base.errors import ConfigError
from famx.mesh import (
    Rules,
    batch_sharding,
    check_batch_size,
    check_blocks,
    logical_to_sharding,
    make_mesh,
    make_rules,
)
from famx.models import DecoderModel
from famx.modules.backends import resolve_backend
from famx.training import state_passing
from famx.training.flops import Learning
from famx.training.step import make_initializer, make_train_step
from famx.training.trainable import Trainable


@dataclasses.dataclass(frozen=True)
class Setup:
    """Model, optimiser, devices and the sizes of a step; make it with `prepare`.

    Attributes:
      num_lanes: states that the training state holds, where `mode` keeps any.
      with_start: whether every example begins from a saved state.
    """

    model: DecoderModel
    optimizer: Any
    mode: str
    batch_size: int
    length: int
    num_microbatches: int
    seed: int
    mesh: Mesh
    rules: Rules
    learns: Trainable
    num_lanes: int
    with_start: bool

    @property
    def learning(self) -> Learning:
        """What learns, for the count of operations."""
        paths = flatten_dict(self.model.abstract_params(), sep="/")
        rank = 0 if self.model.lora is None else self.model.lora.rank
        return Learning({path for path in paths if self.learns.learns(path)}, rank)

    def initializer(self):
        """As `step.make_initializer`."""
        return make_initializer(
            self.model, self.optimizer, self.mode, self.num_lanes, self.mesh, self.rules,
            self.learns, self.with_start,
        )  # fmt: skip

    def train_step(self, abstract):
        """As `step.make_train_step`."""
        return make_train_step(
            self.model, self.optimizer, self.mode, self.seed, abstract, self.learns,
            self.num_microbatches,
        )  # fmt: skip

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch of a step, as far as the step needs it, with shardings and without data."""
        sharding = batch_sharding(self.mesh)
        make = lambda dtype, *shape: jax.ShapeDtypeStruct(
            (self.batch_size, *shape), dtype, sharding=sharding
        )
        batch = {
            "decoder_input_tokens": make(jnp.int32, self.length),
            "decoder_target_tokens": make(jnp.int32, self.length),
            "decoder_loss_weights": make(jnp.float32, self.length),
        }
        if self.mode == "continuous":
            batch["reset"] = make(jnp.bool_)
        if self.mode == "aged":
            batch["lane"] = make(jnp.int32)
        return batch


def prepare(
    model: DecoderModel,
    optimizer: Any,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    random_seed: int = 0,
    state_passing_mode: str = "none",
    random_state: state_passing.RandomState | None = None,
    pool_groups: int = 8,
    initial_memory_file: str | None = None,
    trainable: str = "all",
    frozen_dtype: str | None = None,
    num_microbatches: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Setup:
    """Checks the settings of `loop.train` that concern the step; `devices`: None: all there are.

    `model` takes the adapters, the random state passing and the shards that the settings ask for.

    Raises:
      ConfigError: with one sentence, before anything is compiled, if the settings do not fit.
    """
    if "targets" not in task_feature_lengths:
        raise ConfigError("TASK_FEATURE_LENGTHS must name a length for 'targets': {'targets': 512}.")
    mesh = make_mesh() if devices is None else make_mesh(devices=devices)
    rules = make_rules()
    check_batch_size(batch_size, mesh, num_microbatches)
    check_blocks(task_feature_lengths["targets"], model.config, mesh)
    resolve_backend(model.config, mesh.devices.flat[0].platform, mesh.size)  # refuses what cannot run
    learns = Trainable(trainable, frozen_dtype)
    if trainable != "lora":
        model.lora = None
    abstract_params = model.abstract_params()
    learns.check(abstract_params)
    logical_to_sharding(abstract_params, mesh, rules)  # refuses what cannot be cut
    model.context_shards = mesh.shape["context"]
    model.random_state = None
    if state_passing_mode == "random":
        model.random_state = random_state or state_passing.RandomState()
    return Setup(
        model, optimizer, state_passing_mode, batch_size, task_feature_lengths["targets"],
        num_microbatches, random_seed, mesh, rules, learns,
        batch_size * (pool_groups if state_passing_mode == "aged" else 1),
        initial_memory_file is not None,
    )  # fmt: skip
