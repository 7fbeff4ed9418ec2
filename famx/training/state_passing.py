"""State passing: the states that examples begin from, and what is kept of the states they end with.

| STATE_PASSING | class | an example begins from | paper |
|---|---|---|---|
| `none` | `Fresh` | the state before the first token | |
| `random` | `Random` | with a probability, the final memory of the last step's first example | RSP |
| `continuous` | `Lanes` | the final state of its lane's last row | named as the ideal |
| `aged` | `Aged` | a state of a pool that has read a document up to its last row | ours |
| `none`, INITIAL_MEMORY_FILE | `FromMemoryFile` | a saved memory, which learns | |

Gradients never cross the step boundary. The kept states are a dict of pytrees, with the names that they
have in checkpoints. Only the batch axes of a `DecoderState` are known here: its memory may be any pytree
with leaves `[layers, B, ...]`.
"""

import dataclasses
import pathlib
from typing import Annotated, Any, ClassVar

import gin
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from famx.base.distributed import on_host
from famx.base.errors import ConfigError
from famx.base.ranges import NonNegative, OneOf, Path, Positive, Share
from famx.base.values import checked
from famx.mesh import Rules, state_sharding, without_boxes
from famx.model_dir import memory_file as memory_files
from famx.models import DecoderModel
from famx.modules import DecoderState
from famx.training.feeds import Feed, aged_feed, fresh_feed, lane_feed
from famx.training.source import Source
from famx.training.trainable import Trainable

MUTABLES, RANDOM = "flax_mutables", "state_passing"  # t5x's names


@dataclasses.dataclass(frozen=True)
class StatePassing:
    """Base class of state passing; keeps nothing, so that every example begins before the first token.

    Attributes:
      from_prompt: whether a step costs as much as if examples began before the first token, see
        `famx.training.flops.train_flops`.
      aligned: whether every example begins at a block boundary.
    """

    from_prompt: ClassVar[bool] = True
    aligned: ClassVar[bool] = True

    def check(self, run) -> None:
        """Raises ConfigError if the other settings of the `famx.training.run.Run` do not fit."""

    def feed(self, source: Source, model: DecoderModel, place) -> Feed:
        """The feed of a task; `place` is a function that puts this host's rows on the devices."""
        del model, place
        return fresh_feed(source)

    def batch_spec(self) -> dict[str, Any]:
        """Names and dtypes of the arrays `[B]` that the feed's batches have besides rows of tokens."""
        return {}

    # ------ Kept states

    def load(self, trained) -> DecoderState | None:
        """A state from a file, for `initial`, or None; `trained`: the model that the run begins from."""
        del trained

    def initial(
        self, model: DecoderModel, params, batch_size: int, loaded: DecoderState | None = None
    ) -> dict[str, Any]:
        """The kept states before the first step."""
        del model, params, batch_size, loaded
        return {}

    def shardings(self, model: DecoderModel, kept, mesh: Mesh, rules: Rules) -> dict[str, Any]:
        """The sharding of each array of `kept` (arrays or ShapeDtypeStructs)."""
        config = model.config
        return {name: state_sharding(state, config, mesh, rules) for name, state in kept.items()}

    def export(self, kept, directory: pathlib.Path, step: int) -> str | None:
        """Writes results of the run to files, if any; returns a sentence that names them, or None.

        All processes of a run call it.
        """
        del kept, directory, step

    # ------ Within a step

    def start(self, kept, fresh: DecoderState, batch, rng) -> tuple[DecoderState, Any]:
        """The states that the batch begins from, and the random key for the rest of the step.

        Args:
          kept: kept states.
          fresh: states before the first token.
          batch: batch of the feed.
          rng: random key of the step.
        """
        del kept, batch
        return fresh, rng

    def end(self, kept, state: DecoderState) -> dict[str, Any] | None:
        """The kept states after the step, from `state` after the batch; None: `kept` unchanged."""
        del kept, state

    def cut(self, kept, parts: int) -> dict[str, Any] | None:
        """Kept states of each of `parts` parts of the batch, on a new first axis; None: all of `kept`."""
        del kept, parts

    def join(self, kept, ends) -> dict[str, Any] | None:
        """The result of `end` for the batch, from the stacked results of `end` for its parts."""
        del kept, ends

    # ------ Learning

    def part(self, trainable: Trainable, params, kept) -> dict[str, Any]:
        """The part of parameters and kept states that learns."""
        del kept
        return trainable.part(params)

    def put(self, trainable: Trainable, params, kept, part) -> tuple[Any, dict[str, Any]]:
        """`(params, kept)` with `part` in place of the part that learns."""
        return trainable.put(params, part), kept


@gin.configurable
@checked
@dataclasses.dataclass(frozen=True)
class Fresh(StatePassing):
    """Every example begins before the first token."""


@gin.configurable
@checked
@dataclasses.dataclass(frozen=True)
class Random(StatePassing):
    """Random state passing (RSP).

    Attributes:
      probability: probability that all examples of a step begin from the kept memory.
      start_step: first step that may do so; from scratch, RSP at step 0 keeps a model from learning.
    """

    probability: Share = 0.8
    start_step: NonNegative = 0

    def initial(self, model, params, batch_size=1, loaded=None):
        """A memory of zeros, without the batch axis, and int32 scalars `updates` and `steps`, both 0."""
        del batch_size, loaded
        state = jax.eval_shape(lambda params: model.initial_state(params, 1), params)
        zeros = lambda x: jnp.zeros(x.shape[:1] + x.shape[2:], x.dtype)
        memory = jax.tree.map(zeros, state.memory)
        return self._dict({"memory": memory, "updates": jnp.int32(0), "steps": jnp.int32(0)})

    def shardings(self, model, kept, mesh, rules):
        """The memory is sharded like that of a single example's state; the counts are replicated."""
        params = without_boxes(model.abstract_params())
        state = jax.eval_shape(lambda params: model.initial_state(params, 1), params)
        no_batch = lambda x: NamedSharding(mesh, PartitionSpec(*x.spec[:1], *x.spec[2:]))
        memory = jax.tree.map(no_batch, state_sharding(state, model.config, mesh, rules).memory)
        replicated = NamedSharding(mesh, PartitionSpec())
        return self._dict({"memory": memory, "updates": replicated, "steps": replicated})

    def start(self, kept, fresh, batch, rng):
        del batch
        coin, rng = jax.random.split(rng)
        kept = kept[MUTABLES][RANDOM]
        use = jax.random.bernoulli(coin, float(self.probability))
        use &= (kept["updates"] > 0) & (kept["steps"] >= self.start_step)
        choose = lambda kept, fresh: jnp.where(use, jax.lax.stop_gradient(kept)[:, None], fresh)
        return fresh.replace(
            memory=jax.tree.map(choose, kept["memory"], fresh.memory),
            updates=jnp.where(use, kept["updates"], fresh.updates),
        ), rng

    def end(self, kept, state):
        """The memory of the batch's first example."""
        first = lambda x: jax.lax.stop_gradient(x[:, 0])
        return self._dict({
            "memory": jax.tree.map(first, state.memory),
            "updates": state.updates[0],
            "steps": kept[MUTABLES][RANDOM]["steps"] + 1,
        })  # fmt: skip

    def join(self, kept, ends):
        del kept
        return jax.tree.map(lambda x: x[0], ends)

    def _dict(self, kept):
        return {MUTABLES: {RANDOM: kept}}


@gin.configurable
@checked
@dataclasses.dataclass(frozen=True)
class Lanes(StatePassing):
    """Every example begins from the final state of its lane's last row.

    Attributes:
      document_length: number of tokens of a document, for tasks whose examples are made by index.
      num_documents: number of such documents.
    """

    from_prompt: ClassVar[bool] = False
    document_length: Positive = 16384
    num_documents: Positive = 1_000_000

    def feed(self, source, model, place):
        del model, place
        return lane_feed(source, self.document_length, self.num_documents)

    def batch_spec(self):
        return {"reset": jnp.bool_}

    def initial(self, model, params, batch_size, loaded=None):
        del loaded
        return {"lanes": model.initial_state(params, batch_size)}

    def start(self, kept, fresh, batch, rng):
        """The lane's state without gradient, or a fresh one where `reset`."""
        return fresh.select(batch["reset"], jax.lax.stop_gradient(kept["lanes"])), rng

    def end(self, kept, state):
        del kept
        return {"lanes": jax.lax.stop_gradient(state)}

    def cut(self, kept, parts):
        return {"lanes": kept["lanes"].map_examples(lambda x, axis: cut(x, parts, axis))}

    def join(self, kept, ends):
        return {"lanes": kept["lanes"].map_examples(lambda _, x, axis: join(x, axis), ends["lanes"])}


@gin.configurable
@checked
@dataclasses.dataclass(frozen=True)
class Aged(StatePassing):
    """Every example begins before the first token, or from a state of the aged-state pool.

    Attributes:
      groups: number of groups of the pool, each of one batch of states.
      refresh_period: steps between two replacements of a group, see `famx.training.feeds.AgedFeed`.
    """

    from_prompt: ClassVar[bool] = False
    groups: Positive = 8
    refresh_period: Positive = 8

    def feed(self, source, model, place):
        return aged_feed(source, model, self.groups, self.refresh_period, place)

    def batch_spec(self):
        return {"lane": jnp.int32}

    def initial(self, model, params, batch_size, loaded=None):
        del loaded
        return {"lanes": model.initial_state(params, batch_size * self.groups)}

    def start(self, kept, fresh, batch, rng):
        """State `lane` (int32 `[B]`) of the pool without gradient, or a fresh one where it is -1."""
        lane = batch["lane"]
        aged = jax.lax.stop_gradient(kept["lanes"].take(jnp.maximum(lane, 0)))
        return fresh.select(lane < 0, aged), rng


@gin.configurable
@checked
@dataclasses.dataclass(frozen=True)
class FromMemoryFile(StatePassing):
    """Every example begins from the state in a memory file (`famx.memory`); only its memory learns.

    Attributes:
      path: memory file of one text, made with the checkpoint that the run begins from.
    """

    from_prompt: ClassVar[bool] = False
    aligned: ClassVar[bool] = False
    path: Path

    def check(self, run):
        if memory_files.read_header(self.path).position[1:]:
            raise ConfigError(
                f"INITIAL_MEMORY_FILE {self.path} holds several memories: give a file of one."
            )
        if run.initial_checkpoint_path is None:
            raise ConfigError(
                "INITIAL_MEMORY_FILE needs INITIAL_CHECKPOINT_PATH, the model that made it."
            )
        if run.trainable.name != "memory":
            raise ConfigError(
                f"INITIAL_MEMORY_FILE needs TRAINABLE='memory', not {run.trainable.name!r}: only that"
                " memory learns."
            )
        if run.evaluation is not None:
            raise ConfigError(
                "An evaluation cannot begin from INITIAL_MEMORY_FILE: leave it out, and give the trained"
                " memory to famx.infer as MEMORY_FILE."
            )

    def load(self, trained):
        return memory_files.restore_memory(self.path, trained)[1]

    def initial(self, model, params, batch_size, loaded=None):
        del batch_size
        return {"start": model.initial_state(params, 1) if loaded is None else loaded}

    def export(self, kept, directory, step):
        path = directory / f"memory_{step}.famem"
        memory = jax.tree.map(on_host, kept["start"].memory)
        if jax.process_index() == 0:
            memory_files.with_memory(self.path, path, memory)
        return f"The trained memory is in {path}."

    def start(self, kept, fresh, batch, rng):
        del batch
        return kept["start"].take(jnp.zeros((fresh.batch_size,), jnp.int32)), rng

    def part(self, trainable, params, kept):
        del trainable, params
        return {"memory": kept["start"].memory}

    def put(self, trainable, params, kept, part):
        del trainable
        return params, {"start": kept["start"].replace(memory=part["memory"])}


BY_NAME = {"none": Fresh, "random": Random, "continuous": Lanes, "aged": Aged}


@gin.configurable
@checked
def named(
    name: Annotated[str, OneOf(tuple(BY_NAME))] = "none", memory_file: Path | None = None
) -> StatePassing:
    """The state passing named by STATE_PASSING, with its settings from gin.

    Args:
      name: "none", "random", "continuous" or "aged".
      memory_file: INITIAL_MEMORY_FILE; every example then begins from it.

    Raises:
      ConfigError: the name cannot be combined with a memory file.
    """
    if memory_file is None:
        return BY_NAME[name]()
    if name != "none":
        raise ConfigError(
            f"INITIAL_MEMORY_FILE needs STATE_PASSING='none', not {name!r}: every example begins from it."
        )
    return FromMemoryFile(memory_file)


def cut(x, parts: int, axis: int = 0):
    """Splits `axis` into `parts` parts, on a new first axis; part `i` has rows `i`, `i + parts`, ..."""
    shape = (*x.shape[:axis], -1, parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis + 1, 0)


def join(x, axis: int = 0):
    """The inverse of `cut`."""
    return jnp.moveaxis(x, 0, axis + 1).reshape(*x.shape[1 : axis + 1], -1, *x.shape[axis + 2 :])
