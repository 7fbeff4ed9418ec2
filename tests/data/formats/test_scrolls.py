"""SCROLLS: official files, written by the test, as examples; rows of one id are references."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import famx.data
from famx.base.errors import ConfigError
from famx.data.formats import scrolls
from famx.data.storage.records import write_tfrecords
from famx.data.tools.prepare import prepare

NAMES = ["qasper", "quality", "narrative_qa", "gov_report", "summ_screen_fd", "qmsum", "contract_nli"]


def write(path, rows, newline="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + newline for row in rows)
    path.write_bytes(text.encode())


def row(id, output, input="Who?\n\nA text.", k=0):
    return {"id": id, "pid": f"{id}_{k}", "input": input, "output": output}


def task(name, folder, **options):
    return famx.data.get(f"scrolls_{name}", data_dir=str(folder), **options)


def test_all_seven_tasks_are_registered():
    assert set(famx.data.names()) >= {f"scrolls_{name}" for name in NAMES}
    assert famx.data.get("scrolls_qasper").counts == {"train": 2567, "validation": 1726, "test": 1399}


@pytest.mark.parametrize("place", ["qasper", "scrolls/qasper"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
def test_rows_of_one_id_are_one_example_with_their_outputs(tmp_path, place, newline):
    rows = [
        row("a", "yes"), row("b", "𝔘𝔫𝔦 🙂"), row("a", "no", k=1), row("c", "", input="שלום 世界\n\nx"),
        row("a", "yes", k=2),
    ]  # fmt: skip
    write(tmp_path / place / "validation.jsonl", rows, newline)
    examples = task("qasper", tmp_path).examples("validation")
    assert [example["id"] for example in examples] == ["a", "b", "c"]
    assert [example["references"] for example in examples] == [["yes", "no", "yes"], ["𝔘𝔫𝔦 🙂"], [""]]
    assert examples[2]["inputs"] == "שלום 世界\n\nx\n\n" and examples[1]["targets"] == "𝔘𝔫𝔦 🙂"


@pytest.mark.parametrize("name", ["qasper", "narrative_qa"])
def test_every_answer_of_the_train_split_is_learnt_and_the_others_are_references(tmp_path, name):
    rows = [row("a", "yes"), row("b", "x", "Why?\n\nB"), row("a", "no", k=1), row("a", "perhaps", k=2)]
    write(tmp_path / "data" / name / "train.jsonl", rows)
    write(tmp_path / "data" / name / "validation.jsonl", rows)
    write(tmp_path / "data" / name / "test.jsonl", [{**x, "output": None} for x in rows])
    of = task(name, tmp_path / "data")
    learnt = [("a", "yes"), ("b", "x"), ("a", "no"), ("a", "perhaps")]
    found = [(x["id"], x["targets"], x["references"]) for x in of.examples("train")]
    assert found == [(id, answer, [answer]) for id, answer in learnt]
    assert len(of) == len(of.documents("train")) == 4
    texts = [of.vocab.decode(of[i][0][of[i][1] > 0][:-1]) for i in range(4)]  # the last is eos
    assert texts == [answer for _, answer in learnt]
    assert [x["references"] for x in of.examples("validation")] == [["yes", "no", "perhaps"], ["x"]]
    # Prepared records are the same examples.
    of = dataclasses.replace(of, counts={})
    prepare(of, str(tmp_path / "data"), str(tmp_path / "out"), message=str)
    prepared = task(name, tmp_path / "out")
    for split in ("train", "validation"):
        assert list(prepared.examples(split)) == list(of.examples(split))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.none() | st.text(max_size=3)), min_size=1))
def test_grouping_equals_an_obvious_loop(rows):
    rows = [row(id, output, k=k) for k, (id, output) in enumerate(rows)]
    groups = {}
    for x in rows:
        groups.setdefault(x["id"], []).append(x)
    found = scrolls.GroupedRecords(rows)
    assert found.num_rows == len(rows) and len(found) == len(groups)
    for i, (id, group) in enumerate(groups.items()):
        assert found[i]["pid"] == group[0]["pid"] and found[i]["id"] == id
        assert found[i]["outputs"] == [x["output"] for x in group if x["output"] is not None]
    with pytest.raises(IndexError):
        found[len(groups)]


def test_the_test_split_has_no_answers_and_says_so(tmp_path):
    write(tmp_path / "qmsum" / "test.jsonl", [row("a", None), row("b", None)])
    of = task("qmsum", tmp_path)
    assert [example["references"] for example in of.examples("test")] == [[], []]
    with pytest.raises(ConfigError, match="test split of 'scrolls_qmsum' is published without answers"):
        of.evaluate("test", ["x", "y"])


def test_metrics_are_those_of_scrolls_and_of_the_paper(tmp_path):
    for name in NAMES[2:]:
        write(tmp_path / name / "validation.jsonl", [row("a", "the red cat"), row("a", "blue", k=1)])
    score = lambda name: task(name, tmp_path).evaluate("validation", ["A red cat sat."])
    assert score("contract_nli") == {"exact_match": 0}
    assert set(score("gov_report")) == {"rouge1", "rouge2", "rougeL", "geometric_mean"}
    found = score("narrative_qa")
    assert found["f1"] == pytest.approx(80) and found["rougeL"] == pytest.approx(200 * 2 / 7)


# ------ QuALITY

QUESTION = (
    "What does (B) mean?\n\n (A) A  letter\n (B) Not (A), nor (C)\n (C) Two\nlines\n (D) 好\n\n\n"
    "The text.\n\n (A) is no choice\n (B) no\n (C) no\n (D) no\n\nEnd."
)


def test_choices_stand_between_question_and_text(tmp_path):
    rows = [row("a", "Not (A), nor (C)", QUESTION), row("b", "Two lines", QUESTION)]
    write(tmp_path / "quality" / "validation.jsonl", rows)
    write(tmp_path / "quality" / "test.jsonl", [row("a", None, QUESTION)])
    of = task("quality", tmp_path)
    first, second = of.examples("validation")
    assert of.kind == "rank"
    assert first["choices"] == ["A letter", "Not (A), nor (C)", "Two lines", "好"]
    assert (first["answer"], second["answer"]) == ([1], [2])
    assert of.evaluate("validation", [[-3, -1, -2, -9], [-1, -2, -2.5, -9]]) == {"accuracy": 50}
    halved = of.evaluate("validation", [[-3, -1, -2, -9], [-1, -2, -2.5, -9]], lengths=[[1, 1, 1, 1],
                                                                                      [1, 1, 5, 1]])
    assert halved == {"accuracy": 100}
    assert of.evaluate("validation", ["not a, nor c", "wrong"]) == {"exact_match": 50}
    assert of.examples("test")[0]["answer"] == []
    with pytest.raises(ConfigError, match="without answers"):
        of.evaluate("test", [[1, 2, 3, 4]])


def test_quality_without_choices_gets_a_sentence(tmp_path):
    write(tmp_path / "quality" / "validation.jsonl",
          [row("a", "x", "No choices\n\ntext"), row("b", "absent", QUESTION)])
    examples = task("quality", tmp_path).examples("validation")
    with pytest.raises(ValueError, match="'a' does not have the four choices"):
        examples[0]
    with pytest.raises(ValueError, match="answer 'absent' of the QuALITY question 'b' is none of its"):
        examples[1]


# ------ Bad files and TensorFlow Datasets


def test_broken_files_get_a_sentence_with_file_and_line(tmp_path):
    path = tmp_path / "qasper" / "validation.jsonl"
    write(path, [row("a", "x")])
    path.write_text(path.read_text() + "{not json\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*qasper/validation.jsonl is broken JSON"):
        task("qasper", tmp_path).examples("validation")
    write(path, [{"id": "a", "pid": "a_0", "question": "x", "output": "y"}])
    with pytest.raises(ValueError, match="has no column 'input'; its columns are id, pid, question"):
        task("qasper", tmp_path).examples("validation")
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="There is no record"):
        task("qasper", tmp_path).examples("validation")


def test_records_prepared_by_tensorflow_datasets_are_read(tmp_path, monkeypatch):
    rows = [row("a", "one"), row("b", "ü"), row("a", "two", k=1)]
    versions = {"1.0.0": rows[:1], "1.10.0": rows, "1.9.0": rows[:2], "1.10.0.incomplete7C2": rows[:1]}
    for version, those in versions.items():
        folder = tmp_path / "scrolls" / "qasper" / version
        folder.mkdir(parents=True)
        write_tfrecords(folder / "scrolls-validation.tfrecord", those, 2)
        test = [{**x, "output": ""} for x in those]
        write_tfrecords(folder / "scrolls-test.tfrecord", test)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("FAMX_DATA_DIR", raising=False)
    of = famx.data.get("scrolls_qasper")
    found = {x["id"]: sorted(x["references"]) for x in of.examples("validation")}
    assert found == {"a": ["one", "two"], "b": ["ü"]}
    assert [x["references"] for x in of.examples("test")] == [[], []]
