"""Checkpoints in a store, where nothing can be renamed: one counts while it has a file of success.

It is written in place, that file last; removing it begins with that file. A directory without it may be
one that somebody copies there, so that only what famx has left unfinished is removed.
"""

import json

from famx.base.stores import StorePath
from famx.model_dir.digests import KEY, METADATA, STEP

SUCCESS = "commit_success.txt"  # of orbax


def remove(directory: StorePath) -> None:
    """Remove a checkpoint, whole or not; if this is interrupted, what is left is unfinished."""
    (directory / SUCCESS).unlink(missing_ok=True)
    directory.unlink_all([name for name in directory.names() if name != METADATA])
    (directory / METADATA).unlink(missing_ok=True)


def remove_unfinished(model_dir: StorePath) -> None:
    """Remove what runs have left that were killed while they wrote or removed a checkpoint."""
    found: dict[str, set[str]] = {}
    for name in model_dir.names():
        folder, _, file = name.partition("/")
        if STEP.fullmatch(folder):
            found.setdefault(folder, set()).add(file)
    for folder, files in found.items():
        if SUCCESS not in files and METADATA in files and _is_unfinished(model_dir / folder):
            remove(model_dir / folder)


def _is_unfinished(directory: StorePath) -> bool:
    """Whether a directory without a file of success is one that famx, or orbax, was writing there."""
    try:
        metadata = json.loads((directory / METADATA).read_bytes())
        return not metadata.get("commit_timestamp_nsecs") or KEY in metadata.get("custom_metadata", {})
    except (ValueError, AttributeError, TypeError):
        return False


def move(source: StorePath, target: StorePath) -> None:
    """Copy a checkpoint, object by object through this machine, and then remove it."""
    names = source.names()
    for name in sorted(names, key=lambda name: name == SUCCESS):
        (source / name).copy(target / name, overwrite=True)
    remove(source)
