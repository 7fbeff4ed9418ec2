"""TensorBoard's event files, which a disk without space leaves short, but does not stop."""

import contextlib
import importlib
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from famx.base.appending import StoredAppended
from famx.base.errors import ConfigError
from famx.base.files import as_path, is_stored

if TYPE_CHECKING:
    import tensorboardX

_PREFIX = "famx-events"  # of the paths that are opened by `_Opened`


def summary_writer(directory: str | os.PathLike, **options: Any) -> "tensorboardX.SummaryWriter":
    """A SummaryWriter that leaves out events that cannot be written.

    The thread of an ordinary one ends by the error, and further events wait for it for ever.

    Args:
      directory: directory of the event file; made if missing.
      options: options of `SummaryWriter`.

    Raises:
      ConfigError: the directory cannot be made, or the semaphores of the writer's queue, which are files
        of the system in `/dev/shm`.
    """
    _import_without_torch()
    import tensorboardX
    from tensorboardX import record_writer

    record_writer.register_writer_factory(_PREFIX, _Factory)
    try:
        return tensorboardX.SummaryWriter(f"{_PREFIX}:{os.fspath(directory)}", **options)
    except ConfigError:  # of a store
        raise
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written: {error.strerror or error}. Make space there, and in"
            " /dev/shm, where TensorBoard's files have their locks."
        ) from error


def _import_without_torch() -> None:
    """Imports tensorboardX, but not torch, which it uses in annotations only: that takes seconds."""
    if "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # so that importing it is an ImportError
    try:
        importlib.import_module("tensorboardX")
    finally:
        del sys.modules["torch"]


def _path(name: str) -> pathlib.Path:
    return as_path(name.removeprefix(f"{_PREFIX}:"))


class _Factory:
    """What tensorboardX calls for paths with the prefix."""

    @staticmethod
    def directory_check(name: str) -> None:
        _path(name).mkdir(parents=True, exist_ok=True)

    @staticmethod
    def open(name: str) -> "_Events | _StoredEvents":
        path = _path(name)
        return _StoredEvents(path) if is_stored(path) else _Events(path)


class _StoredEvents:
    """A file in a store to which events are appended."""

    def __init__(self, path: pathlib.Path):
        self._file = StoredAppended(path)

    def write(self, data: bytes) -> None:
        self._file.append(data)

    def flush(self) -> None:
        """Nothing: the file is written every few seconds."""

    def close(self) -> None:
        with contextlib.suppress(ConfigError):
            self._file.close()


class _Events:
    """A file to which whole events are appended, each at a `flush`."""

    def __init__(self, path: pathlib.Path):
        self._file = path.open("wb", buffering=0)
        self._pending, self._size = bytearray(), 0

    def write(self, data: bytes) -> None:
        self._pending += data

    def flush(self) -> None:
        data, self._pending = bytes(self._pending), bytearray()
        try:
            if self._file.write(data) == len(data):
                os.fsync(self._file.fileno())
                self._size += len(data)
                return
        except OSError:
            pass
        self._drop()

    def _drop(self) -> None:
        """Removes what was written of an event, after which TensorBoard would read no other."""
        try:
            self._file.truncate(self._size)
            self._file.seek(self._size)
        except OSError:  # the directory may be gone
            pass

    def close(self) -> None:
        self.flush()
        self._file.close()
