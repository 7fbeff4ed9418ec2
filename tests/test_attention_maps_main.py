"""`famx.attention_maps`: the maps of a text file, and the program as a user runs it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tiny import make_model, make_params
from trained import write_model_dir

from famx.analysis import AttentionMaps, attention_maps, attention_page, read_maps
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.data import ByteVocabulary
from famx.inference import text_maps
from famx.inference.text_maps import make_maps
from famx.model_dir.loading import load_model

MODEL = make_model(num_layers=2)
TEXT = "The grass is green.\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return write_model_dir(folder, MODEL, make_params(MODEL.module), ByteVocabulary())


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def made(directory, tmp_path_factory):
    """The output directory of one run."""
    folder = tmp_path_factory.mktemp("maps")
    (folder / "x.txt").write_text(TEXT)
    make_maps(directory, str(folder / "x.txt"), str(folder / "out"), [1], [0, 1], [0, -1])
    return folder / "out"


def test_everything_is_written(made, directory):
    figures = ["entropy", "masses", "travel_layer1", "sources_layer1_block0", "map_layer1"]
    figures += [f"{what}_layer1_block{b}" for what in ("map", "heads") for b in (0, 2)]
    files = [*(f"{name}.png" for name in figures), "attention.html", "maps.npz", "summary.json"]
    assert sorted(os.listdir(made)) == sorted(files)
    maps = AttentionMaps.load(made / "maps.npz")
    assert (maps.layers, maps.heads, maps.blocks) == ((1,), (0, 1), (0, 2))
    expected = read_maps(load_model(directory), TEXT, [1], blocks=[0, 2])
    np.testing.assert_array_equal(maps.tokens, expected.tokens)
    ids = [ByteVocabulary.bos_id, *ByteVocabulary().encode(TEXT)]
    assert maps.ids[0, -8:].tolist() == ids[:8] and maps.ids[1, 8 : 8 + 5].tolist() == ids[16:]
    texts = [maps.text(token) for token in ids]
    assert texts[:5] == ["<bos>", "T", "h", "e", "␣"] and texts[-1] == "↵"


def test_the_summary_is_json(made):
    summary = json.loads((made / "summary.json").read_text())
    maps = AttentionMaps.load(made / "maps.npz")
    assert summary["tokens"] == 21 and summary["blocks"] == 3 and summary["updates"] == 2
    np.testing.assert_allclose(summary["mean"]["on_memory"], maps.summary.mean("on_memory"), atol=1e-6)
    by_block = maps.summary.memory_entropy.mean(axis=-1)
    np.testing.assert_allclose(summary["by_block"]["memory_entropy"], by_block, atol=1e-6)
    assert list(summary["sources"]) == ["layer 1, block 0"]
    for found, sources in zip(summary["sources"]["layer 1, block 0"], maps.sources(1, 0), strict=True):
        assert [tuple(source) for source in found] == sources


# ---------------------------------------------------------------- bad input


def test_what_is_wrong_is_told_before_the_model_is_loaded(tmp_path, path, monkeypatch):
    def never(*args):
        raise AssertionError("the model was loaded in spite of bad input")

    monkeypatch.setattr(text_maps, "load_with_vocabulary", never)
    full = tmp_path / "full"
    full.mkdir()
    (full / "maps.npz").write_text("")
    for arguments, sentence in [
        ((None, str(tmp_path)), "There is nothing to read: add --text=FILE."),
        ((path, None), "There is nowhere to write to: add --out=DIR."),
        (("/no/such", str(tmp_path)), "/no/such is not a file that can be read."),
        ((str(tmp_path), str(tmp_path)), f"{tmp_path} is not a file that can be read."),
        ((path, str(full)), f"{full} holds maps already: choose another directory, or add --overwrite."),
        ((path, "x", None, None, ()), "No block is named: add --blocks, such as --blocks=0,-1."),
    ]:
        with pytest.raises(ConfigError) as caught:
            make_maps("/model", *arguments)
        assert str(caught.value) == sentence


def test_what_does_not_fit_the_model_or_the_text_is_told(directory, tmp_path, path, monkeypatch):
    out = str(tmp_path / "out")
    (tmp_path / "empty").write_text("")
    for arguments, sentence in [
        ((path, out, [2]), "There is no layer 2: the model has layers 0 to 1."),
        ((path, out, None, [5]), "There is no head 5: the model has heads 0 to 1."),
        ((path, out, None, None, [3]), "There is no block 3: the text has the blocks 0 to 2."),
        ((str(tmp_path / "empty"), out), f"{tmp_path / 'empty'} contains no text."),
        ((path, path), f"{path} cannot be made: {path} must be a folder where you may write."),
        ((path, out, None, None, range(70)), "2 layers of 70 blocks are too many figures: name fewer of"),
    ]:
        with pytest.raises(ConfigError) as caught:
            make_maps(directory, *arguments)
        assert str(caught.value).startswith(sentence)
    monkeypatch.setattr(attention_maps, "_MAX_BYTES", 1 << 12)
    with pytest.raises(ConfigError, match="The maps would take 0.0 GiB, more than the limit of 0 GiB"):
        make_maps(directory, path, out)


def test_a_page_that_cannot_be_made_does_not_take_the_rest_along(
    directory, tmp_path, path, monkeypatch, capsys
):
    monkeypatch.setattr(attention_page, "_MAX_WEIGHTS", 10)
    make_maps(directory, path, str(tmp_path / "out"), [0], [0], [0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("There is no attention.html: The page would hold ")
    assert lines[1] == (f"{tmp_path / 'out'}: 6 figures, 21 tokens in 3 blocks read, maps of blocks 0")
    assert not (tmp_path / "out" / "attention.html").exists()
    assert (tmp_path / "out" / "map_layer0_block0.png").exists()


# ---------------------------------------------------------------- the program


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "famx.attention_maps", *args],
        cwd=gin_utils.gin_root(), capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_program(directory, tmp_path, path):
    out = tmp_path / "out"
    common = ("--checkpoint", directory, "--text", path, f"--out={out}")
    result = run(*common, "--layers=1", "--heads", "0", "--blocks=0,-1")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert result.stdout.splitlines()[-1].endswith("21 tokens in 3 blocks read, maps of blocks 0, 2")
    again = run(*common)
    assert again.returncode == 2 and again.stderr.splitlines()[-1] == (
        f"famx: error: {out} holds maps already: choose another directory, or add --overwrite."
    )
    wrong = run(*common, "--layers=first")
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1] == (
        "famx: error: --layers=first cannot be read: write numbers with commas between them."
    )
