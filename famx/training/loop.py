"""The training loop: check, open the data, begin or resume, step through, finish."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import gin
import jax
import numpy as np

from famx.base import gin_utils
from famx.base.describe import describe
from famx.base.errors import ConfigError
from famx.base.files import as_path, is_stored, removed_if_unused
from famx.base.peers import agree
from famx.base.ranges import Name
from famx.base.signals import graceful_stop
from famx.base.values import checked
from famx.base.waiting import hush, waiting
from famx.data.tasks import Kind, kind_of, vocabulary_of
from famx.data.vocabularies import save_vocabulary
from famx.mesh import batch_sharding
from famx.model_dir.checkpointer import Checkpointer, check_model_dir
from famx.model_dir.identity import check_same_model, split_checkpoint
from famx.model_dir.loading import check_model, load_initial_adapter
from famx.model_dir.lock import RunLock, run_lock
from famx.models import loss_weights
from famx.models.inputs import check_features
from famx.training.ahead import BATCHES_AHEAD, METRICS_DELAY, OBSERVED_DELAY
from famx.training.bad_data import look_at, take
from famx.training.compiling import Programs, check_threads, threads_of
from famx.training.fallback import Choice, choose
from famx.training.feeds import Feed, Rows
from famx.training.health import GoodCheckpoints, Unsound, Watch
from famx.training.initial_state import new_state
from famx.training.metrics import RecentMetrics, Sums
from famx.training.resuming import History, Start, cannot_change, last_scalars, starting
from famx.training.run import Run
from famx.training.run_log import RunLog
from famx.training.saving import RunWriter
from famx.training.session import OpenData, Session
from famx.training.settings import agreement, settings_of
from famx.training.speed import Profile
from famx.training.stages import Place, Stage, stages_of
from famx.training.step import TrainState, make_initializer, with_new_states
from famx.training.stopping import stopped_by_numbers

_MAX_SKIPPED = 20  # steps in a row whose gradient was not finite
_STOP_PERIOD = 10  # steps between agreements of several processes on a stop, which wait for the devices


@gin.configurable
@checked
def train(run: Run, allow_changes: Sequence[Name] = ()) -> dict[str, float]:
    """Trains a model, or resumes where the last run in `run.model_dir` stopped, bit for bit.

    A run resumes with the settings that it began with (`famx.training.settings`); a finished one does
    nothing more.

    A run with stages goes through them one after another. The model of the last stage is the model of the
    run: the one that `run.model_dir` describes, and that evaluations see throughout.

    The host waits for the devices only to log, save and evaluate: batches are made ahead on a thread, and
    metrics are read `METRICS_DELAY` steps late. A curriculum therefore sees the metrics of a step
    `OBSERVED_DELAY` steps later, and gradients that are not finite end the run `METRICS_DELAY` steps
    later than they could. A resumed run has the same delays as an uninterrupted one.

    Args:
      run: the run.
      allow_changes: names of settings that may differ from those of the checkpoint that the run resumes
        from, such as "learning_rate" or "optimizer"; all below a name may differ.

    Returns:
      The last logged scalars.

    Raises:
      ConfigError: the settings do not fit, or are not those of the run that resumes; known before
        anything is compiled or written. Or the numbers went wrong: too many steps in a row had a gradient
        that was not finite, or the parameters left their limits.
    """
    if jax.process_index() > 0:
        hush()
    with contextlib.ExitStack() as stack:
        stack.enter_context(removed_if_unused(run.model_dir))
        stages, directory, profile = _check(run)
        lock = stack.enter_context(run_lock(directory))
        with waiting("Opening the data"):
            stages, data = open_data(stages)
        absolute = is_stored(run.model_dir) or os.path.isabs(run.model_dir)
        notes = [] if absolute else [f"MODEL_DIR is {directory}."]
        data = dataclasses.replace(data, notes=(*data.notes, *gin_utils.check_all_used(), *notes))
        last = stages[-1].run
        if jax.process_count() > 1:
            agree("settings", agreement(last, data.settings, allow_changes))
        checkpointer = stack.enter_context(Checkpointer(directory, keep=last.checkpoints_to_keep))
        choice = choose(checkpointer, last.resume_from)
        start = starting(
            checkpointer, choice.step, data.settings, last, allow_changes, data.vocabulary
        )
        agree("checkpoint", {"checkpoint": start.step})
        if History(directory).is_finished(last.steps, start.step, data.evaluation):
            return _finished_before(directory, start.step)
        session = _begin_or_resume(
            stages, data, directory, profile, checkpointer, lock, choice, start, stack
        )
        seconds = None if run.minutes is None else 60 * run.minutes
        try:
            _step_through(session, stack.enter_context(graceful_stop(seconds=seconds)))
            return _finish(session)
        except Unsound as error:
            raise stopped_by_numbers(session, error) from error


# ---------------------------------------------------------------- check


def _check(run: Run) -> tuple[tuple[Stage, ...], pathlib.Path, Profile]:
    """The stages, ready for their devices; the directory; and the trace of `run.profile_steps`."""
    if run.model_dir is None:
        raise ConfigError("MODEL_DIR is not set: training needs a directory for its checkpoints.")
    if run.steps is None or run.data.task is None:
        missing = "TRAIN_STEPS" if run.steps is None else "MIXTURE_OR_TASK_NAME"
        raise ConfigError(f"{missing} is not set: training needs it.")
    if run.retry_full_disk and jax.process_count() > 1:
        raise ConfigError("Run.retry_full_disk needs a run of one process: others wait for a save.")
    check_threads(run)
    stages = tuple(stage.ready() for stage in stages_of(run))
    for stage in stages:
        with stage.errors():
            stage.run.data.check_options()
            stage.run.state_passing.check(stage.run)
    path = as_path(run.model_dir)
    if jax.process_count() == 1:  # others may be in another directory
        path = path.absolute()
    profile = Profile(run.profile_steps, path, run.steps)
    directory = check_model_dir(path)  # last, as it makes the directory
    return stages, directory, profile


# ---------------------------------------------------------------- open the data


def open_data(stages: tuple[Stage, ...]) -> tuple[tuple[Stage, ...], OpenData]:
    """The stages with vocabulary and evaluation set, and their data, checked; writes nothing."""
    last = stages[-1].run
    initial_dir = initial_vocabulary = None
    if last.initial_checkpoint_path is not None:
        initial_dir = split_checkpoint(last.initial_checkpoint_path)[0]
        initial_vocabulary = check_model(initial_dir).vocabulary
    adapter = {}
    if last.initial_adapter is not None:
        if initial_dir is None:
            raise ConfigError("INITIAL_ADAPTER needs INITIAL_CHECKPOINT_PATH, the model that it is for.")
        adapter = load_initial_adapter(last.initial_adapter, last.model, last.memory_start)
    tasks, vocabulary, notes = [], None, []
    for stage in stages:
        with stage.errors():
            tasks.append(stage.run.data.make_task(initial_vocabulary))
            check_features(tasks[-1], stage.run.model, f"The task {_shown(stage.run.data.task)}")
            found = _vocabulary(tasks[-1], stage.run, initial_vocabulary)
            notes += look_at(tasks[-1], stage.run.data)
            if initial_vocabulary is not None and found not in (None, initial_vocabulary):
                raise ConfigError(
                    f"The vocabulary of the task {last.data.task} is not that of {initial_dir}: give it"
                    f" with TASK_OPTIONS={{'vocabulary': {str(initial_dir)!r}}}, or take a task for that"
                    " vocabulary."
                )
            if stage.index and found != vocabulary:
                raise ConfigError("The vocabulary must be that of the stages before: leave it out here.")
            vocabulary = found
    if last.model.vocabulary is None:
        stages = tuple(stage.with_vocabulary(vocabulary) for stage in stages)
    stages, more_notes = _with_evaluation(stages, initial_vocabulary)
    last, notes = stages[-1].run, (*notes, *more_notes)
    described = describe(last.evaluation)
    data = OpenData((), batch_sharding(last.mesh), initial_dir, notes, vocabulary, {}, described, adapter)
    feeds = []
    for stage, task in zip(stages, tasks, strict=True):
        run = stage.run
        with stage.errors():
            feed = run.state_passing.feed(run.source(task, stage.index), run.model, data.place)
        for other in feeds:
            feed.share(other)
        feeds.append(feed)
    return stages, dataclasses.replace(data, feeds=tuple(feeds), settings=settings_of(stages, tasks))


def _with_evaluation(stages: tuple[Stage, ...], vocabulary) -> tuple[tuple[Stage, ...], tuple[str, ...]]:
    """The last stage with its evaluation set and checked, and sentences for the log."""
    *first, stage = stages
    run, notes = stage.run, []
    evaluation = run.evaluation
    if hasattr(evaluation, "with_task"):
        evaluation = evaluation.with_task(functools.partial(run.data.make_task, vocabulary))
        if evaluation is run.evaluation:
            notes.append(
                f"{type(evaluation).__name__} has a task of its own: settings of the task that is"
                " trained on do not change it."
            )
        run = dataclasses.replace(run, evaluation=evaluation)
    if hasattr(evaluation, "check"):
        evaluation.check(run.model)
    return (*first, dataclasses.replace(stage, run=run)), tuple(notes)


def _shown(task) -> str:
    return task if isinstance(task, str) else type(task).__name__


def _vocabulary(task, run: Run, initial):
    """The task's vocabulary, or None if famx cannot save it.

    Args:
      task: the opened task.
      run: the run.
      initial: vocabulary of the initial checkpoint, or None.

    Raises:
      ConfigError: the model has fewer ids.
    """
    vocabulary, size, needed = vocabulary_of(task), run.model.config.vocab_size, 0
    if kind_of(task) is Kind.SEQIO:
        from famx.data.seqio import from_seqio_vocabulary

        of_task = task.output_features["targets"].vocabulary
        vocabulary, needed = from_seqio_vocabulary(of_task, initial), of_task.vocab_size
    needed = max(needed, 0 if vocabulary is None else vocabulary.vocab_size)
    if needed > size:
        raise ConfigError(
            f"The task's vocabulary has {needed} tokens, the model's only "
            f"{size}: raise DecoderConfig.vocab_size."
        )
    return vocabulary


# ---------------------------------------------------------------- begin or resume


def _begin_or_resume(
    stages: tuple[Stage, ...],
    data: OpenData,
    directory: pathlib.Path,
    profile: Profile,
    checkpointer: Checkpointer,
    lock: RunLock,
    choice: Choice,
    start: Start,
    stack: contextlib.ExitStack,
) -> Session:
    """The session of a new run, or from the newest checkpoint; `stack` closes what it opens."""
    first = jax.process_index() == 0
    last, place = stages[-1].run, Place(stages, stages[-1].run.steps)
    resumed, position = start.step, start.position
    if position is not None and "stage" in position:
        place.set_state(position["stage"])
    run = place.stage.run
    check_same_model(directory, last.model.describe())  # writes model.json
    if first and data.vocabulary is not None:
        save_vocabulary(data.vocabulary, directory)
    initialize, abstract = make_initializer(run)
    check_model_dir(directory, 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)))
    programs = Programs(threads_of(run))
    stack.callback(programs.close)
    writer = RunWriter(last, directory, checkpointer, lock)
    notes = [*data.notes, *writer.notes(), *start.notes]
    begin = lambda: programs.begin(stages[place.index :], data.feeds[place.index :], data.sharding)
    if resumed is None:
        begin()
        state = new_state(run, data, initialize, writer, notes)
    else:
        state = _restored(checkpointer, start, abstract, data.feeds[place.index])
        begin()  # with the length that the curriculum had come to
        notes += choice.set_newer_aside(checkpointer)
    step = int(state.step)
    log = stack.enter_context(
        RunLog(
            str(directory), steps=run.steps, start_step=step, enabled=first,
            skip_if_full=last.retry_full_disk, event_delay=METRICS_DELAY + 1,
        )
    )  # fmt: skip
    if first:
        History(directory).begin(start, data.settings, last)
        gin_utils.write_operative_config(str(directory))
    log.message(_opening(run, state) if step == 0 else f"Resuming from step {step} of {directory}.")
    if place.stage.count > 1:
        log.message(f"Step {step}: {place.stage}.")
    for note in notes:
        log.message(note)

    metrics = RecentMetrics(position.get("pending", ()))
    watch = Watch(last.health, last.model.config.vocab_size)
    if "watch" in position:
        watch.set_state(position["watch"])
    existing = [saved for saved in checkpointer.all_steps() if saved <= step]
    good = GoodCheckpoints(directory, existing, last.health.confirm_steps, first)
    checkpointer.protect(good.kept)
    stack.callback(profile.close)
    session = Session(
        last, data, directory, profile, checkpointer, writer, log, place, state, step, metrics,
        position.get("logged", step), position.get("skipped", 0), watch, good, step, programs,
        choice.origin,
    )  # fmt: skip
    stack.callback(session.close)
    stack.enter_context(run.on_mesh())
    session.enter(abstract)
    return session


def _restored(checkpointer: Checkpointer, start: Start, abstract: TrainState, feed: Feed) -> TrainState:
    """The state of the checkpoint that a run resumes from; sets the position of the feed."""
    try:
        with waiting("Loading the checkpoint", str(checkpointer.model_dir)):
            tree, _, _ = checkpointer.restore(start.step, abstract.to_checkpoint())
        if start.position is None:
            place = f"{checkpointer.model_dir}/checkpoint_{start.step}"
            raise ConfigError(
                f"{place} does not tell the position in the data: t5x saves it with"
                " SaveCheckpointConfig.save_dataset=True."
            )
        feed.set_state(start.position["feed"])
    except ConfigError as error:
        raise cannot_change(error, start) from error
    return TrainState.from_checkpoint(tree)


def _opening(run: Run, state: TrainState) -> str:
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    learning = ""
    if run.trainable.name != "all":
        part = run.state_passing.part(run.trainable, state.params, state.kept)
        learning = f", {count(part):,} of them learn"
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    return f"{count(state.params):,} parameters{learning}; {devices}"


# ---------------------------------------------------------------- step through


def _step_through(session: Session, stop) -> None:
    """Takes the remaining steps, or those until `stop()`."""
    log, profile, place = session.log, session.profile, session.place
    every, steps, pad_id = session.last.every, session.last.steps, session.last.model.pad_id
    if place.over(session.step):  # the run had ended here, and has more stages now
        _next_stage(session)
    session.speed.restart()
    while session.step < steps and not _stopped(stop, session.step):
        observe(session)
        rows, batch, metrics = take_step(session)
        weighted = np.mean(loss_weights(rows.batch, pad_id) != 0)
        session.speed.count(*batch["decoder_target_tokens"].shape, weighted)
        if profile.after(session.step, metrics):
            log.message(f"The trace of steps {session.last.profile_steps} is in {profile.directory}.")
        over = place.over(session.step)
        if session.step % every.log == 0 or session.step == steps or over:
            _log(session)
        if over:
            _next_stage(session)
        session.check_saves()
        if session.step % every.checkpoint == 0 or over:
            session.save()
        if every.evaluation and session.step % every.evaluation == 0 and session.step < steps:
            session.evaluate()
            session.speed.restart()


def take_step(session: Session) -> tuple[Rows, dict[str, jax.Array], dict[str, Any]]:
    """Takes a step; returns its rows, its batch on the devices and its metrics."""
    with session.speed.waiting():
        rows = take(session)
    if session.longest not in (None, rows.longest):
        session.log.message(f"Step {session.step}: {rows.longest} blocks unlocked.")
    session.longest, session.recent[session.step] = rows.longest, rows
    state = session.state
    state = state.replace(kept=session.feed.prepare(rows, state.params, state.kept))
    batch = session.data.place(rows.trained)
    session.profile.before(session.step + 1)
    session.state, metrics = session.train_step(state, batch)
    session.metrics.add(session.step, rows.blocks, metrics)
    session.step += 1
    return rows, batch, metrics


def _next_stage(session: Session) -> None:
    """Enters the next stage; a checkpoint that is saved now resumes at its beginning."""
    session.place.advance(session.step)
    _, abstract = make_initializer(session.run)
    state = session.state.replace(kept={})  # before the new ones exist
    session.state = None
    session.state = with_new_states(session.run, state, abstract)
    session.enter(abstract)
    session.log.message(f"Step {session.step}: {session.place.stage}.")


def _stopped(stop, step: int) -> bool:
    return (jax.process_count() == 1 or step % _STOP_PERIOD == 0) and stop()


def observe(session: Session) -> None:
    """Reads the metrics of `METRICS_DELAY` steps ago, and requests the next batch."""
    seen = session.step - 1 - METRICS_DELAY
    entry = session.metrics.read(seen)
    if entry is not None:
        _check_numbers(session, seen, entry[1])
        if seen >= session.place.first:
            session.place.observe(*entry)
    session.ahead.ask(session.step + BATCHES_AHEAD, session.observation(seen))


def _check_numbers(session: Session, step: int, sums: Sums) -> None:
    """Checks the metrics of step `step`, counted from 0; Unsound if too many had no finite gradient."""
    session.skipped = session.skipped + 1 if sums["skipped"][0] else 0
    first = step - session.skipped + 1  # of those without a finite gradient
    for old in [old for old in session.recent if old < step and old != first]:
        del session.recent[old]
    if step == session.place.first:
        session.watch.restart()
    well, alarms = session.watch.observe(step + 1, sums)
    for alarm in alarms:
        session.log.event(step + 1, alarm.sentence, alarm.values)
    session.good.observe(step + 1, well, session.checkpointer.all_steps)
    session.checkpointer.protect(session.good.kept)
    if session.skipped >= _MAX_SKIPPED:
        cause = f"The gradient was not finite in the {session.skipped} steps before step {step + 1}"
        raise Unsound(cause, first)


def _log(session: Session) -> None:
    """Writes a line of the log, with the means since the last one; waits for the last step."""
    scalars = session.metrics.means(session.logged) | session.speed.report()
    if session.longest is not None:
        scalars["blocks"] = session.longest
    if session.bad_records:
        scalars["bad_records"] = session.bad_records
    if session.place.stage.count > 1:
        scalars["stage"] = session.place.index + 1
    session.scalars, session.logged = scalars, session.step
    session.metrics.drop(session.step - OBSERVED_DELAY)
    session.log.write(session.step, scalars)
    session.log.progress(session.step, scalars)


# ---------------------------------------------------------------- finish


def _finish(session: Session) -> dict[str, float]:
    """Saves, and evaluates and reports a complete run; returns the last logged scalars."""
    run, step, log = session.last, session.step, session.log
    if step == run.steps:
        observed = dataclasses.replace(session, watch=session.watch.copy())
        for late in range(step - 1 - METRICS_DELAY, step):
            entry = session.metrics.read(late)
            if entry is not None:
                _check_numbers(observed, late, entry[1])
    if step != session.saved or session.checkpointer.latest_step() is None:
        session.save()
    session.checkpointer.wait()
    if step < run.steps:
        log.message(f"Stopped at step {step}; the same command resumes from there.")
        return session.scalars
    scalars = session.scalars | session.evaluate()
    if hasattr(run.evaluation, "report"):
        params = session.merge(session.state.params)
        with waiting("Evaluating for the report", run.model_dir):
            report = run.evaluation.report(run.model, params, str(session.directory))
        if report:
            log.message(report)
    sentence = run.state_passing.export(session.state.kept, session.directory, step)
    if sentence is not None:
        log.message(sentence)
    if jax.process_index() == 0:
        History(session.directory).finish(step, session.data.evaluation)
    return scalars


def _finished_before(directory: pathlib.Path, step: int) -> dict[str, float]:
    """Says that there is nothing to do; returns the last logged scalars."""
    if jax.process_index() == 0:
        sentence = f"The run in {directory} is finished, with {step} steps: there is nothing to do."
        print(f"{sentence} A larger TRAIN_STEPS continues from there.", file=sys.stderr, flush=True)
    return last_scalars(directory, step)
