"""Measured cells in a JSON-lines file, from which a command that was stopped or killed is resumed."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Self

from famx.base.errors import ConfigError

Key = tuple[Any, ...]


class CellLog:
    """Cells of a command, each written to disk as soon as it is measured; a context manager.

    The first line of the file has the settings that all cells share, every other one a cell. A line that
    a killed process left unfinished is dropped. Nothing is written before the first `add`.

    Args:
      path: the file, which this process alone has until the context ends; its directory is made if it is
        missing.
      settings: what the cells depend on besides their keys, as JSON values.
      keys: names of the fields by which cells are told apart.

    Attributes:
      settings: the settings.
      cells: the cells by the values of their keys; a later cell replaces an earlier one.

    Raises:
      ConfigError: the file cannot be read, is no such file, has cells of other settings, or belongs to a
        process that is writing it.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any], keys: Sequence[str]):
        self._path, self._keys = path, tuple(keys)
        self.settings = json.loads(json.dumps(settings))
        self.cells: dict[Key, dict[str, Any]] = {}
        self._complete = 0  # bytes of complete lines
        self._file: IO[bytes] | None = None
        if os.path.lexists(path):
            with self._sentence("read"):
                self._open()
                self._read(path.read_bytes())

    def _read(self, data: bytes) -> None:
        self._complete = data.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in data[: self._complete].splitlines()]
            settings = dict(lines[0]["settings"]) if lines else self.settings
            cells = {self._key(cell): cell for cell in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            sentence = f"{self._path} is not a file of cells: choose another directory."
            raise ConfigError(sentence) from error
        if settings != self.settings:
            names = sorted({*settings, *self.settings})
            differing = [name for name in names if settings.get(name) != self.settings.get(name)]
            raise ConfigError(
                f"{self._path} has cells of other settings ({', '.join(differing)}): choose another"
                " directory, or delete the file."
            )
        self.cells = cells

    def _key(self, cell: Mapping[str, Any]) -> Key:
        return tuple(cell[name] for name in self._keys)

    def add(self, cell: Mapping[str, Any]) -> None:
        """Writes a cell, with the fields of its key, to disk.

        Raises:
          ConfigError: the file cannot be written.
        """
        with self._sentence("written"):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._open()
            assert self._file is not None
            if self._file.tell() != self._complete:  # a line that was cut
                self._file.truncate(self._complete)
            if not self._complete:
                self._write({"settings": self.settings})
            self._write(cell)
        self.cells[self._key(cell)] = dict(cell)

    def _open(self) -> None:
        self._file = open(self._path, "ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            sentence = f"Another process is writing {self._path}: wait until it has ended."
            raise ConfigError(sentence) from error

    @contextlib.contextmanager
    def _sentence(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"{self._path} cannot be {verb}: {reason}.") from error

    def _write(self, value: Mapping[str, Any]) -> None:
        assert self._file is not None
        line = json.dumps(value).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._complete += len(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
