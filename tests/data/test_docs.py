"""docs/data.md names every task and no other, and its commands run."""

import fnmatch
import os
import pathlib
import re
import subprocess
import sys

import pytest

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_the_table_names_every_task_and_no_other():
    table = [line for line in PAGE.splitlines() if line.startswith("| `")]
    documented = re.findall(r"`([^`]+)`", " ".join(line.split("|")[1] for line in table))
    patterns = [re.sub(r"<\w+>", "*", name) for name in documented]
    code = "import famx.data; print(*famx.data.names())"  # without what other tests register
    names = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    for pattern in patterns:
        assert fnmatch.filter(names, pattern), pattern
    for name in names:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.slow
def test_its_commands_run(tmp_path):
    (tmp_path / "DOWNLOADS" / "qasper").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        line = '{"id": "1", "pid": "1_0", "input": "What?", "output": "That."}\n'
        (tmp_path / "DOWNLOADS" / "qasper" / f"{split}.jsonl").write_text(line)
    block = PAGE.split("## Commands")[1].split("```")[1]
    commands = re.findall(r"^famx ((?:prepare|cache|inspect-data) .*)$", block, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        if command.startswith("prepare"):
            command += " --allow_partial"
        run = subprocess.run(
            [sys.executable, "-m", "famx", *command.split()],
            cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "FAMX_DATA_DIR": str(tmp_path / "DATA")},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    assert (tmp_path / "CACHE" / "scrolls_qasper" / "COMPLETED").is_file()
    assert (tmp_path / "lengths.png").is_file()
