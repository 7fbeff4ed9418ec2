"""Where a run begins: from nothing, from its newest checkpoint with the same settings, or not at all.

MODEL_DIR/settings.json is for readers: the settings now, and a line of history for each time that the run
began or went on, with what changed. What a resume is compared with is in the checkpoint itself.
"""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from famx.base.describe import Difference
from famx.base.errors import ConfigError
from famx.base.files import write_json
from famx.data.vocabularies import load_vocabulary
from famx.model_dir.checkpointer import Checkpointer
from famx.training.run import Run
from famx.training.run_log import read_metrics
from famx.training.settings import Saved, changes, check_allowed, versions

FILE = "settings.json"


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
      step: step of the checkpoint that it resumes from; None: it begins from nothing.
      position: data state of that checkpoint; None if it has none.
      changes: settings that changed since, all of them allowed.
      notes: sentences for the log.
    """

    step: int | None
    position: Mapping[str, Any] | None
    changes: Sequence[Difference] = ()
    notes: Sequence[str] = ()


def starting(
    checkpointer: Checkpointer,
    step: int | None,
    settings: Mapping[str, Any],
    run: Run,
    allowed: Sequence[str],
    vocabulary: Any = None,
) -> Start:
    """Where a run of these settings begins, at a checkpoint or from nothing; writes nothing.

    Args:
      checkpointer: checkpointer of the `MODEL_DIR`.
      step: step of the checkpoint that the run resumes from; None: there is none.
      settings: `famx.training.settings.settings_of` the run.
      run: the run of the last stage.
      allowed: names of settings that may have changed.
      vocabulary: vocabulary of the data, or None.

    Raises:
      ConfigError: the checkpoint is of a run with other settings, or `allowed` names no setting.
    """
    if step is None:
        check_allowed(allowed, settings)
        return Start(None, {})
    position = checkpointer.data_state(step)
    saved = Saved.of(step, position or {})
    if saved is None:
        check_allowed(allowed, settings)
        _check_vocabulary(checkpointer.model_dir, vocabulary)
        note = (
            f"The checkpoint of step {step} does not tell the settings of its run: whether they are the"
            " same now cannot be checked."
        )
        return Start(step, position, notes=(note,))
    found = changes(saved, settings, run.steps, allowed, checkpointer.model_dir)
    notes = [f"Since step {step}: {change}." for change in found]
    if saved.versions != versions():
        was, now = (
            " and ".join(f"{name} {version}" for name, version in of.items())
            for of in (saved.versions, versions())
        )
        notes.append(f"The checkpoint of step {step} was written with {was}, and this is {now}.")
    return Start(step, position, found, notes)


def _check_vocabulary(directory: pathlib.Path, vocabulary: Any) -> None:
    """Raises ConfigError if a `MODEL_DIR` has another vocabulary; for runs of older versions."""
    if vocabulary is None or not (directory / "vocabulary.json").exists():
        return
    if load_vocabulary(directory) != vocabulary:
        raise ConfigError(
            f"The run in {directory} was trained with another vocabulary than that of the data now: go"
            " back to its task and options, or choose another MODEL_DIR."
        )


class History:
    """The file MODEL_DIR/settings.json.

    Args:
      directory: the `MODEL_DIR`.
    """

    def __init__(self, directory: pathlib.Path):
        self._path = directory / FILE

    def read(self) -> dict[str, Any]:
        """The content of the file; {} if there is none that can be read."""
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            return content if isinstance(content["history"], list) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def begin(self, start: Start, settings: Mapping[str, Any], run: Run) -> None:
        """Adds that the run begins or continues with these settings, and is not finished any more."""
        line = {
            "step": start.step or 0,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "steps": run.steps,
            "processes": jax.process_count(),
            "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
            **versions(),
            "changes": [
                {"setting": change.name, "was": _value(change.was), "now": _value(change.now)}
                for change in start.changes
            ],
        }
        before = self.read().get("history", []) if start.step is not None else []
        write_json(self._path, {"settings": settings, "history": [*before, line]})

    def finish(self, step: int, evaluation: Any) -> None:
        """Notes that the run took all its steps and was evaluated; `evaluation`: its description."""
        write_json(self._path, {**self.read(), "finished": {"step": step, "evaluation": evaluation}})

    def is_finished(self, steps: int, step: int | None, evaluation: Any) -> bool:
        """Whether nothing is left to do for a run of `steps` with its newest checkpoint at `step`."""
        finished = {"step": step, "evaluation": evaluation}
        return step is not None and step >= steps and self.read().get("finished") == finished


def _value(value: Any) -> Any:
    return value if isinstance(value, dict | list | str | int | float | None) else "unset"


def last_scalars(directory: pathlib.Path, step: int) -> dict[str, float]:
    """The scalars of the last line of training, and of evaluations after the last step."""
    lines = read_metrics(str(directory))
    chosen = [line for line in lines if line["split"] == "train"][-1:]
    chosen += [line for line in lines if line["split"] == "eval" and line["step"] == step]
    plain = ("step", "split", "time")
    return {name: x for line in chosen for name, x in line.items() if name not in plain}


def cannot_change(error: ConfigError, start: Start) -> ConfigError:
    """The error of restoring a checkpoint, naming the allowed changes as its likely cause, if any."""
    if not start.changes:
        return error
    named = ", ".join(change.name for change in start.changes)
    return ConfigError(
        f"The run cannot continue with the changes that were allowed ({named}): {error} A new run can"
        " begin from this checkpoint: set INITIAL_CHECKPOINT_PATH."
    )
