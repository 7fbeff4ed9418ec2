"""A training run in progress: what changes from step to step and from stage to stage."""

import dataclasses
import functools
import pathlib
import textwrap
from collections.abc import Mapping
from typing import Any

import jax

from famx.base.waiting import waiting
from famx.model_dir.checkpointer import Checkpointer
from famx.training.ahead import BATCHES_AHEAD, OBSERVED_DELAY, BatchesAhead
from famx.training.compiling import Programs
from famx.training.feeds import Feed, Rows
from famx.training.health import GoodCheckpoints, Watch, check_sound
from famx.training.metrics import RecentMetrics, mean
from famx.training.run import Run
from famx.training.run_log import COLUMNS, RunLog
from famx.training.saving import RunWriter
from famx.training.settings import versions
from famx.training.speed import Profile, SpeedMeter
from famx.training.stages import Place
from famx.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class OpenData:
    """The opened data of a run.

    Attributes:
      feeds: for each stage, the source of the rows of its steps.
      sharding: sharding of a batch.
      initial_dir: `MODEL_DIR` of the checkpoint that the run begins from, or None.
      notes: sentences for the log.
      vocabulary: vocabulary of the data, or None.
      settings: settings of the run, see `famx.training.settings`.
      evaluation: description of its evaluation, as it was before the run.
      adapter: parameters of the saved adapter that the run begins with; empty without one.
    """

    feeds: tuple[Feed, ...]
    sharding: Any
    initial_dir: pathlib.Path | None
    notes: tuple[str, ...]
    vocabulary: Any
    settings: dict[str, Any]
    evaluation: Any
    adapter: Mapping[str, Any]

    def place(self, batch):
        """This host's rows as arrays of the global batch."""
        make = lambda x: jax.make_array_from_process_local_data(self.sharding, x)
        return jax.tree.map(make, batch)


@dataclasses.dataclass
class Session:
    """A run in progress: everything that changes from step to step, and its outputs.

    Attributes:
      last: the run of the last stage, whose model and evaluation are those of the whole run.
      place: the stage that the run is in.
      step: number of steps taken.
      metrics: metrics of steps that are not logged or not yet observed.
      logged: number of steps taken at the last line of the log.
      skipped: number of latest steps in a row without a finite gradient, among those with metrics read.
      watch: what was usual in the steps with metrics read.
      good: which checkpoints are good.
      saved: number of steps taken at the last checkpoint; -1: it could not be written.
      programs: the jitted steps of all stages.
      resumed_from: the step that `Run.resume_from` named, or None.
      ahead, speed, train_step: of the stage, see `enter`.
      longest: length in blocks that the curriculum unlocked last; None without a curriculum.
      scalars: scalars of the last line of the log.
      bad_records: number of bad documents that were left out, as the log tells.
      recent: rows of the latest steps, numbered from 0: from the last one whose metrics are read on, and
        of the first of the `skipped` ones.
    """

    last: Run
    data: OpenData
    directory: pathlib.Path
    profile: Profile
    checkpointer: Checkpointer
    writer: RunWriter
    log: RunLog
    place: Place
    state: TrainState
    step: int
    metrics: RecentMetrics
    logged: int
    skipped: int
    watch: Watch
    good: GoodCheckpoints
    saved: int
    programs: Programs
    resumed_from: int | None = None
    ahead: BatchesAhead | None = None
    speed: SpeedMeter | None = None
    train_step: Any = None
    longest: int | None = None
    scalars: dict[str, float] = dataclasses.field(default_factory=dict)
    bad_records: int = 0
    recent: dict[int, Rows] = dataclasses.field(default_factory=dict)

    @property
    def run(self) -> Run:
        """The run with the settings of the stage."""
        return self.place.stage.run

    @property
    def feed(self) -> Feed:
        """The feed of the stage."""
        return self.data.feeds[self.place.index]

    def enter(self, abstract: TrainState) -> None:
        """Begins to make batches of the stage, and takes its program.

        Args:
          abstract: `state` as ShapeDtypeStructs with shardings.
        """
        run, step = self.run, self.step
        self.close()
        self.ahead, self.longest = BatchesAhead(self.feed, self.place.end), None
        self.ahead.ask(step)  # the feed has observed all metrics that this batch depends on
        for later in range(step + 1, step + BATCHES_AHEAD):
            self.ahead.ask(later, self.observation(later - 1 - OBSERVED_DELAY))
        self.speed = SpeedMeter(run.model.config, run.state_passing.from_prompt, run.learning)
        self.train_step = self.programs.of(run, abstract)

    def observation(self, step: int) -> tuple[int | None, float] | None:
        """`(blocks, metric)` of a step for the feed; None for one before the stage or without metrics."""
        entry = self.metrics.read(step)
        if entry is None or step < self.place.first:
            return None
        blocks, sums = entry
        return blocks, mean(sums, getattr(self.run.data.curriculum, "metric", "loss"))

    def close(self) -> None:
        """Ends the making of batches."""
        if self.ahead is not None:
            self.ahead.close()

    @functools.cached_property
    def merge(self):
        """Jitted function that merges adapters and int8 kernels into the decoder's parameters."""
        return jax.jit(self.last.model.merged)

    def check_sound(self) -> None:
        """Raises Unsound if what learns or its moments are beyond the limits."""
        run, state = self.run, self.state
        learned = run.state_passing.part(run.trainable, state.params, state.kept)
        check_sound(learned, state.opt_state, run.health, self.step)

    def save(self) -> None:
        """Saves a checkpoint from which the run resumes exactly.

        Raises:
          Unsound: parameters or moments are beyond the limits, see `famx.training.health`.
        """
        self.check_sound()
        self.metrics.drop(min(self.logged, self.step - OBSERVED_DELAY))
        position = {
            "feed": self.ahead.state(),
            "pending": self.metrics.to_json(),
            "logged": self.logged,
            "skipped": self.skipped,
            "run": {
                "steps": self.last.steps,
                "settings": self.data.settings,
                "versions": versions(),
            },
            "watch": self.watch.get_state(),
        }
        if self.place.stage.count > 1:
            position["stage"] = self.place.get_state()
        if self.resumed_from is not None:
            position["resumed_from"] = self.resumed_from
        self.check_saves(wait=True)
        self.log.flush()  # a run that resumes from the checkpoint does not write its lines again
        sentence = self.writer.save(self.step, self.state, position)
        self.saved = self.step
        if sentence is None:
            self.good.saved(self.step)
            self.checkpointer.protect(self.good.kept)
        self._not_saved(sentence)

    def check_saves(self, wait: bool = False) -> None:
        """Reports a checkpoint that could not be written in the background; `wait`: once it is done.

        Raises:
          ConfigError: one could not be written, and the run does not try again.
        """
        self._not_saved(self.writer.check(wait))

    def _not_saved(self, sentence: str | None) -> None:
        if sentence is not None:
            self.saved = -1
            self.log.message(sentence)

    def evaluate(self) -> dict[str, float]:
        """Evaluates, logs and returns the scores."""
        run = self.last
        if run.evaluation is None:
            return {}
        with waiting("Evaluating", run.model_dir):
            scores = run.evaluation(run.model, self.merge(self.state.params), self.step)
        self.log.write(self.step, scores, split="eval")
        shown = {name: value for name, value in scores.items() if not name.startswith("memory/")}
        text = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.log.message(textwrap.fill(f"Step {self.step}: {text}", COLUMNS, subsequent_indent="  "))
        return scores
