"""Batches for a decoder, and examples made by index as documents."""

import numpy as np
import pytest

from famx.data import ByteVocabulary, IndexedDocuments, PasskeyTask, decoder_batch

TASK = PasskeyTask(header=False, filler="random_words")
BYTES = ByteVocabulary()


def example(tokens, **more):
    return dict(tokens=np.array(tokens, np.int32), weights=np.ones(len(tokens), np.float32), **more)


def test_inputs_are_the_targets_shifted_with_bos_at_every_start():
    batch = decoder_batch([example([5, 6, 7, 8]), example([4, 3, 9, 9], starts=[0, 2])], BYTES)
    assert batch["decoder_input_tokens"].tolist() == [[1, 5, 6, 7], [1, 4, 1, 9]]
    assert batch["decoder_target_tokens"].tolist() == [[5, 6, 7, 8], [4, 3, 9, 9]]
    assert batch["decoder_loss_weights"].tolist() == [[1] * 4] * 2
    assert {x.dtype.name for x in batch.values()} == {"int32", "float32"} and len(batch) == 3


def test_answers_are_there_where_examples_tell_them():
    rows = [example([5, 6, 7, 8], answer_start=2), example([4, 3, 9, 9], answer_start=3)]
    assert decoder_batch(rows, BYTES)["answer_start"].tolist() == [2, 3]
    assert "answer" not in decoder_batch(rows, BYTES)
    answer = decoder_batch(rows, BYTES, answer_width=3)["answer"]
    assert answer.tolist() == [[7, 8, 0], [9, 0, 0]] and answer.dtype == np.int32


def test_a_batch_of_nothing_gets_a_sentence():
    with pytest.raises(ValueError, match="at least one index"):
        decoder_batch([], BYTES)


def test_documents_are_examples():
    documents = IndexedDocuments(TASK, 64, count=3, start=2)
    assert len(documents) == 3 and documents.num_tokens(0) == 64
    tokens, weights = documents[1]
    np.testing.assert_array_equal(tokens, TASK.example(3, 64)["tokens"])
    np.testing.assert_array_equal(weights, TASK.example(3, 64)["weights"])
    with pytest.raises(IndexError):
        documents[3]
