"""A user's own JSON lines: whole texts, or inputs and targets."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import famx.data
from famx.base import gin_utils
from famx.data import ContinuousLanes, WordVocabulary
from famx.data.formats.own_records import __doc__ as DOC
from famx.data.formats.own_records import own_records


def write(path, rows, newline="\n"):
    path.write_bytes("".join(json.dumps(row) + newline for row in rows).encode())
    return str(path)


def test_texts_are_documents(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"Text {i} 🙂", "n": i} for i in range(50)], "\r\n")
    task = famx.data.get("own_records", files=path, validation_fraction=0.2)
    parts = [[x["targets"] for x in task.examples(split)] for split in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == sorted(f"Text {i} 🙂" for i in range(50))
    assert 2 <= len(parts[1]) <= 25
    tokens, weights = task[0]
    assert task.vocab.decode(tokens) == parts[0][0] and (weights == 1).all()
    write(tmp_path / "a.jsonl", [{"text": f"Text {i} 🙂"} for i in range(60)])
    more = [x["targets"] for x in own_records(path, validation_fraction=0.2).examples("validation")]
    assert [x for x in more if int(x.split()[1]) < 50] == parts[1]


def test_inputs_and_targets_carry_the_loss_on_the_targets(tmp_path):
    rows = [{"q": "a b", "r": ["b", "c"]}, {"q": "b", "r": "a"}]
    train, held = (write(tmp_path / name, rows) for name in ("train.jsonl", "held.jsonl"))
    task = own_records(train, inputs="q", targets="r", validation_files=held, split="validation",
                     vocabulary=WordVocabulary(["a", "b", "c"]))  # fmt: skip
    assert task.kind == "generation" and len(task) == len(task.examples("train")) == 2
    tokens, weights = task[0]
    assert tokens.tolist() == [4, 5, 5, 2] and weights.tolist() == [0, 0, 1, 1]
    assert tokens.dtype == np.int32 and weights.dtype == np.float32
    assert task.evaluate("validation", ["c", "x"])["accuracy"] == 50
    batch = next(ContinuousLanes(task, 1, 8))
    assert batch["decoder_loss_weights"].sum() == 2


def test_bad_records_get_a_sentence(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"body": "x", "inputs": "y"}])
    with pytest.raises(ValueError, match="neither a column 'text' nor both 'inputs' and 'targets'; their "
                                         "columns are body, inputs"):  # fmt: skip
        own_records(path)
    path = write(tmp_path / "a.jsonl", [{"text": "x"}, {"text": None}])
    with pytest.raises(ValueError, match="Column 'text' contains 'None', which is not text"):
        own_records(path, validation_files=path).examples("train")[1]
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text"\n')
    with pytest.raises(ValueError, match="Line 2 of .*a.jsonl is broken JSON"):
        own_records(path, validation_files=path).examples("train")[1]
    with pytest.raises(ValueError, match="No file matches"):
        own_records(str(tmp_path / "none*"))
    with pytest.raises(ValueError, match="below 1"):
        own_records(path, validation_fraction=1.0)
    with pytest.raises(ValueError, match="validation split has none of 1 records"):
        own_records(write(tmp_path / "b.jsonl", [{"text": "x"}])).examples("validation")


def test_lone_halves_of_surrogate_pairs_are_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}\n')
    task = own_records(str(path), validation_files=str(path))
    assert task.vocab.decode(task[0][0]) == "a\N{REPLACEMENT CHARACTER} b 😀"


@pytest.mark.slow
def test_the_gin_lines_of_the_docstring_train(tmp_path):
    write(tmp_path / "a.jsonl", [{"inputs": f"{i} and ", "targets": "one"} for i in range(30)])
    lines = [line for line in DOC.splitlines() if line.startswith("    ")]
    text = textwrap.dedent("\n".join(lines)).replace("/data/*.jsonl", str(tmp_path / "*.jsonl"))
    (tmp_path / "own.gin").write_text(text.replace("1024", "32"))
    args = [f"MODEL_DIR='{tmp_path}/model'", "BATCH_SIZE=2", "TRAIN_STEPS=2"]
    result = subprocess.run(
        [sys.executable, "-m", "famx.train", f"--gin_file={tmp_path}/own.gin",
         *(f"--gin.{arg}" for arg in args)],
        cwd=gin_utils.gin_root(), env={**os.environ, "JAX_PLATFORMS": "cpu"}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "model" / "checkpoint_2").is_dir() and len(lines) == 9
