"""Index-addressed batches: consecutive, sharded, resumable, with a length that may change."""

import json

import numpy as np
import pytest

from famx.data import IndexedBatches, IndexedDocuments, PasskeyTask

TASK = PasskeyTask(header=False, filler="random_words")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_indices_are_consecutive_and_the_seed_is_used():
    batches = IndexedBatches(TASK, 3, 64, seed=5, start=7, second_key=True)
    task = PasskeyTask(header=False, filler="random_words", seed=5)
    assert_same(next(batches), task.batch([7, 8, 9], 64, second_key=True))
    batches.length = 80
    assert_same(next(batches), task.batch([10, 11, 12], 80, second_key=True))
    assert_same(next(IndexedBatches(TASK, 2, 64)), TASK.batch([0, 1], 64))


def test_resume_is_exact():
    batches = IndexedBatches(TASK, 2, 64)
    next(batches)
    batches.length = 70
    next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    resumed = IndexedBatches(TASK, 2, 64)
    resumed.set_state(state)
    for _ in range(3):
        assert_same(next(resumed), next(batches))


def test_shards_are_the_rows_of_the_global_batch():
    whole = IndexedBatches(TASK, 6, 64)
    shards = [IndexedBatches(TASK, 6, 64, shard_index=s, num_shards=3) for s in range(3)]
    for _ in range(3):
        parts = [next(shard) for shard in shards]
        joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        assert_same(joined, next(whole))
    with pytest.raises(ValueError, match="divided evenly"):
        IndexedBatches(TASK, 5, 64, num_shards=2)


def test_documents_are_examples():
    documents = IndexedDocuments(TASK, 64, count=3, start=2)
    assert len(documents) == 3 and documents.num_tokens(0) == 64
    tokens, weights = documents[1]
    np.testing.assert_array_equal(tokens, TASK.example(3, 64)["tokens"])
    np.testing.assert_array_equal(weights, TASK.example(3, 64)["weights"])
    with pytest.raises(IndexError):
        documents[3]
