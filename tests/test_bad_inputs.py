"""Every bad input of the table ends in one sentence, with exit code 2, and leaves no trace.

The commands run as a user's do, but in forks of one process (`forked_mains.py`), so that the table takes
about a minute rather than one start of Python and jax for each row.
"""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
from bad_inputs import CASES, Files

ROOT = pathlib.Path(__file__).parent.parent
MOST_SECONDS = 30.0  # of processor time; imports and compilation, but no training


def contents(folder: pathlib.Path) -> dict[str, str]:
    """Digest of every file, and "" for every directory, by path."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory):
    """By name of a case that is to run: the answer, its folder, and what was there before and after."""
    ours = (item for item in request.session.items if item.path == request.path)
    asked = {item.callspec.params["name"] for item in ours if hasattr(item, "callspec")}
    cases = {name: case for name, case in CASES.items() if name in asked}
    folder = tmp_path_factory.mktemp("bad")
    shared, home, cache = folder / "shared", folder / "home", folder / "cache"
    shared.mkdir()
    home.mkdir()
    files = Files.make(shared)
    jobs, places, ends = [], {}, []
    for i, (name, case) in enumerate(cases.items()):
        here = places[name] = folder / f"case{i}"
        here.mkdir()
        ends.append(case.make and case.make(here, files))
        (here / "gin_configs").symlink_to(ROOT / "gin_configs")
        jobs.append({"arguments": case.arguments(here, files), "cwd": str(here), "home": str(home),
                     "environment": dict(case.environment)})  # fmt: skip
    watched = [*places.values(), shared, home]
    before = {path: contents(path) for path in watched}
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "forked_mains.py")],
        input=json.dumps(jobs), capture_output=True, text=True, cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MPLCONFIGDIR": str(cache)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    after = {path: contents(path) for path in watched}
    for end in filter(callable, ends):
        end()
    assert after[shared] == before[shared] and after[home] == before[home]
    return {
        name: (answer, places[name], before[places[name]], after[places[name]], files)
        for name, answer in zip(cases, json.loads(run.stdout), strict=True)
    }


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_is_one_sentence(answers, name):
    answer, here, before, after, files = answers[name]
    lines = answer["err"].splitlines()
    assert answer["code"] == 2 and lines, answer
    assert len(lines) == 1 and lines[0].startswith("famx: error: "), answer["err"]
    paths = {key: str(path) for key, path in vars(files).items()} | {"here": str(here)}
    for word in CASES[name].words:
        for key, path in paths.items():
            word = word.replace("{" + key + "}", path)
        assert word in lines[0], lines[0]
    assert after == before
    assert answer["seconds"] < MOST_SECONDS


def test_the_table_is_long():
    assert len(CASES) >= 120
