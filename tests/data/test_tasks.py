"""Text tasks: documents with loss on the answer alone, where records are looked for, scores."""

import dataclasses
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import famx.data
from famx.base.errors import ConfigError
from famx.data import ByteVocabulary, ContinuousLanes, TextTask, WordVocabulary
from famx.data.metrics import token_f1
from famx.data.rows.packing import PackedRows
from famx.data.storage import complete_shards, write_tfrecords
from famx.data.tasks.examples import CUTS, cut_tokens, encode_example


class Folder:
    """Official records of a made-up format: the file `SPLIT` holds their number."""

    def __init__(self, folder, split):
        path = os.path.join(folder, split)
        if not os.path.isfile(path):
            raise FileNotFoundError(None, "missing", path)
        with open(path) as file:
            self.size = int(file.read())

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"q": f"Question {i}? ", "a": [f"answer {i}", "other"] if i % 3 else []}


def preprocess(record):
    answers = record["a"]
    return {"inputs": record["q"], "targets": answers[0] if answers else "", "references": answers}


TASK = TextTask(
    name="made_up", kind="generation", open_split=Folder, preprocess=preprocess, metrics=(token_f1,),
    splits=("train", "validation"), folders=("first", "second"), published="nowhere",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FAMX_DATA_DIR", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    for name, split, size in (("second", "train", 5), ("first", "validation", 4),
                              ("second", "validation", 3)):  # fmt: skip
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / split).write_text(str(size))
    return tmp_path


# ------ Documents


@given(st.text(max_size=20), st.text(max_size=20), st.integers(1, 60), st.sampled_from(CUTS))
def test_a_document_is_inputs_targets_and_eos_and_never_loses_the_targets(inputs, targets, size, cut):
    vocab = ByteVocabulary()
    tokens, weights = encode_example(inputs, targets, vocab, size, cut)
    answer = [*vocab.encode(targets), vocab.eos_id]
    prompt = vocab.encode(inputs)
    room = max(0, size - len(answer))
    head = -(-room // 2) if cut == "middle" else 0
    kept = prompt if len(prompt) <= room else prompt[:head] + prompt[len(prompt) - (room - head):]
    assert tokens.tolist() == kept + answer
    assert weights.tolist() == [0] * len(kept) + [1] * len(answer)
    assert (tokens.dtype, weights.dtype) == (np.int32, np.float32)
    assert len(tokens) <= max(size, len(answer))


def test_cutting_keeps_both_ends_or_the_end():
    tokens = np.arange(9)
    assert cut_tokens(tokens, 4, "middle").tolist() == [0, 1, 7, 8]
    assert cut_tokens(tokens, 5, "middle").tolist() == [0, 1, 2, 7, 8]
    assert cut_tokens(tokens, 1, "middle").tolist() == [0]
    assert cut_tokens(tokens, 4, "left").tolist() == [5, 6, 7, 8]
    for cut in ("left", "middle"):
        assert cut_tokens(tokens, 0, cut).tolist() == []
        assert cut_tokens(tokens, 9, cut) is tokens


def test_lanes_and_packed_rows_take_the_task_and_its_documents(folder):
    task = dataclasses.replace(TASK, data_dir=str(folder))
    assert len(task) == 5
    documents = task.documents("train", max_tokens=12, cut="left")
    total = sum(len(tokens) for tokens, _ in documents)
    for source, size in ((task, sum(len(x) for x, _ in task)), (documents, total)):
        for reader in (ContinuousLanes, PackedRows):
            rows = reader(source, batch_size=1, length=size)
            seen = [next(rows) for _ in range(1 if reader is PackedRows else 5)]
            weights = sum(row["decoder_loss_weights"].sum() for row in seen)
            assert weights == sum(w.sum() for _, w in source)
    tokens, weights = task[1]
    assert task.vocab.decode(tokens) == "Question 1? answer 1" and weights.sum() == len("answer 1") + 1


def test_the_vocabulary_is_the_tasks_or_the_one_given(folder):
    words = WordVocabulary(["answer", "Question"])
    task = dataclasses.replace(TASK, data_dir=str(folder), vocabulary=words)
    assert task.vocab == words
    expected = [5, *words.encode("1 ?"), 4, *words.encode("1"), words.eos_id]
    assert task[1][0].tolist() == expected
    assert task.documents("train", vocabulary="bytes")[1][0].max() > 20


# ------ Where records lie


def test_folders_are_looked_into_in_order_and_splits_apart(folder, monkeypatch):
    task = dataclasses.replace(TASK, data_dir=str(folder))
    assert (len(task.examples("train")), len(task.examples("validation"))) == (5, 4)
    monkeypatch.setenv("FAMX_DATA_DIR", str(folder))
    assert len(TASK.examples("train")) == 5
    assert len(dataclasses.replace(TASK, folders=(lambda: None, lambda: "second")).examples("train")) == 5
    absolute = dataclasses.replace(TASK, folders=(str(folder / "second"),))
    monkeypatch.delenv("FAMX_DATA_DIR")
    assert len(absolute.examples("validation")) == 3


def test_prepared_records_come_first_if_they_are_complete(folder):
    task = dataclasses.replace(TASK, data_dir=str(folder))
    official = list(task.examples("train"))
    (folder / "made_up").mkdir()
    paths = write_tfrecords(task.prepared_name("train"), official[:2] + official[3:], 2)
    found = list(task.examples("train"))
    assert sorted(x["inputs"] for x in found) == sorted(x["inputs"] for x in official[:2] + official[3:])
    by_inputs = {x["inputs"]: x for x in official}
    for x in found:
        assert {k: v for k, v in x.items() if k != "id"} == by_inputs[x["inputs"]]
    os.remove(paths[1])
    assert complete_shards(task.prepared_name("train")) == []
    assert list(task.examples("train")) == official


def test_rank_examples_survive_preparation(folder):
    example = {"id": "7", "inputs": "", "targets": "b", "references": ["b"], "choices": ["é", "b"],
               "answer": [1]}  # fmt: skip
    other = example | {"references": [], "answer": [], "targets": "", "choices": ["a"]}
    both = example | {"references": ["b", "b"], "answer": [0, 1]}
    task = dataclasses.replace(TASK, kind="rank", data_dir=str(folder))
    (folder / "made_up").mkdir()
    write_tfrecords(task.prepared_name("validation"), [example, other, both])
    assert list(task.examples("validation")) == [example, other, both]


def test_missing_data_gets_a_sentence_with_the_command(folder):
    with pytest.raises(ConfigError, match="needs a data directory, and none is set: set data_dir or"):
        TASK.examples("train")
    task = dataclasses.replace(TASK, data_dir=str(folder / "none"), tfds="made_up")
    with pytest.raises(ConfigError) as error:
        task.examples("train")
    for part in ("none/first/train, which is not there", "Published: nowhere", "`tfds build made_up`",
                 f"famx prepare --task made_up --source DOWNLOAD --data_dir {folder}/none"):
        assert part in str(error.value)
    installed = dataclasses.replace(TASK, package="the package x", folders=(lambda: None,))
    with pytest.raises(ConfigError, match="'made_up' is not there; install the package x"):
        installed.examples("train")


def test_bad_settings_get_a_sentence(folder):
    task = dataclasses.replace(TASK, data_dir=str(folder))
    with pytest.raises(ConfigError, match="no split 'valid'; the nearest name is 'validation'"):
        task.examples("valid")
    for option, sentence in (
        ({"kind": "x"}, "kind must be one"), ({"max_tokens": 0}, "at least 1"), ({"cut": "right"}, "cut"),
        ({"split": "x"}, "no split 'x'"), ({"vocabulary": "x"}, "is not a vocabulary"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            dataclasses.replace(task, **option)
    with pytest.raises(IndexError, match="Example 5 is not one of 5"):
        task.examples("train")[5]
    with pytest.raises(ValueError, match="The nearest name is 'scrolls_qasper'"):
        famx.data.get("scroll_qasper")
    with pytest.raises(ConfigError, match="no option 'data_dri'. Did you mean data_dir"):
        famx.data.get("scrolls_qasper", data_dri="x")


# ------ Scores


def test_scores_are_over_the_references_of_the_examples_asked_for(folder):
    task = dataclasses.replace(TASK, data_dir=str(folder))
    assert task.evaluate("train", ["other", "x"], indices=[1, 2]) == {"f1": 50}
    assert task.evaluate("train", ["answer 4"], indices=np.array([4])) == {"f1": 100}
    with pytest.raises(ConfigError, match="published without answers"):
        task.evaluate("train", ["x"] * 5)
    with pytest.raises(ValueError, match="2 predictions were given for 5 examples of the train split"):
        task.evaluate("train", ["x", "y"])
    with pytest.raises(ValueError, match="give at least one"):
        task.evaluate("train", [], indices=[])
