"""Streaming encoding of text files of any length, and its progress report."""

import codecs
import os
import pathlib
import re
from collections.abc import Iterator
from typing import IO

from famx.base.progress import Progress
from famx.data.storage.unchanged import check_mark, not_utf8
from famx.data.vocabularies import ByteVocabulary, Vocabulary

_FILE_PIECE = 1 << 16  # bytes encoded at a time


def encode_file(
    path: str, vocabulary: Vocabulary, size: int = _FILE_PIECE
) -> Iterator[tuple[int, list[int]]]:
    """Encode a file piece by piece, in memory that does not depend on its length.

    A byte vocabulary takes the bytes as they are. For any other, the file is decoded as UTF-8, without
    the mark that it may begin with, and a piece ends at the last line end before a non-space character,
    or else at the last space between two words. Cut there, word vocabularies and byte-level BPE give the
    ids of the whole file. A piece without such a place is cut where it ends.
    SentencePiece models that prepend a space to a text prepend one to every piece.

    Args:
      path: the text file.
      vocabulary: encodes the text.
      size: approximate number of bytes per piece.

    Yields:
      `(number of bytes encoded so far, ids of the piece)`.

    Raises:
      OSError: the file cannot be read.
      BadRecord: it is not UTF-8.
    """
    with open(path, "rb") as file:
        done, text = 0, ""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        while data := file.read(size):
            if isinstance(vocabulary, ByteVocabulary):
                done += len(data)
                yield done, vocabulary.encode(data)
                continue
            if not done:
                check_mark(path, data)
            text += _decoded(decoder, data, path, done)
            done += len(data)
            whole = _LINE.match(text) or _WORD.match(text)
            cut = whole.end() if whole else len(text)
            yield done, vocabulary.encode(text[:cut])
            text = text[cut:]
        yield done, vocabulary.encode(text + _decoded(decoder, b"", path, done, final=True))


def _decoded(
    decoder: codecs.IncrementalDecoder, data: bytes, path: str, done: int, final: bool = False
) -> str:
    """`data` as text, after the `done` bytes of the file before it; BadRecord if it is not UTF-8."""
    before = done - len(decoder.getstate()[0])  # where the bytes that are decoded now begin
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        raise not_utf8(path, before + error.start, data) from error


# Only a single space or line end is a safe place to cut: byte-level BPE splits a run of them before its
# last one, so a cut inside a run would change the ids.
_LINE = re.compile(r".*\S\n(?=\S)", re.DOTALL)
_WORD = re.compile(r".*\S(?= \S)", re.DOTALL)


class ReadProgress(Progress):
    """Progress in reading a text file.

    Args:
      path: the file.
      stream: where it is shown; standard error by default.
    """

    def __init__(self, path: str, stream: IO[str] | None = None):
        self._name = pathlib.Path(path).name
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        super().__init__(self._name, size or None, unit="B", keep_bar=False, stream=stream)

    def __call__(self, done: int, tokens: int) -> None:
        """Show that `done` bytes are encoded and `tokens` tokens read."""

        def line() -> str:
            share = f" ({done / self.total:.0%})" if self.total else ""
            rate = tokens / self.elapsed
            return f"{self._name}: {done:,} bytes{share}, {tokens:,} tokens, {rate:,.0f} tokens/s"

        self.update(done, lambda: f"{tokens:,} tokens", line)
