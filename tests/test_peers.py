"""The benchmark against other implementations: taking turns, and the command at tiny sizes."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import xla_flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import peers  # noqa: E402
from benchmarks.peer_shape import Shape  # noqa: E402
from benchmarks.turns import LeftOut, Worker  # noqa: E402
from famx.base import tables  # noqa: E402
from famx.scale import timing  # noqa: E402

# An implementation that writes down when it computes.
FAKE = """
import sys, time
from benchmarks.turns import LeftOut, Peer

def build(log, name, falls=True):
    print("noise that a library prints")
    loss = 10.0
    def step():
        nonlocal loss
        loss -= falls
        with open(log, "a") as file:
            print(name, "begins", time.monotonic(), file=file)
        time.sleep(0.01)
        with open(log, "a") as file:
            print(name, "ends", time.monotonic(), file=file)
        return loss
    return Peer(step, {"parameters": 7})

def missing():
    import no_such_package

def broken():
    raise ValueError("two\\nlines")

def unasked():
    raise LeftOut("give it a path.")

def dying():
    sys.exit("gone")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake_peer.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "log"


def test_processes_compute_in_turns(fake):
    """Warm-up, then in forward and reverse order, one at a time, each from where it was."""
    arguments = lambda name: {"log": str(fake), "name": name}
    with (
        Worker("a", "fake_peer:build", arguments("a")) as a,
        Worker("b", "fake_peer:build", arguments("b")) as b,
    ):
        assert a.facts == b.facts == {"parameters": 7, "first_loss": 9.0}
        fake.write_text("")
        timing.interleave({"a": lambda: a.run(2), "b": lambda: b.run(1)}, 2)
        assert (a.run(1), b.run(1)) == (0.0, 3.0)  # 3 steps of preparation, 3 turns and this one
    lines = [line.split() for line in fake.read_text().splitlines()]
    assert "".join(name for name, what, _ in lines if what == "begins") == "aab" + "aab" + "baa" + "ab"
    times = [float(time) for *_, time in lines]
    assert times == sorted(times)
    assert [what for _, what, _ in lines] == ["begins", "ends"] * (len(lines) // 2)


@pytest.mark.parametrize(
    "function, arguments, sentence",
    [
        ("missing", {}, "x: the package no_such_package is not installed."),
        ("broken", {}, "x: it failed with ValueError: two lines"),
        ("unasked", {}, "x: give it a path."),
        ("dying", {}, "x: its process ended; last line of its error output: gone"),
        ("build", {"log": os.devnull, "name": "x", "falls": False}, "x: its loss does not fall"),
    ],
)
def test_what_cannot_be_measured_says_why(fake, function, arguments, sentence):
    with pytest.raises(LeftOut) as reason:
        Worker("x", f"fake_peer:{function}", arguments)
    assert str(reason.value).startswith(sentence)


def test_a_landmark_stands_at_the_beginning_alone():
    inputs, targets = Shape(8, 1, 4, 1, 8, 4, 2, 3, 12).tokens()
    assert inputs.shape == targets.shape == (3, 12)
    assert (inputs[:, 0] == 7).all() and (inputs[:, 1:] < 7).all() and (targets < 7).all()
    assert (inputs[:, 1:] == targets[:, :-1]).all()


def test_the_page_of_this_repository_has_a_place_for_every_section():
    assert tables.missing_markers(ROOT / "docs" / "benchmarks.md", peers.SECTIONS) == []


def test_a_folder_that_is_no_clone_of_meliad_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        peers.main(["--quick", f"--meliad={tmp_path}"])
    assert error.value.code == 2
    assert "is not a clone of google-research/meliad" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot be held to one core")
def test_famx_and_whoever_is_installed_train_beside_each_other(tmp_path):
    """Runs on one core, since frameworks whose threads wait for each other crawl on a busy machine."""
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    shutil.copy(ROOT / "docs" / "benchmarks.md", page)
    flags = f"{xla_flags.FAST} --xla_llvm_disable_expensive_passes=true"
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--quick", "--repeats=2"]
        + ["--only=peers_m1,peers_m0", f"--markdown={page}", f"--json={figures}"],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sections = json.loads(figures.read_text())["sections"]
    assert list(sections) == ["peers_m1", "peers_m0"]
    for section in sections.values():
        assert section["title"] in page.read_text()
        rows = {row["model"]: row for row in section["rows"]}
        assert rows["famx FAM"]["tokens/s, FAM / this"]["median"] == 1
        # The whole prompt of N vectors is all that FAM has more than BSWA.
        more = rows["famx FAM"]["parameters"] - rows["famx BSWA"]["parameters"]
        assert more == peers.QUICK.small.memory_length * peers.QUICK.small.width
        assert float(rows["famx FAM"]["gradient"]) > 0 == float(rows["famx BSWA"]["gradient"])
        for name, row in rows.items():
            first, last = map(float, row["loss"].split(" to "))
            assert math.isfinite(last) and last < first
            if name.endswith("pytorch"):
                assert float(row["gradient"]) > 0, name
        assert all(word not in done.stdout for word in ("failed", "does not fall", "ended"))
        named = [*rows, *(n for n in section["notes"] if n.startswith("left out: "))]
        assert len(named) == (6 if section is sections["peers_m1"] else 4)
