"""Heat maps: what a cell counts, the files, and `famx heatmap` as a user runs, kills and resumes it."""

import csv
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from processes import start_process
from tiny import BLOCK, make_model, make_params, make_tokens, passkey
from trained import write_model_dir

from famx.base.errors import ConfigError
from famx.data.probes.passkey_text import passkey_words
from famx.evaluation import heatmap, heatmap_files
from famx.evaluation.heatmap import Grid, make_heat_map
from famx.evaluation.streamed import AnswerScores, score_answers

ROOT = pathlib.Path(__file__).parent.parent
OPTIONS = {"digits": 1, "header": False, "filler": "random_words", "block_size": None}
SMALL = dict(lengths=(64, 32), depths=(0, 1.0), seeds=(2, 1), examples=3, options=OPTIONS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    vocabulary = passkey_words()
    model = make_model(vocabulary=vocabulary, vocab_size=vocabulary.vocab_size)
    path = tmp_path_factory.mktemp("model")
    return write_model_dir(path, model, make_params(model.module), vocabulary, step=7)


def right_if(rule):
    """A replacement of `score_answers` in which an answer is right if `rule(inputs)` says so."""

    def scores(model, params, tokens, starts, answers, pad_id, piece_blocks, done):
        done(tokens.shape[1])
        return AnswerScores(np.array([rule(row) for row in tokens]), np.zeros(len(tokens)))

    return scores


def rule(row):
    return int(row.sum()) % 3 > 0


# ---------------------------------------------------------------- measuring


@pytest.mark.sampled(3)
@pytest.mark.parametrize("padding", [0, BLOCK - 1, BLOCK + 1])
@pytest.mark.parametrize(
    "length, pieces", [(4 * BLOCK, None), (4 * BLOCK, 1), (7 * BLOCK + 3, 2), (BLOCK + 5, None)]
)
def test_scores_of_streamed_answers_are_those_of_one_pass(length, pieces, padding):
    """Padding may follow the answers, of which one is right; two are wrong in their first token."""
    model = make_model()
    params = make_params(model.module, seed=1)
    tokens, counts = make_tokens(3, length), [3, 1, 2]
    starts = length - np.array([0, padding, padding // 2]) - counts
    answers, pad_id, read = np.full((3, 4), -1, np.int32), -1, []
    logits, _ = model.module.apply({"params": params}, tokens)
    best = np.argmax(logits, -1)
    for i, (start, count) in enumerate(zip(starts, counts)):
        answers[i, :count] = best[i, start : start + count]
    answers[1:, 0] = (answers[1:, 0] + 1) % logits.shape[-1]
    found = score_answers(
        model, params, tokens, starts, answers, pad_id, piece_blocks=pieces, done=read.append
    )
    assert found.right.tolist() == [True, False, False]
    log_p = np.asarray(jax.nn.log_softmax(logits.astype(np.float32), -1))
    for i, (start, count) in enumerate(zip(starts, counts)):
        expected = [-log_p[i, start + j, answers[i, j]] for j in range(count)]
        assert found.loss[i] == pytest.approx(np.mean(expected), rel=1e-4)
    last = -(-(length - starts.min()) // BLOCK) * BLOCK  # what is read at once, with the answers in it
    assert sum(read) == length and (pieces is None) == (len(read) == (2 if last < length else 1))


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_a_cell_counts_its_own_rows(directory, tmp_path, monkeypatch, batch_size):
    monkeypatch.setattr(heatmap, "score_answers", right_if(rule))
    cells = make_heat_map(directory, tmp_path, Grid("passkey", **SMALL), batch_size)
    assert list(cells) == list(itertools.product((32, 64), (0, 1.0), (1, 2)))
    for (length, depth, seed), cell in cells.items():
        task = passkey(depth=depth, seed=seed, split="eval", vocabulary="words")
        rows = [task.batch([i], length)["decoder_input_tokens"][0] for i in range(3)]
        assert cell["right"] == sum(map(rule, rows)) and cell["examples"] == 3
        assert cell["accuracy"] == pytest.approx(cell["right"] / 3)
    assert len({cell["right"] for cell in cells.values()}) > 1


def test_the_block_size_of_a_probe_is_the_model_s(directory, monkeypatch, tmp_path):
    made = {}
    monkeypatch.setattr(heatmap, "score_answers", right_if(rule))
    probes = Grid.probes
    monkeypatch.setattr(Grid, "probes", lambda *a: made.update(probes(*a)) or made)
    options = {name: value for name, value in OPTIONS.items() if name != "block_size"}
    with pytest.raises(ConfigError, match="does not fit into a block of 8"):
        make_heat_map(directory, tmp_path, Grid("passkey", **{**SMALL, "options": options}))
    make_heat_map(directory, tmp_path, Grid("passkey", **SMALL))
    assert {probe.block_size for probe in made.values()} == {None}


def test_a_vocabulary_that_cannot_spell_the_probe_is_refused(directory, tmp_path):
    with pytest.raises(ConfigError, match="The vocabulary cannot spell 'One of the special magic"):
        make_heat_map(directory, tmp_path / "out", Grid("ruler_niah_single_1", lengths=(1024,)))
    assert not (tmp_path / "out").exists()


def test_more_lengths_are_added_and_what_is_there_is_not_measured_again(
    directory, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(heatmap, "score_answers", right_if(rule))
    first = make_heat_map(directory, tmp_path, Grid("passkey", **{**SMALL, "lengths": (32,)}))
    lines = (tmp_path / "heatmap.jsonl").read_text().splitlines()
    more = make_heat_map(directory, tmp_path, Grid("passkey", **SMALL))
    assert "4 of 8 cells are measured already." in capsys.readouterr().out
    assert (tmp_path / "heatmap.jsonl").read_text().splitlines()[:5] == lines and len(lines) == 5
    assert {key: more[key] for key in first} == first and len(more) == 8
    monkeypatch.setattr(heatmap, "score_answers", None)  # nothing is left to measure
    assert make_heat_map(directory, tmp_path, Grid("passkey", **SMALL)) == more
    with pytest.raises(ConfigError, match=r"cells of other settings \(examples\)"):
        make_heat_map(directory, tmp_path, Grid("passkey", **{**SMALL, "examples": 4}))


# ---------------------------------------------------------------- files


def test_the_files_have_the_figures(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(heatmap, "score_answers", right_if(rule))
    cells = make_heat_map(directory, tmp_path, Grid("passkey", **SMALL))
    rows = list(csv.DictReader((tmp_path / "heatmap.csv").open()))
    assert [(int(r["length"]), float(r["depth"]), int(r["seed"])) for r in rows] == list(cells)
    for row, cell in zip(rows, cells.values(), strict=True):
        assert float(row["accuracy"]) == cell["accuracy"]
        assert int(row["blocks"]) * BLOCK == cell["length"]
    assert (tmp_path / "heatmap.png").read_bytes()[:4] == b"\x89PNG"

    page = (tmp_path / "heatmap.html").read_text()
    assert not re.findall(r"https?:|src=|<link", page)  # it needs no network
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert data["lengths"] == [32, 64] and data["depths"] == [0, 1]
    assert [tuple(cell[:3]) for cell in data["cells"]] == list(cells)
    mean, one, two = data["panels"].values()
    assert list(data["panels"]) == ["mean of 2 seeds", "seed 1", "seed 2"]
    for i, depth in enumerate((0, 1.0)):
        for j, length in enumerate((32, 64)):
            scores = [cells[length, depth, seed]["accuracy"] for seed in (1, 2)]
            assert [one[i][j], two[i][j]] == scores and mean[i][j] == pytest.approx(sum(scores) / 2)


def test_the_picture_shows_what_is_measured_and_what_is_not():
    grid = Grid("passkey", lengths=(32, 131_072), depths=(0, 0.5), seeds=(1,))
    cell = dict(length=32, depth=0.5, seed=1, right=3, examples=4, accuracy=0.75, seconds=0.1)
    settings = dict(probe="passkey", step=3, block_size=8, options={}, examples=4)
    figure = heatmap_files.heat_figure({(32, 0.5, 1): cell}, settings, grid)
    figure.canvas.draw()
    axes = figure.axes[0]
    (image,) = axes.get_images()
    shown = np.ma.filled(image.get_array(), np.nan)
    np.testing.assert_array_equal(shown, [[np.nan, np.nan], [0.75, np.nan]])
    assert [text.get_text() for text in axes.texts] == ["0.75"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["32", "131k"]
    page = heatmap_files.page({(32, 0.5, 1): cell}, {**settings, "options": {"a": "</script>"}}, grid)
    assert page.count("</script>") == 2 and "[[null, null], [0.75, null]]" in page


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_a_command_that_was_killed_is_resumed(directory, tmp_path):
    lengths = [str(32 * 2**i) for i in range(6)]
    command = [
        sys.executable, "-m", "famx.heatmap", f"--checkpoint={directory}", f"--out={tmp_path / 'out'}",
        f"--probe_options={json.dumps(OPTIONS)}", f"--lengths={','.join(lengths)}", "--depths=0,1",
        "--seeds=1", "--examples=1", "--batch_size=1",
    ]  # fmt: skip
    log, environment = tmp_path / "out" / "heatmap.jsonl", {**os.environ, "JAX_PLATFORMS": "cpu"}
    child = start_process(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while not log.is_file() or log.read_bytes().count(b"\n") < 2:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    data = log.read_bytes()
    before = data[: data.rfind(b"\n") + 1].decode().splitlines()
    log.write_text("\n".join(before) + '\n{"length": 64, "de')  # as a kill within a write leaves it
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    after = log.read_text().splitlines()
    assert after[: len(before)] == before and len(after) == 1 + 2 * len(lengths)
    keys = [(cell["length"], cell["depth"]) for cell in map(json.loads, after[1:])]
    assert keys == list(itertools.product(map(int, lengths), (0.0, 1.0)))
    assert len(before) > 12 or " of 12 cells are measured already." in run.stdout
    assert re.search(r"12 cells, \d+ of 12 answers right", run.stdout)
