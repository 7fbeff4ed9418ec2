"""SeqIO: the same tokens as numpy, float weights kept, resumable, packing refused."""

import dataclasses

import numpy as np
import pytest

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

from famx.data import ByteVocabulary, PasskeyTask  # noqa: E402
from famx.data.passkey_text import passkey_words  # noqa: E402
from famx.data.seqio_tasks import FamFeatureConverter, as_seqio_vocabulary  # noqa: E402


def dataset(name="passkey_words", split="train", length=128, **kwargs):
    return seqio.get_dataset(
        name,
        task_feature_lengths={"targets": length},
        dataset_split=split,
        feature_converter=FamFeatureConverter(pack=False, use_custom_packing_ops=False),
        **{"shuffle": True, "seed": 3, "num_epochs": None, **kwargs},
    )


@pytest.mark.parametrize("name, length", [("passkey_words", 128), ("passkey_bytes", 400)])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_are_the_numpy_rows(name, length, split):
    task = PasskeyTask(
        name.removeprefix("passkey_"), split={"train": "train", "validation": "eval"}[split])
    expected = task.batch(range(4), length)
    rows = list(dataset(name, split, length).take(4).as_numpy_iterator())
    for feature in ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"):
        actual = np.stack([row[feature] for row in rows])
        np.testing.assert_array_equal(actual, expected[feature])
        assert actual.dtype == expected[feature].dtype
    assert set(rows[0]["decoder_loss_weights"].tolist()) == {0.0, 0.5, 1.0}
    assert rows[0].keys() == expected.keys() - {"answer", "answer_start"}


def test_validation_ends_and_shards_interleave():
    assert sum(1 for _ in dataset(split="validation", num_epochs=1)) == 256
    expected = PasskeyTask().batch([1, 3, 5], 128)["decoder_target_tokens"]
    shard = dataset(shard_info=seqio.ShardInfo(index=1, num_shards=2)).take(3)
    actual = np.stack([row["decoder_target_tokens"] for row in shard.as_numpy_iterator()])
    np.testing.assert_array_equal(actual, expected)


def test_iterator_can_be_saved(tmp_path):
    data = dataset().batch(2)
    iterator = iter(data)
    next(iterator)
    path = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / "position"))
    expected = next(iterator)
    resumed = iter(data)
    tf.train.Checkpoint(iterator=resumed).read(path).assert_consumed()
    np.testing.assert_array_equal(
        next(resumed)["decoder_target_tokens"], expected["decoder_target_tokens"])


def test_converter_pads_and_makes_weights_where_a_task_has_none():
    convert = FamFeatureConverter(pack=False, use_custom_packing_ops=False)
    data = tf.data.Dataset.from_tensors({"targets": tf.constant([5, 0, 7], tf.int32)})
    (row,) = convert(data, {"targets": 5}).as_numpy_iterator()
    assert row["decoder_target_tokens"].tolist() == [5, 0, 7, 0, 0]
    assert row["decoder_input_tokens"].tolist() == [1, 5, 0, 7, 0]
    assert row["decoder_loss_weights"].tolist() == [1, 0, 1, 0, 0]
    weighted = tf.data.Dataset.from_tensors(
        {"targets": tf.constant([5, 6], tf.int32), "loss_weights": tf.constant([0.25, 0.1])})
    (row,) = convert(weighted, {"targets": 3, "loss_weights": 3}).as_numpy_iterator()
    np.testing.assert_array_equal(row["decoder_loss_weights"], np.float32([0.25, 0.1, 0]))
    assert set(convert.get_model_feature_lengths({"targets": 9}).values()) == {9}


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match="does not pack"):
        FamFeatureConverter(pack=True, use_custom_packing_ops=False)
    with pytest.raises(ValueError, match="must be the same"):
        FamFeatureConverter()(None, {"targets": 3, "loss_weights": 4})
    with pytest.raises(ValueError, match="give the length of 'targets'"):
        seqio.get_mixture_or_task("passkey_words").get_dataset(None, split="train", shuffle=False)


@pytest.mark.parametrize("ours", [ByteVocabulary(), passkey_words()])
def test_vocabulary_is_ours(ours):
    vocab = as_seqio_vocabulary(ours)
    text = "The pass key is 12345. Remember it."
    ids = ours.encode(text)
    assert vocab.encode(text) == ids and vocab.decode(ids) == text
    assert vocab.encode_tf(tf.constant(text)).numpy().tolist() == ids
    assert vocab.decode_tf(tf.constant(ids)).numpy().decode() == text
    graph = tf.data.Dataset.from_tensors(text).map(vocab.encode_tf)
    assert next(graph.as_numpy_iterator()).tolist() == ids
    graph = tf.data.Dataset.from_tensors(tf.constant(ids)).map(vocab.decode_tf)
    assert next(graph.as_numpy_iterator()).decode() == text
    batch = vocab.decode_tf(tf.constant([ids, ids[::-1]])).numpy()
    assert [t.decode() for t in batch] == [text, ours.decode(ids[::-1])]
    assert (vocab.pad_id, vocab.bos_id, vocab.eos_id) == (0, 1, 2)
    assert (vocab.unk_id, vocab.vocab_size) == (ours.unk_id, ours.vocab_size)
    assert vocab == as_seqio_vocabulary(ours)
    assert vocab != as_seqio_vocabulary(
        ByteVocabulary() if ours == passkey_words() else passkey_words())


def test_splits_follow_the_registered_task():
    task = seqio.get_mixture_or_task("passkey_words")
    assert tuple(task.splits) == ("train", "validation")
    train, evaluation = (dataclasses.replace(PasskeyTask(), split=s) for s in ("train", "eval"))
    assert not np.array_equal(train.batch(range(4), 99)["answer"],
                              evaluation.batch(range(4), 99)["answer"])
