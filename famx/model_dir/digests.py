"""Digests of the files of a checkpoint: written with it, and compared with the files when it is loaded.

`checkpoint_<step>/digests.json` names every other file of the checkpoint with its size and a digest of
each 64 MiB of it. Where many arrays share files (OCDBT), it also has a digest of each array as it is
stored: a program that loads only the parameters then reads only theirs. The file ends with the digest of
its own content, and `_CHECKPOINT_METADATA` says that it exists.

Digests are XXH3 of 128 bits. It reads memory about nine times as fast as SHA-256, and finds damage as
surely; neither finds forgery, since who can replace a file can replace its digest.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from famx.base.errors import ConfigError
from famx.base.files import is_stored, write_bytes
from famx.base.store_errors import StoreError, store_error
from famx.model_dir.shared_files import LISTING, Value, stored_arrays, stored_values

NAME = "digests.json"
METADATA = "_CHECKPOINT_METADATA"  # of orbax
KEY = "digests"  # of orbax' custom metadata, with the name of the file of digests
STEP = re.compile(r"checkpoint_(\d+)")  # name of the directory of a checkpoint
_PIECE = 1 << 26
_BUFFER = 1 << 20
_STORED_PART = 1 << 23  # bytes of an object of a store that are read at a time
_SMALL = 1 << 20  # files of up to this many bytes are compared before anything is read from them
_ADVICE = ". Copy the checkpoint again"
# Files that an operating system leaves in any directory.
_FOREIGN = (".DS_Store", "._", ".nfs", "Thumbs.db", "desktop.ini")


class DamagedCheckpoint(ConfigError):
    """A checkpoint is not as it was written, or cannot be read."""

    @property
    def finding(self) -> str:
        """The sentence without what to do."""
        return f"{str(self).split(_ADVICE)[0]}."


@dataclasses.dataclass(frozen=True)
class Digests:
    """Content of `digests.json`.

    Attributes:
      files: `{path: (size in bytes, digest of each 64 MiB)}`, relative to the checkpoint.
      arrays: `{folder: {array: digest}}` of the folders whose arrays share files.
    """

    files: Mapping[str, tuple[int, Sequence[str]]]
    arrays: Mapping[str, Mapping[str, str]]


# ---------------------------------------------------------------- writing


def write_digests(directory: pathlib.Path) -> None:
    """Write `digests.json` of a checkpoint that is complete but for this file.

    Raises:
      ConfigError: the file cannot be written.
      OSError: a file cannot be read.
    """
    with ThreadPoolExecutor(_threads()) as pool:
        files = (_stored_files if is_stored(directory) else _local_files)(directory, pool)
        arrays = {}
        for folder in _folders_of_arrays(files):
            stored = stored_values(directory / folder)
            values = pool.map(functools.partial(_array, directory / folder), stored.values())
            arrays[folder] = dict(zip(stored, values, strict=True))
    write_bytes(directory / NAME, _rendered({"format": 1, "files": files, "arrays": arrays}))


def _local_files(directory: pathlib.Path, pool: ThreadPoolExecutor) -> dict[str, dict[str, Any]]:
    """`{name: size and digests}` of the files of a checkpoint."""
    sizes = _sizes(directory)
    units = [(name, start) for name, size in sizes.items() for start in range(0, max(size, 1), _PIECE)]
    pieces = pool.map(lambda unit: _piece(directory / unit[0], unit[1])[0], units)
    files: dict[str, dict[str, Any]] = {
        name: {"bytes": size, "xxh3_128": []} for name, size in sizes.items()
    }
    for (name, _), digest in zip(units, pieces, strict=True):
        files[name]["xxh3_128"].append(digest)
    return files


def _stored_files(directory: pathlib.Path, pool: ThreadPoolExecutor) -> dict[str, dict[str, Any]]:
    """As `_local_files`, in a store, which does not tell the size of an object before it is read."""

    def read(name: str) -> dict[str, Any]:
        size, digests = 0, []
        while not digests or size == len(digests) * _PIECE:
            digest, count = _piece(directory / name, len(digests) * _PIECE)
            if count or not digests:
                digests.append(digest)
            size += count
            if not count:
                break
        return {"bytes": size, "xxh3_128": digests}

    names = [name for name in directory.names() if name != NAME]
    return dict(zip(names, pool.map(read, names), strict=True))


def _rendered(content: Mapping[str, Any]) -> bytes:
    digest = xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "xxh3_128": digest}, indent=1, sort_keys=True).encode() + b"\n"


# ---------------------------------------------------------------- reading


def read_digests(directory: pathlib.Path) -> Digests | None:
    """The digests of a checkpoint; None for one that another program or an older famx wrote.

    Raises:
      DamagedCheckpoint: `digests.json` is missing though it was written, or is not as it was written.
    """
    path = directory / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if not directory.is_dir():
            raise damaged(directory, "the directory", "is missing") from None
        if _expected(directory):
            raise damaged(directory, NAME, "is missing") from None
        return None
    except StoreError:
        raise
    except OSError as error:
        raise damaged(directory, NAME, f"cannot be read: {error.strerror}") from error
    try:
        content = json.loads(data)
        del content["xxh3_128"]
        if _rendered(content) != data:
            raise ValueError("another content")
        files = {name: (file["bytes"], file["xxh3_128"]) for name, file in content["files"].items()}
        return Digests(files, content["arrays"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(directory, NAME, "is not what was written") from error


def _expected(directory: pathlib.Path) -> bool:
    try:
        return KEY in json.loads((directory / METADATA).read_bytes())["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def damaged(directory: pathlib.Path, name: str, how: str) -> DamagedCheckpoint:
    """The error for a file of a checkpoint; `how` continues the sentence."""
    return DamagedCheckpoint(
        f"{directory} is damaged: {name} {how}{_ADVICE}, or use another one;"
        f" `famx verify {directory.parent}` lists those that are whole."
    )


@contextlib.contextmanager
def verified(
    directory: pathlib.Path, tops: Collection[str] | None = None, share: tuple[int, int] = (0, 1)
) -> Iterator[bool]:
    """A context that compares a checkpoint with its digests while it is read; its value: it has any.

    Nothing that was read may be used before the context ends. Sizes and small files, which say how to
    read the others, are compared before it begins, and large files in threads beside it. If they differ,
    that is the error that leaves the context, whatever reading them raised.

    Args:
      directory: the checkpoint.
      tops: names at the top of the tree; large files of other arrays are not compared. None: all are.
      share: `(i, n)` compares the i-th of n parts of the large files.

    Raises:
      DamagedCheckpoint: a file is missing, not as it was written, or was added.
    """
    digests = read_digests(directory)
    if digests is None:
        if directory.is_dir() and not any(directory.iterdir()):
            raise damaged(directory, "its content", "is missing")
        yield False
        return
    _compare_small(directory, digests)
    large = _large(directory, digests, tops)
    index, count = share
    stop = threading.Event()
    compare = lambda unit: None if stop.is_set() else unit[1]()
    pool = ThreadPoolExecutor(_threads())
    try:
        results = pool.map(compare, sorted(large, key=lambda unit: -unit[0])[index::count])
        try:
            yield True
        except Exception as error:
            found = next(filter(None, results), None)
            if found is None and tops is not None:  # what was read may lie in files of other arrays, too
                everything = (compare() for _, compare in _large(directory, digests, None))
                found = next(filter(None, everything), None)
            if found is not None:
                raise _located(directory, digests, found) from error
            raise
        found = next(filter(None, results), None)
        if found is not None:
            raise _located(directory, digests, found)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _compare_small(directory: pathlib.Path, digests: Digests) -> None:
    if is_stored(directory):
        _compare_small_objects(directory, digests)
        return
    sizes = _sizes(directory)
    for name, (size, wanted) in sorted(digests.files.items(), key=lambda item: item[1][0]):
        if name not in sizes:
            raise damaged(directory, name, "is missing")
        if sizes[name] != size:
            raise damaged(directory, name, f"has {sizes[name]} bytes, and had {size}")
        if size <= _SMALL and (how := _differs(directory / name, 0, wanted[0])):
            raise damaged(directory, name, how)
    _compare_names(directory, digests, sizes)


def _compare_small_objects(directory: pathlib.Path, digests: Digests) -> None:
    """As `_compare_small`, in a store: sizes are compared with the content, and many objects at once."""

    def compare(item: tuple[str, tuple[int, Sequence[str]]]) -> str | None:
        name, (size, wanted) = item
        if name not in names:
            return "is missing"
        if size <= _SMALL:
            return _differs(directory / name, 0, wanted[0])
        # That its last piece is longer is seen when that is read.
        longer = size % _PIECE == 0 and _piece(directory / name, size)[1]
        return "is not what was written" if longer else None

    names = frozenset(directory.names()) - {NAME}
    items = sorted(digests.files.items(), key=lambda item: item[1][0])
    with ThreadPoolExecutor(_threads()) as pool:
        for (name, _), how in zip(items, pool.map(compare, items), strict=True):
            if how:
                raise damaged(directory, name, how)
    _compare_names(directory, digests, names)


def _compare_names(directory: pathlib.Path, digests: Digests, names: Collection[str]) -> None:
    """Raises DamagedCheckpoint if a file was added to a folder of the checkpoint."""
    for name in sorted(set(names) - digests.files.keys()):
        if "/" in name and not name.rsplit("/", 1)[-1].startswith(_FOREIGN):
            raise damaged(directory, name, "was added to it")


def _large(
    directory: pathlib.Path, digests: Digests, tops: Collection[str] | None
) -> list[tuple[int, Callable[[], tuple[str, str] | None]]]:
    """`(bytes, compare)` of parts of large files; `compare` returns None, or a name and what is wrong."""

    def compare(name: str, start: int, wanted: str) -> tuple[str, str] | None:
        how = _differs(directory / name, start, wanted)
        return how and (name, how)

    units = []
    for name, (size, pieces) in digests.files.items():
        if size > _SMALL and (tops is None or _needed(name, digests, tops)):
            for i, wanted in enumerate(pieces):
                part = min(_PIECE, size - i * _PIECE)
                units.append((part, functools.partial(compare, name, i * _PIECE, wanted)))
    for folder, arrays in digests.arrays.items() if tops else ():
        try:
            stored = stored_arrays(directory / folder)
        except (ValueError, OSError) as error:
            if found := store_error(error, directory):
                raise found from error
            raise damaged(directory, f"{folder}/{LISTING}", "cannot be read") from error
        for array, wanted in arrays.items():
            if array.split(".")[0] in tops:
                values = stored.get(array, [])
                check = functools.partial(_compare_array, directory, folder, array, values, wanted)
                units.append((sum(value.size for value in values), check))
    return units


def _needed(name: str, digests: Digests, tops: Collection[str]) -> bool:
    """Whether a file is read with arrays below `tops`, and cannot be compared by them."""
    folder, *rest = name.split("/")
    if folder in digests.arrays:
        return name.split("/")[-2] != "d"  # holds parts of several arrays
    return len(rest) < 2 or "." not in rest[0] or rest[0].split(".")[0] in tops


def _compare_array(
    directory: pathlib.Path, folder: str, array: str, values: Sequence[Value], wanted: str
) -> tuple[str, str] | None:
    try:
        same = _array(directory / folder, values) == wanted
    except StoreError:
        raise
    except OSError:
        same = False
    return None if same else (f"{folder}: {array}", "is not what was written")


def _located(directory: pathlib.Path, digests: Digests, found: tuple[str, str]) -> DamagedCheckpoint:
    """The error, with the file in which an array is damaged."""
    if found[0] not in digests.files:
        for _, compare in _large(directory, digests, None):
            found = compare() or found
            if found[0] in digests.files:
                break
    return damaged(directory, *found)


# ---------------------------------------------------------------- files


def _sizes(directory: pathlib.Path) -> dict[str, int]:
    """Sizes of the files of a checkpoint by relative path, in order, without `digests.json`."""
    sizes = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = pathlib.Path(folder, name)
            with contextlib.suppress(FileNotFoundError):
                sizes[path.relative_to(directory).as_posix()] = path.stat().st_size
    sizes.pop(NAME, None)
    return dict(sorted(sizes.items()))


def _piece(path: pathlib.Path, start: int) -> tuple[str, int]:
    """Digest of at most `_PIECE` bytes of a file, and their number."""
    digest = xxhash.xxh3_128()
    count = _add(digest, path, start, _PIECE)
    return digest.hexdigest(), count


def _add(digest, path: pathlib.Path, start: int, size: int) -> int:
    """Add at most `size` bytes of a file to a digest; the number that there were."""
    count = 0
    if is_stored(path):
        while count < size:
            wanted = min(_STORED_PART, size - count)
            part = path.read_part(start + count, wanted)
            digest.update(part)
            count += len(part)
            if len(part) < wanted:
                break
        return count
    buffer = memoryview(bytearray(min(size, _BUFFER)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count < size and (read := file.readinto(buffer[: size - count])):
            digest.update(buffer[:read])
            count += read
    return count


def _differs(path: pathlib.Path, start: int, wanted: str) -> str | None:
    """What is wrong with a part of a file, or None."""
    try:
        return None if _piece(path, start)[0] == wanted else "is not what was written"
    except StoreError:
        raise
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


# ---------------------------------------------------------------- arrays that share files


def _folders_of_arrays(names: Collection[str]) -> list[str]:
    """The folders whose arrays share files, among the items of a checkpoint."""
    paths = map(pathlib.PurePosixPath, names)
    return [path.parts[0] for path in paths if path.parts[1:] == (LISTING,)]


def _array(directory: pathlib.Path, values: Iterable[Value]) -> str:
    """Digest of the stored values of an array, each after its key and before its size."""
    digest = xxhash.xxh3_128()
    for value in values:
        digest.update(value.key + b"\0")
        digest.update(value.content)
        size = len(value.content)
        if value.name:
            size = _add(digest, directory / value.name, value.start, value.size)
        digest.update(b"%d" % size)
    return digest.hexdigest()
