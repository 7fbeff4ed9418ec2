"""Settings of a run that decide its result, and what differs when it resumes.

`settings_of` describes them as JSON values. They are part of every checkpoint, and
MODEL_DIR/settings.json has them in readable form with the history of the run (`famx.training.resuming`).
What a resume may change freely is in `FREE`; the fields of the model that decide its parameters are
compared by `famx.model_dir.identity`. `Data.on_bad_record` may change, too.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np

import famx
from famx.base.describe import UNSET, Difference, describe, differences, names_in
from famx.base.errors import ConfigError
from famx.base.gin_checks import nearest
from famx.data.tasks import Kind, kind_of
from famx.data.tasks.identity import identity
from famx.modules import Memory
from famx.training.run import Data, Run, bound_options
from famx.training.stages import Stage

# Fields of `Run` that a resumed run may change: they do not change what it learns, except that it may
# last longer.
FREE = (
    *("steps", "model_dir", "evaluation", "every", "adapter_dtype", "checkpoints_to_keep"),
    *("mesh", "rules", "minutes", "profile_steps", "xla_options", "resume_from", "retry_full_disk"),
    *("health", "compile_threads"),
)
_OF_STAGES = ("data", "microbatches", "state_passing", "stages")  # fields of `Run` that stages change
_OF_MODEL = ("dtype", "param_dtype")  # fields of `DecoderConfig` that its identity leaves out
_NOT_OF_MODEL = ("module", "vocabulary", "lora", "loss_chunk", "context_shards")  # of `DecoderModel`
# Options of a task that name places. The content of the files there is compared, not their place; the
# vocabulary is compared as such.
_PLACES = ("data_dir", "files", "folders", "validation_files", "vocabulary")
_OF_TEXTS = ("split", "max_tokens", "cut", "allow_partial")  # settings of text tasks, also by default
_MOST_SHOWN = 8  # differences in a sentence


def settings_of(stages: Sequence[Stage], tasks: Sequence[Any]) -> dict[str, Any]:
    """The settings of a run as JSON values.

    Args:
      stages: the stages of the run, `ready`, with their vocabulary.
      tasks: the opened task of each.

    Raises:
      ConfigError: a data file cannot be read.
    """
    run = stages[-1].run
    config = run.model.config
    model = {name: getattr(config, name) for name in _OF_MODEL}
    model |= _fields(run.model, _NOT_OF_MODEL)
    common = _fields(run, (*FREE, *_OF_STAGES, "model"))
    settings = {"model": model, "vocabulary": run.model.vocabulary, "stages": len(stages), **common}
    of_stages = [
        _of_stage(stage, task, config.memory) for stage, task in zip(stages, tasks, strict=True)
    ]
    if len(stages) == 1:
        return describe(settings | of_stages[0])
    return describe(settings | {f"stage_{i}": fields for i, fields in enumerate(of_stages, 1)})


def last_task(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Name ("type") and settings of the task of a run's last stage, by its `settings_of`; {}: unknown."""
    of_stage = settings.get(f"stage_{settings.get('stages')}", settings)
    return of_stage.get("task") or {}


def _of_stage(stage: Stage, task: Any, memory: Memory) -> dict[str, Any]:
    """The settings of a stage; `memory`: that of the last one, which belongs to the model's identity."""
    run, data = stage.run, stage.run.data
    fields = {
        **_fields(data, ("task", "lengths", "options", "on_bad_record")),
        "length": data.length,
        "task": _task(data, task),
        "data": _identity(task),
        "microbatches": run.microbatches,
        "state_passing": run.state_passing,
    }
    if stage.count > 1:
        config = run.model.config
        fields |= {name: getattr(config, name) for name in ("block_size", "memory_segments")}
        fields |= {"memory": config.memory} if config.memory != memory else {}
        fields["until"] = stage.until
        if not stage.last:
            fields["steps"] = stage.given_steps
    return fields


def _task(data: Data, task: Any) -> dict[str, Any]:
    """The task's name as "type", and its settings: all of them if it makes its examples by index."""
    named = isinstance(data.task, str)
    options = {**(bound_options(data.task) if named else {}), **(data.options or {})}
    if kind_of(task) is Kind.MADE and dataclasses.is_dataclass(task):
        options = _fields(task, ())
    elif kind_of(task) is Kind.SCORED:
        options |= {name: getattr(task, name) for name in _OF_TEXTS if hasattr(task, name)}
    kept = {name: value for name, value in options.items() if name not in _PLACES}
    return {"type": data.task if named else type(data.task).__name__, **kept}


def _identity(task: Any) -> dict[str, Any]:
    try:
        return identity(task)
    except OSError as error:
        raise ConfigError(f"The data file {error.filename} cannot be read: {error.strerror}.") from error


def _fields(value: Any, without: Iterable[str]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(value) if field.name not in without]
    return {name: getattr(value, name) for name in names}


def versions() -> dict[str, str]:
    """Versions of famx and of the library that computes."""
    return {"famx": famx.__version__, "jax": jax.__version__}


# ---------------------------------------------------------------- what processes must agree on


def agreement(run: Run, settings: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
    """What all processes of a run must have in common, as JSON values.

    Args:
      run: the run of the last stage, `ready`.
      settings: its `settings_of`, which include the identity of the data.
      allowed: names of settings that may have changed.
    """
    free = {name: getattr(run, name) for name in FREE} | {"mesh": dict(run.mesh.shape)}
    code = versions() | {"jaxlib": jaxlib.__version__, "numpy": np.__version__}
    code["source"] = source_digest()
    return {**settings, **describe({**free, "allow_changes": list(allowed)}), "code": code}


def source_digest() -> str:
    """16 hexadecimal digits of a hash of famx's own Python files; other packages' do not count."""
    root, digest = pathlib.Path(famx.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- what a resume changes


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a checkpoint tells about the run that wrote it.

    Attributes:
      step: number of steps taken.
      steps: number of steps of the run.
      settings: `settings_of` that run.
      versions: `versions()` of it.
    """

    step: int
    steps: int
    settings: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def of(cls, step: int, position: Mapping[str, Any]) -> "Saved | None":
        """From the data state of the checkpoint of a step; None if an older famx, or t5x, wrote it."""
        saved = position.get("run")
        if not isinstance(saved, Mapping) or not {"steps", "settings", "versions"} <= set(saved):
            return None
        return cls(step, saved["steps"], saved["settings"], saved["versions"])


def changes(
    saved: Saved, settings: Mapping[str, Any], steps: int, allowed: Sequence[str], directory: Any
) -> list[Difference]:
    """The changes with which a run resumes from a checkpoint.

    A schedule that ends with the run follows `steps`.

    Args:
      saved: what the checkpoint tells.
      settings: the settings now.
      steps: number of steps of the run now.
      allowed: names of settings that may change, as "optimizer.learning_rate", or a part of such a name.
      directory: the `MODEL_DIR`, for the sentence.

    Raises:
      ConfigError: a setting changes that is not among `allowed`, or `allowed` names none.
    """
    other_version = saved.versions != versions()
    found = list(differences(saved.settings, settings))
    other_stages = [change for change in found if change.name == "stages"]
    found = [
        change for change in other_stages or found  # with other stages, all of their settings differ
        if not (other_version and change.was is UNSET)  # a setting that did not exist yet
    ]  # fmt: skip
    check_allowed(allowed, saved.settings, settings)
    refused = [
        change for change in found
        if not _is_allowed(change.name, allowed) and not _follows(change, saved.steps, steps)
    ]  # fmt: skip
    if refused:
        listed = "; ".join(map(str, refused[:_MOST_SHOWN]))
        more = len(refused) - _MOST_SHOWN
        listed += f"; and {more} more" if more > 0 else ""
        names = ", ".join(repr(change.name) for change in refused[:_MOST_SHOWN])
        raise ConfigError(
            f"The run in {directory} has taken {saved.step} steps with other settings: {listed}. Go back"
            " to them, choose another MODEL_DIR, or allow the changes with"
            f' --gin.train.allow_changes="({names},)".'
        )
    return found


def check_allowed(allowed: Sequence[str], *described: Mapping[str, Any]) -> None:
    """Raises ConfigError if a name of `train.allow_changes` is not that of a setting."""
    if isinstance(allowed, str) or not all(isinstance(name, str) for name in allowed):
        raise ConfigError(
            "train.allow_changes must be a tuple of names of settings, such as ('learning_rate',), not"
            f" {allowed!r}."
        )
    names = list(dict.fromkeys(name for values in described for name in names_in(values)))
    for name in allowed:
        if not any(_is_allowed(known, (name,)) for known in names):
            raise ConfigError(
                f"train.allow_changes names {name!r}, which is no setting of this run."
                + nearest(name, [*names, *(known.rpartition(".")[2] for known in names)])
            )


def _is_allowed(name: str, allowed: Iterable[str]) -> bool:
    """Whether one of the allowed names is a part of `name`: some of its words, in their order."""
    return any(f".{part.lower()}." in f".{name.lower()}." for part in allowed)


def _follows(change: Difference, was: int, now: int) -> bool:
    """Whether the steps of a schedule change because those of the run do."""
    words = change.name.split(".")
    in_schedule = words[0] == "optimizer" and words[-1] == "steps"
    return in_schedule and (change.was, change.now) == (was, now)
