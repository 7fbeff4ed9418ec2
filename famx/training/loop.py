"""The training loop, read from top to bottom."""

import collections
import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import jax
from jax.experimental import multihost_utils

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.files import write_json
from famx.base.signals import graceful_stop
from famx.data.tasks import Kind, kind_of, registry, vocabulary_of
from famx.data.vocabularies import save_vocabulary
from famx.lora import save_adapter
from famx.mesh import batch_shard, batch_sharding, on_mesh
from famx.model_dir import memory_file
from famx.model_dir.checkpointer import Checkpointer, check_model_dir
from famx.model_dir.identity import check_same_model, split_checkpoint, weights_fingerprint
from famx.model_dir.loading import TrainedModel, check_model, load_pretrained
from famx.models import DecoderModel
from famx.models.metrics import Mean
from famx.training import state_passing
from famx.training.curriculum import Curriculum
from famx.training.feeds import make_feed
from famx.training.run_log import RunLog
from famx.training.setup import prepare
from famx.training.speed import Profile, SpeedMeter
from famx.training.trainable import Trainable

_BASE_FILE = "base.json"  # what a run began from
_MAX_SKIPPED = 20  # steps in a row whose gradient was not finite


@dataclasses.dataclass(frozen=True)
class LaneDocuments:
    """How continuous lanes cut documents from a task that is made by index."""

    length: int = 16384  # tokens of a document
    count: int = 1_000_000


@gin.configurable
def train(
    model_dir: str,
    model: DecoderModel,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    total_steps: int,
    batch_size: int,
    optimizer: Any,
    task_options: Mapping[str, Any] | None = None,
    random_seed: int = 0,
    state_passing_mode: str = "none",
    random_state: state_passing.RandomState | None = None,
    curriculum: Curriculum | None = None,
    pool_groups: int = 8,
    pool_refresh_period: int = 8,
    lane_documents: LaneDocuments = LaneDocuments(),
    packed: bool | None = None,
    evaluation: Any = None,
    eval_period: int = 0,
    log_period: int = 10,
    checkpoint_period: int = 1000,
    checkpoints_to_keep: int | None = 3,
    initial_checkpoint_path: str | None = None,
    initial_memory_file: str | None = None,
    trainable: str = "all",
    frozen_dtype: str | None = None,
    num_microbatches: int = 1,
    profile_steps: str | None = None,
) -> dict[str, float]:
    """Trains a model, or goes on where the last run in `model_dir` stopped, bit for bit.

    Args:
      model_dir: absolute directory of checkpoints and logs.
      model: what to train.
      mixture_or_task_name: a task of `famx.data`, made with `task_options`.
      task_feature_lengths: `{"targets": L}`, the tokens of a row through which gradients go.
      total_steps: steps of the whole run, earlier parts included.
      batch_size: rows of the global batch.
      optimizer: an optax transformation.
      random_seed: of parameters, data and everything else that is drawn.
      state_passing_mode: none, random, continuous or aged; see `famx.training.state_passing`.
      random_state: settings of random state passing.
      curriculum: lengths in blocks that unlock on accuracy; those beyond a row need `aged`.
      pool_groups, pool_refresh_period: the aged-state pool, see `AgedFeed`.
      lane_documents: documents that continuous lanes cut from a task made by index.
      packed: fill rows with several documents; None: unless `continuous` lanes read them.
      evaluation: called as `evaluation(model, params, step) -> scalars` every `eval_period` steps;
        its `report(model, params, model_dir)`, if any, ends the run; its `check(model)`, if any,
        raises ConfigError before the run begins.
      eval_period, log_period, checkpoint_period: in steps; `eval_period` 0: at the end alone.
      checkpoints_to_keep: the newest so many; None: all.
      initial_checkpoint_path: where a run that begins takes its parameters from, a `MODEL_DIR` or one
        `checkpoint_<step>` of it. The model may differ from the one there in its memory. The task's
        vocabulary is then the one there.
      initial_memory_file: what `famx.memory` wrote with that checkpoint: every example begins from it,
        and its memory is what `trainable="memory"` trains.
      trainable: which parameters learn, see `famx.training.trainable`.
      frozen_dtype: of matrices that do not learn: "bfloat16" or "int8"; None: as they are.
      num_microbatches: parts of the batch that are read one after another, to need less memory; the
        step is the same.
      profile_steps: "10:13" traces these steps to `MODEL_DIR/profile`, see `Profile`.

    Returns:
      The last logged scalars.

    Raises:
      ConfigError: with one sentence, before anything is compiled, if the settings do not fit.
    """
    # ---------------------------------------------------------------- checks
    directory = check_model_dir(model_dir)
    for name, value in (("TRAIN_STEPS", total_steps), ("log_period", log_period)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}.")
    profile = Profile(profile_steps, directory)
    setup = prepare(
        model, optimizer, task_feature_lengths, batch_size, random_seed, state_passing_mode,
        random_state, pool_groups, initial_memory_file, trainable, frozen_dtype, num_microbatches,
    )  # fmt: skip
    mesh, learns = setup.mesh, setup.learns
    _check_start(initial_memory_file, initial_checkpoint_path, learns, state_passing_mode, evaluation)
    initial_vocabulary = None
    if initial_checkpoint_path is not None:
        initial = split_checkpoint(initial_checkpoint_path)[0]
        initial_vocabulary = check_model(initial).input_vocabulary
    task = _make_task(mixture_or_task_name, task_options or {}, initial_vocabulary)
    vocabulary = _vocabulary(task, model)
    if initial_vocabulary is not None and vocabulary not in (None, initial_vocabulary):
        raise ConfigError(
            f"The vocabulary of the task {mixture_or_task_name} is not that of {initial}: give it with"
            f" TASK_OPTIONS={{'vocabulary': {str(initial)!r}}}, or take a task for that vocabulary."
        )
    if model.input_vocabulary is None:
        model.input_vocabulary = model.output_vocabulary = vocabulary
    if hasattr(evaluation, "check"):
        evaluation.check(model)

    # ---------------------------------------------------------------- data
    sharding = batch_sharding(mesh)

    def place(batch):
        make = lambda x: jax.make_array_from_process_local_data(sharding, x)
        return jax.tree.map(make, batch)

    shard = batch_shard(setup.mesh, jax.process_index())
    feed = make_feed(
        task, state_passing_mode, model, batch_size, task_feature_lengths["targets"], curriculum,
        random_seed, shard, place, pool_groups, pool_refresh_period, lane_documents, packed,
    )  # fmt: skip
    gin_utils.check_all_used()
    check_same_model(directory, model.describe())  # last: it notes the model
    if jax.process_index() == 0 and vocabulary is not None:
        save_vocabulary(vocabulary, directory)

    # ---------------------------------------------------------------- state
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        initialize, abstract = setup.initializer()
        check_model_dir(directory, 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)))
        checkpointer = stack.enter_context(Checkpointer(directory, keep=checkpoints_to_keep))
        pending: list[list] = []  # metrics of steps since the last log line
        if checkpointer.latest_step() is None:
            pretrained, start, notes = {}, None, []
            if initial_checkpoint_path is not None:
                pretrained, notes = load_pretrained(initial_checkpoint_path, model)
                base = {
                    "checkpoint": str(initial_checkpoint_path),
                    "weights": weights_fingerprint(pretrained),
                }
                if first:
                    write_json(directory / _BASE_FILE, base)
                    if (initial / "source").is_dir():  # of an imported model, for the export
                        shutil.copytree(initial / "source", directory / "source", dirs_exist_ok=True)
            if setup.with_start:
                trained = TrainedModel(model, pretrained, 0, initial)
                start = memory_file.restore_memory(initial_memory_file, trained)[1]
            state = initialize(jax.random.key(random_seed), pretrained, start)
            del pretrained  # given away
        else:
            tree, data, last = checkpointer.restore(None, abstract.to_checkpoint())
            if data is None:
                raise ConfigError(
                    f"{directory}/checkpoint_{last} does not tell the position in the data: t5x saves it"
                    " with SaveCheckpointConfig.save_dataset=True."
                )
            state = type(abstract).from_checkpoint(tree)
            feed.set_state(data["feed"])
            pending = data["pending"]
        step = int(state.step)
        log = stack.enter_context(
            RunLog(str(directory), total_steps=total_steps, start_step=step, enabled=first)
        )
        if first:
            gin_utils.write_operative_config(str(directory))
        if step == 0:
            count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
            learning = "" if trainable == "all" else f", {count(learns.part(state)):,} of them learn"
            devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
            log.message(f"{count(state.params):,} parameters{learning}; {devices}")
            for note in notes:
                log.message(note)
        else:
            log.message(f"Going on from step {step} of {directory}.")

        # ------------------------------------------------------------ loop
        stack.enter_context(on_mesh(mesh, setup.rules))
        train_step = setup.train_step(abstract)
        merge = jax.jit(model.merged)
        stop = stack.enter_context(graceful_stop())
        scalars: dict[str, float] = {}
        saved, skipped = step, 0
        from_start = state_passing_mode in ("none", "random") and not setup.with_start
        speed = SpeedMeter(model.config, from_start, setup.learning)
        stack.callback(profile.close)

        def save():
            data = {"feed": feed.get_state(), "pending": pending}
            checkpointer.save(step, state.to_checkpoint(), data, force=True)
            if model.lora is not None:
                small = multihost_utils.process_allgather(learns.part(state), tiled=True)
                if first:
                    memory = model.config.memory_fields()
                    base = _read_base(directory)
                    save_adapter(
                        directory / "adapter", small, model.lora, base.get("weights"),
                        base.get("checkpoint"), memory,
                    )  # fmt: skip

        def evaluate():
            if evaluation is None:
                return {}
            found = evaluation(model, merge(state.params), step)
            log.write(step, found, split="eval")
            scores = {k: v for k, v in found.items() if not k.startswith("memory/")}  # health is logged
            shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            log.message(f"Step {step}: {shown}")
            return found

        while step < total_steps and not stop():
            state = state.replace(lanes=feed.prepare(step, state.params, state.lanes))
            with speed.waiting():
                batch, blocks = feed.next(step)
                batch.pop("answer", None)
                batch = place(batch)
            profile.before(step + 1)
            state, metrics = train_step(state, batch)
            step += 1
            speed.count(*batch["decoder_target_tokens"].shape)
            if profile.after(step, metrics):
                log.message(f"The trace of steps {profile_steps} is in {profile.directory}.")
            values = {k: [float(m.total), float(m.count)] for k, m in jax.device_get(metrics).items()}
            pending.append([blocks, values])
            skipped = skipped + 1 if values["skipped"][0] else 0
            _check_finite(skipped, step, checkpointer)
            if feed.observe(blocks, _mean(values, getattr(curriculum, "metric", "loss"))):
                log.message(f"Step {step}: {curriculum.blocks[curriculum.stage]} blocks unlocked.")
            if step % log_period == 0 or step == total_steps:
                scalars = _summary(pending)
                scalars |= speed.report()
                if curriculum is not None:
                    scalars["blocks"] = curriculum.blocks[curriculum.stage]
                pending = []
                log.write(step, scalars)
                log.progress(step, scalars)
            if step % checkpoint_period == 0:
                save()
                saved = step
            if eval_period and step % eval_period == 0 and step < total_steps:
                evaluate()
                speed.restart()

        # ------------------------------------------------------------ end
        if step != saved or checkpointer.latest_step() is None:
            save()
        checkpointer.wait()
        if step < total_steps:
            log.message(f"Stopped at step {step}; the same command goes on from there.")
            return scalars
        scalars |= evaluate()
        if first and hasattr(evaluation, "report"):
            log.message(evaluation.report(model, merge(state.params), str(directory)))
        if setup.with_start and first:
            path = directory / f"memory_{step}.famem"
            memory_file.with_memory(initial_memory_file, path, state.start.memory)
            log.message(f"The memory that was trained is in {path}.")
    return scalars


def _check_start(memory, checkpoint, learns: Trainable, mode: str, evaluation: Any) -> None:
    if memory is None:
        return
    if memory_file.read_header(memory).position[1:]:
        raise ConfigError(f"INITIAL_MEMORY_FILE {memory} holds several memories: give a file of one.")
    if checkpoint is None:
        raise ConfigError("INITIAL_MEMORY_FILE needs INITIAL_CHECKPOINT_PATH, the model that made it.")
    if learns.name != "memory":
        raise ConfigError(
            f"INITIAL_MEMORY_FILE needs TRAINABLE='memory', not {learns.name!r}: it is what learns."
        )
    if mode != "none":
        raise ConfigError(
            f"INITIAL_MEMORY_FILE needs STATE_PASSING='none', not {mode!r}: every example begins from it."
        )
    if evaluation is not None:
        raise ConfigError(
            "An evaluation begins from nothing, not from INITIAL_MEMORY_FILE: leave it out, and give the"
            " memory that is trained to famx.infer as MEMORY_FILE."
        )


def _make_task(name: str, options: Mapping[str, Any], vocabulary: Any):
    """The task; one that can take any vocabulary, and is given none, takes `vocabulary`."""
    if vocabulary is not None and "vocabulary" not in options and registry.takes(name, "vocabulary"):
        options = {**options, "vocabulary": vocabulary}
    try:
        return registry.get(name, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"MIXTURE_OR_TASK_NAME {name!r}: {error}") from error


def _vocabulary(task, model):
    """The task's vocabulary, which the model must have room for; None where it is not ours to save."""
    vocabulary = vocabulary_of(task)
    if kind_of(task) is Kind.SEQIO:
        from famx.data.seqio import from_seqio_vocabulary

        vocabulary = from_seqio_vocabulary(task.output_features["targets"].vocabulary)
    if vocabulary is not None and vocabulary.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"The task's vocabulary has {vocabulary.vocab_size} tokens, the model's only "
            f"{model.config.vocab_size}: raise DecoderConfig.vocab_size."
        )
    return vocabulary


def _read_base(directory: pathlib.Path) -> dict[str, str]:
    path = directory / _BASE_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _mean(values: Mapping[str, Sequence[float]], name: str) -> float:
    total, count = values.get(name, (0.0, 0.0))
    return total / count if count else 0.0


def _summary(pending) -> dict[str, float]:
    sums: dict[str, Mean] = collections.defaultdict(lambda: Mean(0.0, 0.0))
    for _, values in pending:
        for name, (total, count) in values.items():
            sums[name] = Mean(sums[name].total + total, sums[name].count + count)
    return {k: float(m.total / m.count) if m.count else 0.0 for k, m in sums.items()}


def _check_finite(skipped: int, step: int, checkpointer: Checkpointer):
    if skipped >= _MAX_SKIPPED:
        last = checkpointer.latest_step()
        good = f"The last checkpoint, of step {last}, is good."
        raise ConfigError(
            f"The gradient was not finite in the {skipped} steps before step {step}: lower the "
            f"learning rate. {'There is no checkpoint yet.' if last is None else good}"
        )
