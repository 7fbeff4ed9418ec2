"""Records of Parquet and Arrow files by number: `records[i]` is a dict of plain Python values.

A Parquet file is read by row groups and an Arrow file by record batches; Arrow files are memory-mapped.
Arrow files are those of Hugging Face's `datasets` (the stream format) or Feather files (the file format).
"""

import collections
import os
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from famx.base.errors import BadData
from famx.base.packages import optional_package
from famx.data.storage.paths import listed, matching_files
from famx.data.storage.unchanged import Unchanged

_OPEN_FILES = 64
_KEPT_BYTES = 2**28
PARQUET, ARROW = (".parquet",), (".arrow", ".feather")


class _File(Protocol):
    """A file in parts, whose columns are read part by part.

    Attributes:
      columns: names of all columns.
      sizes: number of rows of each part.
    """

    columns: list[str]
    sizes: list[int]

    def read(self, part: int, columns: Sequence[str]) -> Any:
        """The part as an Arrow table or record batch of these columns."""
        ...


class TableRecords:
    """Rows of Parquet or Arrow files, numbered consecutively.

    Lists are lists, structs are dicts and missing values None, as in JSON. To read a row of a Parquet
    file, its whole row group is decoded. The groups that were read last stay in memory, up to 256 MiB, so
    that rows that follow each other are cheap.

    Attributes:
      columns: names of the columns of the first file.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        fields: Sequence[str] | None = None,
    ):
        """
        Args:
          paths: path or glob pattern, or several; files are read in sorted order.
          fields: columns to read, which every file must have; None: all columns.

        Raises:
          ConfigError: the package pyarrow is missing.
          ValueError: a pattern matches no file, there is no row, a file is damaged, or it lacks a column.
        """
        _pyarrow("pyarrow")  # a missing package is not a damaged file
        patterns = [paths] if isinstance(paths, str | os.PathLike) else paths
        self.paths = matching_files([os.fspath(path) for path in patterns])
        self.fields = fields
        self._unchanged = Unchanged(self.paths)
        self._lock = threading.Lock()  # pyarrow's files are not made for several threads
        self._files: dict[int, _File] = {}
        self._parts: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
        self.columns = list(self._file(0).columns)
        places, sizes = [], []
        for k, path in enumerate(self.paths):
            file = self._file(k)
            for field in fields or ():
                if field not in file.columns:
                    raise ValueError(
                        f"{path} has no column '{field}'; its columns are {listed(file.columns)}."
                    )
            places += [(k, part) for part in range(len(file.sizes))]
            sizes += file.sizes
        self._places = np.array(places, np.int64).reshape(-1, 2)  # [parts, (file, part of the file)]
        self._starts = np.cumsum([0, *sizes])  # first row of each part
        if not len(self):
            raise ValueError(f"There is no record in {listed(self.paths)}; name files with data.")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"Record {i} is not one of {len(self)} records.")
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        place = tuple(map(int, self._places[number]))
        with self._lock:
            part = self._parts.get(place)
            if part is None:
                part = self._read(place)
            self._parts[place] = part
            self._parts.move_to_end(place)
            while len(self._parts) > 1 and sum(x.nbytes for x in self._parts.values()) > _KEPT_BYTES:
                self._parts.popitem(last=False)
        return part.slice(int(i - self._starts[number]), 1).to_pylist()[0]

    def where(self, i: int) -> str:
        """The place of a record, see `famx.data.storage.records.where`."""
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        file = int(self._places[number][0])
        first = int(np.flatnonzero(self._places[:, 0] == file)[0])
        return f"Row {int(i - self._starts[first])} of {self.paths[file]}"

    def _read(self, place: tuple[int, int]) -> Any:
        self._unchanged.check(self.paths[place[0]])
        file = self._file(place[0])
        columns = file.columns if self.fields is None else list(self.fields)
        try:
            return file.read(place[1], columns)
        except (ValueError, OSError) as error:
            raise _damaged(self.paths[place[0]], error) from error

    def _file(self, k: int) -> _File:
        """The open file; when too many are open, the one opened first is dropped."""
        if k not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self._files.pop(next(iter(self._files)))
            path = self.paths[k]
            kind = _Parquet if path.endswith(PARQUET) else _Arrow
            try:
                self._files[k] = kind(path)
            except (ValueError, OSError) as error:
                raise _damaged(path, error) from error
        return self._files[k]


class _Parquet:
    def __init__(self, path: str):
        parquet = _pyarrow("pyarrow.parquet")
        self._file = parquet.ParquetFile(path, memory_map=True)
        self.columns = self._file.schema_arrow.names
        groups = self._file.metadata
        self.sizes = [groups.row_group(k).num_rows for k in range(groups.num_row_groups)]

    def read(self, part: int, columns: Sequence[str]) -> Any:
        return self._file.read_row_group(part, columns=list(columns), use_threads=False)


class _Arrow:
    def __init__(self, path: str):
        arrow, ipc = _pyarrow("pyarrow"), _pyarrow("pyarrow.ipc")
        data = arrow.memory_map(path)
        try:
            reader = ipc.open_file(data)
            count, self._batch = reader.num_record_batches, reader.get_batch
        except arrow.ArrowInvalid:  # the stream format
            data.seek(0)
            reader = ipc.open_stream(data)
            batches = list(reader)  # views of the mapped file
            count, self._batch = len(batches), batches.__getitem__
        self.columns = reader.schema.names
        self.sizes = [self._batch(k).num_rows for k in range(count)]

    def read(self, part: int, columns: Sequence[str]) -> Any:
        return self._batch(part).select(list(columns))


def _pyarrow(name: str) -> Any:
    return optional_package(name, "Parquet and Arrow files", "parquet")


def _damaged(path: str, error: Exception) -> BadData:
    kind = "Parquet" if path.endswith(PARQUET) else "Arrow"
    return BadData(f"{path} cannot be read as a {kind} file ({error}); copy it again.")
