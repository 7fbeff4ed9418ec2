"""The training loop: check, open the data, begin or resume, step through, finish."""

import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

import gin
import jax
import numpy as np

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.signals import graceful_stop
from famx.data.tasks import Kind, kind_of, vocabulary_of
from famx.data.vocabularies import save_vocabulary
from famx.mesh import batch_sharding
from famx.model_dir.checkpointer import Checkpointer, check_model_dir
from famx.model_dir.identity import check_same_model, split_checkpoint
from famx.model_dir.loading import TrainedModel, check_model, load_pretrained
from famx.models import loss_weights
from famx.training.ahead import BATCHES_AHEAD, METRICS_DELAY, OBSERVED_DELAY, BatchesAhead
from famx.training.feeds import Feed
from famx.training.metrics import RecentMetrics, mean
from famx.training.run import Run
from famx.training.run_log import RunLog
from famx.training.saving import RunWriter
from famx.training.speed import Profile, SpeedMeter
from famx.training.step import TrainState, make_initializer, make_train_step

_MAX_SKIPPED = 20  # steps in a row whose gradient was not finite
_STOP_PERIOD = 10  # steps between agreements of several processes on a stop, which wait for the devices


@gin.configurable
def train(run: Run) -> dict[str, float]:
    """Trains a model, or resumes where the last run in `run.model_dir` stopped, bit for bit.

    The host waits for the devices only to log, save and evaluate: batches are made ahead on a thread, and
    metrics are read `METRICS_DELAY` steps late. A curriculum therefore sees the metrics of a step
    `OBSERVED_DELAY` steps later, and gradients that are not finite end the run `METRICS_DELAY` steps
    later than they could. A resumed run has the same delays as an uninterrupted one.

    Returns:
      The last logged scalars.

    Raises:
      ConfigError: the settings do not fit; known before anything is compiled. Or too many steps in a row
        had a gradient that was not finite.
    """
    run, directory, profile = _check(run)
    run, data = _open_data(run, directory)
    with contextlib.ExitStack() as stack:
        session = _begin_or_resume(run, data, directory, profile, stack)
        _step_through(session, stack.enter_context(graceful_stop()))
        return _finish(session)


# ---------------------------------------------------------------- check


def _check(run: Run) -> tuple[Run, pathlib.Path, Profile]:
    """The run, ready for its devices; its directory; and the trace of `run.profile_steps`."""
    if run.model_dir is None:
        raise ConfigError("MODEL_DIR is not set: training needs a directory for its checkpoints.")
    directory = check_model_dir(run.model_dir)
    if run.steps < 1:
        raise ConfigError(f"TRAIN_STEPS must be at least 1, not {run.steps}.")
    profile = Profile(run.profile_steps, directory)
    run = run.ready()
    run.state_passing.check(run)
    return run, directory, profile


# ---------------------------------------------------------------- open the data


@dataclasses.dataclass(frozen=True)
class _Data:
    """The opened data of a run.

    Attributes:
      feed: source of the rows of each step.
      sharding: sharding of a batch.
      initial_dir: `MODEL_DIR` of the checkpoint that the run begins from, or None.
      notes: sentences for the log.
    """

    feed: Feed
    sharding: Any
    initial_dir: pathlib.Path | None
    notes: tuple[str, ...]

    def place(self, batch):
        """This host's rows as arrays of the global batch."""
        make = lambda x: jax.make_array_from_process_local_data(self.sharding, x)
        return jax.tree.map(make, batch)


def _open_data(run: Run, directory: pathlib.Path) -> tuple[Run, _Data]:
    """The run with its vocabulary and evaluation set, and its data; makes all remaining checks."""
    initial_dir = initial_vocabulary = None
    if run.initial_checkpoint_path is not None:
        initial_dir = split_checkpoint(run.initial_checkpoint_path)[0]
        initial_vocabulary = check_model(initial_dir).vocabulary
    make_task = functools.partial(run.data.make_task, initial_vocabulary)
    task = make_task()
    vocabulary = _vocabulary(task, run)
    if initial_vocabulary is not None and vocabulary not in (None, initial_vocabulary):
        raise ConfigError(
            f"The vocabulary of the task {run.data.task} is not that of {initial_dir}: give it with"
            f" TASK_OPTIONS={{'vocabulary': {str(initial_dir)!r}}}, or take a task for that vocabulary."
        )
    if run.model.vocabulary is None:
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocabulary=vocabulary))
    evaluation, notes = run.evaluation, []
    if hasattr(evaluation, "with_task"):
        evaluation = evaluation.with_task(make_task)
        if evaluation is run.evaluation:
            notes.append(
                f"{type(evaluation).__name__} has a task of its own: settings of the task that is"
                " trained on do not change it."
            )
        run = dataclasses.replace(run, evaluation=evaluation)
    if hasattr(evaluation, "check"):
        evaluation.check(run.model)

    data = _Data(None, batch_sharding(run.mesh), initial_dir, tuple(notes))
    feed = run.state_passing.feed(run.source(task), run.model, data.place)
    gin_utils.check_all_used()
    check_same_model(directory, run.model.describe())  # last, as it writes model.json
    if jax.process_index() == 0 and vocabulary is not None:
        save_vocabulary(vocabulary, directory)
    return run, dataclasses.replace(data, feed=feed)


def _vocabulary(task, run: Run):
    """The task's vocabulary, or None if famx cannot save it; ConfigError if the model has fewer ids."""
    vocabulary, size = vocabulary_of(task), run.model.config.vocab_size
    if kind_of(task) is Kind.SEQIO:
        from famx.data.seqio import from_seqio_vocabulary

        vocabulary = from_seqio_vocabulary(task.output_features["targets"].vocabulary)
    if vocabulary is not None and vocabulary.vocab_size > size:
        raise ConfigError(
            f"The task's vocabulary has {vocabulary.vocab_size} tokens, the model's only "
            f"{size}: raise DecoderConfig.vocab_size."
        )
    return vocabulary


# ---------------------------------------------------------------- begin or resume


@dataclasses.dataclass
class _Session:
    """A run in progress: everything that changes from step to step, and its outputs.

    Attributes:
      step: number of steps taken.
      metrics: metrics of steps that are not logged or not yet observed.
      logged: number of steps taken at the last line of the log.
      skipped: number of latest steps in a row without a finite gradient, among those with metrics read.
      saved: number of steps taken at the last checkpoint.
      longest: length in blocks that the curriculum unlocked last; None without a curriculum.
      scalars: scalars of the last line of the log.
    """

    run: Run
    data: _Data
    directory: pathlib.Path
    profile: Profile
    checkpointer: Checkpointer
    writer: RunWriter
    log: RunLog
    abstract: TrainState
    state: TrainState
    step: int
    metrics: RecentMetrics
    logged: int
    skipped: int
    ahead: BatchesAhead
    speed: SpeedMeter
    saved: int
    longest: int | None = None
    scalars: dict[str, float] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def merge(self):
        """Jitted function that merges adapters and int8 kernels into the decoder's parameters."""
        return jax.jit(self.run.model.merged)

    def save(self) -> None:
        """Saves a checkpoint from which the run resumes exactly."""
        self.metrics.drop(min(self.logged, self.step - OBSERVED_DELAY))
        position = {
            "feed": self.ahead.state(),
            "pending": self.metrics.to_json(),
            "logged": self.logged,
            "skipped": self.skipped,
        }
        self.writer.save(self.step, self.state, position)
        self.saved = self.step

    def evaluate(self) -> dict[str, float]:
        """Evaluates, logs and returns the scores."""
        run = self.run
        if run.evaluation is None:
            return {}
        scores = run.evaluation(run.model, self.merge(self.state.params), self.step)
        self.log.write(self.step, scores, split="eval")
        shown = {name: value for name, value in scores.items() if not name.startswith("memory/")}
        text = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.log.message(f"Step {self.step}: {text}")
        return scores


def _begin_or_resume(
    run: Run, data: _Data, directory: pathlib.Path, profile: Profile, stack: contextlib.ExitStack
) -> _Session:
    """The session of a new run, or from the newest checkpoint; `stack` closes what it opens."""
    first = jax.process_index() == 0
    initialize, abstract = make_initializer(run)
    check_model_dir(directory, 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)))
    checkpointer = stack.enter_context(Checkpointer(directory, keep=run.checkpoints_to_keep))
    writer = RunWriter(run, directory, checkpointer)
    notes, position = [*data.notes, *writer.notes()], {}
    if checkpointer.latest_step() is None:
        state = _new_state(run, data, initialize, writer, notes)
    else:
        tree, position, last = checkpointer.restore(None, abstract.to_checkpoint())
        if position is None:
            raise ConfigError(
                f"{directory}/checkpoint_{last} does not tell the position in the data: t5x saves it"
                " with SaveCheckpointConfig.save_dataset=True."
            )
        state = TrainState.from_checkpoint(tree)
        data.feed.set_state(position["feed"])
    step = int(state.step)
    log = stack.enter_context(RunLog(str(directory), steps=run.steps, start_step=step, enabled=first))
    if first:
        gin_utils.write_operative_config(str(directory))
    log.message(_opening(run, state) if step == 0 else f"Resuming from step {step} of {directory}.")
    for note in notes:
        log.message(note)

    metrics = RecentMetrics(position.get("pending", ()))
    ahead = BatchesAhead(data.feed, run.steps)
    stack.callback(ahead.close)
    stack.callback(profile.close)
    ahead.ask(step)  # the feed has observed all metrics that this batch depends on
    for later in range(step + 1, step + BATCHES_AHEAD):
        ahead.ask(later, _observation(run, metrics.read(later - 1 - OBSERVED_DELAY)))
    stack.enter_context(run.on_mesh())
    speed = SpeedMeter(run.model.config, run.state_passing.from_prompt, run.learning)
    return _Session(
        run, data, directory, profile, checkpointer, writer, log, abstract, state, step, metrics,
        position.get("logged", step), position.get("skipped", 0), ahead, speed, step,
    )  # fmt: skip


def _new_state(run: Run, data: _Data, initialize, writer: RunWriter, notes: list[str]) -> TrainState:
    """The initial state; adds to `notes` what was not taken from the initial checkpoint."""
    pretrained, loaded = {}, None
    if run.initial_checkpoint_path is not None:
        pretrained, load_notes = load_pretrained(
            run.initial_checkpoint_path, run.model, run.memory_start, run.random_seed
        )
        notes += load_notes
        writer.note_base(run.initial_checkpoint_path, data.initial_dir, pretrained)
        trained = TrainedModel(run.model, pretrained, 0, data.initial_dir)
        loaded = run.state_passing.load(trained)
    return initialize(jax.random.key(run.random_seed), pretrained, loaded)


def _opening(run: Run, state: TrainState) -> str:
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    learning = ""
    if run.trainable.name != "all":
        part = run.state_passing.part(run.trainable, state.params, state.kept)
        learning = f", {count(part):,} of them learn"
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    return f"{count(state.params):,} parameters{learning}; {devices}"


# ---------------------------------------------------------------- step through


def _step_through(session: _Session, stop) -> None:
    """Takes the remaining steps, or those until `stop()`."""
    run, every, log, profile = session.run, session.run.every, session.log, session.profile
    train_step = make_train_step(run, session.abstract)
    session.speed.restart()
    while session.step < run.steps and not _stopped(stop, session.step):
        _observe(session)
        with session.speed.waiting():
            rows = session.ahead.take()
        if session.longest not in (None, rows.longest):
            log.message(f"Step {session.step}: {rows.longest} blocks unlocked.")
        session.longest = rows.longest
        state = session.state
        state = state.replace(kept=session.data.feed.prepare(rows, state.params, state.kept))
        batch = {name: x for name, x in rows.batch.items() if name != "answer"}
        batch = session.data.place(batch)
        profile.before(session.step + 1)
        session.state, metrics = train_step(state, batch)
        session.metrics.add(session.step, rows.blocks, metrics)
        session.step += 1
        weighted = np.mean(loss_weights(rows.batch, run.model.pad_id) != 0)
        session.speed.count(*batch["decoder_target_tokens"].shape, weighted)
        if profile.after(session.step, metrics):
            log.message(f"The trace of steps {run.profile_steps} is in {profile.directory}.")
        if session.step % every.log == 0 or session.step == run.steps:
            _log(session)
        if session.step % every.checkpoint == 0:
            session.save()
        if every.evaluation and session.step % every.evaluation == 0 and session.step < run.steps:
            session.evaluate()
            session.speed.restart()


def _stopped(stop, step: int) -> bool:
    return (jax.process_count() == 1 or step % _STOP_PERIOD == 0) and stop()


def _observe(session: _Session) -> None:
    """Reads the metrics of `METRICS_DELAY` steps ago, and requests the next batch."""
    seen = session.step - 1 - METRICS_DELAY
    entry = session.metrics.read(seen)
    if entry is not None:
        session.skipped = _skipped(session.skipped, entry, seen + 1, session.checkpointer)
    session.ahead.ask(session.step + BATCHES_AHEAD, _observation(session.run, entry))


def _observation(run: Run, entry) -> tuple[int | None, float] | None:
    """`(blocks, metric)` for the feed, from a step's `(blocks, sums)`."""
    if entry is None:
        return None
    blocks, sums = entry
    return blocks, mean(sums, getattr(run.data.curriculum, "metric", "loss"))


def _skipped(skipped: int, entry, step: int, checkpointer: Checkpointer) -> int:
    """Number of steps in a row without a finite gradient, up to `step`; ConfigError if too many."""
    skipped = skipped + 1 if entry[1]["skipped"][0] else 0
    if skipped >= _MAX_SKIPPED:
        last = checkpointer.latest_step()
        good = f"The last checkpoint, of step {last}, is good."
        raise ConfigError(
            f"The gradient was not finite in the {skipped} steps before step {step}: lower the "
            f"learning rate. {'There is no checkpoint yet.' if last is None else good}"
        )
    return skipped


def _log(session: _Session) -> None:
    """Writes a line of the log, with the means since the last one; waits for the last step."""
    scalars = session.metrics.means(session.logged) | session.speed.report()
    if session.longest is not None:
        scalars["blocks"] = session.longest
    session.scalars, session.logged = scalars, session.step
    session.metrics.drop(session.step - OBSERVED_DELAY)
    session.log.write(session.step, scalars)
    session.log.progress(session.step, scalars)


# ---------------------------------------------------------------- finish


def _finish(session: _Session) -> dict[str, float]:
    """Saves, and evaluates and reports a complete run; returns the last logged scalars."""
    run, step, log = session.run, session.step, session.log
    if step == run.steps:
        skipped = session.skipped
        for late in range(step - 1 - METRICS_DELAY, step):
            entry = session.metrics.read(late)
            if entry is not None:
                skipped = _skipped(skipped, entry, late + 1, session.checkpointer)
    if step != session.saved or session.checkpointer.latest_step() is None:
        session.save()
    session.checkpointer.wait()
    if step < run.steps:
        log.message(f"Stopped at step {step}; the same command resumes from there.")
        return session.scalars
    scalars = session.scalars | session.evaluate()
    if jax.process_index() == 0:
        if hasattr(run.evaluation, "report"):
            params = session.merge(session.state.params)
            log.message(run.evaluation.report(run.model, params, str(session.directory)))
        sentence = run.state_passing.export(session.state.kept, session.directory, step)
        if sentence is not None:
            log.message(sentence)
    return scalars
