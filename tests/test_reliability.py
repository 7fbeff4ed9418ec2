"""The tools that disturb runs: a short trial, and that they find what they look for.

The tools fork, which a process that uses devices must not: tests that start runs call them as commands.
"""

import collections
import json
import os
import re
import subprocess
import sys

import pytest
import reliability
import reliable_runs
import soak
from reliability import Case, Disturbed, Records
from reliable_runs import Result

from famx.base import gin_utils


def command(*args, seconds=600):
    done = subprocess.run(
        [sys.executable, "-m", *args], cwd=gin_utils.gin_root(), capture_output=True, text=True,
        timeout=seconds,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the tool needs Linux's prctl and /proc")
def test_a_short_trial_finds_nothing_and_goes_on(tmp_path):
    args = ("tests.reliability", "--modes", "continuous", "--processes", "1", "--out", str(tmp_path))
    code, text = command(*args, "--kills=2", "--faults", "kill")
    assert code == 0, text
    kills = int(re.search(r"\| continuous \| 1 \| \d+ \| (\d+) \| 0 \|", text)[1])
    assert kills >= 2 and "nothing found" in text
    code, again = command(*args, "--kills=2", "--faults", "kill")
    assert code == 0 and text.endswith(again)  # only the table: nothing is done again
    code, text = command(*args, "--kills=2", "--faults", "stop")
    assert code == 1 and "was made with other settings" in text


@pytest.mark.slow
def test_every_fault_in_every_mode(tmp_path):
    code, text = command("tests.reliability", "--kills=20", "--out", str(tmp_path), seconds=3600)
    assert code == 0, text


@pytest.mark.slow
def test_a_short_soak(tmp_path):
    args = ("tests.soak", "--hours=0.01", "--minutes", "0.1", "0.2", "--out", str(tmp_path))
    code, text = command(*args, seconds=3600)
    assert code == 0, text
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["same_checkpoint"] and found["same_metrics"] and found["pieces"] >= 1
    assert "| complete checkpoints lost | 0 |" in (tmp_path / "soak.md").read_text()


# ---------------------------------------------------------------- what the tools look for


def disturbed(folder, checkpoints, newest=0, begun_with=0):
    """A case whose run has these checkpoints now."""
    found = Disturbed(Case(0, "none", 1), folder, 0, ["kill"], 1)
    found.folder.mkdir(exist_ok=True)
    for step in checkpoints:
        (found.folder / f"checkpoint_{step}").mkdir()
    found.newest, found._begun_with = newest, begun_with
    return found


@pytest.mark.parametrize(
    "log, newest, begun_with, finding",
    [
        ("Resuming from step 14 of /x.", 21, 14, None),
        ("7,376 parameters; 1 cpu\ntrain step 3/80", 0, 0, None),
        ("Resuming from step 7 of /x.", 21, 14, "resumed from 7, not from 14"),
        ("7,376 parameters; 1 cpu\ntrain step 3/80", 21, 14, "though checkpoint 14 was complete"),
        ("Resuming from step 14 of /x.", 28, 14, "checkpoint 28 was lost; the newest is 21"),
        ("Resuming from step 14 of /x.\nStopped at step 23;", 21, 14, "23 was announced and does not"),
    ],
)
def test_a_start_that_lost_something_is_found(tmp_path, log, newest, begun_with, finding):
    case = disturbed(tmp_path, (14, 21), newest, begun_with)
    (tmp_path / "log.0").write_text(f"before\n{log}\n")
    case._check(len("before\n"), "kill", [-9])
    found = case.case.findings
    assert found == [] if finding is None else len(found) == 1 and finding in found[0]


def test_a_run_that_ends_differently_is_found(tmp_path, monkeypatch):
    disturbed(tmp_path, (reliability.STEPS,))
    monkeypatch.setattr(reliability, "result", lambda *args: Result("a", "b"))
    for whole, findings in {
        Result("a", "b"): [],
        Result("x", "b"): ["the last checkpoint differs"],
        Result("a", "x"): ["the metrics differ"],
    }.items():
        case = Case(0, "none", 1)
        reliability._outcome(case, tmp_path, whole)
        assert case.findings == findings


def test_each_kind_of_damage_changes_one_file_of_the_newest_checkpoint(tmp_path):
    kinds = set()
    for number in range(40):
        folder = tmp_path / str(number)
        folder.mkdir()
        case = disturbed(folder, (7, 14))
        case.random.seed(number)
        contents = {}
        for step in (7, 14):
            for name in ("a", "b"):
                path = case.folder / f"checkpoint_{step}" / name
                path.write_bytes(b"0123456789")
                contents[path] = path.read_bytes()
        case._damage()
        now = {path: path.read_bytes() if path.exists() else None for path in contents}
        ((path, data),) = [(path, now[path]) for path in contents if now[path] != contents[path]]
        assert path.parent.name == "checkpoint_14" and case.newest == 7
        kinds.add(None if data is None else len(data))
    assert kinds == {None, 0, 5, 10}
    only = tmp_path / "only"
    only.mkdir()
    case = disturbed(only, (7,))
    case._damage()
    assert case.case.faults["damage"] == 0


def test_records_add_up_and_go_on(tmp_path):
    settings = {"seed": 0}
    records = Records(tmp_path, settings)
    records.add(Case(0, "none", 1, collections.Counter(kill=3, stop=1)))
    records.add(Case(1, "none", 2, collections.Counter(kill=2), ["checkpoint 7 was lost"]))
    again = Records(tmp_path, settings)
    assert again.cases == records.cases and again.count("kill") == 5
    assert again.table(["kill", "stop"]).splitlines()[2:] == [
        "| none | 1 | 1 | 3 | 1 | 0 |",
        "| none | 2 | 1 | 2 | 0 | 1 |",
        "| all |  | 2 | 5 | 1 | 1 |",
    ]
    with pytest.raises(SystemExit, match="other settings"):
        Records(tmp_path, {"seed": 1})


def test_a_process_that_uses_devices_does_not_fork(tmp_path):
    with pytest.raises(AssertionError, match="must not fork"):
        reliable_runs.Child(tmp_path / "log", lambda: None)


CHILDREN = """
import os, pathlib, resource, signal, sys, time
sys.path.insert(0, "tests")
from reliable_runs import Child
from famx.base.errors import ConfigError

log = pathlib.Path(sys.argv[1])

def fail(error):
    raise error

def full():
    for _ in range(200):
        print("x" * 999)
    pathlib.Path(f"{log}.file").write_text("y" * 2000)

print([Child(log, f).wait(60) for f in (
    lambda: print("one"), lambda: fail(ConfigError("two.")), lambda: fail(KeyError("three")),
    lambda: os.kill(os.getpid(), 9),
)])
child = Child(log, lambda: time.sleep(0.5) or full())
resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
print(child.wait(60))
print(Child(log, lambda: time.sleep(60)).wait(0.1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the tool needs Linux's prctl and /proc")
def test_children_have_codes_logs_and_limits(tmp_path):
    log = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN, str(log)], cwd=gin_utils.gin_root(), capture_output=True,
        text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.split("\n")[:3] == ["[0, 2, 1, -9]", "1", "None"], done.stderr
    text = log.read_text()
    assert text.startswith("one\nfamx: error: two.\nTraceback") and "KeyError: 'three'" in text
    assert text.count("x" * 999) == 200  # what is said is not limited, files are
    assert "File too large" in text


def test_the_table_of_a_soak():
    piece = soak.Piece(2, 180.0, 50, 400, (100, 102, 103), 30, 40, 60, 1)
    other = soak.Piece(1, 180.0, 350, 900, (100, 101, 102), 31, 41, 61, 2)
    found = soak._watched([piece, other])
    assert found["lost"] == 1 and found["hours"] == 0.1 and found["open_files"] == [40, 41]
    assert found["largest_growth_within_a_piece"] == 0.02
    found |= dict(same_checkpoint=True, same_metrics=False, differing_lines=2, lines=9, steps=1000)
    found["rss_of_whole"] = [1e6, 2e6, 3e6]
    text = soak.table(found)
    assert "| differing lines of metrics | 2 of 9 |" in text and "30 to 31" in text
    assert "1 MB, 2 MB, 3 MB" in text
