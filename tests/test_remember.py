"""`benchmarks.remember` and `benchmarks.memory_choices` from end to end at tiny sizes."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tiny import make_model, make_params
from trained import write_model_dir

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.data.vocabularies import ByteVocabulary
from famx.memories import Fam
from famx.model_dir.loading import load_model
from famx.modules import Memory

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import memory_choices, remember  # noqa: E402

TINY = remember.Size(
    stages=(
        {"steps": 2, "block_size": 64, "blocks": 4, "batch_size": 2, "options": {"header": False},
         "memory": remember.LEARNING},
        {"state_passing": "aged", "curriculum": {"blocks": (4, 6)}},
    ),
    steps=4,
    memory=Fam(2, update="gated"),
    settings={**memory_choices.ON_CPU, "Lora.rank": 2, "warmup_cosine.warmup_steps": 1},
    twin_steps=2,
    lengths=(6, 8),
    examples=2,
    texts=1,
    text_blocks=3,
)  # fmt: skip


def make_base(directory) -> str:
    model = make_model(memory=Memory(), vocabulary=ByteVocabulary(), block_size=64)
    return write_model_dir(directory, model, make_params(model.module), ByteVocabulary())


@pytest.mark.slow
def test_a_model_is_trained_and_evaluated_beside_its_twin(tmp_path, monkeypatch, capsys):
    make_base(tmp_path / "base")
    monkeypatch.setitem(remember.SIZES, "cpu", TINY)
    arguments = [f"--to={tmp_path}", "--size=cpu", "--memory=fam:length=2,update=gated", "--seed=3"]
    remember.main(arguments)
    found = json.loads((tmp_path / "remember.json").read_text())
    assert found["memory"]["update"] == "gated" and found["seed"] == 3
    fam, twin = found["fam"], found["bswa"]
    assert (fam["steps"], fam["stages"], twin["steps"]) == (4, {"1": 2, "2": 4}, 2)
    assert fam["exact_match"].keys() == {
        how + probe for probe in remember.PROBES for how in ("", "zeroed ")
    }
    assert twin["exact_match"].keys() == set(remember.PROBES)
    assert fam["exact_match"]["hold"].keys() == {"6", "8"}
    for run in (fam, twin):
        for probe, row in run["exact_match"].items():
            assert run["answer_loss"][probe].keys() == row.keys()
            assert all(loss > 0 for loss in run["answer_loss"][probe].values())
    losses = found["plain_text"]
    assert list(losses) == [
        "pretrained, whole text", "pretrained, blocks apart", "fam, untrained", "fam, trained",
        "bswa, trained",
    ]  # fmt: skip
    # All read the first block alike, except for the prompt; what comes later depends on what is seen.
    whole, apart = (losses[f"pretrained, {how}"] for how in ("whole text", "blocks apart"))
    assert whole[0] == pytest.approx(apart[0], abs=1e-5) and whole[1] != apart[1]
    assert np.isfinite([*losses.values()]).all()

    model = load_model(str(tmp_path / "fam")).model
    assert model.config.memory == Fam(2, update="gated") and model.config.memory_segments == 0
    assert load_model(str(tmp_path / "bswa")).model.config.memory == Memory()
    assert "zeroed hold" in (tmp_path / "remember.md").read_text()
    assert (tmp_path / "remember.png").exists()
    assert "pretrained, whole text" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_out_of_time_is_evaluated_where_it_stopped(tmp_path):
    make_base(tmp_path / "base")
    size = dataclasses.replace(TINY, steps=10**6, twin_steps=0, train_minutes=0.0)
    found = remember.remember(tmp_path, size, Fam(2), "normal", 0)
    assert found["fam"]["steps"] < 10**6
    assert found["fam"]["exact_match"]["hold"].keys() == {"6", "8"}


@pytest.mark.slow
def test_a_run_that_continues_is_evaluated_again(tmp_path):
    make_base(tmp_path / "base")
    size = dataclasses.replace(TINY, steps=10**6, twin_steps=0, train_minutes=0.0)
    remember.remember(tmp_path, size, Fam(2), "normal", 0)
    scores = tmp_path / "fam" / "passkey.json"
    scores.write_text(scores.read_text().replace('"examples": 2', '"examples": 99'))
    remember.remember(tmp_path, size, Fam(2), "normal", 0)
    assert json.loads(scores.read_text())["examples"] == 2


def test_a_stopped_training_is_not_evaluated(tmp_path, monkeypatch):
    make_base(tmp_path / "base")
    size = dataclasses.replace(TINY, twin_steps=0)
    call = gin_utils.call_with
    stopped = lambda train, gin_files, given: call(train, gin_files, given | {"run.Run.minutes": 0.0})
    monkeypatch.setattr(gin_utils, "call_with", stopped)
    with pytest.raises(SystemExit, match="Training stopped at step .; the same command continues."):
        remember.remember(tmp_path, size, Fam(2), "normal", 0)
    assert not (tmp_path / "fam" / "passkey.json").exists()


class _Begins(Exception):
    """Raised where a run would begin."""


SIZES = [remember.SIZES["gpu"], memory_choices.SIZES["twin"]]


@pytest.mark.parametrize("size", SIZES, ids=["gpu", "twin"])
def test_the_stages_pass_all_checks(size, tmp_path, monkeypatch):
    """Except for those of the size "cpu", whose blocks are too short for a header in bytes."""
    size = dataclasses.replace(size, settings={**size.settings, "Lora.rank": 2})  # of narrow layers

    def begin(stages, *args):
        updates = [stage.run.model.config.memory.update for stage in stages]
        first = size.stages[0].get("memory", {}).get("update", size.memory.update)
        assert updates == [first] + [size.memory.update] * (len(size.stages) - 1)
        raise _Begins

    make_base(tmp_path / "base")
    monkeypatch.setattr(remember.loop, "_begin_or_resume", begin)
    monkeypatch.setattr(remember.Loss, "before", lambda *args: {})  # of long blocks, it takes a while
    with pytest.raises(_Begins):
        remember.remember(tmp_path, size, size.memory, "text", 0)


def test_the_memory_is_that_of_the_size(tmp_path, monkeypatch):
    make_base(tmp_path / "base")
    given = []
    monkeypatch.setattr(remember, "remember", lambda to, size, memory, *rest: given.append(memory))
    monkeypatch.setattr(remember, "write", lambda *args: "")
    for arguments in ([], ["--memory=fam:length=5"]):
        remember.main([f"--to={tmp_path}", "--size=cpu", *arguments])
    assert given == [remember.SIZES["cpu"].memory, Fam(5)]


def test_nothing_to_train_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="There is no model in .*: add --from"):
        remember.main([f"--to={tmp_path}"])
    make_base(tmp_path / "base")
    with pytest.raises(ConfigError, match="only memories of the kind fam"):
        remember.main([f"--to={tmp_path}", "--memory=infini"])


def test_a_table_of_nothing_is_one_sentence(tmp_path):
    base = make_base(tmp_path / "base")
    for arguments in (["--tables"], ["--only=no such choice"]):
        with pytest.raises(ConfigError, match="has no results of these choices: check --only"):
            memory_choices.main([f"--base={base}", f"--to={tmp_path / 'cells'}", *arguments])
    assert not (tmp_path / "cells").exists()


def test_a_mistake_on_the_command_line_exits_with_one_sentence(tmp_path):
    commands = {
        "remember": [f"--to={tmp_path}"],
        "memory_choices": [f"--base={tmp_path}", f"--to={tmp_path / 'to'}"],
        "memory_start": [f"--checkpoint={tmp_path}"],
    }
    for name, arguments in commands.items():
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "", done
        assert done.stderr.startswith("error: ") and str(tmp_path) in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_the_step_that_reached_the_exact_match_is_smoothed(tmp_path):
    scores = [(2, 1.0)] * 5 + [(4, 0.0), *[(4, 1.0)] * 40]  # over 2 blocks, and over 4
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step, (blocks, score) in enumerate(scores, 1):
            line = {"step": step, "split": "train", "blocks": blocks, "exact_match": score}
            file.write(json.dumps(line) + "\n")
    # 1 - 0.9^n is at least 0.95 from n 29 on.
    assert remember._reached(tmp_path) == 6 + 29
    (tmp_path / "metrics.jsonl").write_text("")
    assert remember._reached(tmp_path) is None


@pytest.mark.slow
def test_choices_are_measured_once_and_tabulated(tmp_path, monkeypatch, capsys):
    base = make_base(tmp_path / "base")
    size = dataclasses.replace(TINY, twin_steps=0)
    monkeypatch.setitem(memory_choices.SIZES, "twin", size)
    choices = [choice for choice in memory_choices.CHOICES if choice in (({}, "text"), ({}, "bos"))]
    monkeypatch.setattr(memory_choices, "CHOICES", choices)
    page = tmp_path / "page.md"
    page.write_text("<!-- table: memory_choices_twin -->\n<!-- end -->\n")
    arguments = [f"--base={base}", f"--to={tmp_path / 'cells'}", f"--markdown={page}", "--seeds"]
    memory_choices.main([*arguments, "0", "1"])
    results = sorted((tmp_path / "cells").glob("*/*/remember.json"))
    assert [f"{path.parts[-3]}/{path.parts[-2]}" for path in results] == [
        "prompt_bos/0", "prompt_bos/1", "prompt_text/0", "prompt_text/1",
    ]  # fmt: skip
    written = [path.stat().st_mtime_ns for path in results]
    memory_choices.main([*arguments, "0", "1"])
    assert written == [path.stat().st_mtime_ns for path in results]
    assert "prompt bos" in page.read_text() and "hold, 8" in capsys.readouterr().out
    results[0].unlink()
    memory_choices.main([*arguments, "0", "1", "2", "--tables"])
    cells = [[x.strip() for x in row.split("|")[1:3]] for row in page.read_text().splitlines()]
    assert ["prompt bos", "1"] in cells and ["prompt text", "2"] in cells
    assert not results[0].exists() and not (tmp_path / "cells" / "prompt_bos" / "2").exists()


def test_rows_have_the_median_and_the_range_of_the_seeds():
    size = memory_choices.SIZES["twin"]

    def result(steps, before, after, hold):
        scores = {str(n): hold for n in size.lengths}
        text = {"fam, untrained": [9.0, before, before], "fam, trained": [9.0, after, after]}
        return {"fam": {"reached": steps, "exact_match": {"hold": scores}}, "plain_text": text}

    found = [result(30, 1.0, 2.0, 0.5), result(10, 3.0, 2.0, 0.7), result(None, 2.0, 2.0, 0.6)]
    (row,) = memory_choices.rows([("a", x) for x in found], size)
    assert row["memory"] == "a" and row["seeds"] == 3
    assert row["loss before"] == "2.00 [1.00, 3.00]" and row["loss after"] == "2.00"
    assert row["steps to 0.95"] == "30 [10, never]" and row["hold, 4"] == "0.60 [0.50, 0.70]"
    assert "never" in memory_choices.rows([("a", found[2])], size)[0]["steps to 0.95"]
