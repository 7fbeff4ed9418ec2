"""JSON lines: read one at a time, and written so that a run that was killed goes on where it was."""

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
    """The lines of a JSON-lines file (UTF-8) from line `start` (of 0, 1, ...) on.

    Only one line at a time is in memory. Empty lines may stand at the end of the file alone.

    Yields:
      `(line, object)`, `line` being 0 for the first of the file.

    Raises:
      ValueError: a line is empty, is broken JSON or holds no JSON object.
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
        found = json.loads(data.decode("utf-8" if line else "utf-8-sig"))
        if b"\\u" in data:
            _encode(found)  # half of a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place(path, line)} is broken JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(
            f'{place(path, line)} holds no JSON object: write it as {{"field": value, ...}} on one line.'
        )
    return found


def _encode(value: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(value, ensure_ascii=False)}\n".encode()


class ResumableLines:
    """Writes a JSON-lines file that appears only when it is complete.

    Until then its lines stand in `<path>.partial`, on disk whenever `write` returns. What decides
    their content stands in `<path>.settings.json`, which stays; a later run with the same settings
    goes on after the last complete line, and one with others is refused before it touches anything.

    Args:
      path: the file; its folder must exist.

    Raises:
      ConfigError: the folder does not exist or cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._settings = self.path.with_name(f"{self.path.name}.settings.json")
        self._file = None
        folder = self.path.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK) or self.path.is_dir():
            raise ConfigError(
                f"{path} cannot be written: {folder} must be a folder that exists and is writable, and"
                " the name must be free for a file."
            )

    def finished(self, settings: Mapping[str, Any]) -> bool:
        """Whether the file is complete, after a comparison of `settings` with those noted.

        Only the names in `settings` are compared. Nothing is written.

        Raises:
          ConfigError: what lies there was not written by this class, or with other settings.
        """
        found = next((file for file in (self.path, self._partial) if file.exists()), None)
        if found is None:
            return False
        way_out = f"choose another file, or remove {found} to begin anew."
        try:
            there = json.loads(self._settings.read_bytes())["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{found} exists, and not by a run like this one: {way_out}") from error
        there = {name: there.get(name) for name in settings}
        differing = differing_fields(there, json.loads(json.dumps(settings)))
        if differing:
            raise ConfigError(
                f"{found} was made with other settings, differing in {differing}: {way_out}"
            )
        return found == self.path

    def open(self, settings: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> int:
        """Begins to write, or goes on.

        Args:
          settings: JSON values that decide the content; see `finished`, which must be False.
          notes: more to be noted beside them, which may differ from run to run.

        Returns:
          how many complete lines there are; a line cut off by a kill is removed.

        Raises:
          ConfigError: see `finished`; or another run is writing.
        """
        self.finished(settings)
        if not self._partial.exists():
            write_json(self._settings, {**(notes or {}), "settings": settings})
        self._file = self._partial.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ConfigError(f"Another run is writing {self._partial}: wait for its end.") from error
        self._file.seek(0)
        count = end = 0
        for line in self._file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        self._file.truncate(end)
        return count

    def write(self, objects: Iterable[Mapping[str, Any]]) -> None:
        """Appends lines; they are on disk on return.

        Raises:
          ConfigError: the disk is full, say.
        """
        try:
            self._file.write(b"".join(map(_encode, objects)))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ConfigError(
                f"{self._partial} cannot be written: {error.strerror}. Make room; the same command goes"
                " on from the last complete line."
            ) from error

    def finish(self) -> None:
        """Gives the complete file its name."""
        os.replace(self._partial, self.path)
        self.close()

    def close(self) -> None:
        """Closes the file; safe to call twice."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a full disk, which `write` has reported
                self._file.close()
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
