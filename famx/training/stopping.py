"""The end of a run whose numbers went wrong: what to do next, and what a replay needs.

`MODEL_DIR/stopped.json` names the step, its random key and the checkpoint before it; `stopped.npz` next
to it holds the batch of the step. `famx.training.replay` runs the step again. States that are carried
from step to step are not in these files: the steps from the checkpoint on make them again.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from famx.base.errors import ConfigError
from famx.base.files import local_copy, replacing, write_json
from famx.training.health import Unsound
from famx.training.session import Session
from famx.training.step import step_key

_JSON, _BATCH = "stopped.json", "stopped.npz"


@dataclasses.dataclass(frozen=True)
class Stopped:
    """Where a run stopped.

    Attributes:
      step: the step that went wrong, counted from 0.
      cause: what was wrong, in words that begin a sentence.
      key: data of the random key of the step.
      checkpoint: newest checkpoint up to the step, which it can be made again from; None: from the start.
      good: newest good checkpoint, or None.
      batch: arrays of the global batch by name.
    """

    step: int
    cause: str
    key: list[int]
    checkpoint: int | None
    good: int | None
    batch: dict[str, np.ndarray]


def stopped_by_numbers(session: Session, error: Unsound) -> ConfigError:
    """The sentence with which a run ends by `error`, after what a replay needs has been written.

    All processes must call it, at the same step.
    """
    checkpointer, good, directory = session.checkpointer, session.good.newest, session.directory
    checkpointer.wait()
    first = min(step for step in session.recent if step >= error.step)
    batch = session.data.place(session.recent[first].trained)
    batch = multihost_utils.process_allgather(batch, tiled=True)
    before = max((step for step in checkpointer.all_steps() if step <= first), default=None)
    key = jax.random.key_data(step_key(session.run, first))
    stopped = Stopped(first, str(error), np.asarray(key).tolist(), before, good, batch)
    if jax.process_index() == 0:
        _write(directory, stopped)
    resume = "There is no good checkpoint to resume from: begin again in an empty directory."
    if good is not None:
        resume = (
            f"The last good checkpoint is that of step {good}; --resume_from={good} resumes from it."
        )
    return ConfigError(
        f"{error}: lower the learning rate. {resume} famx replay {directory} shows where the numbers went"
        " wrong."
    )


def _write(directory: pathlib.Path, stopped: Stopped) -> None:
    with replacing(directory / _BATCH) as temporary, temporary.open("wb") as file:
        np.savez(file, **stopped.batch)
    fields = dataclasses.asdict(dataclasses.replace(stopped, batch={}))
    del fields["batch"]
    write_json(directory / _JSON, fields)


def read_stopped(directory: pathlib.Path) -> Stopped:
    """What a run that went wrong has left in its `MODEL_DIR`.

    Raises:
      ConfigError: it has left nothing, or the files are damaged.
    """
    path = directory / _JSON
    if not path.exists():
        raise ConfigError(
            f"{directory} has no {_JSON}: no run has stopped there because its numbers went wrong."
        )
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        with (
            local_copy(directory / _BATCH) as batch,
            np.load(batch, allow_pickle=False) as arrays,
        ):
            return Stopped(**fields, batch=dict(arrays))
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        raise ConfigError(f"{path} or {_BATCH} next to it is damaged: {error}") from error
