"""What a run reports of its speed, and its traces; no test asserts on seconds."""

import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from test_loop import history, run
from test_run_log import scalars
from tiny import BLOCK, BLOCKS, make_model

from famx.base.chips import peak_flops
from famx.base.errors import ConfigError
from famx.lora import Lora
from famx.training import speed
from famx.training.flops import Learning, train_flops
from famx.training.run import Every
from famx.training.run_log import read_metrics
from famx.training.speed import SpeedMeter
from famx.training.trainable import Trainable

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.parametrize("kind, peak", [
    ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("TPU v4", 275e12),
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L40S", 362e12), ("cpu", None),
])  # fmt: skip
def test_the_peak_of_a_device(kind, peak):
    assert peak_flops(kind) == peak


def test_the_report_counts_tokens_steps_waiting_and_operations(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    device = types.SimpleNamespace(
        device_kind="TPU v4", memory_stats=lambda: {"peak_bytes_in_use": 3_000_000_000}
    )
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    config = make_model().config
    meter = SpeedMeter(config, from_start=True)
    for _ in range(2):
        with meter.waiting():
            now[0] += 1.0
        now[0] += 3.0
        meter.count(4, 32)
    flops = 2 * sum(train_flops(config, 4, 32).values())
    assert meter.report() == {
        "tokens_per_second": 32.0, "step_seconds": 4.0, "data_wait": 0.25,
        "mfu": flops / 8 / (2 * 275e12), "memory_gb": 3.0,
    }  # fmt: skip
    now[0] += 5.0
    meter.count(1, 5)
    assert meter.report()["tokens_per_second"] == 1.0  # since the last report
    now[0] += 1.0
    meter.count(4, 32, weighted=0.25)  # the others need no logits
    less = flops // 2 - 3 * 2 * 96 * config.embed_dim * config.vocab_size
    assert meter.report()["mfu"] == less / (2 * 275e12)
    learning = Learning({"layers/query/kernel"})
    meter = SpeedMeter(config, True, learning)
    now[0] += 1.0
    meter.count(4, 32)
    part = sum(train_flops(config, 4, 32, True, learning).values())
    assert meter.report()["mfu"] == part / (2 * 275e12) < flops / 2 / (2 * 275e12)


def test_a_run_reports_its_speed_and_traces_the_steps_that_are_asked_for(tmp_path, capsys, monkeypatch):
    """All five figures, in TensorBoard and in metrics.jsonl; lines of progress have tokens a second."""
    monkeypatch.setattr(speed, "peak_flops", lambda kind: 1e12)
    counted, count = [], SpeedMeter.count
    monkeypatch.setattr(SpeedMeter, "count", lambda *args: (counted.append(args[1:]), count(*args)))
    run(tmp_path, steps=4, every=Every(log=2), profile_steps="2:3")
    # Only the answer and the end mark of each row have a weight.
    assert [(batch, length) for batch, length, _ in counted] == [(4, BLOCKS * BLOCK)] * 4
    assert all(0 < weighted * BLOCKS * BLOCK <= 3 for *_, weighted in counted)
    lines = read_metrics(str(tmp_path), "train")
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert set(speed.NAMES) <= line.keys()
        assert 0 <= line["data_wait"] <= 1 and 0 < line["mfu"] < 1 and 0.01 < line["memory_gb"] < 100
    tokens = 4 * BLOCKS * BLOCK
    for line in lines:
        np.testing.assert_allclose(line["tokens_per_second"], tokens / line["step_seconds"])
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    printed = capsys.readouterr().err
    assert "The trace of steps 2:3 is in" in printed
    progress = [line for line in printed.splitlines() if line.startswith("train step ")]
    assert len(progress) == 2
    events = scalars(tmp_path)
    for line, text in zip(lines, progress, strict=True):
        # The figure is rounded to the digits that it has; test_run_log.py has their number.
        figure, unit = re.search(r"  ([\d,.]+)([kM]?) tokens/s", text).groups()
        scale = {"": 1, "k": 1e3, "M": 1e6}[unit]
        half = 0.5 * scale / 10 ** len(figure.partition(".")[2])
        assert abs(float(figure.replace(",", "")) * scale - line["tokens_per_second"]) <= 1.001 * half
    for name in speed.NAMES:
        seen = [(step, value) for step, tag, value in events if tag == f"train/{name}"]
        np.testing.assert_allclose(seen, [(line["step"], line[name]) for line in lines], rtol=1e-6)
    assert all(not set(speed.NAMES) & line.keys() for line in history(tmp_path))


def test_a_run_that_trains_adapters_counts_the_operations_of_its_backward_pass(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(speed, "peak_flops", lambda kind: 1e12)
    monkeypatch.setattr(speed, "train_flops", lambda *args: counted.append(args) or {"all": 1})
    model = make_model(lora=Lora(rank=2, targets=("layers/query",)))
    run(tmp_path, steps=1, model=model, trainable=Trainable("lora"))
    learning = counted[0][-2]
    assert sorted(learning.paths) == ["layers/query/lora_a", "layers/query/lora_b", "memory/prompt"]
    assert learning.rank == 2 and counted[0][1:4] == (4, BLOCKS * BLOCK, True)


@pytest.mark.slow
def test_the_flag_of_the_main_asks_for_a_trace(tmp_path):
    command = [
        sys.executable, "-m", "famx.train", "--gin_file=gin_configs/examples/own_text.gin",
        f"--gin.MODEL_DIR='{tmp_path}'", "--profile_steps=12",
    ]  # fmt: skip
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    assert "the first and the last step to profile, such as 10:13, not 12." in found.stderr


@pytest.mark.parametrize("steps", ["10", "3:2", "0:1", "a:b", "100:101", 7])
def test_steps_to_profile_are_written_as_a_range(steps, tmp_path):
    with pytest.raises(ConfigError, match="profile_steps (must be|100:101 come after the last step)"):
        run(tmp_path, profile_steps=steps)
