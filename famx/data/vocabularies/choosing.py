"""The value of a task's option `vocabulary` as a vocabulary object."""

import functools
import os
import pathlib
import re
from collections.abc import Callable
from typing import Annotated

from famx.base.errors import ConfigError
from famx.base.files import as_path, is_stored
from famx.base.ranges import Directory, Expected, Object
from famx.data.vocabularies.base import Vocabulary
from famx.data.vocabularies.saving import load_vocabulary, open_vocabulary
from famx.data.vocabularies.simple import ByteVocabulary

_CHOICES = "'bytes', the directory of a model, or a tokenizer file"
# The type of a task's option `vocabulary`.
AnyVocabulary = Annotated[Directory | Object, Expected(f"{_CHOICES}, in quotes")]
_VOCABULARY_FILES = ("vocabulary.json", "tokenizer.json", "tokenizer.model")


def as_vocabulary(
    vocabulary: str | os.PathLike | Vocabulary, words: Callable[[], Vocabulary] | None = None
) -> Vocabulary:
    """Return the vocabulary object that a task's option `vocabulary` names.

    Args:
      vocabulary: one of

        * `"bytes"`,
        * `"words"`, for tasks with a word list,
        * the directory of a trained or imported model, of one of its checkpoints, or of another
          saved vocabulary,
        * a tokenizer file (`tokenizer.json`, SentencePiece, GGUF) or a directory that holds one,
        * a vocabulary object, returned as it is.
      words: makes the vocabulary `"words"`; None if the task has no word list.

    Raises:
      ConfigError: the value is not a vocabulary, no such file exists, a package is missing, or a saved
        vocabulary is damaged.
      ValueError: the tokenizer file cannot be read.
    """
    if not isinstance(vocabulary, str | os.PathLike):
        if not hasattr(vocabulary, "encode"):
            raise ConfigError(f"{vocabulary!r} is not a vocabulary; give {_CHOICES}.")
        return vocabulary
    if vocabulary == "bytes":
        return ByteVocabulary()
    if vocabulary == "words" and words is not None:
        return words()
    path = as_path(vocabulary).expanduser()
    if not path.exists():
        choices = f"'words', {_CHOICES}" if words else _CHOICES
        raise ConfigError(
            f"'{vocabulary}' is not a vocabulary, and no such path exists; choose {choices}."
        )
    file = _vocabulary_file(path)
    if is_stored(file):
        if file.name != _VOCABULARY_FILES[0]:
            raise ConfigError(f"The tokenizer file {file} is in a bucket: copy it to this machine.")
        return load_vocabulary(file.parent)
    stat = file.stat()
    return _read_vocabulary(file, stat.st_mtime_ns, stat.st_size)


def _vocabulary_file(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    is_checkpoint = re.fullmatch(r"checkpoint_\d+", path.absolute().name)
    folder = path.absolute().parent if is_checkpoint else path
    files = [folder / name for name in _VOCABULARY_FILES if (folder / name).is_file()]
    if not files:
        raise ConfigError(
            f"The directory '{path}' has no vocabulary, none of {', '.join(_VOCABULARY_FILES)}; name the "
            "directory of a model whose vocabulary was saved, or a tokenizer file."
        )
    return files[0]


@functools.lru_cache(maxsize=8)
def _read_vocabulary(file: pathlib.Path, changed: int, size: int) -> Vocabulary:
    del changed, size  # only part of the cache key: a changed file is read again
    return load_vocabulary(file.parent) if file.name == _VOCABULARY_FILES[0] else open_vocabulary(file)
