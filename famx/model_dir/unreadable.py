"""Errors of reading a checkpoint as sentences, also of one without digests."""

import contextlib
import json
import pathlib
from collections.abc import Iterator

from famx.base.errors import ConfigError
from famx.base.files import is_stored
from famx.base.store_errors import store_error
from famx.model_dir import digests

_JSON_FILES = ("_METADATA", "_sharding", digests.METADATA, "metadata", ".zarray", "zarr.json")


@contextlib.contextmanager
def reading_errors(directory: pathlib.Path) -> Iterator[None]:
    """A context in which a failure to read a checkpoint without digests is a DamagedCheckpoint.

    Of one with digests it is known whether it is damaged, so that errors are passed on.
    """
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        if is_stored(directory) and (found := store_error(error, directory)):
            raise found from error
        if (directory / digests.NAME).exists():
            raise
        raise digests.damaged(directory, *_reason(directory, error)) from error


def _reason(directory: pathlib.Path, error: Exception) -> tuple[str, str]:
    """`(file, what is wrong)`: the file that cannot be read by itself, or that the error names."""
    for path in sorted(directory.rglob("*")):
        is_json = path.parent.name == "array_metadatas" or path.name in _JSON_FILES
        if path.is_file() and is_json:
            try:
                json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError):
                return path.relative_to(directory).as_posix(), "cannot be read"
    text = str(error)
    named = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    found = max((name for name in named if name in text), key=len, default=None)
    for name in ("state/_METADATA", digests.METADATA):
        if found is None and not (directory / name).exists():
            return name, "is missing"
    lines = text.strip().splitlines()
    reason = f"cannot be read ({(lines or [type(error).__name__])[0][:200].rstrip('. ')})"
    return found or "its content", reason

