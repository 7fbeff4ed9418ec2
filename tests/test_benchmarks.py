"""The benchmark command from end to end at tiny sizes, and its parts."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from famx.modules import Decoder, DecoderConfig, Memory
from famx.modules.attention import token_attention

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import checkouts, device, inference, timing, train_step, workloads  # noqa: E402
from benchmarks.full_attention import full_attention  # noqa: E402
from famx.base import tables  # noqa: E402

SECTIONS = ["fam_vs_bswa", "chunks", "matmul_share", "full_vs_fam", "length"]
RATIOS = {
    "fam_vs_bswa": ["time / BSWA", "operations / BSWA"],
    "chunks": ["time / all", "temp / all"],
    "matmul_share": ["share %"],
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
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
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
    monkeypatch.setattr("benchmarks.full_attention.TILE", 8)
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


# Two checkouts.


@pytest.mark.slow
def test_a_checkout_is_measured_over_another(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
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


@pytest.mark.slow
def test_a_device_is_measured_with_each_backend_that_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "peak_flops", lambda kind: 1e12)
    figures, page = tmp_path / "figures.json", tmp_path / "gpu.md"
    shutil.copy(ROOT / "docs" / "gpu.md", page)
    device.main(["--quick", "--repeats=2", f"--json={figures}", f"--markdown={page}"])
    sections = json.loads(figures.read_text())["sections"]
    assert list(sections) == ["device_135m", "device_1b"]
    kind = jax.devices()[0].device_kind
    for section in sections.values():
        assert section["title"] in page.read_text()
        assert f"one device, {kind}; its peak: 1 TFLOP/s" in section["notes"][1]
        models = [(row["model"], row["backend"]) for row in section["rows"]]
        assert models == [(m, b) for b in ("xla", "blockwise") for m in ("FAM", "BSWA")]
        for row in section["rows"]:
            assert all(math.isfinite(x) and x > 0 for x in numbers(row)), row
            assert row["MFU %"]["median"] == pytest.approx(100 * row["TFLOP/s"]["median"])
        fam, bswa = section["rows"][:2]
        assert fam["TFLOP"] > bswa["TFLOP"] and bswa["time / BSWA"]["median"] == 1


def test_backends_of_other_devices():
    config = device.Sizes().config(device.Sizes().large)
    gpu, tpu = (jax.sharding.AbstractDevice("", None, platform) for platform in ("gpu", "tpu"))
    assert device.backends(config, gpu) == ["xla", "blockwise", "cudnn"]
    assert device.backends(config, tpu) == ["xla", "blockwise", "splash"]
    small = device.Sizes().config(device.Sizes().small)
    assert (small.num_kv_heads, small.head_dim, config.head_dim) == (3, 64, 128)
