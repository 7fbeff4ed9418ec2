"""A training run as one value, which training, compiling, benchmarks and tests share.

For example:

    run = Run(
        model=DecoderModel(Decoder(config)),
        data=Data("passkey_words", lengths={"targets": 128}, batch_size=16, options={"header": False}),
        optimizer=optimizers.adamw(1e-3),
        steps=1000,
        model_dir="/tmp/famx/passkey",
    )
    loop.train(run)
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import gin
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from famx.base.errors import ConfigError
from famx.base.features import VALUE_WEIGHTS, VALUES, features_of
from famx.base.ranges import (
    Amount,
    Built,
    Directory,
    Expected,
    Name,
    NonNegative,
    Object,
    OneOf,
    Positive,
    Seed,
)
from famx.base.values import checked, options_named
from famx.base.xla_options import CHOICES, DEFAULT, compiler_options
from famx.data.tasks import registry
from famx.mesh import (
    Rules,
    batch_shard,
    batch_sharding,
    check_batch_size,
    check_blocks,
    logical_to_sharding,
    make_mesh,
    make_rules,
    on_mesh,
)
from famx.models import DecoderModel
from famx.models.memory_start import MemoryStart
from famx.modules.backends import resolve_backend
from famx.training.curriculum import Curriculum
from famx.training.flops import Learning
from famx.training.health import Health
from famx.training.source import Source
from famx.training.stage_line import StageLine
from famx.training.state_passing import Fresh, StatePassing
from famx.training.trainable import Trainable

_Lengths = Annotated[
    Mapping[Name, Positive], Expected("a dict of whole numbers by feature, such as {'targets': 128}")
]
_Stages = Annotated[
    Sequence[StageLine],
    Expected(
        "a tuple of dicts, one for each stage, such as ({'steps': 100}, {'blocks': 8}) or, with the comma"
        " of a tuple of one, ({'blocks': 8},)", inside=True,
    ),
]  # fmt: skip
_Options = Annotated[
    Mapping[Name, Any], Expected("a dict of options of the task, such as {'vocabulary': 'bytes'}")
]


@gin.configurable
@checked
@dataclasses.dataclass(frozen=True)
class Data:
    """Training data: a task and the shape of its batches.

    Attributes:
      task: name of a task of `famx.data` or of SeqIO, or a task object.
      lengths: `{"targets": L}`, the number of tokens of a row, through which gradients flow; a length of
        "inputs" is added to it.
      batch_size: number of rows of the global batch.
      options: settings of the task. For a name, they override gin bindings of the class that makes the
        task (a run of gin files refuses a setting that is given twice); for an object, which must be a
        dataclass, they replace its fields.
      curriculum: lengths in blocks that unlock on accuracy; those beyond a row need `aged` states.
      packed: whether a row holds several documents. None: yes, but not in continuous lanes nor for
        SeqIO. A task by index has no documents to pack, except in continuous lanes.
      on_bad_record: what happens at a document that cannot be used: "stop", with a checkpoint before it,
        or "skip", with a count in the log.
    """

    task: Annotated[Name | Object | None, Expected("the name of a task, or an object")]
    lengths: _Lengths
    batch_size: Positive
    options: _Options | None = None
    curriculum: Curriculum | None = None
    packed: bool | None = None
    on_bad_record: Literal["stop", "skip"] = "stop"

    @property
    def skips_bad(self) -> bool:
        """Whether documents that cannot be used are left out."""
        return self.on_bad_record == "skip"

    @property
    def length(self) -> int:
        """Number of tokens of a row; ConfigError if `lengths` does not give it."""
        if "targets" not in self.lengths:
            raise ConfigError("TASK_FEATURE_LENGTHS must name a length for 'targets': {'targets': 512}.")
        return self.lengths["targets"] + self.lengths.get("inputs", 0)

    def check_options(self) -> None:
        """Raises ConfigError if a named task has no such option, or its annotations forbid the value."""
        options = self.options or {}
        if isinstance(self.task, str) and registry.factory(self.task) is not None:
            with options_named("TASK_OPTIONS", options):
                registry.check_options(self.task, options)

    def make_task(self, vocabulary: Any = None, **changes: Any) -> Any:
        """The task object.

        Args:
          vocabulary: vocabulary for a named task that takes one and whose options give none; None: the
            task's default.
          **changes: options that override all others, such as `split="validation"`.

        Raises:
          ConfigError: there is no such task, or it does not take these options.
        """
        options = {**(self.options or {}), **changes}
        with options_named("TASK_OPTIONS", options):
            return self._made(options, vocabulary)

    def _made(self, options: dict[str, Any], vocabulary: Any) -> Any:
        try:
            if not isinstance(self.task, str):
                return dataclasses.replace(self.task, **options) if options else self.task
            given = {**bound_options(self.task), **options}
            if vocabulary is not None and "vocabulary" not in given:
                if registry.takes(self.task, "vocabulary"):
                    options["vocabulary"] = vocabulary
            factory = registry.factory(self.task)
            if factory is None:
                return registry.get(self.task, **options)
            return _configured(factory)(**registry.check_options(self.task, options))
        except ConfigError:
            raise
        except (ValueError, TypeError) as error:
            sentence = str(error).split("\n  In call to configurable")[0]
            raise ConfigError(f"MIXTURE_OR_TASK_NAME {self.task!r}: {sentence}") from error


def bound_options(name: str) -> dict[str, Any]:
    """Gin bindings of the class or function that makes the task `name`, except for fixed options."""
    factory = registry.factory(name)
    fixed = getattr(factory, "keywords", {})
    target = getattr(factory, "func", factory)
    with contextlib.suppress(ValueError):
        if target is not None:
            bound = gin.get_bindings(target)
            return {option: value for option, value in bound.items() if option not in fixed}
    return {}


def _configured(factory):
    """`factory` with the gin bindings of its class or function."""
    if isinstance(factory, functools.partial):
        return functools.partial(_configured(factory.func), *factory.args, **factory.keywords)
    try:
        return gin.get_configurable(factory)
    except ValueError:  # gin does not know it
        return factory


@gin.configurable
@checked
@dataclasses.dataclass(frozen=True)
class Every:
    """Periods in steps.

    Attributes:
      log: steps between two lines of the log.
      checkpoint: steps between two checkpoints.
      evaluation: steps between two evaluations; 0: only one, at the end.
    """

    log: Positive = 10
    checkpoint: Positive = 1000
    evaluation: NonNegative = 0


@gin.configurable
@checked
@dataclasses.dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
      model: model to train.
      data: the task and the shape of its batches.
      optimizer: an optax transformation.
      steps: number of steps of the whole run, including those before a resume; None only if no step is
        taken.
      model_dir: directory of checkpoints and logs, absolute if there are several processes; None only if
        nothing is written.
      random_seed: seed of parameters, the order of documents, lengths of a curriculum and all other draws
        of the run. Examples that a task generates have the task's own `seed`, whatever this is.
      state_passing: states that examples begin from, see `famx.training.state_passing`.
      trainable: which parameters learn, see `famx.training.trainable`.
      initial_checkpoint_path: checkpoint that a new run takes its parameters from, a `MODEL_DIR` or one
        `checkpoint_<step>` in it. The model may differ from that of the checkpoint in its memory. A named
        task takes the vocabulary of the checkpoint.
      initial_adapter: saved adapter of that checkpoint which the run's adapters begin with, a directory
        or the name of one that comes with famx; None: they begin with their initial values. `trainable`
        must name "lora", with the adapter's rank, alpha and targets.
      memory_start: how the memory starts in a run from such a checkpoint.
      microbatches: number of parts of the batch that are computed one after another to save memory; the
        result of the step is the same.
      evaluation: called as `evaluation(model, params, step) -> scalars`; its `report(model, params,
        model_dir)`, if any, is called at the end of the run; its `check(model)`, if any, raises
        ConfigError before the run begins; its `with_task(make_task)`, if any, gives it the task of the
        run (`make_task` is `Data.make_task`).
      every: periods of logs, checkpoints and evaluations.
      adapter_dtype: what `MODEL_DIR/adapter` is stored in, "float32" or "bfloat16", which takes half the
        space; the checkpoints always have the dtype of training.
      checkpoints_to_keep: number of checkpoints to keep, the newest; None keeps all. The newest good one
        is kept in any case, see `famx.training.health`.
      resume_from: step of the checkpoint to resume from, in place of the newest one, see
        `famx.training.fallback`.
      retry_full_disk: if the disk is full, continue and save at the next period, rather than end.
      health: limits of losses, parameters and memories.
      mesh: mesh of devices; None: `famx.mesh.make_mesh()`.
      rules: sharding rules from logical to mesh axes; None: `famx.mesh.make_rules()`.
      minutes: time after which training stops as at SIGTERM, from zero after a resume; None: no limit.
      profile_steps: "10:13" traces these steps to `MODEL_DIR/profile`, see `Profile`.
      xla_options: compiler options of the step: "default", or a choice of `famx.base.xla_options`.
      compile_threads: number of threads that compile the steps of a curriculum's later lengths and of
        later stages while earlier ones run; 0: each is compiled where it is needed; None: 1 on a GPU or
        TPU of one process, else 0. A run that ends early waits for the compilation in progress.
      stages: settings that change within the run, a dict for each stage, see `famx.training.stages`;
        empty: they stay as they are.
    """

    model: DecoderModel
    data: Data
    optimizer: Annotated[
        optax.GradientTransformation, Expected("an optimiser such as @optimizers.adamw()")
    ]
    steps: Positive | None
    model_dir: Directory | None = None
    random_seed: Seed = 0
    state_passing: StatePassing = Fresh()
    trainable: Trainable = Trainable()
    initial_checkpoint_path: Directory | None = None
    initial_adapter: Name | None = None
    memory_start: MemoryStart = MemoryStart()
    microbatches: Positive = 1
    evaluation: Annotated[
        Callable[..., Any], Built(), Expected("an evaluation such as @evaluation.TaskEvaluation() makes")
    ] | None = None
    every: Every = Every()
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoints_to_keep: Positive | None = 3
    resume_from: NonNegative | None = None
    retry_full_disk: bool = False
    health: Health = Health()
    mesh: Mesh | None = None
    rules: Rules | None = None
    minutes: Amount | None = None
    profile_steps: Name | None = None
    xla_options: Annotated[str, OneOf((DEFAULT, *CHOICES))] = DEFAULT
    compile_threads: NonNegative | None = None
    stages: _Stages = ()

    def ready(self, devices: Sequence[jax.Device] | None = None) -> "Run":
        """A checked copy with mesh and rules set and the model adapted to them.

        The model of the copy has no adapters unless `trainable` names "lora".

        Args:
          devices: devices of the mesh if the run has none; None: all devices.

        Raises:
          ConfigError: the settings do not fit; known before anything is compiled.
        """
        length, batch_size = self.data.length, self.data.batch_size
        mesh, rules = self.mesh, self.rules or make_rules()
        if mesh is None:
            mesh = make_mesh() if devices is None else make_mesh(devices=devices)
        check_batch_size(batch_size, mesh, self.microbatches)
        check_blocks(length, self.model.config, mesh)
        resolve_backend(self.model.config, mesh.devices.flat[0], mesh.size)  # or raises
        compiler_options(self.xla_options, mesh.devices.flat[0].platform, mesh.shape)  # likewise
        model = dataclasses.replace(
            self.model,
            lora=self.model.lora if self.trainable.has_adapters else None,
            context_shards=mesh.shape["context"],
        )
        params = model.abstract_params()
        self.trainable.check(params)
        logical_to_sharding(params, mesh, rules)  # raises if the mesh does not divide an axis
        return dataclasses.replace(self, model=model, mesh=mesh, rules=rules)

    def on_mesh(self) -> contextlib.AbstractContextManager[None]:
        """Context of `famx.mesh.on_mesh` for the mesh and rules of a run that is `ready`."""
        return on_mesh(self.mesh, self.rules)

    @property
    def learning(self) -> Learning:
        """Which parameters learn, for the count of operations."""
        paths = flatten_dict(self.model.abstract_params(), sep="/")
        rank = 0 if self.model.lora is None else self.model.lora.rank
        return Learning({path for path in paths if self.trainable.learns(path)}, rank)

    def source(self, task: Any, stage: int = 0) -> Source:
        """The source that the feed of this process is made from; `stage`: index of the stage."""
        return Source(
            task, self.data.batch_size, self.data.length, self.model.config.block_size,
            self.random_seed, batch_shard(self.mesh, jax.process_index()),
            self.data.curriculum, self.data.packed, stage, self.data.skips_bad,
        )  # fmt: skip

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of those arrays of a batch that the step uses."""
        sharding = batch_sharding(self.mesh)
        rows, length = self.data.batch_size, self.data.length
        make = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
        batch = {
            "decoder_input_tokens": make(jnp.int32, length),
            "decoder_target_tokens": make(jnp.int32, length),
            "decoder_loss_weights": make(jnp.float32, length),
        }
        config = self.model.config
        batch |= {x.key: make(x.dtype, length, *x.shape) for x in features_of(config.frontend)}
        if config.values is not None:
            batch[VALUES] = make(jnp.float32, length, config.values.width)
            batch[VALUE_WEIGHTS] = make(jnp.float32, length)
        return batch | {name: make(dtype) for name, dtype in self.state_passing.batch_spec().items()}
