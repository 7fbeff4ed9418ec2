"""Files and directories that appear complete or not at all.

Data goes to a temporary name next to the final one, is synced to disk, and is then renamed in one step.
A process that fails or is killed leaves what was there before. A disk that is full, or a directory that
cannot be written, is a ConfigError of one sentence.

A path gs://bucket/name is one of Google Cloud Storage (`famx.base.stores`), where an object is never seen
partly written: it needs no temporary name.
"""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from famx.base.errors import ConfigError

if typing.TYPE_CHECKING:
    from famx.base.stores import StorePath

Path = str | os.PathLike[str]
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_stored(path: Path | None) -> bool:
    """Whether a path is one of Google Cloud Storage."""
    return path is not None and os.fspath(path).startswith("gs://")


def as_path(path: Path) -> pathlib.Path:
    """A path with its methods; that of gs://bucket/name is a `famx.base.stores.StorePath`."""
    return typing.cast(pathlib.Path, _stored(path)) if is_stored(path) else pathlib.Path(path)


def _stored(path: Path) -> "StorePath":
    from famx.base.stores import StorePath  # slow to import

    return StorePath(path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, replacing an old one; see `replacing`."""
    if is_stored(path):
        with _sentence(path):
            as_path(path).write_bytes(data)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, replacing an old one; see `replacing`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write `value` as indented JSON, replacing an old file; `options` are those of `json.dumps`."""
    text = json.dumps(value, **{"indent": 2, "ensure_ascii": False, **options})
    # Half of a surrogate pair, as in a file name that is not UTF-8, becomes an escape of JSON.
    write_bytes(path, f"{text}\n".encode(errors="backslashreplace"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[pathlib.Path]:
    """A temporary path to write a file to, which takes the name `path` when the context ends.

    If the context ends by an exception, the temporary file is removed and `path` stays as it was. For an
    object of a store, the temporary file is on this machine.

    Raises:
      ConfigError: the file cannot be written.
    """
    if is_stored(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = pathlib.Path(folder, as_path(path).name)
            yield temporary
            write_bytes(path, temporary.read_bytes())
        return
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _sentence(path, temporary):
            yield temporary
        with _sentence(path):
            _sync(temporary)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: Path, sync: bool = True) -> Iterator[pathlib.Path]:
    """A temporary directory, which takes the name `path` with all its files when the context ends.

    If the context ends by an exception, the temporary directory is removed.

    Args:
      path: a directory that is missing or empty. Its parents are made.
      sync: sync each file to disk, which takes long for very many files.

    Raises:
      ConfigError: the directory cannot be written.
    """
    path = pathlib.Path(path)
    with scratch_directory(path) as temporary:
        yield temporary
        with _sentence(path):
            for file in temporary.rglob("*") if sync else ():
                if file.is_file():
                    _sync(file)
            os.replace(temporary, path)


@contextlib.contextmanager
def scratch_directory(path: Path) -> Iterator[pathlib.Path]:
    """An empty hidden directory next to `path`, which is removed when the context ends.

    What a killed process left in it is removed first.

    Raises:
      ConfigError: the directory cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with _sentence(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        with _sentence(path, temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into_place(files: Mapping[pathlib.Path, Path]) -> None:
    """Sync temporary files to disk, then rename each to its final path; `{temporary: final}`."""
    for temporary, path in files.items():
        with _sentence(pathlib.Path(path)):
            _sync(temporary)
    for temporary, path in files.items():
        with _sentence(pathlib.Path(path)):
            os.replace(temporary, path)


def nearest_existing(path: Path) -> pathlib.Path:
    """The path, absolute and with `~` expanded, or the nearest directory above it that exists."""
    found = pathlib.Path(path).expanduser().absolute()
    while not os.path.exists(found):  # Path.exists raises if a parent directory may not be read
        found = found.parent
    return found


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[pathlib.Path]:
    """A file of this machine with the content of a file: itself, unless it is in a store.

    Raises:
      FileNotFoundError: there is no such file in the store.
    """
    if not is_stored(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, as_path(path).name)
        copy.write_bytes(as_path(path).read_bytes())
        yield copy


def copy_directory(source: Path, target: Path) -> None:
    """Copy all files of a directory into another one, which is made if it is missing."""
    if not is_stored(source) and not is_stored(target):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    source, target = as_path(source), as_path(target)
    for file in source.rglob("*"):
        if file.is_file():
            copy = target / file.relative_to(source).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(copy, file.read_bytes())


def check_answers(directory: Path) -> None:
    """Ask the store that a directory is in, if any, for something.

    Raises:
      StoreError: it does not answer, or refuses; known soon.
    """
    if is_stored(directory):
        _stored(directory).check_access()


def check_writable(directory: Path) -> None:
    """Make a directory if it is missing, and write a file in it.

    Raises:
      OSError: one of the two is refused.
    """
    if is_stored(directory):
        _stored(directory).check_access(write=True)
        return
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".write_test.{os.getpid()}"
    probe.touch()
    probe.unlink()


@contextlib.contextmanager
def removed_if_unused(directory: Path | None) -> Iterator[None]:
    """Context that removes a directory which was made within it and is still empty; None: none."""
    missing = directory is not None and not is_stored(directory) and not os.path.exists(directory)
    try:
        yield
    finally:
        if missing:
            with contextlib.suppress(OSError):  # it is in use, or was never made
                os.rmdir(str(directory))


def _sync(path: pathlib.Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _sentence(path: Path, temporary: pathlib.Path | None = None) -> Iterator[None]:
    """Raise a ConfigError about `path` for an OSError, or only for one of writing to `temporary`."""
    try:
        yield
    except OSError as error:
        ours = str(error.filename or "").startswith(str(temporary or ""))
        if not ours and error.errno not in NO_SPACE:
            raise
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
