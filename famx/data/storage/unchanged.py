"""Files that must not change while a run reads them, and texts in encodings that are not UTF-8."""

import os
from collections.abc import Iterable

from famx.base.errors import BadData, BadRecord
from famx.base.text import byte_size

LARGEST = 2**31  # bytes of a document or a line, which is held in memory as a whole
_MARKS = {  # the first bytes of a text, the longest marks first
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_MARK_OF_UTF8 = b"\xef\xbb\xbf"
_CONTINUES = range(0x80, 0xC0)  # bytes of UTF-8 within a character


class Unchanged:
    """Sizes and times of files when a run opened them.

    Args:
      paths: the files.
    """

    def __init__(self, paths: Iterable[str]):
        self._known = {path: _stamp(path) for path in paths}

    def size(self, path: str) -> int:
        """The size of a file in bytes when it was opened."""
        return self._known[path][0]

    def check(self, path: str) -> None:
        """Raises BadData if a file was removed, cut or changed since it was opened."""
        known = self._known[path]
        try:
            now = _stamp(path)
        except OSError as error:
            raise BadData(f"{path} was there when the run began and is gone: put it back.") from error
        if now == known:
            return
        if now[0] < known[0]:
            raise BadData(
                f"{path} has become shorter, {now[0]} bytes in place of {known[0]}: put it back as it"
                " was, and do not change the data during a run."
            )
        raise BadData(
            f"{path} was replaced or changed after the run began: put it back as it was, and do not"
            " change the data during a run."
        )


def _stamp(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def check_size(path: str, size: int, what: str = "") -> None:
    """Raises BadRecord if a document, or `what` of a file, is too large to be held in memory."""
    if size > LARGEST:
        raise BadRecord(
            f"{what}{path} has {byte_size(size)}, and a document of at most {byte_size(LARGEST)} can be"
            " held in memory: split it."
        )


def check_mark(path: str, data: bytes) -> None:
    """Raises BadRecord if the first bytes of a text are the mark of an encoding other than UTF-8."""
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise BadRecord(
                f"{path} is encoded in {encoding}, not in UTF-8: convert it, for example with"
                f" `iconv -f {encoding} -t UTF-8`."
            )


def decoded(data: bytes, path: str, begins: bool = True, ends: bool = True) -> str:
    """The text of a file in UTF-8, without the mark that it may begin with.

    Args:
      data: the bytes, of the whole file or of a part of it.
      path: the file, for the sentence.
      begins: whether `data` is at the beginning of the file; else a character may be cut there.
      ends: whether it is at the end; else a character may be cut there.

    Raises:
      BadRecord: the bytes are not UTF-8.
    """
    start, stop = 0, len(data)
    if begins:
        check_mark(path, data)
        start = len(_MARK_OF_UTF8) if data.startswith(_MARK_OF_UTF8) else 0
    else:
        while start < min(3, stop) and data[start] in _CONTINUES:
            start += 1
    try:
        return data[start:stop].decode("utf-8")
    except UnicodeDecodeError as error:
        if not ends and error.reason == "unexpected end of data":
            return data[start : start + error.start].decode("utf-8")
        raise not_utf8(path, start + error.start, data) from error


def not_utf8(path: str, position: int, data: bytes) -> BadRecord:
    """Error for a text that is not UTF-8.

    Args:
      path: the file.
      position: first byte that cannot be decoded, counted as the reader of the sentence is to find it.
      data: bytes around it.
    """
    zeros = " It has bytes of zero, as UTF-16 without a mark and binary files do." * (b"\0" in data)
    return BadRecord(
        f"{path} is not UTF-8 at byte {position}: convert it, for example with `iconv -f LATIN1 -t"
        f" UTF-8`, or copy it again.{zeros}"
    )
