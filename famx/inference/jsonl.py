"""Reading JSON lines one at a time, and writing them so that an interrupted run can resume."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from famx.base.errors import ConfigError
from famx.base.files import write_json
from famx.model_dir.identity import differing_fields


def read_objects(path: str | os.PathLike, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a UTF-8 JSON-lines file, one line in memory at a time.

    Empty lines are allowed only at the end of the file. Lines before `start` (from 0) are not parsed.

    Yields:
      `(line, object)`, where `line` is the line number from 0.

    Raises:
      ValueError: a line is empty, is not valid JSON or is not a JSON object.
    """
    empty = None
    with open(path, "rb") as file:
        for line, data in enumerate(file):
            if data.isspace():
                empty = line if empty is None else empty
                continue
            if empty is not None:
                raise ValueError(f"{place(path, empty)} is empty: remove it.")
            if line >= start:
                yield line, _parse(data, path, line)


def place(path: str | os.PathLike, line: int) -> str:
    """'Line 1 of in.jsonl' for line 0."""
    return f"Line {line + 1} of {path}"


def _parse(data: bytes, path: str | os.PathLike, line: int) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8" if line else "utf-8-sig"))
        if b"\\u" in data:
            _encode(value)  # raises for an unpaired surrogate, which is valid JSON but cannot be encoded
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place(path, line)} is broken JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(
            f'{place(path, line)} is not a JSON object: write {{"field": value, ...}} on one line.'
        )
    return value


def _encode(value: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(value, ensure_ascii=False)}\n".encode()


class ResumableLines:
    """Writer of a JSON-lines file that appears under its name only when it is complete.

    Until then the lines are in `<path>.partial`, and they are on disk when `write` returns. The settings
    that determine the content are in `<path>.settings.json`: a later run with the same settings resumes
    after the last complete line, and a run with other settings is refused before it changes anything.

    Args:
      path: the file; its directory must exist.

    Raises:
      ConfigError: the directory does not exist or is not writable, or `path` is a directory.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._settings = self.path.with_name(f"{self.path.name}.settings.json")
        self._file = None
        folder = self.path.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK) or self.path.is_dir():
            raise ConfigError(
                f"{path} cannot be written: {folder} must be an existing, writable directory, and"
                f" {self.path.name} must not be a directory in it."
            )

    def finished(self, settings: Mapping[str, Any]) -> bool:
        """Whether the file is complete. Writes nothing.

        Args:
          settings: compared with those of the run that wrote the file; other settings of that run are
            ignored, so that a run can check before it knows them all.

        Raises:
          ConfigError: the file or its partial version exists, but was made with other settings or by
            something else.
        """
        existing = next((file for file in (self.path, self._partial) if file.exists()), None)
        if existing is None:
            return False
        advice = f"choose another file, or remove {existing} to start over."
        try:
            saved = json.loads(self._settings.read_bytes())["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{existing} exists, but not from a run like this one: {advice}") from error
        saved = {name: saved.get(name) for name in settings}
        differing = differing_fields(saved, settings)
        if differing:
            raise ConfigError(
                f"{existing} was made with other settings, differing in {differing}: {advice}"
            )
        return existing == self.path

    def open(self, settings: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> int:
        """Start writing, or resume.

        Args:
          settings: JSON values that determine the content; `finished(settings)` must be False.
          notes: further JSON values for the settings file, which may differ when the run is resumed.

        Returns:
          Number of complete lines; an incomplete last line is removed.

        Raises:
          ConfigError: see `finished`; or another run is writing the file.
        """
        self.finished(settings)
        if not self._partial.exists():
            write_json(self._settings, {**(notes or {}), "settings": settings})
        self._file = self._partial.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ConfigError(f"Another run is writing {self._partial}: wait until it ends.") from error
        self._file.seek(0)
        count = end = 0
        for line in self._file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        self._file.truncate(end)
        return count

    def write(self, objects: Iterable[Mapping[str, Any]]) -> None:
        """Append lines; they are on disk on return.

        Raises:
          ConfigError: they cannot be written, for example because the disk is full.
        """
        try:
            self._file.write(b"".join(map(_encode, objects)))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ConfigError(
                f"{self._partial} cannot be written: {error.strerror}. Free some space; the same command"
                " then resumes after the last complete line."
            ) from error

    def finish(self) -> None:
        """Close the complete file and give it its final name."""
        os.replace(self._partial, self.path)
        self.close()

    def close(self) -> None:
        """Close the file; may be called more than once."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, which `write` has reported
                self._file.close()
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
