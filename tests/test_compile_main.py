"""`python -m famx.compile`: on virtual CPU devices, with the TPU compiler where it is, on bad input."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import gin
import jax
import optax
import pytest

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.scale import compiling, programs, topologies
from famx.scale.programs import PROGRAMS
from famx.training import loop
from famx.training.stages import stages_of
from famx.training.step import make_initializer, make_train_step

ROOT = pathlib.Path(__file__).parent.parent
NO_OPTIMIZER = optax.identity()
RUN = ["--gin_file=gin_configs/runs/pretrain.gin", "--gin_file=gin_configs/models/tiny.gin"]
SIZES = ["--gin.BATCH_SIZE=8", "--gin.TASK_FEATURE_LENGTHS={'targets': 64}"]
SIZES += ["--gin.DecoderConfig.num_layers=1"]
FSDP = ["--gin_file=gin_configs/meshes/fsdp.gin"]


def compile_main(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "famx.compile", *RUN, *SIZES, *arguments],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": ""},
    )  # fmt: skip


@pytest.mark.slow
def test_eight_virtual_devices(tmp_path):
    out = tmp_path / "tiny.json"
    run = compile_main(
        *FSDP, "--topology=cpu:8", f"--programs={','.join(PROGRAMS)}", f"--json={out}",
        f"--hlo={tmp_path}",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    train, prefill, decode = json.loads(out.read_text())
    assert train["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    assert train["fits"] and train["batch"] == 8 and train["length"] == 64
    # A table, a layer's matrices, norms and prompt: float32, an eighth on each device.
    assert train["parameters"] == 128 * 64 + 64 * (4 * 64 + 3 * 128) + 3 * 64 + 8 * 64
    assert train["memory"]["parameters"] == train["parameters"] * 4 / 8
    assert train["memory"]["optimiser"] >= 2 * train["memory"]["parameters"]
    # Blocks of 32 without a past: half of the pairs are masked, which is executed all the same.
    assert 1 < train["flops"] * 8 / train["model_flops"] < 1.3
    assert {row["kind"] for row in train["collectives"]} & {"all-gather", "all-reduce"}
    assert all(row["axes"] == "fsdp" for row in train["collectives"])
    assert prefill["model_flops"] <= prefill["flops"] * 8 and prefill["length"] == 8 * 32
    assert decode["flops"] > 0 and any("without a known number" in note for note in decode["notes"])
    assert run.stdout.count("parameters; batch") == 3 and (tmp_path / "train.hlo").is_file()

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: sizes -->\n<!-- end -->\nafter\n")
    compiling.fill_page([out], page, "sizes")
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and len(lines) == 4 + 2 + len(PROGRAMS)
    assert [line.split(" | ")[:3] for line in lines[4:-2]] == [
        ["| tiny", name, "cpu:8"] for name in PROGRAMS
    ]
    with pytest.raises(ConfigError, match="has no place for a table named other"):
        compiling.fill_page([out], page, "other")
    with pytest.raises(ConfigError, match="page.md holds no reports of famx.compile --json"):
        compiling.fill_page([page], page, "sizes")
    out.write_text("[]")
    with pytest.raises(ConfigError, match="There are no reports in "):
        compiling.fill_page([out], page, "sizes")


@pytest.mark.slow
def test_each_stage_of_another_shape_is_a_program(tmp_path):
    out = tmp_path / "stages.json"
    stages = (
        {"steps": 3},
        {"steps": 3, "options": {"digits": 2}, "curriculum": {"blocks": (1, 2)}},
        {"block_size": 16, "batch_size": 16, "state_passing": "continuous"},
    )
    run = compile_main(
        f"--gin.STAGES={stages}", "--topology=cpu:8", "--programs=train,prefill", f"--json={out}",
        f"--hlo={tmp_path}",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    first, last, prefill = json.loads(out.read_text())
    names = [report["program"] for report in (first, last, prefill)]
    assert names == ["train_stage_1", "train_stage_3", "prefill"]
    assert "Stage 2 has the program of stage 1." in run.stdout
    assert (first["batch"], last["batch"]) == (8, 16) and first["length"] == last["length"] == 64
    assert first["memory"]["states"] == 0 < last["memory"]["states"]
    assert prefill["length"] == 8 * 16  # with the last stage's block size
    assert {path.stem for path in tmp_path.glob("*.hlo")} == set(names)
    run = compile_main(f"--gin.STAGES={stages[:1] + ({'batch_size': 12},)}", "--topology=cpu:8")
    assert run.returncode == 2 and "famx: error: Stage 2 of STAGES: BATCH_SIZE 12" in run.stderr


class _Begins(Exception):
    """Raised where training would begin."""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("example", ["passkey_tiny", "own_text"])
def test_what_is_compiled_is_the_run_that_trains(example, tmp_path, monkeypatch):
    begun = []

    def begin(stages, *args):
        begun.extend(stage.run for stage in stages)
        raise _Begins

    monkeypatch.setattr(loop, "_begin_or_resume", begin)
    bindings = [f"MODEL_DIR='{tmp_path}'", "DecoderConfig.num_layers=1"]
    gin.clear_config()
    try:
        gin_utils.parse_gin([f"gin_configs/examples/{example}.gin"], bindings)
        given = compiling.run_from_gin()
        with pytest.raises(_Begins):
            gin_utils.call(loop.train)
    finally:
        gin.clear_config()
    devices = jax.devices()

    def comparable(run):
        """Only what a compiler needs, and no optimizer: optax transformations are never equal."""
        model = dataclasses.replace(run.model, vocabulary=None)
        changes = dict(model=model, model_dir=None, evaluation=None, optimizer=NO_OPTIMIZER)
        return dataclasses.replace(run, **changes)

    for stage, trained in zip(stages_of(given), begun, strict=True):
        assert comparable(stage.run.ready(devices)) == comparable(trained)
        _, abstract = make_initializer(trained)
        with trained.on_mesh():
            step = make_train_step(trained, abstract).lower(abstract, trained.abstract_batch())
        assert programs.train(compiling.run_on(stage.run, devices)).lowered.as_text() == step.as_text()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_slices_that_are_not_there(tmp_path):
    out = tmp_path / "out.json"
    two = ["--num_slices=2", "--gin.DATA_PARALLEL=2"]
    run = compile_main(*FSDP, *two, "--topology=v5e:2x2", f"--json={out}")
    assert run.returncode == 0, run.stderr
    (train,) = json.loads(out.read_text())
    sent = {row["kind"]: row["bytes"] for row in train["collectives"] if row["axes"] == "slices"}
    # Each chip's quarter of the gradient crosses the network; such narrow arrays fill half of a tile.
    assert 1 <= sent["network all-reduce"] / train["memory"]["parameters"] < 4
    assert {row["axes"] for row in train["collectives"]} == {"slices", "fsdp"}
    assert train["bound"]["network"] == pytest.approx(sum(sent.values()) / 3.125e9)
    assert train["chip"]["name"] == "v5e" and train["notes"] == []
    assert 1 < train["flops"] * 8 / train["model_flops"] < 1.3
    assert train["bound"]["interconnect"] > 0 and train["bound"]["memory"] > 0
    assert (
        train["bound"]["scheduled"]
        >= train["bound"]["roofline"]
        == max(train["bound"][name] for name in ("compute", "memory", "interconnect", "network"))
    )
    assert "train on 2 x v5e:2x2: fits, 0." in run.stdout and " MFU at most " in run.stdout


@pytest.mark.sampled(3)
@pytest.mark.parametrize("arguments, sentence", [
    ([], "--topology is not set: name what to compile for, such as --topology=v5e:4x4."),
    (["--topology=cpu:8", "--programs=train,fly"], "There is no program 'fly': choose from train, "),
    (["--topology=cpu:8", "--programs="], "--programs is empty: choose from train, "),
    (["--topology=cpu:8", *FSDP, "--gin.BATCH_SIZE=12"], "BATCH_SIZE 12 cannot be divided over 8 "),
    (
        ["--topology=cpu:8", "--programs=decode", "--inference_batch_size=0"],
        "--inference_batch_size must be a whole number of at least 1, not 0.",
    ),
    (
        ["--topology=cpu:8", "--json=no/such/file.json"],
        "The directory of --json=no/such/file.json does not exist: create it first.",
    ),
    (
        ["--topology=cpu:8", "--gin.make_mesh.tensor=8"],
        "heads of layers/key/kernel has size 4, which cannot be divided over 8 devices",
    ),
])  # fmt: skip
def test_bad_input_ends_in_one_sentence(arguments, sentence):
    run = compile_main(*arguments)
    assert run.returncode == 2, (run.stdout, run.stderr)
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("famx: error: ")]
    assert sentence in line and "Traceback" not in run.stderr


@pytest.mark.parametrize("topology, slices, sentence", [
    ("v9:4x4", 1, "Unknown topology 'v9:4x4': use one of v4:2x2x1, "),
    ("v5p:4x4", 1, "Unknown topology v5p:4x4: v5p slices have 3 dimensions, such as v5p:2x4x4"),
    ("v5e:", 1, "Unknown topology v5e:: v5e slices have 2 dimensions"),
    ("cpu:8", 2, "--num_slices is for TPUs only, not for --topology=cpu:8"),
    ("v5e:4x4", 0, "devices.num_slices must be a whole number of at least 1, not 0."),
])  # fmt: skip
def test_topologies_that_are_none(topology, slices, sentence):
    with pytest.raises(ConfigError) as caught:
        topologies.devices(topology, slices)
    assert str(caught.value).startswith(sentence)


def test_a_missing_compiler_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'libtpu: pip install "famx\[tpu\]"'):
        topologies.devices("v5e:4x4")
    assert jax.default_backend() == "cpu"
