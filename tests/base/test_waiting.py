"""Sentences for silences, the times that are kept for them, and noise that is left out."""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from famx.base import waiting as module
from famx.base.gin_utils import gin_root
from famx.base.progress import compilation_seconds
from famx.base.waiting import Announced, announced, hush, waiting


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of times, in a directory of its own; silences of more than 0.2 seconds are explained."""
    monkeypatch.setattr(module, "_path", lambda: tmp_path / "cache" / "famx_seconds.json")
    monkeypatch.setattr(module, "SILENCE", 0.2)
    monkeypatch.setattr(module, "_NOTED", 0.1)
    return tmp_path / "cache" / "famx_seconds.json"


def test_a_long_silence_is_explained_and_the_next_one_at_once(file, capsys):
    with announced():
        with waiting("Loading", "key"):
            time.sleep(0.5)
        assert capsys.readouterr().err == "Loading ...\n"
        (seconds,) = json.loads(file.read_text()).values()
        assert seconds >= 0.5
        file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), 20.4)))
        with waiting("Loading", "key"):
            assert capsys.readouterr().err == "Loading (about 20 s last time) ...\n"
        with waiting("Loading", "another key"):
            pass
    assert capsys.readouterr().err == ""
    assert list(json.loads(file.read_text()).values()) != [20.4], "the newest time counts"


def test_what_is_short_or_not_announced_is_silent(file, capsys):
    with announced(), waiting("Loading", "key"):
        pass
    with waiting("Loading", "key"):
        time.sleep(0.4)
    with announced():
        hush()
        with waiting("Loading", "key"):
            time.sleep(0.4)
    assert capsys.readouterr().err == "" and not file.exists()


def test_only_the_innermost_speaks(file, capsys):
    with announced(), waiting("Evaluating"):
        with waiting("Compiling"):
            time.sleep(0.5)
    assert capsys.readouterr().err == "Compiling ...\n"


def test_a_damaged_file_of_times_is_none(file, capsys):
    file.parent.mkdir()
    for text in ("[1]", "{", '{"x": "y"}'):
        file.write_text(text)
        with announced(), waiting("Loading", "key"):
            time.sleep(0.15)
        assert len(json.loads(file.read_text())) == 1
    assert capsys.readouterr().err == ""


def test_minutes_are_told_as_such():
    assert [module._about(seconds) for seconds in (20.4, 89, 128)] == ["20 s", "89 s", "2 min"]


def test_a_program_is_announced_once_for_each_of_its_shapes(file, capsys):
    traced = []

    @jax.jit
    def double(x):
        traced.append(x.shape)
        time.sleep(0.4)
        return 2 * x

    function, before = Announced(double, "the doubling"), compilation_seconds()
    with announced():
        for size in (2, 2, 3):
            assert function(jnp.ones(size)).shape == (size,)
    assert traced == [(2,), (3,)]
    assert capsys.readouterr().err == "Compiling the doubling ...\n" * 2
    assert compilation_seconds() - before >= 0.8
    assert len(json.loads(file.read_text())) == 2
    assert function.lower(jnp.ones(2)).compile() is not None


NOISE = """
import os, sys
from famx.base import gin_utils, native_stderr
def main():
    native_stderr.stdout_to_stderr()
    alarm = "E0313 12:02:13.1 73 slow_operation_alarm.cc:73] The operation took 2m3s"
    frame = "********************************"
    for line in (alarm, "", frame, "[Compiling module jit_x] Very slow compile? If you want", frame):
        os.write(2, f"{line}\\n".encode())
    os.write(1, b"[Gloo] Rank 0 is connected to 1 peer ranks.\\n")
    os.write(2, b"E0313 12:02:13.1 73 cuda_driver.cc:1] CUDA_ERROR\\n")
    print("to out")
    print("to err", file=sys.stderr)
    os.write(2, b"last words\\n")
    os.abort() if "abort" in sys.argv[0] else None
sys.argv[0] = os.environ["END"]
gin_utils.run(main, gin_flags=False)
"""


@pytest.mark.parametrize("end,code", [("return", 0), ("abort", -6)])
def test_errors_of_libraries_are_shown_and_their_noise_is_not(end, code):
    found = subprocess.run(
        [sys.executable, "-c", NOISE], cwd=gin_root(), capture_output=True, text=True, env={"END": end}
    )
    assert (found.returncode, found.stdout) == (code, "to out\n")
    errors = found.stderr.splitlines()
    for line in ("E0313 12:02:13.1 73 cuda_driver.cc:1] CUDA_ERROR", "last words", "to err"):
        assert errors.count(line) == 1, found.stderr
    assert ("Fatal Python error: Aborted" in errors) == (end == "abort")
    assert not any(word in found.stderr for word in ("slow", "***", "took", "Gloo")), found.stderr
    assert end == "abort" or len(errors) == 3
