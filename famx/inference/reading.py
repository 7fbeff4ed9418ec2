"""Text files of any length: encoded piece by piece, with a report of how far."""

import codecs
import os
import pathlib
import re
from collections.abc import Iterator
from typing import IO

from famx.base.progress import Progress
from famx.data.vocabularies import ByteVocabulary, Vocabulary

_FILE_PIECE = 1 << 16  # bytes that are encoded at once


def encode_file(
    path: str, vocabulary: Vocabulary, size: int = _FILE_PIECE
) -> Iterator[tuple[int, list[int]]]:
    """Encodes a file piece by piece, so that its length does not matter.

    Bytes are taken as they are. For any other vocabulary the file is UTF-8, where bytes that are not
    become the replacement character, and a piece ends where its last line begins, or else before its
    last word. There words and byte-level BPE give the same ids as if the file were encoded at once.
    Only a piece without a single line end or space between two words is cut at any place.
    SentencePiece models that put a space before a text put one before each piece.

    Args:
      path: of the file.
      vocabulary: its ids are made.
      size: bytes of a piece, about.

    Yields:
      `(bytes encoded so far, ids of the piece)`.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        done, text = 0, ""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        while data := file.read(size):
            done += len(data)
            if isinstance(vocabulary, ByteVocabulary):
                yield done, vocabulary.encode(data)
                continue
            text += decoder.decode(data)
            found = _LINE.match(text) or _WORD.match(text)
            cut = found.end() if found else len(text)
            yield done, vocabulary.encode(text[:cut])
            text = text[cut:]
        yield done, vocabulary.encode(text + decoder.decode(b"", final=True))


# Only single spaces and line ends: of a run of them, byte-level BPE takes the last one apart.
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
