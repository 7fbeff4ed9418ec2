"""Stages of a run: one `Run` for each, made from the lines of `Run.stages`.

A stage begins where the one before ended: parameters, optimiser state and the number of steps carry on.
What belongs to a stage alone begins again: the feed, its curriculum and the states that state passing
keeps. All random draws are functions of the seed, the stage and the step.

| key of a line | meaning |
|---|---|
| `steps` | largest number of steps, or a share of `Run.steps`; the last stage takes what is left |
| `block_size`, `memory_segments` | these fields of `DecoderConfig`, which no parameter depends on |
| `memory` | fields of the memory, such as `{"update": "residual"}`, which no parameter depends on |
| `blocks` | tokens of a row, in blocks; without it a row keeps its tokens |
| `batch_size` | rows of a step, or a share of `Data.batch_size` |
| `microbatches` | as `Run.microbatches` |
| `state_passing` | a name as of `STATE_PASSING`, or an object |
| `options` | options of the task, in addition to those of the stages before |
| `curriculum` | fields of `Curriculum`, in addition to those before; an object; or None: none |
| `until` | `{"exact_match": 0.95}` ends the stage early, see `Place` |

What a line leaves out stays as in the line before; `steps` and `until` are a line's own. Numbers of steps
and of rows that are below 1 are shares.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from famx.base.errors import ConfigError
from famx.modules import Decoder
from famx.modules.memory import from_dict as memory_from_dict
from famx.training.curriculum import Curriculum
from famx.training.metrics import Sums, mean
from famx.training.run import Data, Run
from famx.training.stage_line import StageLine
from famx.training.state_passing import FromMemoryFile, StatePassing, named

SMOOTHING = 0.9  # weight of the past in the metric of `until`, as in a curriculum by default


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
      index: its index, from 0.
      count: number of stages of the run.
      run: the run with the settings of this stage, without stages of its own.
      given_steps: `steps` as the line has it, a number or a share.
      until: `(metric, value)` that ends the stage early, or None.
      given_rows: `batch_size` as this line or one before has it, a number or a share.
    """

    index: int
    count: int
    run: Run
    given_steps: float | None = None
    until: tuple[str, float] | None = None
    given_rows: float | None = None

    @property
    def steps(self) -> int | None:
        """Largest number of steps of the stage; None for one that lasts as long as the run."""
        return None if self.given_steps is None else _number(self.given_steps, self.run.steps)

    @property
    def last(self) -> bool:
        """Whether the run ends with this stage."""
        return self.index + 1 == self.count

    @property
    def longest(self) -> int:
        """The longest documents of the stage, in blocks."""
        data = self.run.data
        row = -(-data.length // self.run.model.config.block_size)
        return row if data.curriculum is None else max(data.curriculum.blocks)

    def ready(self, devices: Sequence[jax.Device] | None = None) -> "Stage":
        """The stage with its run `ready`, see `Run.ready`."""
        with self.errors():
            return dataclasses.replace(self, run=self.run.ready(devices))

    def with_vocabulary(self, vocabulary: Any) -> "Stage":
        """The stage with a vocabulary for its model."""
        model = dataclasses.replace(self.run.model, vocabulary=vocabulary)
        return dataclasses.replace(self, run=dataclasses.replace(self.run, model=model))

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Context in which a ConfigError names the stage, if the run has several."""
        try:
            yield
        except ConfigError as error:
            if self.count == 1:
                raise
            stage = f"Stage {self.index + 1} of STAGES"
            if (self.given_rows or 1) < 1 and "BATCH_SIZE" in str(error):
                stage += f" (its BATCH_SIZE is {self.given_rows:g} of the run's)"
            raise ConfigError(f"{stage}: {error}") from error

    def __str__(self):
        config, data = self.run.model.config, self.run.data
        return (
            f"stage {self.index + 1} of {self.count}: rows of {data.length} tokens in blocks of"
            f" {config.block_size}, batches of {data.batch_size}"
        )


def stages_of(run: Run) -> tuple[Stage, ...]:
    """The stages of a run; a run without stages is its own only stage.

    Raises:
      ConfigError: a line does not fit; the sentence names the stage.
    """
    lines = run.stages
    if not lines:
        return (Stage(0, 1, run),)
    if isinstance(run.state_passing, FromMemoryFile):
        raise ConfigError(
            "INITIAL_MEMORY_FILE and STAGES exclude each other: each stage would begin with the memory"
            " of the file again. Leave one of them out."
        )
    stages: list[Stage] = []
    current = dataclasses.replace(run, stages=())
    blocks, rows = None, None
    for index, line in enumerate(lines):
        with Stage(index, len(lines), run).errors():
            blocks, rows = line.get("blocks", blocks), line.get("batch_size", rows)
            try:
                current = _with_line(current, line, blocks, run.data.batch_size)
            except (ValueError, TypeError) as error:
                sentence = str(error).split("\n  In call to configurable")[0]
                raise ConfigError(sentence) from error
            stage = Stage(index, len(lines), current, line.get("steps"), _until(line), rows)
            stages.append(stage)
    _check_steps(stages, run.steps)
    _check_used(run.data, stages, lines)
    return tuple(stages)


def _number(given: float, whole: int | None) -> int:
    """A number, or below 1 this share of `whole`, at least 1; a run that takes no steps has None."""
    return given if given >= 1 else max(1, round(given * (whole or 1)))


def _with_line(run: Run, line: StageLine, blocks: int | None, rows: int) -> Run:
    """`run` with the settings of a line.

    Args:
      run: the run with the settings of the lines before.
      line: the line.
      blocks: blocks of a row, as of this line or of one before.
      rows: the run's batch size, which shares are of.
    """
    config = run.model.config
    fields = {key: line[key] for key in ("block_size", "memory_segments") if key in line}
    if "memory" in line:
        fields["memory"] = memory_from_dict(config.memory.to_dict() | dict(line["memory"]))
    config = dataclasses.replace(config, **fields)
    data, size = run.data, config.block_size
    if blocks is not None:
        data = dataclasses.replace(data, lengths={**data.lengths, "targets": blocks * size})
    elif "block_size" in line and data.length % size:
        raise ConfigError(
            f"A block of {size} tokens does not divide the row of {data.length} tokens that"
            " TASK_FEATURE_LENGTHS gives: set 'blocks', the blocks of a row, or another block_size."
        )
    options = {**(data.options or {}), **line.get("options", {})}
    data = dataclasses.replace(
        data,
        batch_size=_number(line.get("batch_size", data.batch_size), rows),
        options=options or data.options,
        curriculum=_curriculum(line.get("curriculum", data.curriculum), data.curriculum),
    )
    model = run.model
    if fields:
        model = dataclasses.replace(model, module=Decoder(config))
    if "memory" in line and model.abstract_params() != run.model.abstract_params():
        raise ConfigError(
            f"With {dict(line['memory'])} the memory has other parameters, and all stages of a run have"
            " the same: set this in the gin file's memory."
        )
    return dataclasses.replace(
        run,
        model=model,
        data=data,
        microbatches=line.get("microbatches", run.microbatches),
        state_passing=_state_passing(line.get("state_passing", run.state_passing)),
    )


def _curriculum(given: Any, before: Curriculum | None) -> Curriculum | None:
    if given is None or isinstance(given, Curriculum):
        return given
    if before is not None:
        return dataclasses.replace(before, **given)
    if "blocks" not in given:
        raise ConfigError("The first curriculum needs 'blocks', its lengths in the order of unlocking.")
    return Curriculum(**given)


def _state_passing(given: Any) -> StatePassing:
    return named(given) if isinstance(given, str) else given


def _until(line: StageLine) -> tuple[str, float] | None:
    until = line.get("until")
    if until is None:
        return None
    ((metric, value),) = until.items()
    return metric, float(value)


def _check_steps(stages: Sequence[Stage], steps: int | None) -> None:
    """Raises ConfigError if the stages do not fill `steps`; None: the number of steps does not matter."""
    *first, last = stages
    for stage in first:
        if stage.steps is None:
            with stage.errors():
                raise ConfigError("steps is missing: only the last stage takes the steps that are left.")
    if last.until is not None:
        with last.errors():
            raise ConfigError("until ends a stage before the next one, and this one is the last.")
    early = any(stage.until for stage in first)
    if early and last.steps is not None:
        with last.errors():
            raise ConfigError(
                "Leave out its steps: a stage before may end early by its until, and the last stage takes"
                " all steps that are left of TRAIN_STEPS."
            )
    if steps is None:
        return
    used = sum(stage.steps for stage in first)
    if last.steps is not None and used + last.steps != steps:
        raise ConfigError(
            f"The steps of STAGES add up to {used + last.steps}, but TRAIN_STEPS is {steps}: change one"
            " of them, or leave out the steps of the last stage, which then takes what is left."
        )
    if used >= steps:
        raise ConfigError(
            f"The stages before the last take {used} steps, but TRAIN_STEPS is {steps}: none is left for"
            " the last stage."
        )


def _check_used(data: Data, stages: Sequence[Stage], lines: Sequence[StageLine]) -> None:
    """Raises ConfigError if settings of the run have no effect, since no stage has their values."""
    first, unused = lines[0], []
    if "blocks" in first and data.length not in [stage.run.data.length for stage in stages]:
        unused.append(f"TASK_FEATURE_LENGTHS gives rows of {data.length} tokens")
    rows = [line["batch_size"] for line in lines if "batch_size" in line]
    if "batch_size" in first and min(rows) >= 1 and data.batch_size not in rows:
        unused.append(f"BATCH_SIZE is {data.batch_size}")
    given = first.get("curriculum") or {}
    if data.curriculum is not None and (isinstance(given, Curriculum) or "blocks" in given):
        curricula = [stage.run.data.curriculum for stage in stages]
        blocks = tuple(data.curriculum.blocks)
        if blocks not in [tuple(each.blocks) for each in curricula if each is not None]:
            unused.append(f"Curriculum.blocks is {blocks}")
    if unused:
        raise ConfigError(
            f"{' and '.join(unused)}, but all stages have their own, and none has that: change STAGES, or"
            " give what one of them has."
        )


class Place:
    """The stage that a run is in, and what a checkpoint needs of it.

    A stage ends after its number of steps, or by its `until`: as soon as the metric, smoothed over those
    of its batches that have its longest documents, reaches the value. Metrics are seen as late as a
    curriculum sees them, in a resumed run as in any other.

    Args:
      stages: the stages of the run.
      steps: number of steps of the run.

    Attributes:
      index: index of the stage.
      first: number of steps of the run when the stage began.
      level: the smoothed metric of `until`.
    """

    def __init__(self, stages: Sequence[Stage], steps: int):
        self._stages, self._steps = stages, steps
        self.index, self.first, self.level = 0, 0, 0.0

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self._stages[self.index]

    @property
    def end(self) -> int:
        """The number of steps of the run with which the stage ends at the latest."""
        return self._steps if self.stage.last else self.first + self.stage.steps

    def observe(self, blocks: int | None, sums: Sums) -> None:
        """Takes the metrics of a step of this stage into account; `blocks`: length of its documents."""
        if self.stage.until is not None and blocks in (None, self.stage.longest):
            value = mean(sums, self.stage.until[0])
            self.level = SMOOTHING * self.level + (1 - SMOOTHING) * value

    def over(self, step: int) -> bool:
        """Whether the stage is over after `step` steps of the run, and another one follows."""
        if self.stage.last:
            return False
        reached = self.stage.until is not None and self.level >= self.stage.until[1]
        return reached or step >= self.end

    def advance(self, step: int) -> None:
        """Enters the next stage after `step` steps of the run."""
        self.index, self.first, self.level = self.index + 1, step, 0.0

    def get_state(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON values."""
        return {"index": self.index, "first": self.first, "level": self.level}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state that `get_state` returned.

        Raises:
          ConfigError: the run has fewer stages now.
        """
        if state["index"] >= len(self._stages):
            raise ConfigError(
                f"The run was stopped in stage {state['index'] + 1}, but STAGES has only"
                f" {len(self._stages)}: give the stages that it began with."
            )
        self.index, self.first, self.level = state["index"], state["first"], state["level"]
