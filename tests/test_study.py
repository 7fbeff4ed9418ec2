"""Studies: the grid, the runner that repeats nothing, and the tables; and `famx ablate` with a kill."""

import csv
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import gin
import jax
import pytest
from configurables import clean
from processes import start_process

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.modules import Decoder, DecoderConfig
from famx.study import commands, results, runner
from famx.study.grid import Study
from famx.training import loop

ROOT = pathlib.Path(__file__).resolve().parents[1]
AXES = {
    "memory": {"fam": {}, "bswa": {"MEMORY": "@modules.Memory()"}},
    "rate": {"low": {"RATE": 1e-3}, "high": {}},
}


def study(directory=None, **changes):
    values = dict(
        directory=str(directory), gin_files=("a.gin", "b.gin"), axes=AXES, settings={"RATE": 0.5},
        seeds=(3, 1), imports=("famx.modules", "own"),
    )  # fmt: skip
    return Study(**{**values, **changes})


def test_every_choice_meets_every_other_and_every_seed(tmp_path):
    cells = list(study(tmp_path).cells())
    assert [cell.name for cell in cells[:4]] == [
        "memory=fam, rate=low, seed 3", "memory=fam, rate=high, seed 3", "memory=bswa, rate=low, seed 3",
        "memory=bswa, rate=high, seed 3",
    ]  # fmt: skip
    assert [cell.seed for cell in cells] == [3] * 4 + [1] * 4
    assert len({cell.directory for cell in cells}) == 8
    assert cells[2].settings == {"RATE": 1e-3, "MEMORY": "@modules.Memory()", "RANDOM_SEED": 3}
    assert cells[5].settings == {"RATE": 0.5, "RANDOM_SEED": 1}


def test_cells_that_a_study_skips_are_not_in_it(tmp_path):
    names = {cell.name for cell in study(tmp_path).cells()}
    skip = ("^memory=bswa, rate=low", "high, seed 1$")
    left = {cell.name for cell in study(tmp_path, skip=skip).cells()}
    assert names - left == {
        "memory=bswa, rate=low, seed 3", "memory=bswa, rate=low, seed 1", "memory=fam, rate=high, seed 1",
        "memory=bswa, rate=high, seed 1",
    }  # fmt: skip


def test_references_within_values_stay_references(tmp_path):
    parts = {"memory": "@of_memory/Part()", "norms": ("@Part()",)}
    settings = {"adamw.parts": parts, "names": ["a", 1.5], "file": "%FILE"}
    one = study(tmp_path, imports=(), settings=settings)
    cell = next(one.cells())
    one.write_gin_file(cell)
    lines = cell.gin_file.read_text().splitlines()
    assert "adamw.parts = {'memory': @of_memory/Part(), 'norms': (@Part(),)}" in lines
    assert "names = ['a', 1.5]" in lines and "file = %FILE" in lines


def test_a_cell_has_a_gin_file_of_its_own(tmp_path):
    one = study(tmp_path)
    cell = list(one.cells())[2]
    one.write_gin_file(cell)
    choices = cell.directory / "choices.gin"
    assert choices.read_text().splitlines() == [
        "from __gin__ import dynamic_registration",
        "",
        "from famx import modules",
        "import own",
        "",
        "include 'a.gin'",
        "include 'b.gin'",
        "",
        "MEMORY = @modules.Memory()",
    ]
    assert cell.gin_file.read_text().splitlines() == [
        "# memory=bswa, rate=low, seed 3",
        f"include {str(choices)!r}",
        "",
        "RATE = 0.001",
        "RANDOM_SEED = 3",
        f"MODEL_DIR = {str(cell.directory)!r}",
    ]
    plain = list(one.cells())[0]  # it names nothing that is imported
    one.write_gin_file(plain)
    assert plain.gin_file.read_text().startswith("# memory=fam, rate=low, seed 3\ninclude 'a.gin'\n")
    assert not (plain.directory / "choices.gin").exists()
    one.write_gin_file(cell)  # the same again
    other = study(tmp_path, settings={"RATE": 0.5, "STEPS": 3})
    with pytest.raises(ConfigError, match="belongs to a study with other settings"):
        other.write_gin_file(list(other.cells())[2])


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(directory="here"), "must be an absolute path, not here"),
        (dict(gin_files=()), "Study.gin_files must be the gin files of the runs"),
        (dict(gin_files="a.gin"), "Study.gin_files must be the gin files of the runs"),
        (dict(seeds=(0, 1, 0)), "a seed twice"),
        (dict(seeds=(0.5,)), "must be a whole number of at least 0, not 0.5"),
        (dict(axes={"seed": {"a": {}}}), "cannot be named 'seed'"),
        (dict(axes={"a": {}}), "must be a dict of at least one choice"),
        (dict(axes={"a": {"x/y": {}}}), "cannot be named 'x/y'"),
        (dict(axes={"a": {"x": {"MODEL_DIR": "/tmp"}}}), "x of a sets MODEL_DIR"),
        (dict(axes={"a": {"x": [1]}}), "must be a dict of settings"),
        (dict(settings={"import os": 1}), "which is no setting"),
        (dict(imports=("os; x",)), "must be names of modules"),
        (dict(skip=("seed",)), r"Study.skip \('seed',\) leaves no cell"),
        (dict(skip=("(",)), r"Study.skip has '\(', which is no regular expression"),
    ],
)
def test_a_study_that_cannot_be_is_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        study(**{"directory": str(tmp_path), **changes})


def first_cells(name, directory, *more):
    """The study of that gin file, and its cells of seed 0."""
    with clean():
        file, given = f"gin_configs/studies/{name}.gin", [f"STUDY_DIR = {str(directory)!r}", *more]
        gin_utils.parse_gin([file], given)
        one = gin_utils.call(commands.study)
    return one, [cell for cell in one.cells() if cell.seed == 0]


def config_of(one, cell):
    """The decoder's config of a cell, from the gin file that the study writes for it."""
    one.write_gin_file(cell)
    with clean():
        gin_utils.parse_gin([str(cell.gin_file)])
        return gin.get_configurable(DecoderConfig)()


@pytest.mark.parametrize(
    ("name", "more", "choices", "others"),
    [
        ("memories", [], 12 * 6 - 1, {"block_recurrent"}),
        ("memories_copy", [], 12 * 5 - 1, {"block_recurrent"}),
        ("memories_recall", [], 12 * 4 - 1, {"block_recurrent"}),
        ("memories_multikey", [], 12 * 4 - 1, {"block_recurrent"}),
        ("memories_text", [], 12 * 2, {"block_recurrent"}),
        ("memories_gpu", ["BASE_GIN = 'gin_configs/models/fam_135m.gin'"], 9, set()),
    ],
)
def test_every_cell_of_the_studies_of_memories_is_a_run(name, more, choices, others, tmp_path):
    one, cells = first_cells(name, tmp_path, *more)
    configs = [config_of(one, cell) for cell in cells]
    kinds = [(config.memory.kind, config.memory_segments) for config in configs]
    assert len(cells) == len(set(cell.name for cell in cells)) == choices
    assert {kind for kind, _ in kinds} == others | {
        "none", "fam", "infini", "key_value_means", "landmark", "rmt", "auto_compressor",
    }  # fmt: skip
    windows = {1, 3} if name == "memories_text" else {3}
    assert {segments for kind, segments in kinds if kind == "none"} == windows


def test_the_balance_is_between_equal_bytes(tmp_path):
    one, cells = first_cells("balance", tmp_path)
    sizes, kept = [], set()
    for cell in cells:
        config = config_of(one, cell)
        start = functools.partial(Decoder(config).init_with_output, method="initial_state")
        state, _ = jax.eval_shape(functools.partial(start, jax.random.key(0), batch_size=1))
        kept.add(state.num_bytes())
        sizes.append((config.memory_segments, config.memory_columns))
    assert sizes == [(2, 0), (1, 64), (0, 128)] and len(kept) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["memories", "memories_copy", "memories_recall", "memories_multikey", "memories_text", "balance",
     "fam_parts", "carry_over"],
)
def test_every_cell_of_the_studies_can_begin(name, tmp_path, monkeypatch):
    """As far as to the point where settings and data are checked and a run would be begun."""

    def begin(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "starting", begin)
    one, cells = first_cells(name, tmp_path)
    for cell in cells:
        one.write_gin_file(cell)
        with clean():
            gin_utils.parse_gin([str(cell.gin_file)])
            with pytest.raises(KeyboardInterrupt):
                gin_utils.call(loop.train)


def finish(cell, **scores):
    """What a complete cell leaves."""
    cell.directory.mkdir(parents=True)
    (cell.directory / "metrics.jsonl").write_text(
        "\n".join(
            json.dumps({"step": step, "split": split, "time": 0.0, "loss": loss})
            for step, split, loss in ((1, "train", 9.0), (2, "train", 1.0 + cell.seed), (2, "eval", 7.0))
        )
    )
    passkey = {
        "exact_match": {"hold": scores},
        "answer_loss": {"kept": {"hold": {"2": 1.5}}, "zeroed": {"hold": {"2": 2.5}}},
        "block_size": 4,
        "train_blocks": 2,
        "memory": {"zeroed/hold/2": 0.0},
    }
    (cell.directory / "passkey.json").write_text(json.dumps(passkey))
    about = {
        "choices": dict(cell.choices),
        "seed": cell.seed,
        "command": ["-m", "famx.train"],
        "seconds": 2.0,
    }
    (cell.directory / runner.DONE).write_text(json.dumps({**about, **runner.versions()}))


def test_the_table_has_a_row_for_each_number_and_the_summary_the_spread(tmp_path):
    one = study(tmp_path, axes={"memory": AXES["memory"]}, measures=("passkey/hold/2", "train/loss"))
    cells = list(one.cells())
    for cell, score in zip(cells[:3], (0.5, 0.25, 1.0)):
        finish(cell, **{"2": score, "4": 0.125})
    text = commands.tables(one)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 3 * 6  # two losses, two scores, an answer's loss and one with the memory zeroed
    row = next(row for row in rows if row["measure"] == "passkey/hold/2")
    assert (row["memory"], row["seed"], row["value"], row["command"]) == (
        "fam",
        "3",
        "0.5",
        "-m famx.train",
    )
    assert row["jax"] and row["famx"]
    assert "0.75 [0.5, 1]" in text and "0.25" in text  # fam has two seeds, bswa one
    assert "3 [2, 4]" in text  # the last loss of each seed, not the first
    assert (tmp_path / "summary.md").read_text().count("|") and (tmp_path / "passkey.png").stat().st_size
    pyarrow = pytest.importorskip("pyarrow.parquet")
    assert pyarrow.read_table(tmp_path / "results.parquet").num_rows == len(rows)
    assert "bswa" not in commands.tables(one, "^memory=fam")
    assert {row["memory"] for row in csv.DictReader((tmp_path / "results.csv").open())} == {"fam"}


def test_scores_over_lengths_are_a_figure(tmp_path, monkeypatch):
    one = study(tmp_path, axes={"memory": AXES["memory"]}, measures=("train/loss", "eval/accuracy/*"))
    drawn = {}
    for cell, scores in zip(one.cells(), ((0.5, 0.25), (0.75, 0.5), (1.0, 0.125))):
        finish(cell)
        (cell.directory / "passkey.json").unlink()
        line = {"step": 9, "split": "eval", "accuracy/32": scores[0], "accuracy/64": scores[1]}
        lines = [{"step": 9, "split": "train", "loss": 1.0}, line]
        (cell.directory / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    make = results.lengths_figure

    def draw(medians, *arguments, **options):
        drawn.update(medians, **options)
        return make(medians, *arguments, **options)

    monkeypatch.setattr(results, "lengths_figure", draw)
    assert "accuracy/64" in commands.tables(one)
    assert drawn["eval/accuracy"] == {"fam": {32: 0.75, 64: 0.1875}, "bswa": {32: 0.75, 64: 0.5}}
    assert drawn["ranges"]["eval/accuracy"]["fam"] == {32: (0.5, 1.0), 64: (0.125, 0.25)}
    assert (tmp_path / "lengths.png").stat().st_size and not (tmp_path / "passkey.png").exists()


def test_the_summary_names_what_was_measured_if_asked_for_something_else(tmp_path):
    one = study(tmp_path, measures=("train/los",))
    with pytest.raises(ConfigError, match="None of the cells of .* is complete yet"):
        commands.tables(one)
    finish(next(one.cells()), **{"2": 0.5})
    with pytest.raises(ConfigError, match="No run measured train/los: choose from train/loss, eval/loss"):
        commands.tables(one)


def test_the_task_is_that_of_the_flags_or_else_of_the_environment(monkeypatch):
    for variable in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")  # of a job without a number of completions
    assert commands.share(0, None) == (0, 1)
    monkeypatch.setenv("JOB_COMPLETIONS", "5")
    assert commands.share(0, None) == (3, 5) and commands.share(1, 2) == (1, 2)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "9")
    assert commands.share(0, None) == (7, 9)
    with pytest.raises(ConfigError, match="--task=2 must be below --tasks=2"):
        commands.share(2, 2)


def test_tasks_of_an_array_share_the_cells(tmp_path, capsys):
    one = study(tmp_path)
    seen = []
    for task in range(3):
        assert commands.run(one, "", (task, 3), 1, None, dry_run=True) == 0
        seen.append(capsys.readouterr().out.splitlines())
    assert sorted(map(len, seen)) == [2, 3, 3] and len({line for lines in seen for line in lines}) == 8
    with pytest.raises(ConfigError, match="none of the 8 cells. Did you mean memory=bswa, rate=low,"):
        commands.selected(one, "^memory=bswa, rate=lower, seed [31]$")
    with pytest.raises(ConfigError, match="no regular expression"):
        commands.selected(one, "(")


def test_cells_run_side_by_side_and_a_failed_one_is_named(tmp_path, monkeypatch):
    """Each cell in a process of its own, which sees its own cores or GPU."""
    one = study(tmp_path, axes={"n": {"0": {}, "1": {}, "2": {}}}, seeds=(0,))
    code = (
        "import os, sys, pathlib; here = pathlib.Path(sys.argv[1]);"
        " seen = os.environ.get('CUDA_VISIBLE_DEVICES'), len(os.sched_getaffinity(0));"
        " (here / 'seen').write_text('%s %s' % seen);"
        " sys.exit('n=1' in here.name and 3)"
    )
    monkeypatch.setattr(runner, "command", lambda cell: [sys.executable, "-c", code, str(cell.directory)])
    lines, cells = [], list(one.cells())
    failed = runner.Runner(one, processes=2, gpus=2, say=lines.append).run(cells)
    assert [cell.choices["n"] for cell in failed] == ["1"]
    assert [runner.is_complete(cell) for cell in cells] == [True, False, True]
    assert any("n=1, seed 0: failed with exit code 3; see" in line for line in lines)
    assert {(cell.directory / "seen").read_text().split()[0] for cell in cells} <= {"0", "1"}
    before = [(cell.directory / "seen").stat().st_mtime_ns for cell in cells]
    runner.Runner(one, processes=2, say=lines.append).run(cells)  # only the failed one again
    after = [(cell.directory / "seen").stat().st_mtime_ns for cell in cells]
    assert [a == b for a, b in zip(before, after)] == [True, False, True]
    if len(os.sched_getaffinity(0)) > 1:
        share = int((cells[1].directory / "seen").read_text().split()[1])
        assert (
            share == -(-len(os.sched_getaffinity(0)) // 2) or share == len(os.sched_getaffinity(0)) // 2
        )


GRID = """\
from __gin__ import dynamic_registration
from famx.study import commands
from famx.study import grid
commands.study.study = @grid.Study()
grid.Study:
  directory = {directory!r}
  gin_files = ("gin_configs/examples/passkey_short.gin",)
  settings = {{
      "TRAIN_STEPS": 4, "BATCH_SIZE": 2, "DECAY_STEPS": 1, "REPORT_BLOCKS": (4,),
      "PasskeyEvaluation.examples": 2, "warmup_stable_decay.warmup_steps": 1, "Every.log": 1,
  }}
  axes = {{"memory": {{"fam": {{}}, "bswa": {{"MEMORY": "@modules.Memory()"}}}}}}
"""


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_repeats_nothing(tmp_path):
    (tmp_path / "grid.gin").write_text(GRID.format(directory=str(tmp_path / "study")))
    arguments = [sys.executable, "-m", "famx.ablate", f"--gin_file={tmp_path / 'grid.gin'}"]
    first, second = (tmp_path / "study" / "cells" / f"memory={name}-seed=0" for name in ("fam", "bswa"))
    with start_process(arguments, cwd=ROOT, start_new_session=True) as process:
        while not (second / "metrics.jsonl").exists():  # the first is complete, the second has begun
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert (first / "cell.json").exists() and not (second / "cell.json").exists()
    written = (first / "cell.json").stat().st_mtime_ns
    deadline = time.monotonic() + 300
    while True:  # the killed runner's process may still have the cell
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done
        if (second / "cell.json").exists():
            break
        assert "runs elsewhere" in done.stdout and time.monotonic() < deadline, done
        time.sleep(1)
    assert (first / "cell.json").stat().st_mtime_ns == written
    assert "1 of 2 cells are complete." in done.stdout and "passkey/hold/4" in done.stdout
    rows = list(csv.DictReader((tmp_path / "study" / "results.csv").open()))
    assert {row["memory"] for row in rows} == {"fam", "bswa"}
    assert {row["value"] for row in rows if row["measure"] == "train/loss"}
