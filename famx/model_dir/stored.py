"""Checkpoints in a store, where nothing can be renamed: one counts while it has a file of success.

It is written in place, that file last, and removed beginning with that file. Meanwhile a mark next to it,
`checkpoint_<step>.unfinished`, tells it from a directory that somebody copies there, which is left alone.
"""

from famx.base.stores import StorePath
from famx.model_dir.digests import STEP

SUCCESS = "commit_success.txt"  # of orbax
_MARK = ".unfinished"


def begin(directory: StorePath) -> None:
    """Mark a checkpoint as unfinished, before anything of it is written or removed."""
    _mark(directory).write_bytes(b"")


def end(directory: StorePath) -> None:
    """Remove the mark, once the checkpoint is complete, or gone."""
    _mark(directory).unlink(missing_ok=True)


def _mark(directory: StorePath) -> StorePath:
    return directory.with_name(f"{directory.name}{_MARK}")


def remove(directory: StorePath) -> None:
    """Remove a checkpoint, whole or not; if this is interrupted, what is left is unfinished."""
    begin(directory)
    (directory / SUCCESS).unlink(missing_ok=True)
    directory.unlink_all(directory.names())
    end(directory)


def remove_unfinished(model_dir: StorePath) -> None:
    """Remove what runs have left that were killed while they wrote or removed a checkpoint."""
    names = frozenset(model_dir.names())
    for name in names:
        folder = name.removesuffix(_MARK)
        if folder != name and STEP.fullmatch(folder):
            (end if f"{folder}/{SUCCESS}" in names else remove)(model_dir / folder)


def move(source: StorePath, target: StorePath) -> None:
    """Copy a checkpoint, object by object through this machine, and then remove it."""
    names = source.names()
    for name in sorted(names, key=lambda name: name == SUCCESS):
        (source / name).copy(target / name, overwrite=True)
    remove(source)
