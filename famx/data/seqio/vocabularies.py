"""Conversion of vocabularies to SeqIO's interface and back."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
import seqio
import tensorflow as tf

from famx.data.vocabularies import ByT5Vocabulary, SentencePieceVocabulary, Vocabulary
from famx.data.vocabularies.tokenizer_config import TokenizerConfig
from famx.data.vocabularies.tokenizer_files import TokenizerFile, read_tokenizer_file


class _SeqioVocabulary(seqio.Vocabulary):
    """A vocabulary of famx with SeqIO's interface."""

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        self._vocabulary = vocabulary

    pad_id = property(lambda self: self._vocabulary.pad_id)
    bos_id = property(lambda self: self._vocabulary.bos_id)
    eos_id = property(lambda self: self._vocabulary.eos_id)
    unk_id = property(lambda self: self._vocabulary.unk_id)
    _base_vocab_size = property(lambda self: self._vocabulary.vocab_size)

    def _encode(self, s: str) -> Sequence[int]:
        return self._vocabulary.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self._vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes | np.ndarray) -> np.ndarray:  # an array in eager mode
            text = text.item() if isinstance(text, np.ndarray) else text
            return np.array(self._vocabulary.encode(text.decode("utf-8")), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows: np.ndarray) -> np.ndarray:
            flat = rows.reshape(-1, rows.shape[-1])
            texts = [self._vocabulary.decode(row).encode("utf-8") for row in flat]
            return np.array(texts, object).reshape(rows.shape[:-1])

        text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        text.set_shape(ids.shape[:-1])
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SeqioVocabulary) and self._vocabulary == other._vocabulary

    def __hash__(self) -> int:
        return hash(self._vocabulary)


def as_seqio_vocabulary(vocabulary: Vocabulary) -> seqio.Vocabulary:
    """Wrap `vocabulary` as a `seqio.Vocabulary` with the same ids.

    SeqIO's converters pad with 0 and treat every 0 as padding, whatever `pad_id` is. If `pad_id` is
    not 0, use a converter that pads with `vocabulary.pad_id`, such as `FamFeatureConverter`: with
    SeqIO's, padding would become the token with id 0, and real tokens with this id would have no loss.
    """
    return _SeqioVocabulary(vocabulary)


def from_seqio_vocabulary(
    vocabulary: seqio.Vocabulary, like: Vocabulary | None = None
) -> Vocabulary | None:
    """The vocabulary of famx with the same ids, which can be saved; None if famx has none.

    SentencePiece models, with extra ids or without, and SeqIO's bytes have one. Where SeqIO's has no bos,
    eos takes its place, as in GPT-2.

    Args:
      vocabulary: the vocabulary of a SeqIO task.
      like: a vocabulary that is returned if it has the same tokenizer file, though perhaps other special
        ids; None: there is none.

    Raises:
      ConfigError: the file of a SentencePiece model cannot be used.
    """
    if isinstance(vocabulary, _SeqioVocabulary):
        return vocabulary._vocabulary
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return ByT5Vocabulary(vocabulary.extra_ids)
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return None
    file = _tokenizer_file(vocabulary)
    if like is not None and like.content == file.content:
        return like
    found = SentencePieceVocabulary(file)
    if found.bos_id is None and found.eos_id is not None:
        return SentencePieceVocabulary(file, bos_id=found.eos_id)
    return found


def _tokenizer_file(vocabulary: seqio.SentencePieceVocabulary) -> TokenizerFile:
    """The SentencePiece model that SeqIO encodes with: the file, or what SeqIO made of it."""
    path = vocabulary.sentencepiece_model_file
    if vocabulary.extra_ids or vocabulary._normalizer_spec_overrides:  # SeqIO has no property for these
        return TokenizerFile(path, "sentencepiece", vocabulary.sp_model, TokenizerConfig())
    if os.path.isfile(path):
        return read_tokenizer_file(path)
    with tf.io.gfile.GFile(path, "rb") as file:  # in a bucket
        return TokenizerFile(path, "sentencepiece", file.read(), TokenizerConfig())


def begin_id(vocabulary: seqio.Vocabulary) -> int | None:
    """The id with which rows and documents begin; None if a vocabulary of famx has no bos.

    Vocabularies of SeqIO often have none: T5's gives -1, others None or an error. Then it is eos, and
    without eos, padding, as in T5's decoder.
    """
    known = from_seqio_vocabulary(vocabulary)
    if isinstance(vocabulary, _SeqioVocabulary):
        return known.bos_id
    if known is not None and known.bos_id is not None:
        return known.bos_id
    for name in ("bos_id", "eos_id"):
        try:
            found = getattr(vocabulary, name)
        except NotImplementedError:  # `PassThroughVocabulary` and others do not say
            continue
        if found is not None and found >= 0:
            return int(found)
    return vocabulary.pad_id
