"""Vocabularies in files: opening a tokenizer file, and saving any vocabulary next to a checkpoint."""

import hashlib
import json
import os
import pathlib

from famx.base.errors import ConfigError
from famx.base.files import write_bytes, write_json
from famx.data.vocabularies.base import Vocabulary
from famx.data.vocabularies.simple import ByteVocabulary, WordVocabulary
from famx.data.vocabularies.tokenizer_files import (
    BytePairVocabulary,
    SentencePieceVocabulary,
    read_tokenizer_file,
)

KINDS: dict[str, type[Vocabulary]] = {
    cls.kind: cls
    for cls in (ByteVocabulary, WordVocabulary, SentencePieceVocabulary, BytePairVocabulary)
}
_DESCRIPTION_FILE = "vocabulary.json"


def open_vocabulary(
    file: str | os.PathLike,
    pad_id: int | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> SentencePieceVocabulary | BytePairVocabulary:
    """Open a tokenizer file: a SentencePiece model, a `tokenizer.json` or a GGUF file.

    Args:
      file: the tokenizer file; its kind is recognised by its content.
      pad_id, bos_id, eos_id: override the file's ids; see `famx.data.vocabularies.tokenizer_files`.

    Raises:
      ConfigError: a package is missing.
      ValueError: the file cannot be read, or a given id is taken.
    """
    source = read_tokenizer_file(file)
    return KINDS[source.kind](source, pad_id, bos_id, eos_id)


def fingerprint(vocabulary: Vocabulary) -> str:
    """SHA-256, in 64 hexadecimal digits, that is the same for equal vocabularies only.

    It covers the kind, the size, the special ids, and the words or the tokenizer file, but not the
    chat template.
    """
    return vocabulary.fingerprint


def save_vocabulary(vocabulary: Vocabulary, directory: str | os.PathLike) -> None:
    """Write `vocabulary.json` and the tokenizer file, if there is one, into `directory`.

    `vocabulary.json` has the kind, the sizes and special ids, the words or the name and SHA-256 of the
    tokenizer file, the chat template and the fingerprint. Each file is written atomically.

    Args:
      vocabulary: a vocabulary of one of the kinds in `KINDS`.
      directory: created if missing; another vocabulary's files in it are replaced.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    description = {
        **vocabulary.description(),
        "file": vocabulary.file_name,
        "chat_template": vocabulary.chat_template,
        "fingerprint": vocabulary.fingerprint,
    }
    if vocabulary.file_name is not None:
        write_bytes(directory / vocabulary.file_name, vocabulary.content)
    write_json(directory / _DESCRIPTION_FILE, description)


def load_vocabulary(directory: str | os.PathLike) -> Vocabulary:
    """Load the vocabulary that `save_vocabulary` wrote into `directory`.

    Raises:
      ConfigError: a file is missing, damaged or not the one that was saved, the kind is unknown, or a
        package is missing.
    """
    path = pathlib.Path(directory) / _DESCRIPTION_FILE
    if not path.is_file():
        raise ConfigError(
            f"There is no {_DESCRIPTION_FILE} in '{directory}'; name a directory into which a "
            "vocabulary was saved."
        )
    try:
        description = json.loads(path.read_bytes())
        kind, name = description["kind"], description["file"]
        cls = KINDS.get(kind)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' is damaged; copy it again from where it was saved.") from error
    if cls is None:
        raise ConfigError(
            f"'{path}' describes a vocabulary of kind '{kind}'; known here are {', '.join(KINDS)}."
        )
    content = None
    if cls.file_name is not None:
        if name != cls.file_name or not path.with_name(name).is_file():
            raise ConfigError(
                f"The tokenizer file '{cls.file_name}' that '{path}' needs is missing; copy it into "
                "the same directory."
            )
        content = path.with_name(name).read_bytes()
        if hashlib.sha256(content).hexdigest() != description.get("file_sha256"):
            raise ConfigError(
                f"'{path.with_name(name)}' is not the file that was saved with '{path}': its SHA-256 "
                "differs; copy both again from where they were saved."
            )
    altered = f"'{path}' is not as it was saved; copy it again from where it was saved."
    try:
        vocabulary = cls.restore(description, content)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(altered) from error
    if {**description, **vocabulary.description()} != description or (
        vocabulary.fingerprint != description.get("fingerprint")
    ):
        raise ConfigError(altered)
    return vocabulary
