"""Where the arrays of a checkpoint lie, if they share files (OCDBT)."""

import dataclasses
import pathlib
import urllib.parse
from collections.abc import Iterator
from typing import Any

from famx.base.files import is_stored

LISTING = "manifest.ocdbt"  # in a directory whose arrays share files, which are in its folders "d"


@dataclasses.dataclass(frozen=True)
class Value:
    """A stored value: metadata of an array or a chunk of it, as it is on the disk.

    Attributes:
      key: its key; it begins with the name of the array.
      name: path of the file that holds it, relative to the directory; empty if `content` holds it.
      start, size: bytes of that file.
      content: the value, if it was read or is so small that it is in the index itself.
    """

    key: bytes
    name: str = ""
    start: int = 0
    size: int = 0
    content: bytes = b""


def stored_arrays(directory: pathlib.Path) -> dict[str, list[Value]]:
    """The values of each array in the order of their keys, as the index of a directory lists them.

    The index has checksums of its own, which are verified.

    Raises:
      ValueError, OSError: the index cannot be read.
    """
    import tensorstore

    base = tensorstore.KvStore.open(_spec(directory)).result()

    def below(location: str, prefix: bytes) -> Iterator[Value]:
        for entry in tensorstore.ocdbt.dump(base, location).result()["entries"]:
            if "location" in entry:
                yield from below(entry["location"], prefix + entry["subtree_common_prefix"])
            elif "inline_value" in entry:
                yield Value(prefix + entry["key"], content=entry["inline_value"])
            else:
                yield Value(prefix + entry["key"], *_place(entry["indirect_value"]))

    arrays: dict[str, list[Value]] = {}
    root = tensorstore.ocdbt.dump(base).result()["versions"][-1]["root"]
    values = below(root["location"], b"") if "location" in root else ()  # without: it is empty
    for value in sorted(values, key=lambda value: value.key):
        arrays.setdefault(value.key.split(b"/")[0].decode(), []).append(value)
    return arrays


def stored_values(directory: pathlib.Path) -> dict[str, Iterator[Value]]:
    """The values that `stored_arrays` lists, with their contents, each read when its turn comes.

    For each save of a run: tensorstore (0.1.86) tells places as JSON values, whose memory it never frees.

    Raises:
      ValueError, OSError: the index cannot be read.
    """
    import tensorstore

    spec = {"driver": "ocdbt", "base": _spec(directory)}
    store = tensorstore.KvStore.open(spec).result()

    def read(keys: list[bytes]) -> Iterator[Value]:
        return (Value(key, content=store.read(key).result().value) for key in keys)

    arrays: dict[str, list[bytes]] = {}
    for key in sorted(store.list().result()):
        arrays.setdefault(key.split(b"/")[0].decode(), []).append(key)
    return {name: read(keys) for name, keys in arrays.items()}


def _spec(directory: pathlib.Path) -> dict[str, Any]:
    """tensorstore's name of a directory."""
    return directory.spec if is_stored(directory) else {"driver": "file", "path": f"{directory}/"}


def _place(location: str) -> tuple[str, int, int]:
    """File, start and size of `value:<directory>:<file>:<start>:<size>`."""
    _, directory, name, start, size = location.split(":")
    return urllib.parse.unquote(directory + name), int(start), int(size)
