"""Evaluation of one checkpoint, of all checkpoints, or of each new one while training runs.

Each evaluation of a checkpoint writes `<output_dir>/<name>/<step>.json` and TensorBoard scalars. A
result that already exists is read instead of computed again, so an interrupted evaluation resumes.
"""

import contextlib
import datetime
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import gin
from annotated_types import MinLen

import famx
from famx.base import gin_utils
from famx.base.describe import describe
from famx.base.errors import ConfigError
from famx.base.files import as_path, check_writable, write_json
from famx.base.ranges import Amount, Built, Directory, Expected, NonNegative, OneOf, Rate
from famx.base.signals import graceful_stop
from famx.base.values import checked
from famx.evaluation.common import is_of_memory
from famx.mesh import make_mesh, make_rules, on_mesh
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.identity import split_checkpoint
from famx.model_dir.loading import (
    TrainedModel,
    check_model,
    model_of_adapter,
    restore_params,
    with_adapter,
)
from famx.models import DecoderModel
from famx.training.event_files import summary_writer
from famx.training.resuming import History

MODES = ("latest", "all", "wait")
# A checkpoint that cannot be read may be in the middle of its deletion by the training run. It counts
# as damaged only if its directory still exists after this many seconds.
_GONE_SECONDS = 5
_COLUMNS = 6  # number of checkpoints shown in the table

Results = dict[str, dict[int, dict[str, float]]]


_Evaluations = Annotated[
    Mapping[
        str,
        Annotated[
            Callable[..., Any], Built(), Expected("an evaluation, such as @PasskeyEvaluation() makes")
        ],
    ],
    MinLen(1),
    Expected("a dict of at least one evaluation, such as {'passkey': @PasskeyEvaluation()}", inside=True),
]


@gin.configurable
@checked
def evaluate(
    checkpoint_path: Directory,
    evaluations: _Evaluations,
    output_dir: Directory | None = None,
    model: DecoderModel | None = None,
    checkpoints: Annotated[str, OneOf(MODES)] = "latest",
    stop_at_step: NonNegative | None = None,
    timeout: Amount = 3600.0,
    poll_seconds: Rate = 5.0,
    re_evaluate: bool = False,
    adapter: Directory | None = None,
) -> Results:
    """Runs every evaluation on every selected checkpoint, oldest first.

    Training may write to the directory at the same time. On SIGTERM or SIGINT the evaluation in
    progress, or the cell of its table, is finished and the function returns; the same call resumes with
    the next one.

    Args:
      checkpoint_path: a `MODEL_DIR`, or one `MODEL_DIR/checkpoint_<step>`.
      evaluations: `{name: evaluation}`, see `famx.evaluation`; the name is that of its result folder.
      output_dir: directory of the results. None writes results to `MODEL_DIR/eval` and TensorBoard
        files to `MODEL_DIR/tensorboard`.
      model: the model; None takes the one described by the directory's model.json.
      checkpoints: which checkpoints of a `MODEL_DIR` to evaluate: the "latest", "all" existing ones,
        or "wait" for existing and future ones.
      stop_at_step: with "wait", return after the checkpoint of this step or a later one.
      timeout: with "wait", return after this many seconds without a new checkpoint.
      poll_seconds: with "wait", seconds between two looks for new checkpoints.
      re_evaluate: evaluate again even if a result exists.
      adapter: saved adapter for the checkpoint, see `famx.model_dir.loading.load_model`, which needs an
        `output_dir` of its own.

    Returns:
      `{name: {step: scalars}}` for the selected checkpoints, including results of earlier calls.

    Raises:
      ConfigError: the settings do not fit (raised before anything is compiled), or "wait" timed out
        before the first checkpoint.
    """
    _check_evaluations(evaluations)
    directory, only = split_checkpoint(checkpoint_path)
    if only is not None and checkpoints != "latest":
        raise ConfigError(
            f"CHECKPOINTS={checkpoints!r} needs a MODEL_DIR, and CHECKPOINT_PATH is one checkpoint:"
            f" give {directory}."
        )
    stored = check_model(directory, model)
    model = stored
    if adapter is not None:
        _check_adapter(adapter, checkpoints, output_dir)
        model = model_of_adapter(stored, adapter)
    evaluations = _of_run(evaluations, model, directory, adapter)
    for evaluation in evaluations.values():
        if hasattr(evaluation, "check"):
            evaluation.check(model)
    mesh, rules = make_mesh(), make_rules()
    gin_utils.check_all_used()

    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(directory, read_only=True))
        _check_exists(checkpointer, only, checkpoints)
        output = _Output(stack, evaluations, output_dir, directory)
        stop = stack.enter_context(graceful_stop())
        wait = checkpoints == "wait"
        if wait:
            steps = _wait(checkpointer, stop_at_step, timeout, poll_seconds, stop)
        elif only is not None:
            steps = [only]
        else:
            steps = checkpointer.all_steps()[-1 if checkpoints == "latest" else 0 :]
        for count, step in enumerate(steps, 1):
            if stop():
                break
            reused = set() if re_evaluate else output.reuse(evaluations, step)
            pending = {name: x for name, x in evaluations.items() if name not in reused}
            if not pending:
                continue
            params = _restore(checkpointer, stored, step)
            if params is None:
                _say(f"Checkpoint {step} was deleted in the meantime: skipped.")
                continue
            if adapter is not None:
                trained = TrainedModel(stored, params, step, directory / f"checkpoint_{step}")
                params = with_adapter(trained, adapter).params
            place = f"{count}" if wait else f"{count} of {len(steps)}"
            for number, (name, evaluation) in enumerate(pending.items(), 1):
                if stop():
                    break
                _say(f"Checkpoint {step} ({place}): {name} ({number} of {len(pending)}) ...")
                with on_mesh(mesh, rules):
                    output.run(name, evaluation, model, params, step, stop)
        if stop():
            _say("Stopped. Run the same command to resume.")
        elif wait and not any(output.results.values()):
            raise ConfigError(f"No checkpoint appeared in {directory} within {timeout:g} seconds.")
        _say(f"Results are in {output.directory}.")
    return output.results


def _of_run(evaluations, model: DecoderModel, directory: pathlib.Path, adapter: str | None):
    """The evaluations, fitted to the run that trained the model, or its adapter, if it is known."""
    settings = None
    if adapter is None or as_path(adapter).is_dir():  # not one that comes with famx
        run = directory if adapter is None else as_path(adapter).parent
        settings = History(run).read().get("settings")
    if not isinstance(settings, dict):
        return evaluations
    fitted = lambda x: x.of_run(settings, model) if hasattr(x, "of_run") else x
    return {name: fitted(evaluation) for name, evaluation in evaluations.items()}


def table(results: Results) -> str:
    """Formats results as text: one row per scalar, one column for each of the newest checkpoints."""
    lines = []
    for name, by_step in results.items():
        if not by_step:
            continue
        steps = sorted(by_step)[-_COLUMNS:]
        keys = list(dict.fromkeys(key for step in steps for key in by_step[step]))
        width = max(map(len, [*keys, name])) + 2
        lines.append(name.ljust(width) + "".join(f"step {step}".rjust(14) for step in steps))
        for key in keys:
            cells = [f"{by_step[s][key]:.4f}" if key in by_step[s] else "-" for s in steps]
            lines.append(key.ljust(width) + "".join(cell.rjust(14) for cell in cells))
        lines.append("")
    return "\n".join(lines).rstrip()


# ---------------------------------------------------------------- checkpoints


def _check_exists(checkpointer: Checkpointer, only: int | None, mode: str) -> None:
    steps = checkpointer.all_steps()
    if only is not None and only not in steps:
        available = ", ".join(map(str, steps)) or "none"
        raise ConfigError(
            f"{checkpointer.model_dir} has no checkpoint of step {only}; available steps: {available}."
        )
    if mode != "wait" and not steps:
        raise ConfigError(f"There is no checkpoint in {checkpointer.model_dir}.")


def _wait(
    checkpointer: Checkpointer,
    stop_at_step: int | None,
    timeout: float,
    poll_seconds: float,
    stop: Callable[[], bool],
) -> Iterator[int]:
    """Yields checkpoint steps as they appear, oldest first.

    The timeout counts from when the caller asks for the next step, so that the time of an evaluation
    does not count as waiting.
    """
    seen: set[int] = set()
    since = time.monotonic()
    while not stop():
        checkpointer.reload()
        new = sorted(set(checkpointer.all_steps()) - seen)
        if new:
            seen.add(new[0])
            yield new[0]
            since = time.monotonic()
        elif stop_at_step is not None and max(seen, default=-1) >= stop_at_step:
            return
        elif time.monotonic() - since >= timeout:
            _say(f"No new checkpoint within {timeout:g} seconds.")
            return
        else:
            _sleep(min(poll_seconds, max(timeout - (time.monotonic() - since), 0.01)), stop)


def _sleep(seconds: float, stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not stop() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.2))


def _restore(checkpointer: Checkpointer, model: DecoderModel, step: int):
    """The checkpoint's parameters, or None if it was deleted before it could be read completely.

    Raises:
      ConfigError: the checkpoint is damaged, or its weights are not the model's.
    """
    try:
        return restore_params(checkpointer, model, step)[1]
    except Exception as error:
        directory, end = checkpointer.model_dir / f"checkpoint_{step}", time.monotonic() + _GONE_SECONDS
        while directory.exists():
            if time.monotonic() >= end:
                if isinstance(error, ConfigError) or not isinstance(error, (OSError, ValueError)):
                    raise
                reason = str(error).splitlines()[0]
                raise ConfigError(f"{directory} is damaged and cannot be read: {reason}") from error
            time.sleep(0.1)
        return None


# ---------------------------------------------------------------- results


def _check_evaluations(evaluations: Mapping[str, Any]) -> None:
    for name in evaluations:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(
                f"{name!r} cannot be the name of an evaluation: it names a folder, so use letters, digits"
                " and underscores."
            )


def _check_adapter(adapter: str, checkpoints: str, output_dir: str | None) -> None:
    if checkpoints != "latest":
        raise ConfigError(
            f"ADAPTER={adapter} belongs to the weights of one checkpoint: leave out CHECKPOINTS."
        )
    if output_dir is None:
        raise ConfigError(
            f"ADAPTER={adapter} needs EVAL_OUTPUT_DIR, a directory for its results: those in"
            " MODEL_DIR/eval are of the checkpoint without it."
        )


class _Output:
    """The results of all evaluations, in memory, in files and in TensorBoard.

    Args:
      stack: closes the TensorBoard writers.
      evaluations: evaluations by name.
      output_dir: directory of the results; None for `<model_dir>/eval`.
      model_dir: directory of the checkpoints.

    Attributes:
      directory: directory of the results.
      results: `{name: {step: scalars}}` of new and reused results.

    Raises:
      ConfigError: a directory cannot be written to.
    """

    def __init__(
        self,
        stack: contextlib.ExitStack,
        evaluations: Mapping[str, Any],
        output_dir: str | None,
        model_dir: pathlib.Path,
    ):
        self.results: Results = {name: {} for name in evaluations}
        self._model_dir = model_dir
        self.directory, tensorboard = _output_directories(output_dir, model_dir)
        self._writers = {}
        for name in evaluations:
            writer = summary_writer(tensorboard / f"eval_{name}")
            self._writers[name] = stack.enter_context(contextlib.closing(writer))

    def reuse(self, evaluations: Mapping[str, Any], step: int) -> set[str]:
        """Takes over earlier results of the checkpoint of a step; returns the names that have one."""
        reused = set()
        for name, evaluation in evaluations.items():
            earlier = _read_result(self._file(name, step))
            if earlier is None:
                continue
            reused.add(name)
            self.results[name][step] = earlier["scalars"]
            differs = earlier.get("settings") != describe(evaluation)
            hint = " with other settings; set RE_EVALUATE=True to repeat it" if differs else ""
            _say(f"Checkpoint {step}: {name} has already been evaluated{hint}.")
        return reused

    def run(
        self,
        name: str,
        evaluation: Any,
        model: DecoderModel,
        params,
        step: int,
        stop: Callable[[], bool],
    ) -> None:
        """Runs one evaluation of the checkpoint of a step and writes its result."""
        began = time.monotonic()
        # An evaluation that writes more than scalars gets its result folder, and a long one is told
        # whether to stop.
        extra: dict[str, Any] = {}
        if getattr(evaluation, "writes_predictions", False):
            extra["folder"] = self.directory / name
        if getattr(evaluation, "stops_between_cells", False):
            extra["stop"] = stop
        scalars = {k: float(v) for k, v in evaluation(model, params, step, **extra).items()}
        seconds = time.monotonic() - began
        _write_result(
            self._file(name, step),
            {
                "name": name,
                "step": step,
                "scalars": scalars,
                "settings": describe(evaluation),
                "checkpoint": str(self._model_dir / f"checkpoint_{step}"),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "seconds": round(seconds, 3),
                "famx": famx.__version__,
            },
        )
        for key, value in scalars.items():
            self._writers[name].add_scalar(f"eval/{key}", value, step)
        self._writers[name].flush()
        self.results[name][step] = scalars
        shown = ", ".join(f"{k} {v:.4g}" for k, v in scalars.items() if not is_of_memory(k))
        _say(f"Checkpoint {step}: {name}: {shown} ({seconds:.1f} s)")

    def _file(self, name: str, step: int) -> pathlib.Path:
        return self.directory / name / f"{step}.json"


def _output_directories(
    output_dir: str | None, model_dir: pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path]:
    """Creates the directories of results and of TensorBoard files, and checks that they are writable."""
    if output_dir is None:
        results, tensorboard = model_dir / "eval", model_dir / "tensorboard"
    else:
        results = as_path(output_dir).expanduser().absolute()
        tensorboard = results / "tensorboard"
    try:
        for directory in (results, tensorboard):
            check_writable(directory)
    except OSError as error:
        raise ConfigError(
            f"Cannot write results to {directory}: {error.strerror}. Set EVAL_OUTPUT_DIR to a writable"
            " directory."
        ) from error
    return results, tensorboard


def _read_result(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text())
        return result if isinstance(result["scalars"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_result(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
