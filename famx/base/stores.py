"""Paths in Google Cloud Storage, gs://bucket/..., with the methods of pathlib.

They are read and written with tensorstore, which orbax also uses for the arrays of a checkpoint, so that
there is one client, with one kind of credentials. An object appears as a whole or not at all, and every
read sees the newest content. A directory is what names of objects have in common: it is there with its
first object, and ends with the last. An object cannot be appended to or moved; what moves is copied
through this machine.

This file is imported only where a gs:// path occurs, since tensorstore is slow to import. It makes
`etils.epath.Path`, and with it orbax, take `StorePath` for gs://: their own class needs further packages,
and remembers listings of directories that others may have changed since.
"""

import contextlib
import errno
import fnmatch
import functools
import io
import os
import pathlib
import re
import sys
import uuid
from collections.abc import Collection, Iterator
from typing import Any

import tensorstore
from etils import epath
from etils.epath import stat_utils

from famx.base.store_errors import StoreError, http_status, store_error

_ENDPOINT = "TENSORSTORE_GCS_HTTP_URL"  # tensorstore's name of another server than Google's, as in tests
_FEW_RETRIES = {"max_retries": 3, "initial_delay": "500ms", "max_delay": "2s"}


def _parts(segments: tuple[Any, ...]) -> tuple[str, ...]:
    """gs://bucket/x as /gs:/bucket/x, which pathlib takes apart like any absolute path."""
    text = "/".join(os.fspath(segment) for segment in segments)
    return (re.sub(r"^(gs:/|/+gs:)/", "/gs:/", text),)


@epath.register_path_cls("gs://")
class StorePath(epath.Path):
    """A path gs://bucket/name; see the module.

    Methods raise StoreError for a store that does not answer, and FileNotFoundError for a missing object.
    """

    if sys.version_info < (3, 12):

        def __new__(cls, *segments):
            return super().__new__(cls, *_parts(segments))

    else:

        def __init__(self, *segments):
            super().__init__(*_parts(segments))

    def __str__(self) -> str:
        if self.parts[:2] == ("/", "gs:"):
            return "gs://" + "/".join(self.parts[2:])
        return "/".join(self.parts)  # relative

    def __fspath__(self) -> str:
        return str(self)

    def as_uri(self) -> str:
        """The path as text."""
        return str(self)

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        return self.parts[2] if len(self.parts) > 2 else ""

    @property
    def key(self) -> str:
        """Name of the object in the bucket."""
        return "/".join(self.parts[3:])

    @property
    def spec(self) -> dict[str, str]:
        """tensorstore's description of the directory, for a driver that stores in it."""
        return {"driver": "gcs", "bucket": self.bucket, "path": f"{self.key}/"}

    def relative_to(self, other, *rest, **options):
        """The path without `other`, as a relative one."""
        return super().relative_to(StorePath(other, *rest), **options)

    def expanduser(self):
        """The path itself."""
        return self

    def absolute(self):
        """The path itself."""
        return self

    def resolve(self, strict: bool = False):
        """The path itself."""
        return self

    # -------------------------------------------------------------- what is there

    def exists(self) -> bool:
        """Whether there is an object, or one below it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is an object."""
        return bool(self.key) and self._read(slice(0, 1))[0] is not None

    def is_dir(self) -> bool:
        """Whether there are objects below it; true of a bucket."""
        return not self.key or bool(self.names())

    def names(self) -> list[str]:
        """The names of all objects below the directory, relative to it, in order."""
        prefix = f"{self.key}/".encode() if self.key else b""
        below = tensorstore.KvStore.KeyRange(prefix, _after(prefix))
        with _errors(self):
            found = self._store().list(below, strip_prefix_length=len(prefix)).result()
            if not found:  # of a listing that is refused tensorstore makes an empty one
                self._store().read(prefix + b"-").result()
        return sorted(name.decode() for name in found if name and not name.endswith(b"/"))

    def iterdir(self):
        """What is in the directory, in order."""
        for name in dict.fromkeys(name.split("/")[0] for name in self.names()):
            yield self / name

    def glob(self, pattern: str):
        """What is below the directory and matches a pattern, without `**`."""
        depth = pattern.count("/") + 1
        names = dict.fromkeys("/".join(name.split("/")[:depth]) for name in self.names())
        matches = lambda name: all(map(fnmatch.fnmatchcase, name.split("/"), pattern.split("/")))
        yield from (self / name for name in names if name.count("/") == depth - 1 and matches(name))

    def rglob(self, pattern: str):
        """The objects below the directory whose last part matches a pattern."""
        for name in self.names():  # files alone
            if fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], pattern):
                yield self / name

    def walk(self, *, top_down: bool = True, on_error=None):
        """`(directory, names of directories, names of objects)` of the directory and those below."""
        del on_error
        folders: dict[str, tuple[list[str], list[str]]] = {"": ([], [])}
        for name in self.names():
            *above, file = name.split("/")
            for depth, folder in enumerate(above):
                parent, here = "/".join(above[:depth]), "/".join(above[: depth + 1])
                if here not in folders:
                    folders[parent][0].append(folder)
                    folders[here] = ([], [])
            folders["/".join(above)][1].append(file)
        order = sorted(folders) if top_down else sorted(folders, reverse=True)
        yield from ((self / folder if folder else self, *folders[folder]) for folder in order)

    def stat(self):
        """Size and kind; reads the object, since only its content tells its size."""
        content = self._read()[0] if self.key else None
        if content is None and not self.is_dir():
            raise _missing(self)
        return stat_utils.StatResult(
            is_directory=content is None, length=len(content or b""), mtime=0, owner=None, group=None,
            mode=None,
        )  # fmt: skip

    # -------------------------------------------------------------- reading

    def read_bytes(self) -> bytes:
        """The content of the object."""
        content = self._read()[0]
        if content is None:
            raise _missing(self)
        return content

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """The content of the object as text, UTF-8 by default."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def read_part(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on; fewer, if the object ends before."""
        content, _ = self._read(slice(start, start + size))
        if content is None:
            raise _missing(self)
        return content

    def open(self, mode: str = "r", *, encoding: str | None = None, errors=None, **_: Any):
        """The object as a file for reading ("r", "rb") or for writing it as a whole ("w", "wb")."""
        if mode in ("rb", "r"):
            content = io.BytesIO(self.read_bytes())
            return content if mode == "rb" else io.TextIOWrapper(content, encoding or "utf-8", errors)
        if mode not in ("wb", "w"):
            raise OSError(errno.EINVAL, f"an object cannot be opened with the mode {mode!r}", str(self))
        raw = _Whole(self)
        return raw if mode == "wb" else io.TextIOWrapper(raw, encoding or "utf-8", errors)

    # -------------------------------------------------------------- writing

    def mkdir(self, mode=None, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing."""

    def write_bytes(self, data) -> int:
        """Writes the object, replacing an old one; returns its size."""
        with _errors(self):
            self._store().write(self.key, bytes(data)).result()
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors=None, newline=None) -> int:
        """Writes the object as text, UTF-8 by default; returns its size."""
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def touch(self, mode=0o666, exist_ok: bool = True) -> None:
        """Makes an empty object if there is none."""
        if not self.is_file():
            self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object."""
        if not missing_ok and not self.is_file():
            raise _missing(self)
        with _errors(self):
            self._store().write(self.key, None).result()

    def unlink_all(self, names: Collection[str]) -> None:
        """Removes objects below the directory, many at once."""
        with _errors(self):
            store = self._store()
            for removal in [store.write((self / name).key, None) for name in names]:
                removal.result()

    def rmdir(self) -> None:
        """Does nothing."""

    def rmtree(self, missing_ok: bool = False) -> None:
        """Removes all objects below the directory, many at once."""
        if not missing_ok and not self.is_dir():
            raise _missing(self)
        prefix = f"{self.key}/".encode()
        with _errors(self):
            self._store().delete_range(tensorstore.KvStore.KeyRange(prefix, _after(prefix))).result()

    def copy(self, dst, overwrite: bool = False):
        """Writes the content of the object to another path, which is returned."""
        target = StorePath(dst)
        if not overwrite and target.exists():
            raise FileExistsError(errno.EEXIST, "it exists already", str(target))
        target.write_bytes(self.read_bytes())
        return target

    def rename(self, target):
        """Moves an object, or a directory, object by object."""
        for name in self.names() or [""]:
            source = self / name if name else self
            source.copy(StorePath(target) / name if name else target, overwrite=True)
            source.unlink()
        return StorePath(target)

    replace = rename

    # -------------------------------------------------------------- conditional writes

    def read_stamped(self) -> tuple[bytes | None, bytes]:
        """`(content, stamp)`: None if there is no object; the stamp changes with every write."""
        return self._read()

    def write_if(self, data: bytes | None, stamp: bytes) -> bytes | None:
        """Writes, or with None removes, the object if it still has the stamp.

        Returns:
          The new stamp; None if the object has another one, so that nothing was done.
        """
        with _errors(self):
            return self._store().write(self.key, data, if_equal=stamp).result().generation or None

    # -------------------------------------------------------------- tensorstore

    def check_access(self, write: bool = False) -> None:
        """Asks the store for an object of the directory, or writes one and removes it, with few attempts.

        Raises:
          StoreError: the store does not answer, or refuses.
        """
        probe = self / f".write_test.{uuid.uuid4().hex}"  # many processes ask at once
        with _errors(self):
            store = _open(self.bucket, os.environ.get(_ENDPOINT), quick=True)
            if write:
                store.write(probe.key, b"").result()
                store.write(probe.key, None).result()
            else:
                store.read(probe.key).result()

    def _store(self) -> tensorstore.KvStore:
        if not self.bucket:
            raise OSError(errno.EINVAL, "it names no bucket", str(self))
        return _open(self.bucket, os.environ.get(_ENDPOINT))

    def _read(self, part: slice | None = None) -> tuple[bytes | None, bytes]:
        """`(content, stamp)` of the object, or of a part of it that may reach beyond its end."""
        with _errors(self):
            try:
                found = self._store().read(self.key, byte_range=part).result()
            except ValueError as error:
                if part is None or "OUT_OF_RANGE" not in str(error):
                    raise
                if http_status(error) == 416:
                    return b"", b""
                return self._read(slice(part.start, None))
        return (None if found.state == "missing" else found.value), found.stamp.generation


class _Whole(io.BytesIO):
    """A file that is written as an object when it is closed, unless an exception ends its context."""

    def __init__(self, path: StorePath):
        super().__init__()
        self._path, self._failed = path, False

    def __exit__(self, kind, *rest):
        self._failed = kind is not None
        return super().__exit__(kind, *rest)

    def close(self):
        if not self.closed:
            content = self.getvalue()
            super().close()
            if not self._failed:
                self._path.write_bytes(content)


@functools.lru_cache(maxsize=64)
def _open(bucket: str, endpoint: str | None, quick: bool = False) -> tensorstore.KvStore:
    """The objects of a bucket; `endpoint` makes a new store if the variable has changed."""
    del endpoint
    spec: dict[str, Any] = {"driver": "gcs", "bucket": bucket}
    if quick:
        spec["context"] = {"gcs_request_retries": _FEW_RETRIES}
    return tensorstore.KvStore.open(spec).result()


def _after(prefix: bytes) -> bytes:
    """The first key after all that begin with a prefix, which ends with "/" or is empty."""
    return prefix[:-1] + b"0" if prefix else b""


def _missing(path: pathlib.PurePath) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "there is no such object", str(path))


@contextlib.contextmanager
def _errors(path: pathlib.PurePath) -> Iterator[None]:
    """A context in which an error of tensorstore is an OSError about a path."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = store_error(error, path)
        raise found or StoreError(errno.EIO, str(error).splitlines()[0][:200], str(path)) from error
