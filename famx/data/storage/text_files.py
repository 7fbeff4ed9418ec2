"""Text files as documents."""

import os
from typing import Literal

import numpy as np

from famx.base.errors import BadRecord
from famx.base.ranges import Paths, Seed, ShareBelowOne
from famx.base.values import checked
from famx.data.storage.paths import matching_files, stdlib_text_files, validation_names
from famx.data.storage.tables import ARROW, PARQUET
from famx.data.storage.unchanged import Unchanged, check_size, decoded
from famx.data.vocabularies import AnyVocabulary, ByteVocabulary, as_vocabulary, token_ids


@checked
class TextFiles:
    """Documents made of text files: `files[i]` is int32 `[n]`, the ids of document `i`.

    Each file is a document. A hash of its path, relative to the folder that all files have in common,
    and of the seed decides whether it is for training or validation, so a file keeps its split when
    others are added. A single file is cut: its end is the validation document. Empty files are skipped.
    """

    def __init__(
        self,
        files: Paths | None = None,
        vocabulary: AnyVocabulary = "bytes",
        split: Literal["train", "validation"] = "train",
        validation_fraction: ShareBelowOne = 0.05,
        seed: Seed = 0,
    ):
        """
        Args:
          files: path or glob pattern, or several (`**` matches folders of any depth); None:
            `stdlib_text_files()`.
          vocabulary: see `famx.data.vocabularies.as_vocabulary`.
          split: "train" or "validation".
          validation_fraction: approximate share of the documents that is held out for validation.
          seed: selects which documents are held out.

        Raises:
          ValueError: a pattern matches no file, all files are empty, or the split has no document.

        Reading a document raises BadRecord if it is not UTF-8 or is blank, with the name of the file.
        """
        self.vocab = as_vocabulary(vocabulary)
        paths = matching_files(stdlib_text_files() if files is None else files)
        tables = [path for path in paths if path.endswith(PARQUET + ARROW)]
        if tables:
            raise ValueError(
                f"{tables[0]} is a table, not a text; read its rows with the task own_records, which "
                "takes the same `files`."
            )
        self._unchanged = Unchanged(paths)
        sizes = {path: self._unchanged.size(path) for path in paths}
        paths = [path for path in paths if sizes[path]]
        if not paths:
            raise ValueError(
                f"All files that match {files!r} are empty; name files that contain text."
            )
        if len(paths) == 1:
            size = sizes[paths[0]]
            tail = min(size - 1, max(1, round(size * validation_fraction)))
            cut = size - tail if validation_fraction else size
            start, stop = (0, cut) if split == "train" else (cut, size)
            self._parts = [(paths[0], start, stop)] if stop > start else []
        else:
            held_out = _validation_paths(paths, validation_fraction, seed)
            chosen = [path for path in paths if (path in held_out) == (split == "validation")]
            self._parts = [(path, 0, sizes[path]) for path in chosen]
        if not self._parts:
            raise ValueError(
                f"The {split} split of the text files has no document; give more text, or set "
                "validation_fraction above 0."
            )

    @property
    def paths(self) -> list[str]:
        """Path of every document."""
        return [path for path, _, _ in self._parts]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, i: int) -> np.ndarray:
        return token_ids(self._read(i), self.vocab)

    def check(self, i: int) -> None:
        """Raises BadRecord if document `i` cannot be used; makes no tokens."""
        self._read(i)

    def where(self, i: int) -> str:
        """The place of document `i` for a message: its file."""
        return self._parts[i][0]

    def _read(self, i: int) -> str | bytes:
        """Document `i`: a text, or for bytes the bytes as they are in the file.

        Raises:
          BadRecord: it is not UTF-8, is blank, or is too large.
          BadData: the file changed since it was opened.
        """
        path, start, stop = self._parts[i]
        check_size(path, stop - start)
        self._unchanged.check(path)
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        text = decoded(data, path, start == 0, stop == self._unchanged.size(path))
        if not text.strip():
            raise BadRecord(f"{path} has nothing but white space: write a text into it, or leave it out.")
        return data if isinstance(self.vocab, ByteVocabulary) else text

    def num_tokens(self, i: int) -> int:
        """Number of tokens of document `i`; bytes are counted without reading the file."""
        _, start, stop = self._parts[i]
        return stop - start if isinstance(self.vocab, ByteVocabulary) else len(self[i])


def _validation_paths(paths: list[str], fraction: float, seed: int) -> set[str]:
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = {os.path.relpath(path, root).replace(os.sep, "/"): path for path in paths}
    return {names[name] for name in validation_names(list(names), fraction, seed)}
