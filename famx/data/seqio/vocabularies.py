"""Conversion of vocabularies to SeqIO's interface and back."""

from collections.abc import Iterable, Sequence

import numpy as np
import seqio
import tensorflow as tf

from famx.data.vocabularies import SentencePieceVocabulary, Vocabulary


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


def from_seqio_vocabulary(vocabulary: seqio.Vocabulary) -> Vocabulary | None:
    """The vocabulary of famx with the same ids, which can be saved; None if famx has none."""
    if isinstance(vocabulary, _SeqioVocabulary):
        return vocabulary._vocabulary
    if isinstance(vocabulary, seqio.SentencePieceVocabulary) and not vocabulary.extra_ids:
        return SentencePieceVocabulary(vocabulary.sentencepiece_model_file)
    return None
