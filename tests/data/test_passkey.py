"""PassKey: the paper's text, exact lengths, pure streams, places of the keys, weights, metrics."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from famx.data import PasskeyTask, digit_accuracy, exact_match
from famx.data.probes.passkey_text import FILLER_WORDS, REPEATED_FILLER
from famx.data.probes.placement import BlockPlaces

HEADER = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there. "
)
QUESTION = "What is the pass key? The pass key is "


def statement(key):
    return f"The pass key is {key}. Remember it. {key} is the pass key. "


def text_of(task, row, start=0, stop=None):
    return task.vocab.decode(row["tokens"][start:stop])


def key_of(task, row):
    return task.vocab.decode(row["answer"])


def tasks():
    kinds = [("words", f) for f in ("repeated", "random_words", "mixed")]
    kinds += [("bytes", f) for f in ("repeated", "random_words", "mixed", "python_stdlib")]
    return st.builds(
        lambda kind, **kw: PasskeyTask(vocabulary=kind[0], filler=kind[1], **kw),
        st.sampled_from(kinds),
        digits=st.integers(1, 8),
        depth=st.none() | st.floats(0, 1),
        second_key=st.sampled_from([0.0, 0.5, 1.0]),
        second_key_depth=st.none() | st.floats(0, 1),
        header=st.booleans(),
        block_size=st.none() | st.integers(90, 200),
        seed=st.integers(0, 3),
        split=st.sampled_from(["train", "eval"]),
    )


@pytest.mark.parametrize("vocabulary", ["bytes", "words"])
def test_text_is_the_papers(vocabulary):
    task = PasskeyTask(vocabulary=vocabulary)
    filler = len(task.vocab.encode(REPEATED_FILLER + " "))
    row = task.example(7, task.min_length + filler)
    key = key_of(task, row)
    assert len(key) == 5 and key.isdigit()
    assert text_of(task, row) == HEADER + statement(key) + REPEATED_FILLER + " " + QUESTION + key
    assert row["filler_tokens"] == filler
    two = dataclasses.replace(task, second_key=1.0).example(7, task.overhead(True))
    last = key_of(task, two)
    assert text_of(task, two) == HEADER + statement(key) + statement(last) + QUESTION + last


def test_filler_before_the_key_and_without_header():
    task = PasskeyTask(vocabulary="bytes", header=False, depth=1.0)
    filler = len(REPEATED_FILLER) + 1
    row = task.example(0, task.min_length + filler)
    key = key_of(task, row)
    assert text_of(task, row) == REPEATED_FILLER + " " + statement(key) + QUESTION + key


def test_header_and_filler_may_be_drawn_for_each_example():
    """A drawn row is the row of a task that sets what was drawn, so that its other draws are the same."""
    fillers = ("repeated", "random_words", "python_stdlib")
    task = PasskeyTask("bytes", header=0.5, filler=list(fillers), depth=None, second_key=0.3)
    assert hash(task) == hash(dataclasses.replace(task, filler=fillers))
    drawn = []
    for index in range(120):
        row = task.example(index, 1500)
        header = text_of(task, row).startswith(HEADER)
        same = [
            filler for filler in fillers
            if np.array_equal(
                dataclasses.replace(task, header=header, filler=filler).example(index, 1500)["tokens"],
                row["tokens"],
            )
        ]  # fmt: skip
        assert len(same) == 1
        assert row["filler_tokens"] == 1500 - task.overhead(len(row["positions"]) == 2, header)
        drawn.append((header, *same))
    counts = [drawn.count((header, filler)) for header in (True, False) for filler in fillers]
    assert min(counts) > 8 and sum(counts) == 120
    assert task.min_length == dataclasses.replace(task, header=True).min_length
    mixed = PasskeyTask("bytes", filler="mixed", header=False)
    both = dataclasses.replace(mixed, filler=("random_words", "repeated"))
    for index in range(20):
        np.testing.assert_array_equal(
            mixed.example(index, 500)["tokens"], both.example(index, 500)["tokens"]
        )


@settings(max_examples=150, deadline=None)
@given(tasks(), st.integers(0, 10**6), st.integers(0, 700))
def test_any_row(task, index, extra):
    length = task.min_length + extra
    row = task.example(index, length)
    tokens, weights = row["tokens"], row["weights"]
    assert tokens.shape == weights.shape == (length,)
    assert (tokens.dtype, weights.dtype) == (np.int32, np.float32)
    # Pure: another, equal task makes the same row.
    again = dataclasses.replace(task).example(index, length)
    np.testing.assert_array_equal(tokens, again["tokens"])
    # The question and the answer are the last tokens; the answer is the last key.
    key = key_of(task, row)
    end = task.vocab.encode(QUESTION + key)
    assert list(tokens[-len(end) :]) == end and row["answer_start"] == length - task.digits
    # Every statement stands where it is said to stand, unbroken.
    size = len(task.vocab.encode(statement("0" * task.digits)))
    starts = row["positions"]
    keys = [task.vocab.decode(tokens[s : s + size]).split()[4].rstrip(".") for s in starts]
    for start, stated in zip(starts, keys):
        assert list(tokens[start : start + size]) == task.vocab.encode(statement(stated))
        if task.block_size:
            # Targets start .. start + size - 1, the same tokens as inputs one later.
            assert start // task.block_size == (start + size) // task.block_size
    assert keys[-1] == key and len(set(keys)) == len(keys)
    assert starts == sorted(starts) and len(starts) in {0.0: [1], 0.5: [1, 2], 1.0: [2]}[
        task.second_key]
    # Weight lies on the second mention of each key and on the answer, and nowhere else.
    mention = len(task.vocab.encode(f"The pass key is {keys[0]}. Remember it. "))
    expected = np.zeros(length, np.float32)
    for start in starts:
        expected[start + mention : start + mention + task.digits] = 0.5
    expected[-task.digits :] = 1.0
    np.testing.assert_array_equal(weights, expected)
    for start, stated in zip(starts, keys):
        begin = start + mention
        assert task.vocab.decode(tokens[begin : begin + task.digits]) == stated
    # Everything else is filler, without digits unless it is real text.
    assert row["filler_tokens"] == length - task.overhead(len(starts) == 2)
    rest = np.ones(length, bool)
    for start in starts:
        rest[start : start + size] = False
    rest[-task.digits :] = False
    digit_ids = [task.vocab.encode(d)[0] for d in "0123456789"]
    if task.filler != "python_stdlib":
        assert not np.isin(tokens[rest], digit_ids).any()
    assert task.vocab.unk_id is None or task.vocab.unk_id not in tokens
    assert tokens.min() > 2


@settings(max_examples=30, deadline=None)
@given(tasks(), st.integers(0, 1000))
def test_keys_do_not_depend_on_length_filler_depth_or_weights(task, index):
    row = task.example(index, task.min_length)
    long = task.example(index, task.min_length + 5000)
    np.testing.assert_array_equal(row["answer"], long["answer"])
    assert len(row["positions"]) == len(long["positions"])
    other = dataclasses.replace(
        task, filler="repeated", depth=0.3, header=True, block_size=None, mention_weight=0.1)
    other_row = other.example(index, other.min_length)
    np.testing.assert_array_equal(row["answer"], other_row["answer"])
    # The first key is the answer of the same row without a second key.
    first = dataclasses.replace(task, second_key=0.0).example(index, task.min_length)
    start = row["positions"][0] + len(task.vocab.encode("The pass key is "))
    np.testing.assert_array_equal(row["tokens"][start : start + task.digits], first["answer"])


def test_streams_of_seed_split_and_index_differ():
    def keys(**kwargs):
        task = PasskeyTask(digits=9, header=False, **kwargs)
        return {tuple(task.example(i, 64)["answer"]) for i in range(200)}

    streams = [keys(), keys(split="eval"), keys(seed=1), keys(seed=1, split="eval")]
    assert all(len(stream) == 200 for stream in streams)
    assert len(set.union(*streams)) == 800


def test_train_and_eval_fillers_differ():
    for filler in ("random_words", "python_stdlib"):
        train = PasskeyTask("bytes", filler=filler)
        rows = [dataclasses.replace(train, split=s).example(0, 2000)["tokens"] for s in
                ("train", "eval")]
        assert (rows[0][300:1900] != rows[1][300:1900]).mean() > 0.5


def test_python_filler_is_real_text_and_evaluation_has_its_own_part():
    from pydoc_data.topics import topics

    docs = "\n".join(topics[name] for name in sorted(topics)).encode()
    cut = len(docs) * 4 // 5
    parts = {"train": docs[:cut], "eval": docs[cut:]}
    for split, part in parts.items():
        task = PasskeyTask("bytes", filler="python_stdlib", header=False, split=split)
        size = len(statement("0" * 5))
        for index in range(5):
            row = task.example(index, 2000)
            filler = task.vocab.decode_bytes(row["tokens"][size:-len(QUESTION) - 6])
            assert len(filler) > 1800 and filler in part + part
        long = task.example(0, len(part) + 5000)
        filler = task.vocab.decode_bytes(long["tokens"][size : -len(QUESTION) - 6])
        assert filler[: len(part)] in part + part and filler[len(part) :] == filler[:len(
            filler) - len(part)]


def test_depth_places_the_key():
    task = PasskeyTask(filler="random_words")
    length = task.overhead(False) + 1000
    header = len(task.vocab.encode(HEADER))
    at = lambda depth: dataclasses.replace(task, depth=depth)
    for depth, place in ((0.0, 0), (0.25, 250), (1.0, 1000)):
        assert at(depth).example(3, length)["positions"] == [header + place]
    drawn = [at(None).example(i, length)["positions"][0] - header for i in range(300)]
    assert min(drawn) < 100 and max(drawn) > 900 and abs(np.mean(drawn) - 500) < 80
    # The second key's depth counts in the filler that remains.
    two = PasskeyTask(depth=0.5, second_key=1.0, second_key_depth=0.5)
    size = len(two.vocab.encode(statement("00000")))
    first, second = two.example(0, two.overhead(True) + 1000)["positions"]
    assert (first, second) == (header + 500, header + 500 + size + 250)


def test_second_key_has_its_probability_and_can_be_forced():
    task = PasskeyTask(second_key=0.25, header=False)
    counts = [len(task.example(i, 200)["positions"]) - 1 for i in range(800)]
    assert abs(np.mean(counts) - 0.25) < 0.05
    for second_key, keys in ((1.0, 2), (0.0, 1)):
        forced = dataclasses.replace(task, second_key=second_key)
        assert {len(forced.example(i, 200)["positions"]) for i in range(20)} == {keys}


def test_one_digit_keys_still_differ():
    task = PasskeyTask(digits=1, second_key=1.0, header=False)
    single = dataclasses.replace(task, second_key=0.0)
    for i in range(100):
        assert task.example(i, 100)["answer"] != single.example(i, 100)["answer"]


def test_mixed_filler_draws_both():
    task = PasskeyTask(filler="mixed", header=False)
    words = set(task.vocab.encode(" ".join(FILLER_WORDS)))
    random_rows = [bool(words & set(task.example(i, 60)["tokens"].tolist())) for i in range(100)]
    assert 30 < sum(random_rows) < 70


def test_random_words_are_uniform():
    task = PasskeyTask(filler="random_words", header=False)
    size = len(task.vocab.encode(statement("00000")))
    filler = task.example(0, 40_100)["tokens"][size:40_000]
    counts = np.bincount(filler, minlength=task.vocab.vocab_size)
    used = counts[task.vocab.encode(" ".join(FILLER_WORDS))]
    assert used.sum() == len(filler) and used.min() > 850 and used.max() < 1250


def test_batch_is_its_rows_shifted():
    task = PasskeyTask(filler="mixed", second_key=0.5, depth=None)
    batch = task.batch([5, 2, 9], 300)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "decoder_input_tokens": ((3, 300), "int32"),
        "decoder_target_tokens": ((3, 300), "int32"),
        "decoder_loss_weights": ((3, 300), "float32"),
        "answer": ((3, 5), "int32"),
        "answer_start": ((3,), "int32"),
    }
    for b, index in enumerate([5, 2, 9]):
        row = task.example(index, 300)
        np.testing.assert_array_equal(batch["decoder_target_tokens"][b], row["tokens"])
        np.testing.assert_array_equal(batch["decoder_loss_weights"][b], row["weights"])
        np.testing.assert_array_equal(batch["answer"][b], row["answer"])
    assert (batch["decoder_input_tokens"][:, 0] == task.vocab.bos_id).all()
    np.testing.assert_array_equal(
        batch["decoder_input_tokens"][:, 1:], batch["decoder_target_tokens"][:, :-1])


@pytest.mark.parametrize("size, block", [(1, 1), (1, 4), (3, 3), (4, 5), (7, 10), (10, 13)])
def test_places_are_the_nearest_uncut_ones(size, block):
    places = BlockPlaces(size, block)
    uncut = [p for p in range(60) if p // block == (p + size - 1) // block]
    for start in range(35):
        assert places.later(start) == min(p for p in uncut if p >= start)
        assert places.earlier(start) == max(p for p in uncut if p <= start)
        assert BlockPlaces(size, None).nearest(start, 0, 100) == start
        for low in uncut[::3]:
            for high in (p for p in uncut[::4] if p >= low):
                found = places.nearest(start, low, high)
                best = min(abs(p - start) for p in uncut if low <= p <= high)
                assert found in uncut and low <= found <= high and abs(found - start) == best


@pytest.mark.parametrize("block_size", [None, 32, 64])
@pytest.mark.parametrize("second_key", [False, True])
def test_min_length_is_the_smallest(block_size, second_key):
    task = PasskeyTask(block_size=block_size, second_key=float(second_key))
    if block_size is None:
        assert task.min_length == task.overhead(second_key)
    task.example(0, task.min_length)
    with pytest.raises(ValueError, match=f"at least {task.min_length} tokens"):
        task.example(0, task.min_length - 1)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(vocabulary="letters"), "'letters' is not a vocabulary, .* choose 'words', 'bytes', the"),
        (dict(filler="poem"), "filler must be one of 'repeated', "),
        (dict(filler=()), "or a tuple of repeated, random_words, python_stdlib, not \\(\\)"),
        (dict(filler=("repeated", "mixed")), r"filler\[1\] must be one of 'repeated', .*, not 'mixed'"),
        (dict(filler=("repeated", "python_stdlib")), "set vocabulary to 'bytes'"),
        (dict(header=2), "header must be True or False or a number from 0 to 1, not 2"),
        (dict(split="test"), "split must be one of 'train', 'eval', not 'test'"),
        (dict(filler="python_stdlib"), "set vocabulary to 'bytes'"),
        (dict(digits=0), "digits must be a whole number of at least 1, not 0"),
        (dict(depth=1.5), "from 0 to 1 or None, not 1.5"),
        (dict(second_key=None), "from 0 to 1, not None"),
        (dict(second_key=-0.1), "from 0 to 1"),
        (dict(second_key_depth=2.0), "from 0 to 1 or None"),
        (dict(mention_weight=-1.0), "number of at least 0, not -1.0"),
        (dict(seed=-1), "at least 0"),
        (dict(block_size=16), "does not fit into a block of 16"),
    ],
)
def test_bad_options_get_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PasskeyTask(**options)


def test_bad_arguments_get_a_sentence():
    task = PasskeyTask()
    with pytest.raises(ValueError, match="numbered from 0"):
        task.example(-1, 100)
    with pytest.raises(ValueError, match="at least one index"):
        task.batch([], 100)


def test_metrics():
    answer = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    predicted = np.array([[1, 2, 3, 4], [5, 0, 7, 0]])
    np.testing.assert_array_equal(exact_match(predicted, answer), [1.0, 0.0])
    np.testing.assert_array_equal(digit_accuracy(predicted, answer), [1.0, 0.5])
    with pytest.raises(ValueError, match="must be .batch, digits."):
        exact_match(predicted[0], answer)
