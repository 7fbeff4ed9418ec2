"""The vocabulary of a pretrained model, with a padding id that its embedding table has."""

import json
import os

from famx.base.errors import ConfigError
from famx.data.vocabularies import open_vocabulary
from famx.data.vocabularies.tokenizer_files import FileVocabulary, TokenizerFile, read_tokenizer_file


def fitting_vocabulary(
    file: str | os.PathLike, vocab_size: int, pad_id: int | None = None
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
    try:
        vocabulary = open_vocabulary(file, pad_id)
        if vocabulary.vocab_size > vocab_size and pad_id is None:
            free = free_tokens(read_tokenizer_file(file), vocabulary)
            if free and vocabulary.vocab_size - vocab_size == 1:
                vocabulary = open_vocabulary(file, free[0])
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"The tokenizer cannot be used: {error}") from error
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


def free_tokens(file: TokenizerFile, vocabulary: FileVocabulary) -> list[int]:
    """Ids of control tokens of a tokenizer file that can be used for padding, best first."""
    if file.kind == "byte_pair":
        added = json.loads(file.content).get("added_tokens") or []
        tokens = {token["id"]: token["content"] for token in added if token.get("special")}
    else:
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_proto=file.content)
        ids = range(pieces.get_piece_size())
        free = [i for i in ids if pieces.is_control(i) or pieces.is_unused(i)]
        tokens = {i: pieces.id_to_piece(i) for i in free}
    taken = {vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id}
    template = vocabulary.chat_template or ""

    def rank(i: int) -> int:
        name = tokens[i].lower()
        marks = (("pad",), ("reserved", "unused", "dummy"), ("",))
        return next(place for place, words in enumerate(marks) if any(word in name for word in words))

    return sorted((i for i in tokens if i not in taken and tokens[i] not in template), key=rank)
