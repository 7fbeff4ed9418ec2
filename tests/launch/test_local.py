"""`python -m launch.local`: two processes train as one does, stop together, go on, and end together."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from processes import start_process

from famx.base import gin_utils
from famx.training.run_log import read_metrics
from launch import local, settings
from launch.commands import Commands

ROOT = gin_utils.gin_root()
STEPS = 20
GIN = f"""
from __gin__ import dynamic_registration
from famx import modules
from famx.memories import fam
from famx.training import run

include "gin_configs/runs/pretrain.gin"
include "gin_configs/models/tiny.gin"

TRAIN_STEPS = {STEPS}
BATCH_SIZE = 4
MIXTURE_OR_TASK_NAME = "passkey_words"
TASK_FEATURE_LENGTHS = {{"targets": 32}}
TASK_OPTIONS = {{"digits": 1, "header": False, "filler": "random_words"}}
run.Every.log = 1
run.Every.checkpoint = 1  # slow enough to be stopped between two steps
modules.DecoderConfig:
  num_layers = 1
  embed_dim = 16
  num_heads = 2
  mlp_dim = 32
  block_size = 8
fam.Fam.length = 2
"""


@pytest.fixture
def gin_file(tmp_path):
    path = tmp_path / "train.gin"
    path.write_text(GIN)
    return path


def start(module, gin_file, model_dir, *args):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    return start_process(
        [sys.executable, "-m", module, f"--gin_file={gin_file}", f"--gin.MODEL_DIR='{model_dir}'", *args],
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def losses(model_dir):
    lines = read_metrics(str(model_dir), "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return np.array([[line["loss"], line["gradient_norm"]] for line in lines])


@pytest.mark.slow
def test_two_processes_stop_resume_and_equal_one(tmp_path, gin_file):
    alone = start("famx.train", gin_file, tmp_path / "one")
    process = start("launch.local", gin_file, tmp_path / "two")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if f"train step 2/{STEPS}" in line:
            process.send_signal(signal.SIGTERM)
            break
    text = "".join(lines) + process.stdout.read()
    assert process.wait() == 143, text
    assert "the same command resumes from there" in text, text
    assert "--process_id=1" in text

    process = start("launch.local", gin_file, tmp_path / "two")
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "[0] Resuming from step " in text
    first, _ = alone.communicate()
    assert alone.returncode == 0, first
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-3)


@pytest.mark.slow
def test_a_process_that_cannot_train_ends_all_with_its_exit_code(tmp_path, gin_file):
    process = start("launch.local", gin_file, tmp_path / "run", "--gin.BATCH_SIZE=3")
    text, _ = process.communicate()
    assert process.returncode == 2, text
    # Whichever process ends first; the other one may be stopped before it says so.
    assert "] famx: error: BATCH_SIZE 3 cannot be divided" in text


# ---------------------------------------------------------------- other programs in place of training

WAIT = "import time; print('here', flush=True); time.sleep(60)"
PRINT = (
    "import os, sys; print('out', os.environ['PLAIN'], os.environ['HF_TOKEN']); print(2, file=sys.stderr)"
)


class Programs:
    """A job whose processes run these programs."""

    shown, secret = {"PLAIN": "a b"}, {"HF_TOKEN": "hf_123456"}

    def __init__(self, *programs):
        self.programs = programs

    def train(self, python, *flags):
        index = int(flags[-1].removeprefix("--process_id="))
        return [python, "-IS", "-c", self.programs[index], *flags]


def make_processes(*programs, dry_run=False, **changes):
    job = Programs(*programs)
    config = settings.check(settings.local(processes=len(programs), **changes), "local")
    return local.Processes(config, job, Commands(dry_run, job.secret.values()))


def run(*programs, **changes):
    processes = make_processes(*programs, **changes)
    processes.start()
    return processes.wait()


def test_lines_come_with_the_number_of_their_process(capsys):
    assert run(PRINT, PRINT) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if not line.startswith("$ ")]
    assert sorted(lines) == ["[0] out a b ***", "[1] out a b ***"]
    assert sorted(err.splitlines()) == ["[0] 2", "[1] 2"]
    assert "HF_TOKEN=***" in out and "123456" not in out


@pytest.mark.parametrize(
    "program,code", [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_process_that_dies_ends_the_others(program, code):
    began = time.monotonic()
    assert run(WAIT, program, WAIT) == code
    assert time.monotonic() - began < 30


def test_what_does_not_stop_is_killed_after_a_while():
    stubborn = f"import signal; signal.signal(15, signal.SIG_IGN); {WAIT}"
    assert run(stubborn, "import time; time.sleep(1); raise SystemExit(3)", grace_seconds=1) == 3


def test_a_stop_reaches_each_process_once_and_lets_it_end():
    program = (
        "import signal, time; seen = []; signal.signal(15, lambda *_: seen.append(1))\n"
        "while not seen: time.sleep(0.05)\n"
        "time.sleep(0.3 + {}); raise SystemExit(42 if seen == [1] else 7)"
    )
    processes = make_processes(program.format(0), program.format(1))  # the first is done earlier
    processes.start()
    threading.Timer(2, processes.stop, (signal.SIGINT,)).start()
    assert processes.wait() == 130 and processes.stopping == signal.SIGINT


def test_a_run_that_stopped_by_itself_has_not_ended_well():
    assert run("raise SystemExit(42)", "raise SystemExit(42)") == 143


def test_a_dry_run_starts_nothing(capsys):
    processes = make_processes("", "", dry_run=True)
    processes.start()
    assert processes.wait() == 0 and processes.children == []
    out = capsys.readouterr().out
    assert out.count("$ env ") == 2 and "--process_id=1" in out and "123456" not in out


def test_devices_of_a_process(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=/x")
    cpu = local.process_environment(settings.local(devices_per_process=3), 1)
    assert cpu["JAX_PLATFORMS"] == "cpu"
    assert cpu["XLA_FLAGS"].split() == ["--xla_dump_to=/x", "--xla_force_host_platform_device_count=3"]
    cuda = local.process_environment(settings.local(platform="cuda", devices_per_process=2), 1)
    assert cuda == {"JAX_PLATFORMS": "cuda", "JAX_LOCAL_DEVICE_IDS": "2,3"}
