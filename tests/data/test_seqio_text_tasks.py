"""Text tasks in SeqIO: the same texts, tokens, weights and scores as without it."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

seqio = pytest.importorskip("seqio")
pytest.importorskip("tensorflow")

import famx.data  # noqa: E402
from famx.base.errors import ConfigError  # noqa: E402
from famx.data.seqio import FamFeatureConverter, register_tasks, register_text_task  # noqa: E402


@pytest.fixture
def task(tmp_path):
    (tmp_path / "qasper").mkdir()
    for split, size in (("train", 9), ("validation", 3)):
        lines = [
            json.dumps({"id": str(i), "pid": str(k), "input": f"Frage {i} ü\0", "output": f"a{k} 🙂\0"})
            for i in range(size) for k in range(1 + i % 2)
        ]  # fmt: skip
        (tmp_path / "qasper" / f"{split}.jsonl").write_text("\n".join(lines))
    return famx.data.get("scrolls_qasper", data_dir=str(tmp_path))


@pytest.fixture
def name():
    yield "text_task"
    seqio.TaskRegistry.remove("text_task")


def test_texts_and_references(task, name):
    made = register_text_task(task, name)
    assert tuple(made.splits) == ("train", "validation")
    rows = list(made.get_dataset(None, "validation", shuffle=False).as_numpy_iterator())
    vocab = task.vocab
    for row, example in zip(rows, task.examples("validation"), strict=True):
        assert row["inputs"].tolist() == vocab.encode(example["inputs"])
        assert row["targets"].tolist() == [*vocab.encode(example["targets"]), vocab.eos_id]
        assert [x.decode() for x in row["references"]] == example["references"]
        assert row["inputs"].dtype == np.int32
    found = [made.postprocess_fn(None, example=row, is_target=True) for row in rows]
    scores = {}
    for metric in made.metric_fns:
        scores |= metric(found, ["a1", "a0", "x"])
    assert scores == task.evaluate("validation", ["a1", "a0", "x"])


def test_shuffled_and_sharded_it_has_every_example_once(task, name):
    made = register_text_task(task, name)
    read = lambda shuffle, seed, shard=None: [
        bytes(x["inputs_pretokenized"]) for x in made.get_dataset(
            None, "train", shuffle=shuffle, seed=seed, shard_info=shard).as_numpy_iterator()
    ]  # fmt: skip
    straight = read(False, None)
    assert len(set(straight)) == 9
    assert read(True, 1) == read(True, 1) != straight
    assert sorted(read(True, 1)) == sorted(straight) and read(True, 2) != read(True, 1)
    parts = [read(True, 1, seqio.ShardInfo(i, 2)) for i in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(straight)


def test_for_a_decoder_it_gives_the_documents_with_their_weights(task, name):
    task = dataclasses.replace(task, max_tokens=14)
    register_text_task(task, name, decoder_only=True)
    rows = seqio.get_dataset(
        name, {"targets": 16}, dataset_split="validation", shuffle=False,
        feature_converter=FamFeatureConverter(pack=False),
    )  # fmt: skip
    documents = task.documents("validation")
    for row, (tokens, weights) in zip(rows.as_numpy_iterator(), documents, strict=True):
        assert len(tokens) == 14
        np.testing.assert_array_equal(row["decoder_target_tokens"], np.pad(tokens, (0, 2)))
        np.testing.assert_array_equal(row["decoder_loss_weights"], np.pad(weights, (0, 2)))


def test_without_decoder_only_the_converter_makes_the_same_rows_but_for_marks(task, name):
    register_text_task(task, name)
    rows = seqio.get_dataset(
        name, {"targets": 32}, dataset_split="validation", shuffle=False,
        feature_converter=FamFeatureConverter(pack=False),
    )  # fmt: skip
    for row, (tokens, weights) in zip(
        rows.as_numpy_iterator(), task.documents("validation"), strict=True
    ):
        pad = (0, 32 - len(tokens))
        np.testing.assert_array_equal(row["decoder_target_tokens"], np.pad(tokens, pad))
        np.testing.assert_array_equal(row["decoder_loss_weights"], np.pad(weights, pad))
        assert row["decoder_causal_attention"].sum() == 1 + (weights == 0).sum()


def test_whole_documents_have_targets_alone(tmp_path, name):
    (tmp_path / "pg19" / "test").mkdir(parents=True)
    (tmp_path / "pg19" / "test" / "1.txt").write_text("A book")
    task = famx.data.get("pg19", data_dir=str(tmp_path))
    made = register_text_task(task, name)
    (row,) = made.get_dataset(None, "test", shuffle=False).as_numpy_iterator()
    assert set(made.output_features) == {"targets"}
    assert row["targets"].tolist() == [*task.vocab.encode("A book"), task.vocab.eos_id]


REGISTERED = """
import seqio, famx.data
from famx.base.errors import ConfigError
from famx.data.sequences import SEQUENCES
names = lambda: {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
before = names()
import famx.data.seqio
assert names() == before, "importing registers nothing"
famx.data.seqio.register_tasks()
own = {"own_text", "own_records", "own_chat"}
assert set(famx.data.names()) - names() == {*own, *SEQUENCES}
qasper = seqio.get_mixture_or_task("scrolls_qasper")
famx.data.seqio.register_tasks()
assert seqio.get_mixture_or_task("scrolls_qasper") is qasper, "a second call changes nothing"
assert tuple(qasper.splits) == ("train", "validation", "test")
try:
    qasper.get_dataset(None, "train")
except ConfigError as error:
    assert "set data_dir or FAMX_DATA_DIR" in str(error)
flan = seqio.get_mixture_or_task("flan")
assert flan.get_rate(seqio.TaskRegistry.get("flan_t0")) == 0.32
rows = seqio.get_mixture_or_task("ruler_vt").get_dataset({"targets": 2048}, "validation")
row = next(rows.as_numpy_iterator())
assert row["targets"].shape == row["loss_weights"].shape == (2048,)
print("done")
"""


@pytest.mark.slow
def test_a_call_registers_every_task_that_needs_no_files_of_yours(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "FAMX_DATA_DIR"}
    run = subprocess.run(
        [sys.executable, "-c", REGISTERED], env={**env, "TFDS_DATA_DIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout == "done\n", run.stderr


def test_registering_by_hand_replaces_what_the_call_registered(tmp_path):
    register_tasks()
    (tmp_path / "qmsum").mkdir()
    line = '{"id": "1", "pid": "1_0", "input": "What?", "output": "That."}\n'
    (tmp_path / "qmsum" / "train.jsonl").write_text(line)
    task = famx.data.get("scrolls_qmsum", data_dir=str(tmp_path))
    before = seqio.TaskRegistry.get("scrolls_qmsum")
    made = register_text_task(task)
    assert seqio.TaskRegistry.get("scrolls_qmsum") is made is not before
    assert made.num_input_examples("train") == 1
    with pytest.raises(ValueError, match="duplicate"):
        register_text_task(task)  # twice by hand is a mistake


def test_without_data_there_is_the_sentence_of_the_task(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="scrolls/qasper/train.jsonl, which is not there"):
        register_text_task(famx.data.get("scrolls_qasper", data_dir=str(tmp_path)), "none")
