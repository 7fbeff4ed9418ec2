"""Identity of the data that a run reads: number of documents, and names, sizes and samples of the files.

Folders above the ones that the files have in common do not count, so that data may be moved as a whole.
"""

import hashlib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from famx.data.storage import places
from famx.data.tasks.kinds import Kind, kind_of

_MOST_FILES = 64  # files that are listed; of more, this many are sampled
_PIECES, _PIECE = 16, 65_536  # number and bytes of the pieces of a file that are hashed
_MOST_OBJECTS = 20_000  # objects of a task that are searched for files


def identity(task: Any) -> dict[str, Any]:
    """The identity of an opened task's data as JSON values; {} for data of code, and for SeqIO's.

    Raises:
      OSError: a file cannot be read.
    """
    kind = kind_of(task)
    described: dict[str, Any] = {}
    if kind is Kind.SEQIO:
        return described
    if kind in (Kind.DOCUMENTS, Kind.SCORED):
        described["documents"] = len(task)
    paths = files_of(task)
    if not paths:
        return described
    names = places.relative_names(paths)
    sizes = [places.stamp(path)[0] for path in paths]
    described["bytes"] = sum(sizes)
    if len(paths) > _MOST_FILES:
        listing = "\n".join(f"{name} {size}" for name, size in zip(names, sizes))
        described["number_of_files"] = len(paths)
        described["names_and_sizes"] = hashlib.sha256(listing.encode(errors="replace")).hexdigest()[:16]
        chosen = np.linspace(0, len(paths) - 1, _MOST_FILES).astype(int)
    else:
        chosen = range(len(paths))
    described["files"] = {
        names[i]: f"{sizes[i]} bytes, {sample_digest(paths[i], sizes[i])}" for i in chosen
    }
    return described


def sample_digest(path: str, size: int) -> str:
    """16 hexadecimal digits of a hash of up to 1 MiB of a file: all of it, or evenly spaced pieces.

    Raises:
      OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    if size <= _PIECES * _PIECE:
        digest.update(places.read(path, 0, size))
    else:
        for start in np.linspace(0, size - _PIECE, _PIECES).astype(int):
            digest.update(places.read(path, int(start), int(start) + _PIECE))
    return digest.hexdigest()[:16]


def files_of(task: Any) -> list[str]:
    """Sorted paths of the files that an opened task reads.

    They are found in the attributes `paths` and `path` of the records and documents that the task is made
    of. A task that opens its records late has the property `sources`, which opens them.
    """
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [task]
    for _ in range(_MOST_OBJECTS):
        if not waiting:
            break
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            found.update(_paths(value))
            waiting += _parts(value)
    return sorted(found)


def _paths(value: Any) -> Iterator[str]:
    """The files that an object itself names."""
    if isinstance(value, type | types.ModuleType):
        return
    for path in (getattr(value, "path", None), *_listed(getattr(value, "paths", ()))):
        if isinstance(path, str) and places.is_file(path):
            yield places.absolute(path)


def _listed(paths: Any) -> Sequence[Any]:
    return paths if isinstance(paths, list | tuple) else ()


def _parts(value: Any) -> Iterable[Any]:
    """The objects that an object is made of and that may read files."""
    if isinstance(value, type | types.ModuleType) or hasattr(value, "fingerprint"):
        return []
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        parts = [*vars(value).values()] if hasattr(value, "__dict__") else []
        parts.append(getattr(value, "sources", None))
        parts += [_content(cell) for cell in getattr(value, "__closure__", None) or ()]
    plain = str | bytes | int | float | bool | np.ndarray | np.generic | None
    return [part for part in parts if not isinstance(part, plain)]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
