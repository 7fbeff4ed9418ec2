"""The estimate before slices are created, by a famx.compile that is stood in for, and by the real one."""

import importlib.util
import io
import pathlib
import re
import sys

import pytest
import stubs
import test_gke
import test_tpu
from absl.testing import flagsaver

from famx.base.errors import ConfigError
from launch import estimate
from launch.commands import Commands

cloud, cluster = test_tpu.cloud, test_gke.cluster
GIB = 2**30
BOUND = dict(compute=0.2, memory=0.3, interconnect=0.1, network=0.0, roofline=0.3, scheduled=0.36)
REPORT = {"fits": True, "needed": 10 * GIB, "available": 16 * GIB, "bound": BOUND}


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch):
    """famx.compile is stood in for, and libtpu there."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    yield
    monkeypatch.undo()


def prepare(folder, monkeypatch, **state):
    """Puts the program in python's place; what state.json is to hold beside."""
    path = folder / "bin" / "compile"
    here = str(pathlib.Path(stubs.__file__).parent)
    path.write_text(
        stubs.PROGRAM.format(python=sys.executable, here=here, folder=str(folder), name="compile")
    )
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    stubs.write(folder, {"report": REPORT, **state})


def launch(cloud, value="auto", dry_run=False, steps=10_000, delete="end", **changes):
    config = test_tpu.make_config(cloud, **changes)
    with flagsaver.flagsaver(estimate=value):
        return test_tpu.launch(config, dry_run, delete, train_steps=steps)


def order(folder):
    """Which programs were called, gcloud's questions and steps on workers left out."""
    names = [call[0] if call[0] == "compile" else call[4] for call in stubs.calls(folder)]
    return [name for name in names if name not in ("describe", "ssh", "scp")]


def test_fit_time_and_chip_hours_are_shown_before_slices_are_requested(cloud, monkeypatch, capsys):
    prepare(cloud, monkeypatch)
    assert launch(cloud, accelerator="v5p-256", num_slices=2) == 0
    assert order(cloud) == ["compile", "create", "delete"]
    (call,) = [call for call in stubs.calls(cloud) if call[0] == "compile"]
    assert call[1:3] == ["-m", "famx.compile"] and test_tpu.SETTING in call
    assert {"--topology=v5p:4x4x8", "--num_slices=2"} <= set(call)
    out = capsys.readouterr().out
    assert "\ntrain on a slice: what famx.compile says\n" in out
    assert "\nEstimate: fits on v5p-256, 10.00 GiB of 16.00 GiB on each chip.\n" in out
    # 0.36 s, which is the larger bound, 10 000 times, on two slices of 128 chips.
    assert "at least 0.36 s a step, 1 hours for 10,000 steps and 256 chip-hours on 256 chips" in out
    assert "Set --config.price_per_chip_hour=PRICE to see the cost as well.\n" in out
    assert not list((cloud / "stage").glob("estimate*"))


def test_a_training_that_does_not_fit_requests_nothing(cloud, monkeypatch):
    prepare(cloud, monkeypatch, report={**REPORT, "fits": False, "bound": None}, compile_code=1)
    with pytest.raises(
        ConfigError, match="does not fit on v5litepod-16: it needs 10.00 GiB of the 16.00"
    ):
        launch(cloud)
    assert order(cloud) == ["compile"] and "tpus" not in stubs.read(cloud)
    assert launch(cloud, "no") == 0


def test_settings_that_are_refused_here_are_not_tried_on_slices(cloud, monkeypatch):
    prepare(cloud, monkeypatch, report=None, compile_code=2)
    with pytest.raises(ConfigError, match="famx.compile rejected the settings of this training: see"):
        launch(cloud)
    assert order(cloud) == ["compile"]


@pytest.mark.parametrize("reason", ["libtpu", "crash", "family"])
def test_without_an_estimate_the_launch_goes_on_unless_it_was_asked_for(
    cloud, monkeypatch, capsys, reason
):
    prepare(cloud, monkeypatch, report=None, compile_code=139)
    if reason == "libtpu":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sentence = {
        "libtpu": "the TPU compiler is missing (it needs no TPU): pip install libtpu.",
        "crash": "famx.compile exited with code 139, see the lines above.",
        "family": "famx.compile cannot compile for v3.",
    }[reason]
    changes = {"accelerator": "v3-8"} if reason == "family" else {}
    with pytest.raises(ConfigError, match="No estimate is available: " + re.escape(sentence)):
        launch(cloud, "yes", **changes)
    assert "create" not in order(cloud)
    assert launch(cloud, **changes) == 0
    assert f"Continuing without an estimate: {sentence}\n" in capsys.readouterr().out


class Terminal(io.StringIO):
    """A standard output that people look at."""

    def isatty(self):
        return True


def test_the_cost_is_shown_on_a_terminal_and_nowhere_else(cloud, monkeypatch, capsys):
    prepare(cloud, monkeypatch, workers=1)
    assert launch(cloud, price_per_chip_hour=4321.5, steps=20_000) == 0
    out = capsys.readouterr().out
    assert "The cost is printed only to a terminal, and standard output is not one." in out
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert launch(cloud, price_per_chip_hour=4321.5, steps=20_000) == 0
    # Two hours on 16 chips.
    assert "Estimate: costs at least 138,288.00 at your price of a chip-hour.\n" in screen.getvalue()
    written = [path.read_bytes() for path in (cloud / "stage").rglob("*") if path.is_file()]
    for text in (out.encode(), *written, str(stubs.calls(cloud)).encode()):
        assert b"4321" not in text and b"138,288" not in text and b"138288" not in text


def test_a_step_alone_is_told_where_the_number_of_steps_is_not_known(cloud, monkeypatch, capsys):
    prepare(cloud, monkeypatch)
    assert launch(cloud, steps=None) == 0
    assert "Estimate: at least 0.36 s a step on 16 chips.\n" in capsys.readouterr().out


def test_it_is_made_once_and_not_for_slices_that_are_there(cloud, monkeypatch):
    prepare(cloud, monkeypatch, lives=[["WAITING_FOR_RESOURCES", "FAILED"], ["ACTIVE"]])
    assert launch(cloud, delete="never") == 0
    assert order(cloud) == ["compile", "create", "delete", "create"]
    assert launch(cloud) == 0
    assert order(cloud)[4:] == ["delete"]


def test_a_dry_run_compiles_only_if_it_is_asked_to(cloud, monkeypatch, capsys):
    prepare(cloud, monkeypatch)
    assert launch(cloud, dry_run=True) == 0
    out = capsys.readouterr().out
    compiling = re.search(r"^\$ .* -m famx.compile .*--topology=v5e:4x4 .*$", out, re.MULTILINE)
    assert compiling and compiling.start() < out.index("queued-resources create")
    assert stubs.calls(cloud) == [] and "Estimate:" not in out
    assert launch(cloud, "yes", dry_run=True) == 0
    assert order(cloud) == ["compile"] and "Estimate: fits" in capsys.readouterr().out


def test_on_gke_it_comes_before_the_cluster(cluster, monkeypatch, capsys):
    prepare(cluster, monkeypatch)
    with flagsaver.flagsaver(estimate="auto"):
        assert test_gke.launch(test_gke.make_config(cluster), create_cluster=True) == 0
    calls = [" ".join(call[:3]) for call in stubs.calls(cluster)]
    assert calls[:2] == ["compile -m famx.compile", "xpk cluster create"]
    assert "fits on v5litepod-16" in capsys.readouterr().out


GIN = """
include "gin_configs/runs/pretrain.gin"
include "gin_configs/models/tiny.gin"
from __gin__ import dynamic_registration
from famx import modules
TRAIN_STEPS = 1000
BATCH_SIZE = 4
MIXTURE_OR_TASK_NAME = "passkey_words"
TASK_FEATURE_LENGTHS = {"targets": 64}
modules.DecoderConfig.num_layers = 1
"""


@pytest.mark.slow
def test_the_real_one(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # the real find_spec
    for name in ("famx.compile", "libtpu"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    (tmp_path / "tiny.gin").write_text(GIN)
    wheel = tmp_path / "famx-0.1.0-py3-none-any.whl"
    wheel.touch()
    config = test_tpu.make_config(tmp_path, accelerator="v5litepod-4", wheel=str(wheel))
    job = test_tpu.make_job(config, gin_flags=(f"--gin_file={tmp_path / 'tiny.gin'}",), train_steps=1000)
    with flagsaver.flagsaver(estimate="yes"):
        estimate.show(config, job, Commands(dry_run=False))
    out = capsys.readouterr().out
    assert "Estimate: fits on v5litepod-4, 0." in out
    assert re.search(r"Estimate: at least \S+ s a step, .* hours for 1,000 steps and .* on 4 chips", out)
