"""Files that a run writes besides logs: checkpoints, adapters, and a record of what it began from."""

import importlib.util
import pathlib
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from famx.base.checksums import read_checked_json, write_checked_json
from famx.base.errors import ConfigError
from famx.base.files import copy_directory
from famx.lora import save_adapter
from famx.lora.adapters import ADAPTERS
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.commit import disk_is_full
from famx.model_dir.identity import weights_fingerprint
from famx.model_dir.lock import RunLock
from famx.modules.memory import of_memory
from famx.training.run import Run
from famx.training.step import TrainState

_BASE_FILE = "base.json"  # the initial checkpoint and its fingerprint


class RunWriter:
    """Writes the checkpoints of a run that is `ready`, and its adapters also as separate files.

    Args:
      run: the run.
      directory: its `MODEL_DIR`.
      checkpointer: checkpointer of that directory.
      lock: the run's lock of the directory.
    """

    def __init__(
        self, run: Run, directory: pathlib.Path, checkpointer: Checkpointer, lock: RunLock
    ):
        self._run, self._directory, self._checkpointer = run, directory, checkpointer
        self._lock = lock
        self._first = jax.process_index() == 0
        self._can_save_adapter = importlib.util.find_spec("safetensors") is not None

    def notes(self) -> list[str]:
        """Sentences about files that will be missing."""
        if self._run.model.lora is None or self._can_save_adapter:
            return []
        return ["The adapters are saved in the checkpoints alone: the package safetensors is missing."]

    def note_base(self, checkpoint: str, initial_dir: pathlib.Path, params: Any) -> None:
        """Records the checkpoint that the run begins from, and copies the files that an export needs."""
        weights = weights_fingerprint(params)  # in all processes, which share the arrays
        if not self._first:
            return
        base = {"checkpoint": str(checkpoint), "weights": weights}
        write_checked_json(self._directory / _BASE_FILE, base)
        source = initial_dir / "source"  # files of an imported model
        if source.is_dir():
            copy_directory(source, self._directory / "source")

    def save(self, step: int, state: TrainState, data: Any) -> str | None:
        """Saves a checkpoint with `data`, the position in the data, and the adapters if possible.

        Returns:
          None, or a sentence if the disk is full and the run tries again.

        Raises:
          ConfigError: it cannot be written, or another run has taken over the directory.
        """
        self._lock.check()
        try:
            self._checkpointer.save(step, state.to_checkpoint(), data, force=True)
            if self._run.model.lora is not None and self._can_save_adapter:
                self._save_adapter(state)
        except ConfigError as error:
            return self._later(error)
        return None

    def check(self, wait: bool = False) -> str | None:
        """As `save`, for a checkpoint that is written in the background; `wait`: until it is written."""
        try:
            self._checkpointer.wait() if wait else self._checkpointer.check()
        except ConfigError as error:
            return self._later(error)
        return None

    def _later(self, error: ConfigError) -> str:
        if not (self._run.retry_full_disk and disk_is_full(error)):
            raise error
        return f"{error} The run continues, and saves again at the next period."

    def _save_adapter(self, state: TrainState) -> None:
        trainable = self._run.trainable
        wanted = lambda path: of_memory(path) or trainable.learns(path)
        flat = flatten_dict(state.params, sep="/")
        part = unflatten_dict({path: x for path, x in flat.items() if wanted(path)}, sep="/")
        part = multihost_utils.process_allgather(part, tiled=True)
        if not self._first:
            return
        model, path = self._run.model, self._directory / _BASE_FILE
        base = read_checked_json(path) if path.exists() else {}
        memory = model.config.memory_fields()
        others = [path for path in flat if trainable.learns(path) and not path.endswith(ADAPTERS)]
        save_adapter(
            self._directory / "adapter", part, model.lora, base.get("weights"), base.get("checkpoint"),
            memory, others, self._run.adapter_dtype,
        )  # fmt: skip
