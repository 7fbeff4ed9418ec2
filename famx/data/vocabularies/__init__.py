"""Vocabularies: bytes, a closed list of words, and those that a tokenizer file defines."""

from famx.data.vocabularies.base import Vocabulary
from famx.data.vocabularies.choosing import AnyVocabulary, as_vocabulary
from famx.data.vocabularies.encoding import encode_after, token_ids
from famx.data.vocabularies.saving import (
    KINDS,
    fingerprint,
    load_vocabulary,
    open_vocabulary,
    save_vocabulary,
)
from famx.data.vocabularies.simple import ByT5Vocabulary, ByteVocabulary, WordVocabulary
from famx.data.vocabularies.tokenizer_files import BytePairVocabulary, SentencePieceVocabulary

__all__ = [
    "AnyVocabulary",
    "ByT5Vocabulary",
    "BytePairVocabulary",
    "ByteVocabulary",
    "KINDS",
    "SentencePieceVocabulary",
    "Vocabulary",
    "WordVocabulary",
    "as_vocabulary",
    "encode_after",
    "fingerprint",
    "load_vocabulary",
    "open_vocabulary",
    "save_vocabulary",
    "token_ids",
]
