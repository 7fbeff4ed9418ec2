"""Files that grow, such as logs: on a disk, or in a store, where an object is only written as a whole."""

import contextlib
import os
import pathlib
import threading

from famx.base.errors import ConfigError
from famx.base.files import is_stored

_SECONDS = 10.0  # between two times that the whole of a file is written to a store
_BYTES_PER_SECOND = 100_000  # that are written in the long run: some buckets keep what is overwritten


def appended(path: pathlib.Path) -> "Appended":
    """A file, made if it is missing, to which data can be appended."""
    return StoredAppended(path) if is_stored(path) else Appended(path)


class Appended:
    """A file on a disk; data are in it on return.

    Args:
      path: the file.
    """

    def __init__(self, path: pathlib.Path):
        # Unbuffered: what could not be written for want of space is not tried again on closing.
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, data: bytes) -> None:
        """Adds data at the end; OSError if the disk does not take them."""
        os.write(self._file, data)

    def flush(self) -> None:
        """Makes sure that all data are in the file; ConfigError if they cannot be written."""

    def close(self) -> None:
        """Flushes and closes; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


class StoredAppended(Appended):
    """A file in a store; data are in it after `flush` or, by themselves, within seconds.

    The whole file is held in memory. The larger it is, the less often it is written.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._content = bytearray(path.read_bytes() if path.is_file() else b"")
        self._written = len(self._content)
        self._data, self._writing, self._closed = threading.Lock(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="appending", daemon=True)
        self._thread.start()

    def append(self, data: bytes) -> None:
        with self._data:
            self._content += data

    def flush(self) -> None:
        try:
            self._write()
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}.") from error

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            self.flush()

    def _write(self) -> None:
        with self._writing:
            with self._data:
                content = bytes(self._content)
            if len(content) > self._written:
                self._path.write_bytes(content)
                self._written = len(content)

    def _run(self) -> None:
        seconds = _SECONDS
        while not self._closed.wait(seconds):
            with contextlib.suppress(OSError):  # it is tried again, and the next flush says so
                self._write()
            seconds = max(_SECONDS, len(self._content) / _BYTES_PER_SECOND)
