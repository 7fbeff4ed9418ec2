"""The benchmark command from end to end at tiny sizes, and its parts."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import xla_flags
from processes import start_process
from tiny import make_model, make_params
from trained import write_model_dir

from famx.base.errors import ConfigError
from famx.data.vocabularies import ByteVocabulary
from famx.model_dir.loading import load_model
from famx.modules import Decoder, DecoderConfig, Memory
from famx.modules.attention import token_attention

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import (  # noqa: E402
    budget,
    checkouts,
    device,
    device_sections,
    inference,
    loading,
    memories,
    memory_start,
    train_step,
    workloads,
)
from famx.base import tables  # noqa: E402
from famx.scale import timing  # noqa: E402
from famx.scale.full_attention import full_attention  # noqa: E402

SECTIONS = ["fam_vs_bswa", "chunks", "matmul_share", "dtypes", "full_vs_fam", "length"]
RATIOS = {
    "fam_vs_bswa": ["time / BSWA", "operations / BSWA"],
    "chunks": ["time / all", "temp / all"],
    "matmul_share": ["share %"],
    "dtypes": ["time / float32"],
    "full_vs_fam": ["time, full / FAM", "temp, full / FAM"],
    "length": ["per token / 64", "temp / 64"],
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Output, JSON and page of one run with `--quick`."""
    folder = tmp_path_factory.mktemp("benchmarks")
    page, figures = folder / "page.md", folder / "figures.json"
    shutil.copy(ROOT / "docs" / "benchmarks.md", page)
    # Compiled code need not be fast here, and compiling it well takes most of the time.
    flags = f"{xla_flags.FAST} --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", "--quick", "--repeats=2"]
        + [f"--markdown={page}", f"--json={figures}"],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(figures.read_text()), page.read_text()


def numbers(value):
    if isinstance(value, dict):
        return [x for part in value.values() for x in numbers(part)]
    return [] if isinstance(value, str) else [value]


@pytest.mark.slow
def test_every_section_gives_finite_positive_figures(quick):
    _, figures, _ = quick
    assert list(figures["sections"]) == SECTIONS
    for name, section in figures["sections"].items():
        assert section["rows"]
        for row in section["rows"]:
            assert all(math.isfinite(x) and x > 0 for x in numbers(row)), (name, row)
            assert set(RATIOS[name]) <= set(row)
            for value in row.values():
                if isinstance(value, dict):
                    assert value["lower"] <= value["median"] <= value["upper"]


@pytest.mark.slow
def test_rows_are_the_variants_that_are_compared(quick):
    sections = quick[1]["sections"]
    column = lambda name, key: [row[key] for row in sections[name]["rows"]]
    assert column("fam_vs_bswa", "model") == ["FAM", "BSWA"]
    assert column("fam_vs_bswa", "operations / BSWA")[0] > 1
    assert column("chunks", "blocks per chunk") == ["1", "all", "1", "all"]
    assert column("matmul_share", "model") == ["FAM", "BSWA"]
    assert column("dtypes", "dtype") == ["float32", "bfloat16"]
    assert column("full_vs_fam", "order") == ["all blocks", "one block"]
    assert column("length", "tokens") == [64, 128]


@pytest.mark.slow
def test_streaming_memory_does_not_grow(quick):
    """Twice the tokens may take a few more bytes for the tokens, but none for activations."""
    rows = quick[1]["sections"]["length"]["rows"]
    assert rows[-1]["temp / 64"] < 1.05


@pytest.mark.slow
def test_prints_and_fills_in_every_table(quick):
    printed, figures, page = quick
    assert figures["machine"]["cores"] >= 1 and figures["machine"]["jax"] in printed
    for name, section in figures["sections"].items():
        assert section["title"] in printed
        filled = page.split(f"<!-- table: {name} -->")[1].split("<!-- end -->")[0]
        assert section["title"] in filled and filled.count("\n| ") == 1 + len(section["rows"])
        assert "a test, not a measurement" in filled


# Parts.


def test_the_page_of_this_repository_has_a_place_for_every_section():
    assert tables.missing_markers(ROOT / "docs" / "benchmarks.md", SECTIONS) == []


@pytest.mark.parametrize("kv_heads, length", [(2, 24), (1, 7)])
def test_full_attention_equals_the_model_s_own(kv_heads, length, monkeypatch):
    monkeypatch.setattr("famx.scale.full_attention.TILE", 8)
    config = DecoderConfig(
        vocab_size=8, num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=kv_heads,
        block_size=length, memory_segments=0, memory=Memory(), attention_backend="xla",
        attention_softcap=3.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    draw = lambda heads: 4 * rng.standard_normal((2, 1, length, heads, 4), np.float32)
    empty, first = np.zeros((2, 1, 0, kv_heads, 4), np.float32), np.zeros(2, np.int32)
    arrays = (draw(4), draw(kv_heads), draw(kv_heads), empty, empty, first)
    run = lambda function: jax.jit(lambda *xs: function(*xs, config))(*arrays)
    # Scores over 4 numbers, their softmax and the mean of values over the keys, which reach 15.
    near = rounding.bound(4 + 2 * length, scale=15)
    np.testing.assert_allclose(run(full_attention), run(token_attention), atol=near)


def test_full_attention_refuses_a_window():
    config = DecoderConfig(vocab_size=8, num_layers=1, embed_dim=8, num_heads=2, block_size=4,
                           memory_segments=1, memory=Memory())  # fmt: skip
    x = jnp.zeros((1, 1, 4, 2, 4))
    with pytest.raises(ValueError, match="one block without"):
        full_attention(x, x, x, None, None, None, config)


def test_interleave_takes_turns_after_a_warm_up():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.interleave(functions, 3)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(x) for name, x in times.seconds.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize("functions, repeats", [({}, 1), ({"a": lambda: None}, 0)])
def test_interleave_refuses_nothing(functions, repeats):
    with pytest.raises(ValueError, match="Nothing to measure"):
        timing.interleave(functions, repeats)


def test_ratios_are_taken_within_rounds():
    times = timing.Timings({"a": np.array([2.0, 20, 6]), "b": np.array([1.0, 10, 2])})
    assert times.ratio("a", "b") == timing.Spread(2.0, 2.0, 2.5)
    assert times.ratio("a", "b", 10).median == 20
    assert times.spread("a") == timing.Spread(6.0, 4.0, 13.0)


def test_filling_in_replaces_the_old_table_alone(tmp_path):
    page = tmp_path / "page.md"
    rest = "y\n<!-- table: b -->\nold\n<!-- end -->\nz\n"
    page.write_text("x\n<!-- table: a -->\n<!-- end -->\n" + rest)
    table = lambda value: tables.Table(
        "a", r"Title \1", ("note",), [{"n": 3, "t": timing.Spread(value, 1.0, 12.5)}]
    )
    tables.fill_markdown(page, table(1.5))
    tables.fill_markdown(page, table(2.5))
    expected = (
        "x\n<!-- table: a -->\n**Title \\1**\n\n| n | t |\n|---:|---:|\n"
        "| 3 | 2.500 [1.000, 12.5] |\n\nnote\n<!-- end -->\n"
    )
    assert page.read_text() == expected + rest


def test_a_column_that_a_row_lacks_is_a_dash_in_its_place():
    table = tables.Table("a", "", (), [{"x": "1", "z": 2}, {"z": 3, "y": 4}])
    assert table.markdown().splitlines()[-2:] == ["| 1 | 2 | - |", "| - | 3 | 4 |"]
    assert table.text().splitlines()[-3:] == ["x  z  y", "1  2  -", "-  3  4"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--only=fam_vs_bsw"], "did you mean 'fam_vs_bswa'?"),
        (["--repeats=0"], "--repeats must be at least 1, got 0."),
        (["--json=/no/such/folder/x.json"], "does not exist"),
        (["--markdown=/no/such/page.md"], "is not a file"),
    ],
)
def test_bad_input_is_one_sentence_and_measures_nothing(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(train_step, "SECTIONS", dict.fromkeys(SECTIONS))  # calling one would fail
    with pytest.raises(SystemExit) as error:
        train_step.main(arguments)
    assert error.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_page_without_a_place_is_refused(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- table: chunks -->\n<!-- end -->\n")
    with pytest.raises(SystemExit):
        train_step.main(["--only=chunks,length", f"--markdown={page}"])
    assert "no markers for table length" in capsys.readouterr().err


# Inference.


@pytest.mark.slow
def test_reading_and_writing_are_measured(tmp_path, monkeypatch):
    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    shutil.copy(ROOT / "docs" / "benchmarks.md", page)
    inference.main(["--quick", "--repeats=2", f"--json={figures}", f"--markdown={page}"])
    sections = json.loads(figures.read_text())["sections"]
    assert list(sections) == ["reading", "writing"]
    for section in sections.values():
        assert section["title"] in page.read_text()
        for row in section["rows"]:
            assert all(math.isfinite(x) and x > 0 for x in numbers(row)), row
    sizes = inference.QUICK
    assert [row["tokens"] for row in sections["reading"]["rows"]] == list(sizes.lengths)
    assert len({row["state KiB"] for row in sections["reading"]["rows"]}) == 1
    full = [f"full, {n} read" for n in sizes.contexts]
    models = [x for b in sizes.batches for x in ["FAM", "BSWA", *(full if b == 1 else [])]]
    assert [row["model"] for row in sections["writing"]["rows"]] == models * 2


def test_full_attention_reads_all_that_was_read():
    """The cache of the comparison: one block of all tokens, in which a token sees all before it."""
    config = inference.make_config(inference.SMALL, (64, 0, 0))
    sizes = dict(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, vocab_size=16)
    config = dataclasses.replace(config, **sizes)
    decoder, params = Decoder(config), workloads.parameters(config)
    tokens = np.random.default_rng(0).integers(0, 16, (1, 40)).astype(np.int32)
    logits, state = decoder.apply({"params": params}, tokens)
    changed = tokens.copy()
    changed[0, 0] = (changed[0, 0] + 1) % 16
    other, _ = decoder.apply({"params": params}, changed)
    assert int(state.position[0]) == 40 and np.abs(logits[0, -1] - other[0, -1]).max() > 1e-6


# The memories of a study.


@pytest.mark.slow
def test_the_memories_of_a_study_are_measured(tmp_path, monkeypatch):
    configs, figures = memories.models("memories"), tmp_path / "figures.json"
    assert list(configs)[0] == "FAM" and len(configs) == 12
    some = {name: configs[name] for name in ("FAM", "BSWA", "Landmark")}
    monkeypatch.setattr(memories, "models", lambda study: some)
    memories.main(["--quick", "--repeats=2", f"--json={figures}"])
    rows = {row["memory"]: row for row in json.loads(figures.read_text())["sections"]["memories"]["rows"]}
    assert list(rows) == list(some)
    assert rows["FAM"]["state, bytes"] == 2 * 8 * 64 * 4, "layers, rows, width, float32"
    assert rows["BSWA"]["state, bytes"] == rows["BSWA"]["parameters"] == 0
    for row in rows.values():
        times = [numbers(value) for name, value in row.items() if "time" in name]
        assert all(math.isfinite(x) and x > 0 for found in times for x in found), row


# Two checkouts.


@pytest.mark.slow
def test_a_checkout_is_measured_over_another(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla_flags.FAST)
    figures = tmp_path / "figures.json"
    checkouts.main(
        ["--quick", "--only=small", "--repeats=2", f"--other={ROOT}", f"--json={figures}"]
    )
    (section,) = json.loads(figures.read_text())["sections"].values()
    this, other = section["rows"]
    assert (this["checkout"], other["checkout"]) == ("this", "other")
    assert other["time / other"]["median"] == 1 and this["temp MiB"] == other["temp MiB"] > 0
    assert section["notes"][0] == f"this: {ROOT}, other: {ROOT}"


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        checkouts.main(["--quick", f"--other={tmp_path}"])
    assert error.value.code == 2
    assert "is not a checkout of famx" in capsys.readouterr().err


# A device at real sizes.

# Packages that a machine with a GPU need not have.
OTHERS = (
    "tensorflow", "tensorflow_datasets", "seqio", "t5x", "clu", "safetensors", "tokenizers",
    "sentencepiece", "jinja2", "matplotlib", "torch", "transformers",
)  # fmt: skip
WITHOUT_OTHERS = f"""
import sys
for name in {OTHERS}:
    sys.modules[name] = None
from benchmarks import device, device_sections
device_sections.peak_flops = lambda kind: 1e12
device.main()
"""
# Training steps that cost nothing, of which the third one never compiles.
HANGING = """
import time
from benchmarks import device, workloads
started = []
def train_step(config, batch, length, loss_chunk=None):
    started.append(config)
    while len(started) > 2:
        time.sleep(1000)
    return workloads.Workload(lambda: time.sleep(0.01), temp_bytes=1)
train_step.cache_clear = lambda: None
workloads.train_step = train_step
device.main()
"""


def device_page(folder):
    return pathlib.Path(shutil.copy(ROOT / "docs" / "gpu.md", folder / "gpu.md"))


def device_command(program, folder, *options):
    page, figures = device_page(folder), folder / "figures.json"
    arguments = ["--quick", f"--json={figures}", f"--markdown={page}", *options]
    return [sys.executable, "-c", program, *arguments], figures, page


@pytest.mark.slow
def test_a_device_is_measured_with_few_packages(tmp_path):
    command, figures, page = device_command(
        WITHOUT_OTHERS, tmp_path, "--repeats=2", "--peers", "--budget_seconds=800"
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the package safetensors is missing" in done.stderr  # where an adapter would be saved
    sections = json.loads(figures.read_text())["sections"]
    assert list(sections) == list(device_sections.SECTIONS)
    kind = jax.devices()[0].device_kind
    for name, section in sections.items():
        assert section["title"] in page.read_text() and section["title"] in done.stdout
        assert f"one device, {kind}; its peak: 1 TFLOP/s in bfloat16, dense" in section["notes"]
        for row in section["rows"] if name != "device_peers" else ():
            assert row["tokens/s"]["median"] > 0, (name, row)
            assert all(math.isfinite(x) and x >= 0 for x in numbers(row)), (name, row)
    fam, bswa = sections["device_135m"]["rows"]
    assert (fam["model"], bswa["model"], fam["backend"]) == ("FAM", "BSWA", "xla")
    assert fam["TFLOP"] > bswa["TFLOP"] and bswa["time / BSWA"]["median"] == 1
    assert fam["MFU %"]["median"] == pytest.approx(100 * fam["TFLOP/s"]["median"])
    finetune = sections["device_finetune"]["rows"]
    assert [row["model"] for row in finetune] == ["FAM", "BSWA"]
    assert all(0 <= row["data_wait %"]["upper"] <= 100 for row in finetune)
    decode = [(row["batch"], row["model"]) for row in sections["device_decode"]["rows"]]
    assert decode == [(batch, model) for batch in (1, 2) for model in ("FAM", "BSWA")]
    peers_section = sections["device_peers"]
    assert "left out: the package torch is not installed." in peers_section["notes"]
    assert {row["seconds"] for row in peers_section["rows"]} == {"left out"}


_SPENT = pytest.param("15 seconds are spent", marks=pytest.mark.slow)


@pytest.mark.parametrize("ending", ["SIGTERM", "SIGINT", _SPENT])
def test_a_device_run_that_is_cut_off_leaves_its_tables(ending, tmp_path):
    budget = 15 if "seconds" in ending else 600
    sections = ["device_135m", "device_1b", "device_135m_short"]
    command, figures, page = device_command(
        HANGING, tmp_path, f"--only={','.join(sections)}", f"--budget_seconds={budget}"
    )
    began = time.monotonic()
    process = start_process(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if budget == 600:
        while "device_1b" not in (figures.read_text() if figures.exists() else ""):
            assert time.monotonic() - began < 500 and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.Signals[ending])
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == (128 + signal.Signals[ending] if budget == 600 else 0)
    measured = json.loads(figures.read_text())["sections"]
    assert list(measured) == sections
    cut = [f"cut off: {ending}" in section["notes"] for section in measured.values()]
    if budget == 600:
        assert cut == [False, True, True]
        assert all(row["seconds"]["median"] > 0 for row in measured["device_135m"]["rows"])
    for name in sections[1:]:
        assert {row["seconds"] for row in measured[name]["rows"]} == {"not measured"} and cut[-1]
        assert measured[name]["title"] in page.read_text() and measured[name]["title"] in printed
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def step(monkeypatch):
    """Sets the function that makes the training steps of `benchmarks.device`; default: nothing to do."""

    def set_step(make=lambda config: lambda: time.sleep(0.001)):
        function = lambda config, *_: workloads.Workload(make(config), 1)
        function.cache_clear = lambda: None
        monkeypatch.setattr(workloads, "train_step", function)

    return set_step


def device_rows(tmp_path, name, *options):
    """Rows by model, and notes, of one section of `benchmarks.device`."""
    figures = tmp_path / "figures.json"
    device.main(["--quick", f"--only={name}", f"--json={figures}", "--budget_seconds=500", *options])
    section = json.loads(figures.read_text())["sections"][name]
    return {row["model"]: row for row in section["rows"]}, section["notes"]


def test_what_does_not_fit_the_budget_is_left_out(step, tmp_path, monkeypatch):
    step()
    needs = {**device_sections.QUICK.needs, "train FAM": 501.0}
    monkeypatch.setattr(
        device, "QUICK", dataclasses.replace(device_sections.QUICK, needs=needs, large_rows=(2, 40))
    )
    rows, _ = device_rows(tmp_path, "device_1b")
    assert rows["FAM"]["seconds"] == "no time left" and rows["FAM"]["tokens/s"] == ""
    assert rows["BSWA"]["tokens/s"]["median"] > 0 and rows["BSWA"]["time / BSWA"]["median"] == 1


def test_a_kind_of_measurement_needs_what_it_took():
    limit = budget.Budget(100.0, {"a": 200.0}, spent=10.0)
    assert 80 < limit.remaining < 90 and not limit.allows("a")
    limit.learn("a", 5.0)
    assert limit.allows("a")


def test_an_error_is_a_word_in_its_row(step, tmp_path, capsys):
    def make(config):
        if config.memory_columns:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

        def run():
            raise ValueError("two\nlines")

        return run

    step(make)
    rows, notes = device_rows(tmp_path, "device_135m")
    assert [row["seconds"] for row in rows.values()] == ["out of memory", "ValueError"]
    assert "FAM, xla: RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes." in notes
    assert "BSWA, xla: two lines" in notes and "Traceback" in capsys.readouterr().err


def test_all_backends_are_measured_on_request(step, tmp_path):
    step()
    figures = tmp_path / "figures.json"
    device.main(["--quick", "--only=device_1b", "--backends=all", f"--json={figures}"])
    rows = json.loads(figures.read_text())["sections"]["device_1b"]["rows"]
    found = [(row["model"], row["backend"], row["time / BSWA"]["median"] > 0) for row in rows]
    tokamax = ["tokamax"] if importlib.util.find_spec("tokamax") else []
    assert found == [(m, b, True) for b in ("xla", "blockwise", *tokamax) for m in ("FAM", "BSWA")]


@pytest.mark.parametrize("tokamax", [[], ["tokamax"]], ids=["without", "with"])
def test_backends_of_other_devices(monkeypatch, tokamax):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: tokamax or None if name == "tokamax" else find(name)
    )
    sizes = device_sections.Sizes()
    config = sizes.config(sizes.large)
    gpu, tpu = (jax.sharding.AbstractDevice("", None, platform) for platform in ("gpu", "tpu"))
    assert device_sections.backends(config, gpu, "all") == ["cudnn", "xla", "blockwise", *tokamax]
    assert device_sections.backends(config, tpu, "all") == ["splash", "xla", "blockwise", *tokamax]
    assert device_sections.backends(config, gpu, "auto") == ["cudnn"]
    small = sizes.config(sizes.small)
    assert (small.num_kv_heads, small.head_dim, config.head_dim) == (3, 64, 128)


def test_other_implementations_take_turns_with_fam(step, tmp_path, monkeypatch):
    step()
    program = """
import time
from benchmarks.turns import Peer
def build(shape, falls=True):
    assert (shape["device"], shape["dtype"]) == ("cpu", "bfloat16")
    losses = iter(range(99, 0, -1))
    return Peer(lambda: float(next(losses)) if falls else 1.0, {"parameters": 7})
"""
    (tmp_path / "fake_device_peer.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    build = "fake_device_peer:build"
    builds = {1: {"fake": (build, {}), "flat": (build, {"falls": False})}}
    monkeypatch.setattr(device_sections.peers, "TORCH", builds)
    monkeypatch.setattr(device_sections, "torch_refusal", lambda platform: None)
    rows, notes = device_rows(tmp_path, "device_peers", "--peers")
    assert list(rows) == ["famx FAM", "fake", "flat"]
    assert rows["famx FAM"]["tokens/s, FAM / this"]["median"] == 1
    assert rows["fake"]["tokens/s, FAM / this"]["median"] > 0 and rows["fake"]["parameters"] == 7
    assert rows["flat"]["seconds"] == "left out"
    assert any(note.startswith("left out: flat: its loss does not fall") for note in notes)


def test_torch_must_find_the_device(monkeypatch):
    assert "not measured on a device of the kind tpu" in device_sections.torch_refusal("tpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert device_sections.torch_refusal("gpu") == "the package torch is not installed."


@pytest.mark.slow
def test_a_training_step_starts_again_after_one_that_failed():
    config = device_sections.QUICK.config(device_sections.QUICK.small)
    workload = workloads.train_step(config, 1, 24, 8)
    first = [float(workload.run()[1]["loss"].compute()) for _ in range(2)]
    workloads._training_states(config).clear()  # as a step leaves it that runs out of memory
    assert float(workload.run()[1]["loss"].compute()) == first[0] > first[1]


def test_the_gpu_page_has_a_place_for_every_section():
    assert tables.missing_markers(ROOT / "docs" / "gpu.md", device_sections.SECTIONS) == []


def test_a_memory_is_measured_by_the_loss_of_each_block(tmp_path, capsys):
    model = make_model(memory=Memory(), memory_segments=0)
    params = make_params(model.module)
    base = write_model_dir(tmp_path / "base", model, params, ByteVocabulary())
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text("<!-- table: memory_start -->\n<!-- end -->\n")
    sizes = ["--block_size=8", "--blocks=3", "--length=2", "--rows=2"]
    chosen = "^(no memory|prompt text|first_residual=ordinary, prompt text)$"
    written = [f"--markdown={page}", f"--json={figures}"]
    memory_start.main([f"--checkpoint={base}", *sizes, f"--only={chosen}", *written])
    rows = json.loads(figures.read_text())["sections"]["memory_start"]["rows"]
    names = ["no memory", "prompt text", "first_residual=ordinary, prompt text"]
    assert [row["memory"] for row in rows] == names and all(name in page.read_text() for name in names)
    losses = np.array([[float(row[f"block {i}"]) for i in range(3)] for row in rows])
    # The first block sees the prompt alone; the second a memory whose first update differs.
    assert losses[1, 0] == losses[2, 0] and (losses[1, 1:] != losses[2, 1:]).all()

    trained = load_model(base)
    tokens = memory_start.texts(trained, (), 2, 24)
    batch = {"decoder_input_tokens": tokens[:, :-1], "decoder_target_tokens": tokens[:, 1:]}
    loss = model.loss(params, batch)[0]
    assert losses[0].mean() == pytest.approx(float(loss), abs=0.01)
    with pytest.raises(ConfigError, match="2 texts of more than"):
        memory_start.texts(trained, (), 2, 10**7)
    assert "block 2" in capsys.readouterr().out


def test_loading_is_measured_with_and_without_the_comparison(tmp_path, capsys):
    loading.main(["--megabytes=1", "--repeats=2", f"--directory={tmp_path}"])
    saved, *lines = capsys.readouterr().out.splitlines()
    assert saved.startswith("1 MB; saved in ") and not list(tmp_path.iterdir())
    assert [line.split(": ")[0] for line in lines] == ["everything", "parameters"]
    assert all("times the time of processors" in line for line in lines)
