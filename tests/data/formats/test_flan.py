"""Flan v2: files of the public layouts, and rows that follow from seed and number alone."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import famx.data
from famx.base.errors import ConfigError
from famx.data.formats import flan
from famx.data.formats.flan import WEIGHTS, FlanRows
from famx.data.storage.records import write_tfrecords
from famx.data.vocabularies import ByteVocabulary
from famx.training.feeds import fresh_feed
from famx.training.source import Source
from tests.tiny import make_model

SOURCES = {"flan2021": "Flan2021", "t0": "P3", "niv2": "NIv2", "cot": "CoT", "dialog": "Dialog"}
VOCAB = ByteVocabulary()


def record(submix, i, **more):
    sources = {"task_source": SOURCES[submix], "task_name": "x", "template_type": "zs_opt"}
    return {"inputs": f"{submix} {i} الله?", "targets": f"answer 🙂 {i}", **sources, **more}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\r\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five submixtures of 200 records, each in another of the public layouts."""
    place = tmp_path_factory.mktemp("data")
    rows = {name: [record(name, i) for i in range(200)] for name in WEIGHTS}
    write(place / "flan" / "flan_zsopt_data" / "part-0.jsonl", rows["flan2021"])
    write(place / "flan" / "t0_submix_original" / "a" / "train.jsonl", rows["t0"])
    write(place / "flan" / "NIv2" / "one.jsonl", rows["niv2"][:50])
    write(place / "flan" / "NIv2" / "two.jsonl", rows["niv2"][50:])
    write(place / "flan" / "cot_fs_opt_train.jsonl", [{**x, "task_source": "?"} for x in rows["cot"]])
    write_tfrecords(
        place / "flan" / "flan_v2_rest.tfrecord",
        [{"inputs_pretokenized": x["inputs"], "targets_pretokenized": x["targets"], "inputs": [1, 2],
          "_task_source": x["task_source"]} for x in rows["dialog"]],
    )  # fmt: skip
    return place


def rows(folder, **options):
    return famx.data.get("flan_packed", data_dir=str(folder), **options)


def test_submixtures_are_found_by_the_names_of_files_and_folders_and_by_their_records(folder):
    for name in WEIGHTS:
        found = famx.data.get(f"flan_{name}", data_dir=str(folder)).examples("train")
        assert len(found) == 200
        for i in (0, 49, 50, 199):
            answer = f"answer 🙂 {i}"
            assert found[i] == {
                "inputs": f"{name} {i} الله? ", "targets": answer, "references": [answer]}
    assert len(famx.data.get("flan", data_dir=str(folder)).examples("train")) > 1000


def test_one_mixed_file_is_parted_by_its_records(tmp_path):
    mixed = [record(name, i) for i in range(3) for name in WEIGHTS]
    write(tmp_path / "flan" / "all.jsonl", mixed)
    write(tmp_path / "flan" / "cot" / "more.jsonl", [record("t0", 9)])
    found = famx.data.get("flan_cot", data_dir=str(tmp_path)).examples("train")
    assert [found[i]["inputs"] for i in range(4)] == [
        *(f"cot {i} الله? " for i in range(3)), "t0 9 الله? "]
    with pytest.raises(IndexError):
        found[4]


@pytest.mark.parametrize(("name", "submix"), [
    ("flan2021_submix_original", "flan2021"), ("flan_fs_opt_train_03.jsonl", "flan2021"),
    ("flan_v2", None), ("flan2022.jsonl", None), ("FLAN_collection", None), ("P3", "t0"),
    ("dialog_zsopt", "dialog"), ("cotton.jsonl", None), ("cot.jsonl", "cot"), ("part-0.jsonl", None),
])  # fmt: skip
def test_names_of_the_public_dumps(name, submix):
    assert flan._submix_of_path(name) == submix


def test_a_gap_stands_between_inputs_and_targets_unless_they_have_one():
    for inputs, expected in (("Q:", "Q: "), ("Q:\n", "Q:\n"), ("", "")):
        assert flan.preprocess({"inputs": inputs, "targets": "a"})["inputs"] == expected


# ------ Rows


@settings(max_examples=25, deadline=None)
@given(index=st.integers(0, 2**40), length=st.integers(200, 700), repeat=st.sampled_from([0, 1, 60]))
def test_a_row_is_its_examples_one_after_another_and_a_segment_of_them(folder, index, length, repeat):
    task = rows(folder, repeat_tokens=repeat, seed=3)
    row = task.example(index, length)
    again = rows(folder, repeat_tokens=repeat, seed=3).example(index, length)
    assert all(np.array_equal(row[name], again[name]) for name in row)
    prompt = VOCAB.encode(" [repeat random segment]: ") if repeat else []
    room = length - repeat - len(prompt)
    assert (row["tokens"].dtype, row["weights"].dtype) == (np.int32, np.float32)
    assert len(row["tokens"]) == len(row["weights"]) == length
    bounds = [*row["starts"], room]
    for start, end, name in zip(bounds[:-1], bounds[1:], row["submixes"], strict=True):
        found = re.match(rf"{name} (\d+) ", VOCAB.decode(row["tokens"][start:end]))
        assert found or end == room  # the last one may be cut off anywhere
        if found:
            inputs = VOCAB.encode(f"{name} {found[1]} الله? ")
            targets = [*VOCAB.encode(f"answer 🙂 {found[1]}"), VOCAB.eos_id]
            assert end == room or end - start == len(inputs + targets)
            assert row["tokens"][start:end].tolist() == (inputs + targets)[: end - start]
            weights = [0] * len(inputs) + [1] * len(targets)
            assert row["weights"][start:end].tolist() == weights[: end - start]
    tail = row["tokens"][room:].tolist()
    if not repeat:
        assert row["segment_start"] is None and not tail
        return
    place = row["segment_start"]
    assert 0 <= place <= room - repeat
    assert tail == prompt + row["tokens"][place : place + repeat].tolist()
    assert not row["weights"][room : room + len(prompt)].any()
    assert (row["weights"][-repeat:] == np.float32(0.1)).all()


def test_the_papers_sizes_hold_8448_tokens_of_text_and_prompt(folder):
    task = rows(folder)
    row = task.example(7, 8704)
    prompt = VOCAB.encode(" [repeat random segment]: ")
    assert row["tokens"][8448 - len(prompt) : 8448].tolist() == prompt
    assert (row["weights"][8448:] == np.float32(0.1)).all() and len(row["weights"][8448:]) == 256
    assert task.min_length == len(prompt) + 512 and len(task.example(0, task.min_length)["tokens"])


def test_batches_shift_the_targets_and_begin_every_example_with_bos(folder):
    task = rows(folder, repeat_tokens=40)
    batch = task.batch([5, 1], 300)
    for b, index in enumerate((5, 1)):
        row = task.example(index, 300)
        expected = [VOCAB.bos_id, *row["tokens"][:-1]]
        for start in row["starts"]:
            expected[start] = VOCAB.bos_id
        assert batch["decoder_input_tokens"][b].tolist() == expected
        assert np.array_equal(batch["decoder_target_tokens"][b], row["tokens"])
        assert np.array_equal(batch["decoder_loss_weights"][b], row["weights"])
    assert batch["decoder_input_tokens"].dtype == np.int32


def test_submixtures_are_drawn_at_their_weights(folder):
    def shares(**options):
        task = rows(folder, repeat_tokens=0, **options)
        drawn = [name for i in range(60) for name in task.example(i, 1000)["submixes"]]
        return {name: drawn.count(name) / len(drawn) for name in WEIGHTS}

    for name, share in shares().items():
        assert share == pytest.approx(WEIGHTS[name], abs=0.04)
    assert shares(weights={"cot": 3, "t0": 1, "dialog": 0}) == pytest.approx(
        {"cot": 0.75, "t0": 0.25, "flan2021": 0, "niv2": 0, "dialog": 0}, abs=0.04)


def test_evaluation_draws_the_records_that_training_never_sees(folder):
    def seen(split):
        task = rows(folder, repeat_tokens=0, split=split, weights={"cot": 1})
        found = set()
        for i in range(60):
            row = task.example(i, 600)
            texts = [VOCAB.decode(x) for x in np.split(row["tokens"], row["starts"][1:])[:-1]]
            found |= {int(text.split(" ")[1]) for text in texts}
        return found

    assert seen("eval") == {99, 199}
    training = seen("train")
    assert not training & {99, 199} and {0, 198} <= training and len(training) > 150


def test_long_examples_lose_the_middle_of_their_inputs_not_their_answer(tmp_path):
    write(tmp_path / "flan" / "cot.jsonl", [{"inputs": "a" * 500 + "b" * 500, "targets": "yes"}])
    row = rows(tmp_path, weights={"cot": 1}, repeat_tokens=0).example(0, 104)
    assert VOCAB.decode(row["tokens"]) == "a" * 50 + "b" * 49 + " yes" and row["weights"].sum() == 4


def test_hosts_make_their_parts_of_a_batch(folder):
    task = rows(folder, repeat_tokens=16)
    for first in (0, 4):
        batch = task.batch(range(first, first + 4), 128)
        halves = [task.batch(range(k, k + 2), 128) for k in (first, first + 2)]
        for name in batch:
            assert np.array_equal(batch[name], np.concatenate([half[name] for half in halves]))


def test_the_training_engine_takes_it(folder):
    model = make_model()
    length = 16 * model.config.block_size
    feed = fresh_feed(Source(rows(folder, repeat_tokens=8), 2, length, model.config.block_size))
    batch, blocks = feed.next(3)[:2]
    expected = rows(folder, repeat_tokens=8).batch([6, 7], length)
    assert blocks == 16 and all(np.array_equal(batch[name], expected[name]) for name in expected)


# ------ Bad input


def test_missing_and_packed_files_get_a_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("FAMX_DATA_DIR", raising=False)
    write(tmp_path / "flan" / "cot.jsonl", [record("cot", i) for i in range(3)])
    with pytest.raises(ConfigError, match="'flan_flan2021' needs .*flan2021/.*google-research/FLAN.*"
                                          "allow_partial, to train without 'flan2021'"):
        rows(tmp_path).example(0, 1000)
    assert set(rows(tmp_path, allow_partial=True).example(0, 1000)["submixes"]) == {"cot"}
    with pytest.raises(ConfigError, match="flan_cot has 3 records; evaluation takes every 100th"):
        rows(tmp_path, allow_partial=True, split="eval").example(0, 1000)
    with pytest.raises(ConfigError, match="none is set: set data_dir or FAMX_DATA_DIR"):
        FlanRows(allow_partial=True).example(0, 1000)
    (tmp_path / "packed" / "flan").mkdir(parents=True)
    (tmp_path / "packed" / "flan" / "cot.jsonl.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cot.jsonl.gz is compressed; decompress the files of Flan"):
        rows(tmp_path / "packed").example(0, 1000)


def test_broken_records_get_a_sentence(tmp_path):
    write(tmp_path / "flan" / "cot.jsonl", [{"input": "a", "target": "b"}])
    with pytest.raises(ValueError, match="no text in its column 'inputs'; its columns are input, target"):
        rows(tmp_path, weights={"cot": 1}).example(0, 1000)
    write(tmp_path / "data" / "mixed.jsonl", [record("t0", 0), {"inputs": "a", "targets": "b"}])
    with pytest.raises(ValueError, match="Record 1 of .*mixed.jsonl has no column 'task_source'"):
        flan.open_submix("cot", str(tmp_path / "data"), "train")


@pytest.mark.parametrize(("options", "sentence"), [
    (dict(weights={"flan": 1}), "weights must be a dict of numbers of at least 0"),
    (dict(weights={"cot": -1}), "'cot'\\] must be a number of at least 0, not -1"),
    (dict(weights={"cot": 0}), "All weights"),
    (dict(split="test"), "split must be one of 'train', 'eval', not 'test'"),
    (dict(repeat_tokens=-1), "repeat_tokens must be a whole number of at least 0, not -1"),
    (dict(repeat_weight=-0.5), "repeat_weight must be a number of at least 0, not -0.5"),
    (dict(seed=-1), "FlanRows.seed must be a whole number of at least 0, not -1"),
])  # fmt: skip
def test_bad_settings_get_a_sentence(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        FlanRows(**options)


def test_bad_rows_get_a_sentence(folder):
    task = rows(folder)
    with pytest.raises(ValueError, match="needs at least 538 tokens, but the length is 300"):
        task.example(0, 300)
    with pytest.raises(ValueError, match="index is -1"):
        task.example(-1, 1000)
    with pytest.raises(ValueError, match="at least one index"):
        task.batch([], 1000)
