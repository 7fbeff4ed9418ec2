"""`python -m famx.train` as a user runs it: the main job cut short, interruption, bad input."""

import json
import os
import re
import signal
import subprocess
import sys

import gin
import pytest
import xla_flags
from absl import flags
from gin import config as gin_config
from processes import free_address, start_process

from famx import train
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.model_dir.identity import check_same_model
from famx.training import loop, speed
from famx.training.run_log import read_metrics

ROOT = gin_utils.gin_root()
EXAMPLE = "gin_configs/examples/passkey_aged.gin"
MAIN = "gin_configs/examples/passkey_tiny.gin"  # the README's
STEPS = 150
SMALL = (
    f"TRAIN_STEPS={STEPS}",
    "BATCH_SIZE=2",
    "DecoderConfig.num_layers=1",
    "DecoderConfig.embed_dim=16",
    "DecoderConfig.num_heads=2",
    "DecoderConfig.mlp_dim=32",
    "warmup_stable_decay.warmup_steps=2",
    "warmup_stable_decay.decay_steps=20",
    "Every.log=10",
    "Every.evaluation=100",
    "PasskeyEvaluation.blocks=(4,)",
    "PasskeyEvaluation.report_blocks=(4, 8)",
    "PasskeyEvaluation.examples=4",
)


def arguments(model_dir, *bindings, file=EXAMPLE):
    bindings = (f"MODEL_DIR='{model_dir}'", *SMALL, *bindings)
    return [f"--gin_file={file}", *(f"--gin.{binding}" for binding in bindings)]


def start(*args, **env):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **env}
    return start_process(
        [sys.executable, "-m", "famx.train", *args], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def history(model_dir):
    times = ("time", *speed.NAMES)
    lines = read_metrics(str(model_dir))
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


@pytest.mark.slow
def test_the_main_job_whole_and_interrupted(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(*arguments(whole, file=MAIN))
    _, text = process.communicate()
    assert process.returncode == 0, text
    assert "Traceback" not in text and "famx: error" not in text
    assert f"train step {STEPS}/{STEPS}" in text
    table = text.index("Exact match over 4 fresh documents per cell, streamed:")
    table = text[table:].splitlines()
    probes = ["hold", "hold_unaligned", "hold_repeated", "overwrite"]
    assert table[1].split() == ["blocks", "tokens", *probes]
    assert [row.split()[:2] for row in table[2:4]] == [["4", "128"], ["8", "256"]]
    result = json.loads((whole / "passkey.json").read_text())
    assert result["block_size"] == 32 and set(result["exact_match"]) == set(table[1].split()[2:])
    assert set(result["exact_match"]["hold"]) == {"4", "8"}
    assert (whole / "passkey.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "run.Run:\n" in (whole / "config.gin").read_text()
    assert "steps = " in (whole / "config.gin").read_text()

    process = start(*arguments(cut, file=MAIN))
    for line in process.stderr:
        if line.startswith("train step 20/"):
            break
    process.send_signal(signal.SIGTERM)
    text = process.stderr.read()
    assert process.wait() == 143, text
    assert "the same command resumes from there" in text, "ended before the signal came"
    stopped = int(text.split("Stopped at step ")[1].split(";")[0])
    assert 20 <= stopped < STEPS and (cut / f"checkpoint_{stopped}" / "state").is_dir()
    assert not (cut / "passkey.json").exists()

    process = start(*arguments(cut, file=MAIN))
    _, text = process.communicate()
    assert process.returncode == 0 and f"Resuming from step {stopped} of {cut}." in text, text
    assert history(cut) == history(whole)
    assert json.loads((cut / "passkey.json").read_text()) == result


@pytest.mark.slow
def test_the_twin_without_memory(tmp_path):
    file = "gin_configs/examples/passkey_tiny_bswa.gin"
    few = ("TRAIN_STEPS=22", "MEMORY_SEGMENTS=2", "PasskeyEvaluation.report_blocks=(4,)")
    process = start(*arguments(tmp_path, *few, file=file))
    _, text = process.communicate()
    assert process.returncode == 0, text
    result = json.loads((tmp_path / "passkey.json").read_text())
    assert result["memory_config"] == {"kind": "none"} and result["memory_segments"] == 2
    assert (tmp_path / "checkpoint_22" / "state").is_dir()


@pytest.mark.slow
def test_own_text(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"{i} and the rest of the text. " * 40)
    sizes = ("num_layers=1", "embed_dim=16", "num_heads=2", "mlp_dim=32", "block_size=32")
    process = start(
        "--gin_file=gin_configs/examples/own_text.gin",
        f"--gin.MODEL_DIR='{tmp_path / 'run'}'",
        f"--gin.TEXT_FILES='{tmp_path}/*.txt'",
        "--gin.TRAIN_STEPS=55",
        "--gin.TASK_FEATURE_LENGTHS={'targets': 64}",
        "--gin.TextEvaluation.length=64",
        *(f"--gin.DecoderConfig.{size}" for size in sizes),
    )
    _, text = process.communicate()
    assert process.returncode == 0, text
    last = read_metrics(str(tmp_path / "run"), "eval")[-1]
    assert last["step"] == 55 and 0 < last["bits_per_token"] < 8.5 and 0 <= last["accuracy"] <= 1


# ---------------------------------------------------------------- the task is given once


class _Begins(Exception):
    """Raised where training would begin."""


@pytest.fixture
def opened(monkeypatch, capsys):
    """A function that runs famx.train up to its first step: the run, its training task, and its log."""

    begun = []

    def begin(stages, data, *args):
        source = getattr(data.feeds[-1], "source", None)  # lanes have none
        begun.append((stages[-1].run, source and source.task, data.notes))
        raise _Begins

    def call(*args):
        _forget()
        monkeypatch.setattr(loop, "_begin_or_resume", begin)
        monkeypatch.setattr(sys, "argv", ["train", *args])
        with pytest.raises(_Begins):
            gin_utils.run(train.main, train.define_flags, argument="gin_file")
        return begun.pop()

    yield call
    _forget()


@pytest.mark.parametrize("binding, field, value", [
    ("PasskeyTask.header=True", "header", True),
    ("PasskeyTask.digits=3", "digits", 3),
    ("TASK_OPTIONS={'digits': 2}", "digits", 2),
    ("MIXTURE_OR_TASK_NAME='passkey'", "digits", 5),
])  # fmt: skip
def test_a_change_of_the_task_changes_training_and_evaluation(opened, tmp_path, binding, field, value):
    longer = "Curriculum.blocks=(4, 8)"  # the header takes room
    run, task, notes = opened(*arguments(tmp_path, binding, longer))
    assert not notes and getattr(task, field) == value
    assert task.filler == "mixed" and task.second_key == 0.7
    evaluated = run.evaluation._task(run.model, "hold")
    assert getattr(evaluated, field) == value and evaluated.header == task.header
    assert run.evaluation.task == task


def test_an_evaluation_with_a_task_of_its_own_says_so(opened, tmp_path):
    own = "PasskeyEvaluation.task=@own/PasskeyTask()"
    run, task, (note,) = opened(*arguments(tmp_path, own, "own/PasskeyTask.digits=2"))
    assert (task.digits, run.evaluation.task.digits) == (5, 2)
    assert note == (
        "PasskeyEvaluation has a task of its own: settings of the task that is trained on do not"
        " change it."
    )


def test_a_binding_that_an_option_overrides_is_refused(bad_input, tmp_path):
    sentence = bad_input(*arguments(tmp_path, "TASK_OPTIONS={'header': False}"))
    assert sentence.startswith("The binding PasskeyTask.header has no effect in this run")


# ---------------------------------------------------------------- first tweaks


def names_in(notes):
    """What the command line sets, and whose settings have no effect, of the notes in the log."""
    pattern = r"(\S+) is replaced: the settings of (\S+) in the gin files, such as "
    return [match.groups() for note in notes if (match := re.match(pattern, note))]


@pytest.mark.parametrize("tweaks, replaced", [
    (["LEARNING_RATE=1e-3"], [("LEARNING_RATE", "warmup_stable_decay")]),
    (["LEARNING_RATE=1e-3", "TRAIN_STEPS=5"], [("LEARNING_RATE", "warmup_stable_decay")]),
    (["LEARNING_RATE=@schedules.constant_rate()", "schedules.constant_rate.learning_rate=1e-3"],
     [("LEARNING_RATE", "warmup_stable_decay")]),
    (["warmup_stable_decay.learning_rate=1e-3"], []),
    (["OPTIMIZER=@lion()"], [("OPTIMIZER", "adamw")]),
    (["BATCH_SIZE=1"], []),
    (["BATCH_SIZE=3"], []),
    (["Run.evaluation=None"], [("Run.evaluation", "PasskeyEvaluation")]),
    (["run.Run.evaluation=None", "Data.curriculum=None", "TASK_FEATURE_LENGTHS={'targets': 96}",
      "STAGES=()"],
     [("Run.evaluation", "PasskeyEvaluation"), ("Data.curriculum", "Curriculum")]),
    (["DecoderConfig.memory=@modules.Memory()"], [("DecoderConfig.memory", "Fam")]),
    (["DecoderConfig.memory=@infini.Infini()", "Infini.delta=True"], [("DecoderConfig.memory", "Fam")]),
    (["TRAIN_STEPS=50", "warmup_stable_decay.warmup_steps=5", "warmup_stable_decay.decay_steps=22"], []),
], ids=str)  # fmt: skip
def test_a_tweak_of_an_example_begins(opened, tmp_path, tweaks, replaced):
    bindings = [f"MODEL_DIR={tmp_path}", *tweaks]
    _, _, notes = opened("passkey_tiny", *(f"--gin.{binding}" for binding in bindings))
    assert sorted(names_in(notes)) == sorted(replaced)


@pytest.mark.parametrize(
    "example",
    ["own_text", "own_text_bswa", "own_text_short", "passkey_short", "passkey_tiny_bswa", "recall_tiny",
     "multikey_tiny"],
)
def test_other_examples_begin_with_few_settings(opened, tmp_path, example):
    steps = ["TRAIN_STEPS=20", "LEARNING_RATE=1e-3", "BATCH_SIZE=8", "Run.evaluation=None"]
    opened(example, *(f"--gin.{binding}" for binding in (f"MODEL_DIR={tmp_path}", *steps)))


def test_a_relative_directory_is_that_of_this_one(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, notes = opened("passkey_tiny", "--gin.MODEL_DIR=runs/x")
    assert notes == (f"MODEL_DIR is {tmp_path}/runs/x.",) and (tmp_path / "runs").is_dir()


@pytest.mark.parametrize("tweaks, sentence", [
    (["TRAIN_STEPS=50"], "steps (50) must be larger than warmup_steps (100). A run of 50 steps can have"
     " --gin.warmup_stable_decay.warmup_steps=5 --gin.warmup_stable_decay.decay_steps=22."),
    (["TRAIN_STEPS=1000"], "decay_steps must be at most steps - warmup_steps (900), not 2100. A run of"
     " 1000 steps can have --gin.warmup_stable_decay.decay_steps=450."),
    (["Run.evaluation=None", "PasskeyEvaluation.examples=4"],
     "The binding PasskeyEvaluation.examples has no effect in this run: "),
    (["train.evaluation=None"],
     "train has no parameter evaluation. Did you mean Every.evaluation or Run.evaluation?"),
], ids=str)  # fmt: skip
def test_a_tweak_that_does_not_fit_names_the_flag(bad_input, tmp_path, tweaks, sentence):
    bindings = [f"MODEL_DIR={tmp_path}", *tweaks]
    assert bad_input("passkey_tiny", *(f"--gin.{x}" for x in bindings)).startswith(sentence)


def test_the_flag_of_a_setting_that_a_macro_gives_is_that_of_the_macro(bad_input, tmp_path):
    sentence = bad_input("passkey_short", f"--gin.MODEL_DIR={tmp_path}", "--gin.TRAIN_STEPS=25")
    assert sentence.endswith("--gin.warmup_stable_decay.warmup_steps=2 --gin.DECAY_STEPS=11.")


# ---------------------------------------------------------------- bad input


@pytest.fixture
def bad_input(monkeypatch, capsys, tmp_path):
    """A function that runs famx.train in this process and returns its error sentence."""
    monkeypatch.setattr("famx.base.gin_utils.write_operative_config", _never)  # a run writes it first

    def call(*args):
        _forget()
        monkeypatch.setattr(sys, "argv", ["train", *args])
        with pytest.raises(SystemExit) as caught:
            gin_utils.run(train.main, train.define_flags, argument="gin_file")
        error = capsys.readouterr().err
        assert caught.value.code == 2, error
        *before, last = error.strip().splitlines()
        assert last.startswith("famx: error: ") and "Traceback" not in error, error
        assert "In call to" not in error
        return last.removeprefix("famx: error: ")

    yield call
    _forget()


def _never(*args):
    raise AssertionError("training began in spite of bad input")


def _forget():
    """Reset gin and the flags as in a new process."""
    gin.clear_config()
    gin_config._IMPORTS.clear()
    for name in ("gin_file", "gin_bindings", "gin_search_paths"):
        if name in flags.FLAGS:
            flags.FLAGS[name].unparse()


@pytest.mark.parametrize(
    "bindings, sentence",
    [
        (["TRAIN_STPES=5"], "Nothing uses TRAIN_STPES"),
        (["run.Every.checkpont=5"], "Every has no parameter checkpont. Did you mean checkpoint?"),
        (["DecoderConfg.num_layers=1"], "DecoderConfg. Did you mean DecoderConfig?"),
        (["DecoderConfig.num_heads=3"], "embed_dim 16 is not a multiple of num_heads 3; set"),
        (["DecoderConfig.num_kv_heads=3"], "num_heads 2 is not a multiple of num_kv_heads 3."),
        (["DecoderConfig.block_size=0"], "DecoderConfig.block_size must be a whole number of at least"),
        (["Fam.length=33"], "Fam.length 33 exceeds block_size 32"),
        (["DecoderConfig.activation='slu'"], "DecoderConfig.activation must be one of 'silu', "),
        (["TASK_FEATURE_LENGTHS={'targets': 100}"], "must be a multiple of the block size 32"),
        (["Curriculum.blocks=(1, 4)"], "The shortest length of the curriculum is 1 blocks"),
        (["Curriculum.blocks=()"], "Curriculum.blocks must be a tuple or list of whole numbers of at"),
        (["STATE_PASSING='none'"], "or set STATE_PASSING to 'aged'"),
        (["MIXTURE_OR_TASK_NAME='passkey_wrods'"], "The nearest name is 'passkey_words'"),
        (["TASK_OPTIONS={'digits': 0}"], "TASK_OPTIONS['digits'] must be a whole number of at least 1"),
        (["MIXTURE_OR_TASK_NAME='own_text'", "TASK_OPTIONS={'files': '/no/such/*.txt'}"],
         "No file matches '/no/such/*.txt'"),
        (["PasskeyTask.digits=0"], "PasskeyTask.digits must be a whole number of at least 1, not 0."),
        (["PasskeyTask.digits=40"], "A key statement of 40 digits takes"),
        (["DecoderConfig.vocab_size=16"], "raise DecoderConfig.vocab_size"),
        (["mesh.make_mesh.fsdp=3"], "does not fit"),
        (["BATCH_SIZE=0"], "BATCH_SIZE must be a whole number of at least 1, not 0."),
        (["TRAIN_STEPS=0", "LEARNING_RATE=0.1"], "TRAIN_STEPS must be a whole number of at least 1 or"),
        (["MODEL_DIR='/proc/famx/x'"], "MODEL_DIR /proc/famx/x is not writable"),
    ],
)  # fmt: skip
def test_bad_settings(bad_input, tmp_path, bindings, sentence):
    assert sentence in bad_input(*arguments(tmp_path / "run", *bindings))
    # No file is left that would prevent the next attempt.
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_unset_macro(bad_input):
    sentence = bad_input(f"--gin_file={EXAMPLE}")
    assert sentence == "MODEL_DIR is not set: add --gin.MODEL_DIR=/some/dir."


def test_unknown_gin_file(bad_input, tmp_path):
    sentence = bad_input(*arguments(tmp_path, file="gin_configs/examples/passkey_tiney.gin"))
    assert sentence.endswith(f"Did you mean {MAIN}?")


def test_no_gin_file(bad_input):
    sentence = bad_input()
    assert sentence == (
        "No gin file says what to run. A complete command is `famx train passkey_tiny"
        " --gin.MODEL_DIR=/tmp/famx/passkey_tiny`; `famx examples` lists those that come with famx."
    )
    assert bad_input("--gin.TRAIN_STEPS=5") == sentence


@pytest.mark.parametrize("name, near", [
    ("passkey_tniy", " Did you mean passkey_tiny, passkey_tiny_bswa or passkey_short?"),
    ("xyzzy", ""),
    ("pretrain_2b", " Did you mean pretrain_24b, pretrain_8b or pretrain_1b?"),
])  # fmt: skip
def test_a_wrong_name_lists_near_ones(bad_input, name, near):
    sentence = bad_input(name)
    assert sentence == (
        f"There is no gin file {name}.{near} `famx examples` lists those that come with famx."
    )


def test_parameter_without_a_value(bad_input, tmp_path):
    model, file = tmp_path / "model.gin", tmp_path / "run.gin"
    tiny = (ROOT / "gin_configs/models/tiny.gin").read_text()
    model.write_text(tiny.replace("vocab_size = 128", ""))
    example = (ROOT / MAIN).read_text()
    file.write_text(example.replace("gin_configs/models/tiny.gin", str(model)))
    sentence = bad_input(*arguments(tmp_path / "run", file=file))
    name = "DecoderConfig.vocab_size"
    assert sentence == f"{name} is not set: add --gin.{name}=VALUE."


def test_stray_argument(bad_input, tmp_path):
    assert "Unknown argument stray" in bad_input(*arguments(tmp_path), "stray")


def test_model_dir_of_another_model(bad_input, tmp_path):
    check_same_model(tmp_path, {"embed_dim": 64})
    sentence = bad_input(*arguments(tmp_path))
    assert "holds another model, differing in" in sentence
    assert "embed_dim (64 there, 16 here)" in sentence


def test_checkpoint_of_another_shape(bad_input, tmp_path):
    import jax.numpy as jnp

    from famx.model_dir.checkpointer import Checkpointer

    with Checkpointer(tmp_path) as saver:
        saver.save(5, {"target": {"embedding": jnp.ones((128, 64))}})
    sentence = bad_input(*arguments(tmp_path))
    assert f"{tmp_path}/checkpoint_5 holds another model" in sentence


@pytest.mark.slow
def test_a_resume_is_the_same_run(bad_input, tmp_path):
    given = arguments(tmp_path, "TRAIN_STEPS=22", "PasskeyEvaluation.report_blocks=(4,)")
    process = start(*given)
    _, text = process.communicate()
    assert process.returncode == 0, text
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for binding, sentence in (
        ("adamw.b1=0.5", "optimizer.b1 was 0.9 and is now 0.5"),
        ("Aged.groups=9", "state_passing.groups was 8 and is now 9"),
        ("warmup_stable_decay.floor=1e-4", "optimizer.learning_rate.floor was 0.0 and is now 0.0001"),
        ("TASK_OPTIONS={'digits': 3}", "task.digits was 5 and is now 3"),
        ("RANDOM_SEED=4", "random_seed was 0 and is now 4"),
        ("train.allow_changes=('sead',)", "names 'sead', which is no setting of this run."),
    ):
        assert sentence in bad_input(*given, f"--gin.{binding}")
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    process = start(*given, "--gin.RANDOM_SEED=4", "--gin.train.allow_changes=('random_seed',)")
    _, text = process.communicate()
    assert process.returncode == 0 and "is finished, with 22 steps: there is nothing to do" in text, text


@pytest.mark.slow
def test_two_processes_with_other_steps_end_at_once(tmp_path):
    address = f"--coordinator_address={free_address()}"
    processes = [
        start(*arguments(tmp_path, f"TRAIN_STEPS={22 + 8 * i}"), address, "--num_processes=2",
              f"--process_id={i}")
        for i in range(2)
    ]  # fmt: skip
    for process in processes:
        _, text = process.communicate(timeout=300)
        assert process.returncode == 2 and "Traceback" not in text, text
        assert "steps is 22 in process 0 and 30 in process 1. Start all with" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "place", ["famx.training.state_passing.aged_feed", "famx.modules.config.math.sqrt"]
)
def test_a_bug_keeps_its_traceback(bad_input, tmp_path, monkeypatch, place):
    """Even a ValueError: only errors that famx raises before the run starts become a sentence."""

    def broken(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(place, broken)
    _forget()
    monkeypatch.setattr(sys, "argv", ["train", *arguments(tmp_path)])
    with pytest.raises(ValueError, match="a bug") as caught:
        gin_utils.run(train.main, train.define_flags)
    assert not isinstance(caught.value, ConfigError)


@pytest.mark.slow
@pytest.mark.parametrize("file, rows, sentence", [
    (EXAMPLE, 12, "BATCH_SIZE 12"),
    (MAIN, 16, "Stage 3 of STAGES (its BATCH_SIZE is 0.25 of the run's): BATCH_SIZE 4"),
])  # fmt: skip
def test_batch_that_eight_devices_cannot_share(tmp_path, file, rows, sentence):
    process = start(
        *arguments(tmp_path, f"BATCH_SIZE={rows}", file=file),
        XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {xla_flags.FAST}",
    )
    _, text = process.communicate()
    assert process.returncode == 2 and "Traceback" not in text
    assert text.splitlines()[-1] == (
        f"famx: error: {sentence} cannot be divided over 8 devices (data 8 x fsdp 1): use a"
        " multiple of 8."
    )
