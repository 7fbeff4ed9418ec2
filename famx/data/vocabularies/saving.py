"""Vocabularies in files: opening a tokenizer file, and saving any vocabulary next to a checkpoint."""

import hashlib
import os
from typing import Annotated

from pydantic import Field

from famx.base.errors import ConfigError
from famx.base.files import as_path, write_bytes, write_json
from famx.base.ranges import NonNegative, Path
from famx.base.untrusted import Fields, Name, parsed, read_limited, read_object, shown
from famx.base.values import checked
from famx.data.vocabularies.base import Vocabulary
from famx.data.vocabularies.simple import ByT5Vocabulary, ByteVocabulary, WordVocabulary
from famx.data.vocabularies.special_tokens import MOST_TOKEN, MOST_TOKENS
from famx.data.vocabularies.tokenizer_config import MOST_TOKENIZER_BYTES
from famx.data.vocabularies.tokenizer_files import (
    BytePairVocabulary,
    SentencePieceVocabulary,
    read_tokenizer_file,
)

KINDS: dict[str, type[Vocabulary]] = {
    cls.kind: cls
    for cls in (
        ByteVocabulary, WordVocabulary, SentencePieceVocabulary, BytePairVocabulary, ByT5Vocabulary
    )
}
_DESCRIPTION_FILE = "vocabulary.json"
_Word = Annotated[str, Field(max_length=MOST_TOKEN)]


class _Saved(Fields):
    """The fields of vocabulary.json that all kinds have, and the words of a `WordVocabulary`."""

    kind: Name
    file: Name | None
    file_sha256: Name | None = None
    fingerprint: Name | None = None
    end_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2 * MOST_TOKENS)]], Field(max_length=256)] = []
    words: Annotated[list[_Word], Field(max_length=MOST_TOKENS)] | None = None


@checked
def open_vocabulary(
    file: Path,
    pad_id: NonNegative | None = None,
    bos_id: NonNegative | None = None,
    eos_id: NonNegative | None = None,
) -> SentencePieceVocabulary | BytePairVocabulary:
    """Open a tokenizer file: a SentencePiece model, a `tokenizer.json` or a GGUF file.

    Args:
      file: the tokenizer file; its kind is recognised by its content.
      pad_id, bos_id, eos_id: override the file's ids; see `famx.data.vocabularies.tokenizer_files`.

    Raises:
      ConfigError: a package is missing, the file cannot be read, or a given id is taken.
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
    directory = as_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    description = {
        **vocabulary.saved_description(),
        "file": vocabulary.file_name,
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
    path = as_path(directory) / _DESCRIPTION_FILE
    if not path.is_file():
        raise ConfigError(
            f"There is no {_DESCRIPTION_FILE} in '{directory}'; name a directory into which a "
            "vocabulary was saved."
        )
    description = read_object(path)
    saved = parsed(_Saved, description, path)
    cls = KINDS.get(saved.kind)
    if cls is None:
        raise ConfigError(
            f"'{path}' describes a vocabulary of kind {shown(saved.kind)}; known here are "
            f"{', '.join(KINDS)}."
        )
    content = None
    if cls.file_name is not None:
        # Only the one name is read, so that no name in a file leads out of the directory.
        file = path.with_name(cls.file_name)
        if saved.file != cls.file_name or not file.is_file():
            raise ConfigError(
                f"The tokenizer file '{cls.file_name}' that '{path}' needs is missing; copy it into "
                "the same directory."
            )
        content = read_limited(file, MOST_TOKENIZER_BYTES)
        if hashlib.sha256(content).hexdigest() != saved.file_sha256:
            raise ConfigError(
                f"'{file}' is not the file that was saved with '{path}': its SHA-256 "
                "differs; copy both again from where they were saved."
            )
    altered = f"'{path}' is not as it was saved; copy it again from where it was saved."
    try:
        vocabulary = cls.restore(description, content)
        vocabulary.set_more_end_ids(saved.end_ids)
    except ConfigError as error:
        raise ConfigError(f"'{path}': {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(altered) from error
    if {**description, **vocabulary.description()} != description or (
        vocabulary.fingerprint != description.get("fingerprint")
    ):
        raise ConfigError(altered)
    return vocabulary
