"""TensorBoard's event files, which a disk without space leaves short, but does not stop."""

import importlib
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorboardX

_PREFIX = "famx-events"  # of the paths that are opened by `_Opened`


def summary_writer(directory: str | os.PathLike, **options: Any) -> "tensorboardX.SummaryWriter":
    """A SummaryWriter that leaves out events that cannot be written.

    The thread of an ordinary one ends by the error, and further events wait for it for ever.

    Args:
      directory: directory of the event file; made if missing.
      options: options of `SummaryWriter`.
    """
    _import_without_torch()
    import tensorboardX
    from tensorboardX import record_writer

    record_writer.register_writer_factory(_PREFIX, _Factory)
    return tensorboardX.SummaryWriter(f"{_PREFIX}:{os.fspath(directory)}", **options)


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
    return pathlib.Path(name.removeprefix(f"{_PREFIX}:"))


class _Factory:
    """What tensorboardX calls for paths with the prefix."""

    @staticmethod
    def directory_check(name: str) -> None:
        _path(name).mkdir(parents=True, exist_ok=True)

    @staticmethod
    def open(name: str) -> "_Events":
        return _Events(_path(name))


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
