"""SeqIO: the same tokens as numpy, float weights kept, resumable, also packed."""

import dataclasses
import io

import numpy as np
import pytest
from own_seqio import EXTRA_IDS, own_module

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

from famx.data import ByteVocabulary, PasskeyTask  # noqa: E402
from famx.data.probes import PROBES  # noqa: E402
from famx.data.probes.passkey_text import passkey_words  # noqa: E402
from famx.data.seqio import (  # noqa: E402
    FamFeatureConverter,
    as_seqio_vocabulary,
    begin_id,
    from_seqio_vocabulary,
    register_made,
    register_tasks,
)
from famx.data.vocabularies import (  # noqa: E402
    SentencePieceVocabulary,
    load_vocabulary,
    save_vocabulary,
)

register_tasks()


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


def packed(tokens, weights, length):
    """Examples as a dataset of packed rows; `weights` may be None."""

    def examples():
        for i, ids in enumerate(tokens):
            example = {"targets": ids, "text": "features of no use are dropped"}
            yield example if weights is None else {**example, "loss_weights": weights[i]}

    signature = {"targets": tf.TensorSpec([None], tf.int32), "text": tf.TensorSpec([], tf.string)}
    if weights is not None:
        signature["loss_weights"] = tf.TensorSpec([None], tf.float32)
    data = tf.data.Dataset.from_generator(examples, output_signature=signature)
    return FamFeatureConverter(pack=True)(data, {"targets": length})


def naive_rows(tokens, weights, length):
    """Packed rows, one token after another."""
    stream = [
        (1 if place == 0 else ids[place - 1], token, weight)
        for ids, ws in zip(tokens, weights, strict=True)
        for place, (token, weight) in enumerate(zip(ids, ws, strict=True))
    ]
    stream += [(0, 0, np.float32(0))] * (-len(stream) % length)
    for i in range(0, len(stream), length):
        inputs, targets, row_weights = zip(*stream[i : i + length], strict=True)
        yield {
            "decoder_input_tokens": np.array(inputs, np.int32),
            "decoder_target_tokens": np.array(targets, np.int32),
            "decoder_loss_weights": np.array(row_weights, np.float32),
        }


def assert_same_rows(actual, expected):
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize(
    "sizes, length, at_once",
    [([3, 1, 0, 7, 25, 8, 1, 1], 8, 1), ([3, 1, 0, 7, 25, 8, 1, 1], 8, 3), ([8, 8], 8, 64),
     ([0, 5, 0, 0], 1, 3), ([0, 0], 4, 3), ([], 4, 3), ([4, 5] * 40, 7, 64)],
)  # fmt: skip
def test_packed_rows_are_the_naive_ones(sizes, length, at_once, monkeypatch):
    monkeypatch.setattr("famx.data.seqio.packed_rows.EXAMPLES_AT_ONCE", at_once)
    rng = np.random.default_rng(len(sizes))
    tokens = [rng.integers(0, 100, size, np.int32) for size in sizes]  # zeros are tokens like others
    weights = [rng.random(size, np.float32) for size in sizes]
    rows = packed(tokens, weights, length).as_numpy_iterator()
    assert_same_rows(rows, naive_rows(tokens, weights, length))


def test_packed_padding_weighs_nothing_where_a_task_has_no_weights():
    tokens = [np.array(ids, np.int32) for ids in ([5, 0, 7], [8], [9, 0])]
    ones = [(ids != 0).astype(np.float32) for ids in tokens]
    rows = packed(tokens, None, 4).as_numpy_iterator()
    assert_same_rows(rows, naive_rows(tokens, ones, 4))


def test_a_seqio_task_can_be_packed_with_examples_of_a_static_length():
    convert = FamFeatureConverter(pack=True)
    data = seqio.get_mixture_or_task("passkey_words").get_dataset(
        {"targets": 100}, split="validation", shuffle=False)
    rows = list(convert(data, {"targets": 64}).take(30).as_numpy_iterator())
    task = dataclasses.replace(PasskeyTask(), split="eval")
    examples = [task.example(i, 100) for i in range(20)]
    expected = naive_rows([x["tokens"] for x in examples], [x["weights"] for x in examples], 64)
    assert_same_rows(rows, list(expected)[:30])
    assert convert(data, {"targets": 64}).element_spec["decoder_loss_weights"].shape == [64]


@pytest.mark.parametrize("taken", [1, 40])
def test_a_packed_iterator_can_be_saved_in_the_middle(tmp_path, taken):
    convert = FamFeatureConverter(pack=True)
    task = seqio.get_mixture_or_task("passkey_words")
    examples = task.get_dataset({"targets": 100}, split="validation", shuffle=True, seed=1)
    data = convert(examples.repeat(), {"targets": 37}).batch(2).prefetch(2)
    iterator = iter(data)
    for _ in range(taken):
        next(iterator)
    path = tf.train.Checkpoint(iterator=iterator).write(str(tmp_path / "position"))
    expected = [next(iterator) for _ in range(100)]
    resumed = iter(data)
    tf.train.Checkpoint(iterator=resumed).read(path).assert_consumed()
    for batch in expected:
        actual = next(resumed)
        for name in batch:
            np.testing.assert_array_equal(actual[name], batch[name])


def pairs(inputs, targets, weights=None, **converter):
    """Inputs and targets as a dataset of rows."""

    def examples():
        for i in range(len(inputs)):
            example = {"inputs": inputs[i], "targets": targets[i], "text": "dropped"}
            yield example if weights is None else {**example, "loss_weights": weights[i]}

    tokens = tf.TensorSpec([None], tf.int32)
    signature = {"inputs": tokens, "targets": tokens, "text": tf.TensorSpec([], tf.string)}
    if weights is not None:
        signature["loss_weights"] = tf.TensorSpec([None], tf.float32)
    data = tf.data.Dataset.from_generator(examples, output_signature=signature)
    lengths = converter.pop("lengths")
    return FamFeatureConverter(**converter)(data, lengths).as_numpy_iterator()


def draw_pairs(sizes):
    rng = np.random.default_rng(len(sizes))
    return [[rng.integers(1, 100, size, np.int32) for size in column] for column in zip(*sizes)]


@pytest.mark.parametrize("lengths", [{"targets": 9}, {"inputs": 6, "targets": 3}])
@pytest.mark.parametrize("with_weights", [False, True])
def test_inputs_come_before_the_targets_and_weigh_nothing(lengths, with_weights):
    sizes = [(3, 2), (0, 4), (6, 3), (20, 3), (20, 0), (4, 12), (0, 0), (8, 1)]
    inputs, targets = draw_pairs(sizes)
    weights = [np.full(len(x), 0.25, np.float32) for x in targets] if with_weights else None
    rows = list(pairs(inputs, targets, weights, lengths=lengths, bos_id=7))
    for row, head, tail in zip(rows, inputs, targets, strict=True):
        room = max(9 - max(len(tail), 1), 0)  # the targets are kept, and a place for a first one
        head = list(head)[-room:] if room else []
        text = (head + list(tail) + [0] * 9)[:9]
        assert row["decoder_target_tokens"].tolist() == text
        assert row["decoder_input_tokens"].tolist() == [7, *text[:-1]]
        weight = 0.25 if with_weights else 1
        expected = ([0] * len(head) + [weight] * len(tail) + [0] * 9)[:9]
        assert row["decoder_loss_weights"].tolist() == expected
        assert row["decoder_causal_attention"].tolist() == [int(i <= len(head)) for i in range(9)]
        assert {x.dtype.name for x in row.values()} == {"int32", "float32"} and len(row) == 4


def test_packed_inputs_and_targets_are_one_example_after_another():
    sizes = [(3, 2), (0, 4), (20, 3), (0, 0), (5, 0)]
    inputs, targets = draw_pairs(sizes)
    joined = [np.concatenate(pair) for pair in zip(inputs, targets, strict=True)]
    weights = [np.repeat(np.float32([0, 1]), pair) for pair in sizes]
    rows = pairs(inputs, targets, lengths={"inputs": 4, "targets": 4}, pack=True)
    assert_same_rows(rows, naive_rows(joined, weights, 8))


def test_rows_cut_what_is_longer_where_seqio_does_not():
    data = tf.data.Dataset.from_tensors({"targets": tf.range(1, 9)})
    (row,) = FamFeatureConverter()(data, {"targets": 5}).as_numpy_iterator()
    assert row["decoder_target_tokens"].tolist() == [1, 2, 3, 4, 5]


def test_packing_needs_a_weight_for_every_token():
    ids, weights = np.ones(3, np.int32), np.ones(2, np.float32)
    with pytest.raises(tf.errors.InvalidArgumentError, match="as many loss_weights as targets"):
        list(packed([ids], [weights], 4))


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match="must not be given more length"):
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


@pytest.mark.parametrize("pad_id", [None, 3])
def test_vocabulary_of_a_tokenizer_file(tmp_path, pad_id):
    """The ids are those of SeqIO's own class; the pad id, which SeqIO calls 0, is ours."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat", "a dog ran"] * 20), model_writer=model,
        vocab_size=16, control_symbols=["<spare>"], minloglevel=2)  # fmt: skip
    (tmp_path / "a.model").write_bytes(model.getvalue())
    ours = SentencePieceVocabulary(tmp_path / "a.model", pad_id)
    vocab, theirs = as_seqio_vocabulary(ours), seqio.SentencePieceVocabulary(str(tmp_path / "a.model"))
    text = "the dog sat"
    ids = theirs.encode(text)
    assert vocab.encode(text) == vocab.encode_tf(tf.constant(text)).numpy().tolist() == ids
    assert theirs.pad_id == theirs.unk_id == 0 and vocab.unk_id == 0
    assert vocab.pad_id == ours.pad_id == (16 if pad_id is None else 3)
    assert vocab.vocab_size == (17 if pad_id is None else 16)
    padded = [*ids, vocab.eos_id, ids[0], vocab.pad_id]
    assert vocab.decode(padded) == vocab.decode_tf(tf.constant([padded]))[0].numpy().decode() == text
    assert "⁇" in vocab.decode([0]), "id 0 is unknown, not padding"


@pytest.mark.parametrize("settings", [{}, {"extra_ids": EXTRA_IDS, "reverse_extra_ids": False}])
@pytest.mark.parametrize("overrides", [False, True])
def test_a_vocabulary_of_seqios_is_saved_with_all_its_ids(tmp_path, settings, overrides):
    if overrides:
        proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
        spec = proto.NormalizerSpec(add_dummy_prefix=False)
        settings = {**settings, "normalizer_spec_overrides": spec}
    theirs = seqio.SentencePieceVocabulary(own_module().MODEL, **settings)
    ours = from_seqio_vocabulary(theirs)
    assert theirs.bos_id == -1 and (ours.pad_id, ours.bos_id, ours.eos_id, ours.unk_id) == (0, 1, 1, 2)
    save_vocabulary(ours, tmp_path)
    ours = load_vocabulary(tmp_path)
    assert ours == from_seqio_vocabulary(theirs) and ours.vocab_size == theirs.vocab_size
    for text in ("red house ?", "house <extra_id_0> tree <extra_id_1>"):
        ids = theirs.encode_tf(tf.constant(text)).numpy().tolist()
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids)


def test_a_vocabulary_with_the_same_file_is_taken_in_its_place():
    theirs = seqio.SentencePieceVocabulary(own_module().MODEL)
    mine = SentencePieceVocabulary(own_module().MODEL, bos_id=theirs.vocab_size)
    assert from_seqio_vocabulary(theirs) != mine
    assert from_seqio_vocabulary(theirs, mine) is mine
    assert from_seqio_vocabulary(theirs, ByteVocabulary()) == from_seqio_vocabulary(theirs)


def test_seqios_bytes_are_byt5s():
    theirs = seqio.ByteVocabulary(extra_ids=3)
    ours = from_seqio_vocabulary(theirs)
    text = "Käse, 12"
    assert ours.encode(text) == theirs.encode(text)
    ids = [*ours.encode(text), 261, ours.eos_id]
    assert ours.decode(ids) == theirs.decode(ids) == text
    assert ours.vocab_size == theirs.vocab_size == 262
    with pytest.raises(ValueError, match="ids run from 0 to 261"):
        ours.decode([262])


@pytest.mark.parametrize(
    "vocabulary, begin",
    [
        (seqio.ByteVocabulary(), 1),
        (seqio.PassThroughVocabulary(9), 0),
        (seqio.PassThroughVocabulary(9, eos_id=3), 3),
        (seqio.PartialCodepointVocabulary([97]), 1),
        (as_seqio_vocabulary(ByteVocabulary()), 1),
    ],
    ids=lambda x: type(x).__name__,
)
def test_rows_begin_with_bos_or_what_takes_its_place(vocabulary, begin):
    assert begin_id(vocabulary) == begin
    assert begin_id(own_module().VOCABULARY) == 1


def test_a_vocabulary_of_ours_without_bos_begins_with_nothing():
    ours = SentencePieceVocabulary(own_module().MODEL)
    assert ours.bos_id is begin_id(as_seqio_vocabulary(ours)) is None


def test_registering_a_made_task_replaces_what_the_call_registered():
    before, task = seqio.TaskRegistry.get("ruler_fwe"), PROBES["ruler_fwe"](seed=1)
    made = register_made("ruler_fwe", task)
    assert seqio.TaskRegistry.get("ruler_fwe") is made is not before
    with pytest.raises(ValueError, match="duplicate"):
        register_made("ruler_fwe", task)  # twice by hand is a mistake


def test_splits_follow_the_registered_task():
    task = seqio.get_mixture_or_task("passkey_words")
    assert tuple(task.splits) == ("train", "validation")
    train, evaluation = (dataclasses.replace(PasskeyTask(), split=s) for s in ("train", "eval"))
    assert not np.array_equal(train.batch(range(4), 99)["answer"],
                              evaluation.batch(range(4), 99)["answer"])
