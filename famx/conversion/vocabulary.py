"""The vocabulary of a pretrained model, with a padding id that its embedding table has."""

import os
from collections.abc import Iterable

from famx.base.errors import ConfigError
from famx.data.vocabularies import open_vocabulary
from famx.data.vocabularies.tokenizer_files import FileVocabulary


def fitting_vocabulary(
    file: str | os.PathLike,
    vocab_size: int,
    pad_id: int | None = None,
    end_ids: Iterable[int] = (),
) -> FileVocabulary:
    """The vocabulary of a tokenizer file, with a padding id that the model has.

    If the file has no padding token and the table has no row for an additional one, an unused control
    token is used: one named after padding, else a reserved or unused one, else any that the chat
    template does not contain.

    Args:
      file: the tokenizer file.
      vocab_size: number of ids that the model has.
      pad_id: id of the padding token; None: chosen as above. `vocab_size` adds one id to the vocabulary.

    Raises:
      ConfigError: the file cannot be read, or its ids do not fit the model.
    """
    vocabulary = open_vocabulary(file, pad_id)
    vocabulary.set_more_end_ids(end_ids)
    if vocabulary.vocab_size > vocab_size and pad_id is None:
        free = free_tokens(vocabulary)
        if free and vocabulary.vocab_size - vocab_size == 1:
            vocabulary = open_vocabulary(file, free[0])
            vocabulary.set_more_end_ids(end_ids)
    if vocabulary.vocab_size <= vocab_size or pad_id == vocab_size == vocabulary.vocab_size - 1:
        return vocabulary
    hint = "pass the tokenizer of this model with --tokenizer=FILE."
    if vocabulary.vocab_size - 1 == vocab_size == vocabulary.pad_id:
        hint = (
            "the last is for padding, for which the tokenizer has no token. Set --pad_id to a control"
            f" token that no text needs, or to {vocab_size}, for which the model gets a row of zeros."
        )
    raise ConfigError(
        f"The vocabulary of {file} has {vocabulary.vocab_size} ids, the model {vocab_size}: {hint}"
    )


def free_tokens(vocabulary: FileVocabulary) -> list[int]:
    """Ids of control tokens that can be used for padding, best first."""
    tokens = vocabulary.free_tokens()
    taken = {vocabulary.bos_id, vocabulary.unk_id, *vocabulary.end_ids}
    template = vocabulary.chat_template or ""

    def rank(i: int) -> int:
        name = tokens[i].lower()
        marks = (("pad",), ("reserved", "unused", "dummy"), ("",))
        return next(place for place, words in enumerate(marks) if any(word in name for word in words))

    free = (i for i, text in tokens.items() if i not in taken and text and text not in template)
    return sorted(free, key=rank)
