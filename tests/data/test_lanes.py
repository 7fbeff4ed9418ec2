"""Continuous lanes: every lane reads whole documents; positions and shards are exact."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from famx.data import ContinuousLanes, IndexedDocuments, PasskeyTask, TextFiles


def make_documents(sizes):
    """Documents whose tokens tell which document and which place they are."""
    return [np.arange(size, dtype=np.int32) + 1000 * (i + 1) for i, size in enumerate(sizes)]


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        assert a[name].dtype == b[name].dtype


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(1, 12), st.integers(0, 5))
def test_each_lane_reads_whole_documents(sizes, batch_size, length, seed):
    documents = make_documents(sizes)
    lanes = ContinuousLanes(documents, batch_size, length, seed)
    steps = [next(lanes) for _ in range(40)]
    assert steps[0]["reset"].all()
    begun = []
    for b in range(batch_size):
        starts = [t for t, step in enumerate(steps) if step["reset"][b]] + [len(steps)]
        for begin, end in zip(starts, starts[1:]):
            joined = {name: np.concatenate([step[name][b] for step in steps[begin:end]])
                      for name in steps[0] if name != "reset"}
            number = joined["decoder_target_tokens"][0] // 1000 - 1
            begun.append((begin, b, number))
            document = documents[number]
            n = len(document) if end < len(steps) else min(len(document), length * (end - begin))
            targets, inputs = joined["decoder_target_tokens"], joined["decoder_input_tokens"]
            np.testing.assert_array_equal(targets[:n], document[:n])
            assert inputs[0] == 1
            np.testing.assert_array_equal(inputs[1:n], document[: n - 1])
            assert (joined["decoder_loss_weights"][:n] == 1).all()
            # Only the end of the last piece is padding.
            for name in joined:
                assert (joined[name][n:] == 0).all()
            assert len(targets) - n < length
    # In the order in which they are begun, every epoch holds every document once.
    order = [number for _, _, number in sorted(begun)]
    for i in range(0, len(order) - len(sizes) + 1, len(sizes)):
        assert sorted(order[i : i + len(sizes)]) == list(range(len(sizes)))


def test_epochs_and_seeds_have_different_orders():
    def order(seed, steps):
        lanes = ContinuousLanes(make_documents([1] * 30), 1, 1, seed)
        return [int(next(lanes)["decoder_target_tokens"][0, 0]) for _ in range(steps)]

    both = order(0, 60)
    assert both[:30] != both[30:] and sorted(both[:30]) == sorted(both[30:])
    assert order(1, 30) != both[:30] and order(0, 30) == both[:30]


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(1, 12), st.integers(0, 20))
def test_resume_is_exact_anywhere(sizes, batch_size, length, steps):
    documents = make_documents(sizes)
    lanes = ContinuousLanes(documents, batch_size, length, seed=3)
    for _ in range(steps):
        next(lanes)
    state = json.loads(json.dumps(lanes.get_state()))
    resumed = ContinuousLanes(documents, batch_size, length, seed=3)
    next(resumed)
    resumed.set_state(state)
    for _ in range(15):
        assert_same(next(resumed), next(lanes))
    assert resumed.get_state() == lanes.get_state()


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 3), st.integers(1, 12), st.sampled_from([1, 2, 3]))
def test_shards_are_the_rows_of_the_global_batch(sizes, rows, length, num_shards):
    documents = make_documents(sizes)
    batch_size = rows * num_shards
    whole = ContinuousLanes(documents, batch_size, length, seed=1)
    shards = [ContinuousLanes(documents, batch_size, length, 1, s, num_shards)
              for s in range(num_shards)]
    for step in range(12):
        parts = [next(shard) for shard in shards]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert all(len(part["reset"]) == rows for part in parts)
        assert_same(joined, next(whole))
        if step == 5:  # every shard knows the whole position
            assert all(shard.get_state() == whole.get_state() for shard in shards)
            for shard in shards:
                shard.set_state(whole.get_state())


def test_passkey_documents_keep_their_weights():
    task = PasskeyTask(header=False, second_key=1.0)
    documents = IndexedDocuments(task, length=100, count=4, start=10)
    lanes = ContinuousLanes(documents, batch_size=2, length=32)
    steps = [next(lanes) for _ in range(4)]
    assert [s["reset"].tolist() for s in steps] == [[True] * 2] + [[False] * 2] * 3
    expected = {tuple(task.example(i, 100)["tokens"]): i for i in range(10, 14)}
    for b in range(2):
        tokens = np.concatenate([s["decoder_target_tokens"][b] for s in steps])
        weights = np.concatenate([s["decoder_loss_weights"][b] for s in steps])
        row = task.example(expected[tuple(tokens[:100])], 100)
        np.testing.assert_array_equal(weights[:100], row["weights"])
        assert not tokens[100:].any() and not weights[100:].any()


def test_text_lanes(tmp_path):
    (tmp_path / "a").write_bytes(b"hello world")
    files = TextFiles(str(tmp_path / "a"), validation_fraction=0.0)
    lanes = ContinuousLanes(files, 1, 8)
    tokens = [next(lanes)["decoder_target_tokens"][0] for _ in range(2)]
    assert [files.vocab.decode(t) for t in tokens] == ["hello wo", "rld"]


def test_length_may_change_between_steps():
    lanes = ContinuousLanes(make_documents([10]), 1, 4)
    first = next(lanes)["decoder_target_tokens"][0]
    lanes.length = 6
    second = next(lanes)
    np.testing.assert_array_equal(np.concatenate([first, second["decoder_target_tokens"][0]]),
                                  np.arange(1000, 1010))
    assert not second["reset"][0]


def test_bad_input_gets_a_sentence(tmp_path):
    documents = make_documents([3, 4])
    with pytest.raises(ValueError, match="at least one document"):
        ContinuousLanes([], 1, 4)
    with pytest.raises(ValueError, match="length of at least 1"):
        ContinuousLanes(documents, 1, 0)
    with pytest.raises(ValueError, match="divided evenly among 2"):
        ContinuousLanes(documents, 3, 4, num_shards=2)
    with pytest.raises(ValueError, match="Shard 2 is not one of 2"):
        ContinuousLanes(documents, 2, 4, shard_index=2, num_shards=2)
    with pytest.raises(ValueError, match="Document 0 is empty"):
        next(ContinuousLanes(make_documents([0]), 1, 4))
    state = ContinuousLanes(documents, 2, 4).get_state()
    for other in (ContinuousLanes(documents, 1, 4), ContinuousLanes(documents, 2, 4, seed=1),
                  ContinuousLanes(documents[:1], 2, 4)):
        with pytest.raises(ValueError, match="cannot resume"):
            other.set_state(state)


def test_text_that_changed_is_noticed(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"hello world")
    lanes = ContinuousLanes(TextFiles(str(path), validation_fraction=0.0), 1, 4)
    next(lanes)
    state = lanes.get_state()
    path.write_bytes(b"hello")
    resumed = ContinuousLanes(TextFiles(str(path), validation_fraction=0.0), 1, 4)
    resumed.set_state(state)
    with pytest.raises(ValueError, match="do not change the text"):
        next(resumed)
