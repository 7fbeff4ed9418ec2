"""Files to read: those of this machine, and objects of a store such as gs://bucket/texts/a.txt.

Objects are read through fsspec, which is installed with orbax; Google's store needs `famx[gcs]`, other
stores the package that fsspec names.
"""

import contextlib
import functools
import glob
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from famx.base.errors import BadData, ConfigError

Stamp = tuple[int, Any]  # the size in bytes, and what changes with the content


def is_remote(path: str) -> bool:
    """Whether a path is a URL of a store."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def is_file(path: str) -> bool:
    """Whether a path is that of a file or object."""
    if not is_remote(path):
        return os.path.isfile(path)
    with _errors(path):
        return _system(path).isfile(path)


def is_directory(path: str) -> bool:
    """Whether a path is that of a directory, or begins names of objects."""
    if not is_remote(path):
        return os.path.isdir(path)
    with _errors(path):
        return _system(path).isdir(path)


def matching(pattern: str) -> list[str]:
    """Paths that match a glob pattern, in which `**` is folders of any depth."""
    if not is_remote(pattern):
        return glob.glob(pattern, recursive=True)
    with _errors(pattern):
        protocol = pattern.partition("://")[0]
        return [f"{protocol}://{path.lstrip('/')}" for path in _system(pattern).glob(pattern)]


def absolute(path: str) -> str:
    """A path that does not depend on the current directory."""
    return path if is_remote(path) else os.path.abspath(path)


def stamp(path: str) -> Stamp:
    """What tells whether a file is the same as before.

    Raises:
      OSError: it is not there.
    """
    if not is_remote(path):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    with _errors(path):
        system = _system(path)
        system.invalidate_cache(posixpath.dirname(path))
        return int(system.info(path)["size"]), system.ukey(path)


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A file, open for reading from its beginning as long as the context lasts."""
    if not is_remote(path):
        with open(path, "rb") as file:
            yield file
    else:
        with _errors(path), _system(path).open(path, "rb") as file:
            yield file


def read(path: str, start: int, stop: int) -> bytes:
    """The bytes `start` to `stop` of a file; fewer, if it has ended."""
    if not is_remote(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)
    with _errors(path):
        return _system(path).cat_file(path, start=start, end=stop)


def relative_names(paths: Sequence[str]) -> list[str]:
    """The paths, relative to the folder that all have in common, with `/` between their parts."""
    whole = ["/" + path.partition("://")[2] if is_remote(path) else path for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [os.path.relpath(path, root).replace(os.sep, "/") for path in whole]


@functools.cache
def _file_system(protocol: str) -> Any:
    try:
        import fsspec

        return fsspec.filesystem(protocol)
    except ImportError as error:
        package = "famx[gcs]" if protocol in ("gs", "gcs") else "fsspec"
        raise ConfigError(
            f"{protocol}:// cannot be read: {str(error).rstrip('.')}. Run pip install '{package}'."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{protocol}:// cannot be read: fsspec knows no such store.") from error


def _system(path: str) -> Any:
    return _file_system(path.partition("://")[0])


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    """A context in which what a store raises, of whatever type, is BadData; a missing object stays so."""
    try:
        yield
    except (ConfigError, FileNotFoundError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadData(f"{path} cannot be read: {reason}") from error
