"""Records of JSON-lines and TFRecord files by number: `records[i]` is a dict.

Only the offsets of the records are in memory; a record is read from its file at each access.
"""

import json
import mmap
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from famx.base.errors import BadData, BadRecord
from famx.base.files import move_into_place, scratch_directory
from famx.data.storage import places, tfrecord
from famx.data.storage.paths import listed, matching_files
from famx.data.storage.shards import shard_paths
from famx.data.storage.unchanged import LARGEST, Unchanged, check_mark, check_size
from famx.data.vocabularies import token_ids

_OPEN_FILES = 64


class MappedRecords:
    """Records that are made, when they are read, of those of another sequence.

    Args:
      records: the other records.
      make: returns the record that is made of one of them.
    """

    def __init__(
        self, records: Sequence[Mapping[str, Any]], make: Callable[[Mapping[str, Any]], dict[str, Any]]
    ):
        self._records, self._make = records, make

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._make(self._records[i])

    def where(self, i: int) -> str:
        """The place of a record, see `where`."""
        return where(self._records, i)


def where(records: Any, i: int) -> str:
    """The place of a record for a message: its file and line, if the records tell."""
    tells = getattr(records, "where", None)
    return tells(i) if tells else f"Record {i}"


class _Records:
    """Records of several files, numbered consecutively. Subclasses index a file and decode a record."""

    def __init__(self, paths: str | os.PathLike | Sequence[str | os.PathLike]):
        patterns = [paths] if isinstance(paths, str | os.PathLike) else paths
        self.paths = matching_files([os.fspath(path) for path in patterns])
        self._unchanged = Unchanged(self.paths)
        spans = [np.frombuffer(self._index(path), np.int64).reshape(-1, 2) for path in self.paths]
        self._begins = np.cumsum([0] + [len(span) for span in spans])  # first record of each file
        self._spans = np.concatenate(spans)  # [records, (first byte, byte after the last)]
        self._files: dict[str, Any] = {}
        if not len(self._spans):
            raise ValueError(f"There is no record in {listed(self.paths)}; name files with data.")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, i: int) -> dict[str, Any]:
        path, start, stop = self._place(i)
        self._unchanged.check(path)
        if places.is_remote(path):
            data = places.read(path, start, stop)
        else:
            file = self._file(path)  # this reference keeps it open if another thread drops it
            data = os.pread(file.fileno(), stop - start, start)
        if len(data) < stop - start:
            self._unchanged.check(path)
            raise BadData(f"{path} cannot be read as far as byte {stop}: copy it again.")
        return self._decode(data, path, start)

    def _place(self, i: int) -> tuple[str, int, int]:
        """File, first byte and byte after the last of a record."""
        if not 0 <= i < len(self):
            raise IndexError(f"Record {i} is not one of {len(self)} records.")
        path = self.paths[int(np.searchsorted(self._begins, i, side="right")) - 1]
        start, stop = map(int, self._spans[i])
        return path, start, stop

    def where(self, i: int) -> str:
        """The place of a record, see `where`."""
        path, start, _ = self._place(i)
        return f"The record at byte {start} of {path}"

    def _file(self, path: str) -> Any:
        """The open file; when too many are open, the one opened first is dropped."""
        file = self._files.get(path)
        if file is None:
            if len(self._files) >= _OPEN_FILES:
                self._files.pop(next(iter(self._files)))
            file = self._files[path] = open(path, "rb")
        return file

    def _index(self, path: str) -> array:
        raise NotImplementedError

    def _decode(self, data: bytes, path: str, start: int) -> dict[str, Any]:
        raise NotImplementedError


class JsonlRecords(_Records):
    """Lines of JSON-lines files (UTF-8), each a JSON object, as dicts. Empty lines are skipped."""

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        fields: Sequence[str] | None = None,
    ):
        """
        Args:
          paths: path or glob pattern, or several; files are read in sorted order.
          fields: columns to read, which every record must have; None: all columns.

        Raises:
          ValueError: a pattern matches no file, there is no record, or the first record lacks a
            column. Reading a record raises it for a broken line, with the file and the line number.
        """
        self.fields = fields
        super().__init__(paths)
        self[0]

    def _index(self, path: str) -> array:
        spans, start = array("q"), 0
        with places.opened(path) as file:
            for line in iter(lambda: file.readline(LARGEST + 1), b""):
                if not start:
                    check_mark(path, line)
                check_size(path, len(line), "A line of ")
                stop = start + len(line)
                if not line.isspace():
                    spans.extend((start, stop))
                start = stop
        return spans

    def _decode(self, data: bytes, path: str, start: int) -> dict[str, Any]:
        try:
            record = json.loads(data.decode("utf-8-sig" if start == 0 else "utf-8"))
        except ValueError as error:
            raise BadRecord(f"{_line(path, start)} is broken JSON: {error}.") from error
        except RecursionError as error:
            raise BadRecord(f"{_line(path, start)} is JSON that is nested too deeply.") from error
        if not isinstance(record, dict):
            raise BadRecord(
                f"{_line(path, start)} is not a JSON object; write every record as "
                '{"column": value, ...} on one line.'
            )
        if self.fields is None:
            return record
        for field in self.fields:
            if field not in record:
                raise BadRecord(
                    f"{_line(path, start)} has no column '{field}'; its columns are "
                    f"{listed(record)}."
                )
        return {field: record[field] for field in self.fields}

    def where(self, i: int) -> str:
        path, start, _ = self._place(i)
        return _line(path, start)


class TFRecordRecords(_Records):
    """Records of TFRecord files, each a `tf.train.Example`, as dicts.

    A list of numbers is an int64 or float32 array `[n]`. A list of bytes is `bytes` if it has one
    item, and a list otherwise.
    """

    def __init__(
        self, paths: str | os.PathLike | Sequence[str | os.PathLike], check_crc: bool = False
    ):
        """
        Args:
          paths: path or glob pattern, or several; files are read in sorted order.
          check_crc: compare the checksums of all lengths now, and that of a record when it is read.

        Raises:
          ValueError: a pattern matches no file, there is no record, a file is truncated or not a
            TFRecord file, or a checksum is wrong. Reading raises it for a record that is not an Example.
        """
        self.check_crc = check_crc
        super().__init__(paths)

    def _index(self, path: str) -> array:
        spans, start, size = array("q"), 0, os.path.getsize(path)
        if not size:
            return spans
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            while start < size:
                head = data[start : start + tfrecord.HEADER.size]
                if len(head) < tfrecord.HEADER.size:
                    raise ValueError(f"{path} is cut off in the record at byte {start}; copy it again.")
                length, crc = tfrecord.HEADER.unpack(head)
                if (self.check_crc or not start) and tfrecord.masked_crc(head[:8]) != crc:
                    raise ValueError(
                        f"{path} is not a TFRecord file, or damaged at byte {start}: the checksum of the "
                        "record's length is wrong. Decompress compressed files first."
                    )
                stop = start + tfrecord.HEADER.size + length + tfrecord.FOOTER.size
                if stop > size:
                    raise ValueError(f"{path} is cut off in the record at byte {start}; copy it again.")
                spans.extend((start, stop))
                start = stop
        return spans

    def _decode(self, data: bytes, path: str, start: int) -> dict[str, Any]:
        (crc,) = tfrecord.FOOTER.unpack(data[-tfrecord.FOOTER.size :])
        data = data[tfrecord.HEADER.size : -tfrecord.FOOTER.size]
        if self.check_crc and tfrecord.masked_crc(data) != crc:
            raise BadRecord(
                f"{path} is damaged: the checksum of the record at byte {start} is wrong. Copy it again."
            )
        try:
            return tfrecord.decode_example(data)
        except ValueError as error:
            raise BadRecord(f"{path}, byte {start}: {error}") from error


def write_tfrecords(
    name: str | os.PathLike, records: Iterable[Mapping[str, Any]], num_shards: int = 1
) -> list[str]:
    """Write `name-00000-of-00010` etc.; record `i` goes to shard `i % num_shards`.

    The files get their names only when all of them are complete.

    Args:
      name: path of the shards without their numbers; its folder must exist.
      records: dicts of text, bytes, lists of these, or numbers. Whole numbers are written as int64,
        others as float32, the only types of the format.
      num_shards: number of files.

    Returns:
      the paths of the shards.

    Raises:
      ValueError: the folder does not exist, `num_shards` is below 1, or a value cannot be written.
    """
    folder = os.path.dirname(os.path.abspath(name))
    if not os.path.isdir(folder):
        raise ValueError(f"The folder {folder} does not exist; make it first.")
    if num_shards < 1:
        raise ValueError(f"Records need at least 1 shard, but num_shards is {num_shards}.")
    paths = shard_paths(os.fspath(name), num_shards)
    with scratch_directory(name) as unfinished:
        parts = [unfinished / str(i) for i in range(num_shards)]
        files = [open(part, "wb") for part in parts]
        try:
            for i, record in enumerate(records):
                files[i % num_shards].write(_frame(record))
        finally:
            for file in files:
                file.close()
        move_into_place(dict(zip(parts, paths)))
    return paths


def write_tfrecord_file(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one file of records, with the types and errors of `write_tfrecords`."""
    with open(path, "wb") as file:
        for record in records:
            file.write(_frame(record))


def _frame(record: Mapping[str, Any]) -> bytes:
    return tfrecord.frame(tfrecord.encode_example(record))


class RecordDocuments:
    """Records as documents for lanes and packed rows: item `i` is int32 `[n]`, the ids of record `i`.

    With `weights`, it is the pair (ids int32 `[n]`, loss weights float32 `[n]`).
    """

    def __init__(
        self, records: Any, tokens: str, weights: str | None = None, vocabulary: Any = None
    ):
        """
        Args:
          records: what `famx.data.storage.open_records` returns, or any sequence of dicts.
          tokens: column with the token ids, or with the text.
          weights: column with the loss weights of the tokens; None: every weight is 1.
          vocabulary: encodes the text; not needed for token ids.

        Reading a document raises ValueError if a column is missing, is text without a vocabulary to
        encode it, or is not a list of token ids.
        """
        self.records, self.tokens, self.weights, self.vocab = records, tokens, weights, vocabulary

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        record = self.records[i]
        for column in filter(None, (self.tokens, self.weights)):
            if column not in record:
                raise ValueError(
                    f"Record {i} has no column '{column}'; its columns are {listed(record)}."
                )
        tokens = self._ids(record[self.tokens], i)
        if self.weights is None:
            return tokens
        return tokens, np.asarray(record[self.weights], np.float32)

    def _ids(self, value: Any, i: int) -> np.ndarray:
        if isinstance(value, str | bytes):
            if self.vocab is None:
                raise ValueError(
                    f"Column '{self.tokens}' of record {i} is text; give the vocabulary that encodes it."
                )
            return token_ids(value, self.vocab)
        ids = np.asarray(value)
        fits = ids.ndim == 1 and (ids.dtype.kind in "iu" or not ids.size)
        if not fits or (ids.size and (ids.min() < 0 or ids.max() >= 2**31)):
            raise ValueError(
                f"Column '{self.tokens}' of record {i} is not a list of token ids; they must be whole "
                "numbers from 0 to 2147483647."
            )
        return ids.astype(np.int32)


def _line(path: str, start: int) -> str:
    """Name of the line that begins at byte `start`, for a message."""
    with places.opened(path) as file:
        number = 1
        while start:
            data = file.read(min(start, 2**20))
            number, start = number + data.count(b"\n"), start - len(data)
    return f"Line {number} of {path}"
