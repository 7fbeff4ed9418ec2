"""Own text as documents. `ContinuousLanes`, which reads them, can be imported from here too."""

import functools
import glob
import hashlib
import os
import pathlib
import re
import sysconfig
from collections.abc import Callable, Sequence

import numpy as np

from famx.base.errors import ConfigError
from famx.data.rows.lanes import ContinuousLanes
from famx.data.vocabularies import ByteVocabulary, load_vocabulary, open_vocabulary
from famx.data.vocabularies.base import Vocabulary

__all__ = [
    "ContinuousLanes",
    "TextFiles",
    "as_vocabulary",
    "stdlib_text_files",
    "token_ids",
    "validation_names",
]

_CHOICES = "'bytes', the directory of a model, or a tokenizer file"  # of vocabularies
_VOCABULARY_FILES = ("vocabulary.json", "tokenizer.json", "tokenizer.model")
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def stdlib_text_files() -> list[str]:
    """Sorted paths of the documentation and sources of Python's standard library, tests left out.

    Raises:
      ValueError: the standard library lies here without its sources.
    """
    found = []
    for folder, subfolders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise ValueError(
            "This Python lies here without its sources; name text files of your own."
        )
    return sorted(found)


def as_vocabulary(
    vocabulary: str | os.PathLike | Vocabulary, words: Callable[[], Vocabulary] | None = None
) -> Vocabulary:
    """The vocabulary object that a task's option `vocabulary` means.

    Args:
      vocabulary: "bytes"; "words", for tasks that have words of their own; the directory of a trained
        or imported model, of one of its checkpoints, or of another saved vocabulary; a tokenizer file
        (tokenizer.json, SentencePiece, GGUF) or a directory that holds one; or a vocabulary object.
      words: makes the vocabulary "words"; None: the task has none.

    Raises:
      ConfigError: there is no such file, or a saved vocabulary is damaged.
      ValueError: it is no vocabulary, or the tokenizer file cannot be read.
    """
    if not isinstance(vocabulary, str | os.PathLike):
        if not hasattr(vocabulary, "encode"):
            raise ConfigError(f"{vocabulary!r} is no vocabulary; {_CHOICES}.")
        return vocabulary
    if vocabulary == "bytes":
        return ByteVocabulary()
    if vocabulary == "words" and words is not None:
        return words()
    path = pathlib.Path(vocabulary).expanduser()
    if not path.exists():
        choices = f"'words', {_CHOICES}" if words else _CHOICES
        raise ConfigError(
            f"'{vocabulary}' is no vocabulary, and there is no such path; choose {choices}."
        )
    file = _vocabulary_file(path)
    facts = file.stat()
    return _read_vocabulary(file, facts.st_mtime_ns, facts.st_size)


def _vocabulary_file(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    is_checkpoint = re.fullmatch(r"checkpoint_\d+", path.absolute().name)
    folder = path.absolute().parent if is_checkpoint else path
    found = [folder / name for name in _VOCABULARY_FILES if (folder / name).is_file()]
    if not found:
        raise ConfigError(
            f"The directory '{path}' holds no vocabulary, none of {', '.join(_VOCABULARY_FILES)}; name "
            "that of a model whose vocabulary was saved, or a tokenizer file."
        )
    return found[0]


@functools.lru_cache(maxsize=8)
def _read_vocabulary(file: pathlib.Path, changed: int, size: int) -> Vocabulary:
    del changed, size  # part of the key alone
    return load_vocabulary(file.parent) if file.name == _VOCABULARY_FILES[0] else open_vocabulary(file)


def token_ids(text: str | bytes, vocabulary: Vocabulary) -> np.ndarray:
    """int32 [n] ids of a text, without bos and eos; bytes stand for UTF-8."""
    if isinstance(vocabulary, ByteVocabulary):
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32) + vocabulary.num_special_ids
    text = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
    return np.array(vocabulary.encode(text), np.int32)


def validation_names(names: Sequence[str], fraction: float, seed: int = 0) -> set[str]:
    """The names kept for validation, by their hash: at least one and not all, unless fraction is 0."""
    if not fraction:
        return set()

    def place(name: str) -> float:
        digest = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    places = {name: place(name) for name in names}
    ranked = sorted(names, key=lambda name: places[name])
    count = sum(x < fraction for x in places.values())
    return set(ranked[: min(max(count, 1), len(ranked) - 1)])


class TextFiles:
    """Text files as documents: `len(files)`, and `files[i]` -> int32 [n] ids of document i.

    A file is one document. Whether it belongs to training or to validation follows from a hash of
    its path (relative to the folder common to all files) and the seed, so it stays where it is when
    files are added beside it. A single file is split: its tail is the validation document.
    Empty files are left out.
    """

    def __init__(
        self,
        files: str | Sequence[str] | None = None,
        vocabulary: str | Vocabulary = "bytes",
        split: str = "train",
        validation_fraction: float = 0.05,
        seed: int = 0,
    ):
        """
        Args:
          files: path or glob pattern, or several (`**` matches folders of any depth); None means
            `stdlib_text_files()`.
          vocabulary: see `as_vocabulary`; any but bytes reads the files as UTF-8.
          split: "train" or "validation".
          validation_fraction: about what share of the documents is kept for validation.
          seed: changes which documents these are.

        Raises:
          ValueError: a pattern matches no file, all files are empty, the split has no document, or
            an argument is out of range.
        """
        if split not in ("train", "validation"):
            raise ValueError(
                f"The split of text files is '{split}'; choose 'train' or 'validation'."
            )
        if not 0 <= validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {validation_fraction}; it must be at least 0 and below 1."
            )
        self.vocab = as_vocabulary(vocabulary)
        paths = matching_files(stdlib_text_files() if files is None else files)
        sizes = {path: os.path.getsize(path) for path in paths}
        paths = [path for path in paths if sizes[path]]
        if not paths:
            raise ValueError(
                f"All files that match {files!r} are empty; name files that hold text."
            )
        if len(paths) == 1:
            size = sizes[paths[0]]
            tail = min(size - 1, max(1, round(size * validation_fraction)))
            cut = size - tail if validation_fraction else size
            start, stop = (0, cut) if split == "train" else (cut, size)
            self._parts = [(paths[0], start, stop)] if stop > start else []
        else:
            kept = _validation_paths(paths, validation_fraction, seed)
            wanted = [path for path in paths if (path in kept) == (split == "validation")]
            self._parts = [(path, 0, sizes[path]) for path in wanted]
        if not self._parts:
            raise ValueError(
                f"The {split} split of the text files holds no document; give more text, or set "
                "validation_fraction above 0."
            )

    @property
    def paths(self) -> list[str]:
        """Path of every document."""
        return [path for path, _, _ in self._parts]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, i: int) -> np.ndarray:
        path, start, stop = self._parts[i]
        with open(path, "rb") as file:
            file.seek(start)
            return token_ids(file.read(stop - start), self.vocab)

    def num_tokens(self, i: int) -> int:
        """Number of tokens of document i; with bytes, known without reading the file."""
        _, start, stop = self._parts[i]
        return stop - start if isinstance(self.vocab, ByteVocabulary) else len(self[i])


def matching_files(patterns: str | Sequence[str]) -> list[str]:
    """Sorted absolute paths of the files that the patterns match, each once."""
    paths = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        pattern = os.path.expanduser(pattern)
        # A path that exists is taken as it is, even if it holds characters of glob patterns.
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        found = [os.path.abspath(path) for path in found if os.path.isfile(path)]
        if not found:
            raise ValueError(
                f"No file matches '{pattern}' (seen from {os.getcwd()}); check the path, and write "
                "'**' to look into folders of any depth."
            )
        paths.update(found)
    if not paths:
        raise ValueError("No text files were named; give at least one path or glob pattern.")
    return sorted(paths)


def _validation_paths(paths: list[str], fraction: float, seed: int) -> set[str]:
    """The paths kept for validation, by their names relative to the folder common to all."""
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = {os.path.relpath(path, root).replace(os.sep, "/"): path for path in paths}
    return {names[name] for name in validation_names(list(names), fraction, seed)}
