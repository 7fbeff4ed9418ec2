"""Profiles: the cells of a plan, theory's lines, the files, and a model that is measured here."""

import csv
import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famx.base.errors import ConfigError
from famx.modules import DecoderConfig, Memory
from famx.modules.attention import token_attention
from famx.scale import full_attention, profile_files, profiling, variants
from famx.scale.profiling import Plan, make_profile
from famx.scale.variants import Options

MODEL = """from __gin__ import dynamic_registration

from famx import modules
from famx.memories import fam

include "gin_configs/models/tiny.gin"

modules.DecoderConfig:
  num_layers = 1
  embed_dim = 16
  num_heads = 2
  mlp_dim = 32
  block_size = 8
  memory_segments = 1

fam.Fam.length = 2
"""
LENGTHS = (64, 256, 512)


@pytest.fixture(scope="module")
def size(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.gin"
    path.write_text(MODEL)
    return str(path)


@pytest.fixture(scope="module")
def profiled(size, tmp_path_factory):
    """The folder and the cells of a profile of reading on this machine, and what was compiled for it."""
    folder, compiled = tmp_path_factory.mktemp("profile"), []
    lower = profiling.lower

    def noted(run, variant, pass_):
        compiled.append((variant, pass_, run.data.length))
        return lower(run, variant, pass_)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "lower", noted)
        plan = Plan([size], LENGTHS, passes=("reading", "at_once"), repeats=2)
        cells = make_profile(folder, plan)
    return folder, plan, cells, compiled


def line(cells, variant, pass_="reading", name="bytes"):
    of = [cell for cell in cells if (cell["variant"], cell["pass"]) == (variant, pass_)]
    return [cell[name] for cell in sorted(of, key=lambda cell: cell["tokens"])]


# ---------------------------------------------------------------- what is measured


@pytest.mark.slow
def test_memory_is_flat_where_text_is_streamed_and_grows_where_it_is_read_at_once(profiled):
    _, _, cells, compiled = profiled
    for variant in ("fam", "bswa"):
        assert len(set(line(cells, variant))) == 1  # one program reads texts of every length
        assert compiled.count((variant, "reading", LENGTHS[0])) == 1
        short, middle, long = (cell["temporaries"] for cell in line(cells, variant, "at_once", "memory"))
        assert short < middle < long and long > 1.5 * middle
    states = [memory["states"] for memory in line(cells, "full", name="memory")]
    assert states[1] - states[0] == 2 * 16 * 4 * (LENGTHS[1] - LENGTHS[0])  # keys and values, float32
    assert not line(cells, "full", "at_once")  # it is the same as reading


@pytest.mark.slow
def test_every_program_ran_and_is_timed_next_to_bswa(profiled):
    _, plan, cells, _ = profiled
    assert len(cells) == 3 * 3 + 2 * 3
    for cell in cells:
        assert cell["lower"] <= cell["seconds"] <= cell["upper"] and cell["seconds"] > 0
        assert cell["fits"] and "scheduled" not in cell  # a CPU has no published rates
        assert cell["peak"] > cell["bytes"] and cell["peak_of"] == "process"
        assert (cell["to_bswa"] == 1) == (cell["variant"] == "bswa")
        assert cell["rows"] == plan.options.rows == cell["batch"]


@pytest.mark.slow
def test_operations_are_linear_with_a_window_and_quadratic_without(profiled):
    for variant, power in (("fam", 1), ("bswa", 1), ("full", 2)):
        short, _, long = line(profiled[2], variant, "reading", "model_flops")
        grows = (long / short) ** (1 / np.log2(LENGTHS[-1] / LENGTHS[0]))
        assert 2 ** (power - 0.75) < grows < 2 ** (power + 0.1)
    fam, full = (line(profiled[2], v, "reading", "model_flops") for v in ("fam", "full"))
    assert full[-1] / fam[-1] > 2 * full[0] / fam[0]


@pytest.mark.slow
def test_what_is_known_is_not_measured_again(profiled, monkeypatch):
    folder, plan, cells, _ = profiled
    monkeypatch.setattr(profiling, "lower", None)
    assert make_profile(folder, plan) == cells
    monkeypatch.setattr(profiling, "_params", None)
    fewer = dataclasses.replace(plan, lengths=LENGTHS[:1])
    assert make_profile(folder, fewer) == cells


def test_a_program_that_takes_too_long_is_compiled_and_not_run(size, tmp_path):
    plan = Plan([size], (64, 128), ("bswa",), ("at_once",), repeats=1, most_seconds=1e-9)
    first, second = make_profile(tmp_path, plan)
    assert "seconds" in first and "seconds" not in second and second["bytes"] > first["bytes"]
    assert second["note"] == "not run: about 0:00, more than --most_seconds"


def test_a_training_step_runs_with_full_attention(size, tmp_path):
    plan = Plan([size], (64,), ("full",), ("training",), repeats=1)
    (cell,) = make_profile(tmp_path, plan)
    moments, weights = (cell["memory"][kind] for kind in ("optimiser", "parameters"))
    assert cell["seconds"] > 0 and 2 * weights < moments < 2 * weights + 16  # and the count of steps
    assert cell["model_flops"] > 0


# ---------------------------------------------------------------- full attention


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_gradient_of_full_attention_is_that_of_the_formula(kv_heads, monkeypatch):
    monkeypatch.setattr(full_attention, "TILE", 4)
    config = DecoderConfig(
        vocab_size=8, num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=kv_heads, block_size=12,
        memory_segments=0, memory=Memory(), attention_backend="xla",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.standard_normal((2, 1, 12, heads, 4)), jnp.float32)
    empty, first = jnp.zeros((2, 1, 0, kv_heads, 4)), jnp.zeros(2, jnp.int32)
    arrays, target = (draw(4), draw(kv_heads), draw(kv_heads)), draw(4)

    def gradient(function):
        loss = lambda xs: jnp.sum(target * function(*xs, empty, empty, first, config))
        return jax.jit(jax.grad(loss))(arrays)

    for got, expected in zip(gradient(full_attention.full_attention), gradient(token_attention)):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_full_attention_takes_the_place_of_the_model_s_only_within_its_context():
    from famx.modules import layer

    before = layer.token_attention
    with pytest.raises(ZeroDivisionError), full_attention.replaced():
        assert layer.token_attention is full_attention.full_attention
        1 / 0  # noqa: B018
    assert layer.token_attention is before


# ---------------------------------------------------------------- theory and files


def made(variant, pass_, tokens, **values):
    fixed = {"parameters": 100, "optimiser": 200, "states": tokens, "temporaries": 3 * tokens}
    cell = dict(on="x", size="s", variant=variant, tokens=tokens, batch=1, memory=fixed)
    return {**cell, "pass": pass_, "bytes": sum(fixed.values()), "fits": True, **values}


def test_theory_s_lines():
    streamed = [made("fam", "reading", n, seconds=n / 10, model_flops=5 * n) for n in (10, 100)]
    assert profile_files.theory(streamed, "bytes") == [340, 340]
    assert profile_files.theory(streamed, "seconds") == pytest.approx([1, 10])
    full = [made("full", "reading", n, scheduled=1.0, model_flops=n**2) for n in (10, 100)]
    assert profile_files.theory(full, "scheduled") == pytest.approx([0.01, 1])
    assert profile_files.theory(full, "bytes") == pytest.approx([340, 700])
    training = [made("fam", "training", n) for n in (10, 20)]
    assert profile_files.theory(training, "bytes") == pytest.approx([340, 380])


@pytest.mark.slow
def test_the_table_and_the_figure_have_all_cells(profiled):
    folder, _, cells, _ = profiled
    rows = list(csv.DictReader((folder / "profile.csv").open()))
    assert len(rows) == len(cells) and (folder / "profile.png").read_bytes()[:4] == b"\x89PNG"
    found = {(r["variant"], r["pass"], int(r["tokens"])): r for r in rows}
    for cell in cells:
        row = found[cell["variant"], cell["pass"], cell["tokens"]]
        assert float(row["seconds"]) == cell["seconds"] and int(row["bytes"]) == cell["bytes"]
        assert int(row["memory_states"]) == cell["memory"]["states"]
    page = (folder / "profile.md").read_text()
    assert len(re.findall(r"^\| (?!size)", page, re.MULTILINE)) == len(cells)
    figure = profile_files.profile_figure(cells)
    seconds, memory, *_ = figure.axes
    drawn = [tuple(x.get_ydata()) for x in seconds.get_lines()]
    assert tuple(line(cells, "fam", "reading", "seconds")) in drawn
    drawn = [tuple(x.get_ydata()) for x in memory.get_lines()]
    assert tuple(x / 2**30 for x in line(cells, "bswa")) in drawn


def test_cells_of_several_machines_share_a_table():
    cells = [made("fam", "reading", 10, seconds=1e-3, lower=1e-3, upper=2e-3)]
    cells.append(made("fam", "reading", 10, scheduled=1e-5, on="h100"))
    failed = dict(on="h100", size="s", variant="full", tokens=10, note="not compiled: x")
    cells.append(failed | {"pass": "reading"})
    rows = profile_files.table(cells).rows
    assert [(row["on"], row["variant"]) for row in rows] == [
        ("h100", "FAM"), ("h100", "full attention"), ("x", "FAM")
    ]  # fmt: skip
    assert rows[2]["measured, µs a token"] == "100.0 [100.0, 200.0]"
    assert rows[0]["bound as scheduled, µs a token"] == "1.000"
    assert rows[1]["needed, MiB"] == "-" and rows[1]["note"] == "not compiled: x"


def test_smaller_models_stand_first():
    cells = [made("bswa", "reading", 10, size=size, parameters=n) for size, n in (("8b", 8), ("24b", 24))]
    cells += [made("fam", "reading", 10, size=size, parameters=n) for size, n in (("24b", 25), ("8b", 9))]
    rows = profile_files.table(cells[::-1]).rows
    assert [(row["size"], row["variant"]) for row in rows] == [
        ("8b", "FAM"), ("8b", "BSWA"), ("24b", "FAM"), ("24b", "BSWA")
    ]  # fmt: skip


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", ["tiny", "135m", "1b", "8b", "24b"])
def test_sizes_by_name(name):
    path = variants.gin_file_of(name)
    assert pathlib.Path(path).stem == ("tiny" if name == "tiny" else f"fam_{name}")


def test_options_reach_the_run(size):
    run = variants.run_of(size, Options(param_dtype="bfloat16", remat="full", optimizer="adafactor"))
    config = run.model.config
    assert (config.param_dtype, config.remat, config.embed_dim) == ("bfloat16", "full", 16)
    full = variants.config_of(config, "full", 640)
    assert (full.block_size, full.memory_segments, full.memory) == (640, 0, Memory())
    assert variants.config_of(config, "bswa", 640).memory == Memory()
    assert variants.config_of(config, "fam", 640) == config


def test_plans_that_are_none(size, tmp_path):
    out = tmp_path / "out"
    for changes, sentence in (
        ({"sizes": ["7b"]}, "--sizes names '7b': give tiny, 135m, 1b, 8b, 24b, or the path"),
        ({"lengths": (100,)}, "--lengths has 100, which is no whole number of the blocks of 8"),
        ({"lengths": ()}, "--lengths"),
        ({"variants": ["rnn"]}, "--variants"),
        ({"passes": ["flying"]}, "--passes"),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            make_profile(out, Plan(**{"sizes": [size], "lengths": (64,), **changes}))
    with pytest.raises(ConfigError, match="Unknown topology 'v9'"):
        make_profile(out, Plan([size], (64,)), "v9")
    assert not out.exists()
