"""Every command on every page parses, or is marked with what it needs.

The blocks run in bash with stand-ins on PATH that record their arguments. The recorded commands of famx
are then parsed by its flags and gin. Other programs (pip, git, gcloud) are not ours to check,
so a block that has one says what it needs in the line before: `<!-- needs: network -->`.
"""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
from markdown_pages import PAGES, ROOT, Block, blocks

from famx.__main__ import COMMANDS

BLOCKS = [block for page in PAGES for block in blocks(page, "bash")]
NEEDS = ("network", "gpu", "tpu", "cloud", "t5x", "long")
RUN_BY_CI = ("main-command", "test-command")
STUBS = ("famx", "python", "pip", "git", "pytest", "taskset", "make", "pre-commit", "zensical", "jupyter")
OURS = ("famx", "launch", "benchmarks", "notebooks")
_STUB = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >> "$RECORD"; printf '\\n\\0' >> "$RECORD"
cat > /dev/null  # or who writes into the pipe could find it closed
if [ "$1" = "-c" ]; then echo printed; fi
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; touch "$3/bin/activate"; fi
"""


@functools.cache
def stubs() -> str:
    folder = pathlib.Path(tempfile.mkdtemp())
    for name in STUBS:
        (folder / name).write_text(_STUB)
        (folder / name).chmod(0o755)
    return str(folder)


@functools.cache
def commands(block: Block) -> list[list[str]]:
    """The calls of programs that a block makes, as bash understands it."""
    with tempfile.TemporaryDirectory() as folder:
        record = pathlib.Path(folder) / "record"
        record.touch()
        run = subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", block.text],
            cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            env={"PATH": f"{stubs()}:/usr/bin:/bin", "RECORD": str(record), "HOME": folder},
        )  # fmt: skip
        assert run.returncode == 0, f"{block}: {run.stderr}"
        calls = record.read_text().split("\n\0")[:-1]
    calls = [call.split("\0")[:-1] for call in calls]
    return [call[call.index("python") :] if call[0] == "taskset" else call for call in calls]


def module(call: list[str]) -> tuple[str, list[str]] | None:
    """`(module, arguments)` of `famx COMMAND` or `python -m module`, where the module is ours."""
    if call[0] == "famx":
        return COMMANDS.get(call[1], f"famx.{call[1]}"), call[2:]
    if call[:2] == ["python", "-m"] and call[2].split(".")[0] in OURS:
        return call[2], call[3:]
    return None


def needs(block: Block) -> list[str]:
    return re.findall(r"[\w-]+", block.marker.partition("needs:")[2])


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_ours_or_says_what_it_needs(block):
    assert set(needs(block)) <= set(NEEDS)
    foreign = [call for call in commands(block) if module(call) is None and call[1:2] != ["-c"]]
    if foreign and block.marker not in RUN_BY_CI:
        assert needs(block), foreign


MISTAKES = {
    "checkpoints": ["famx.chat", ["--checkpoints=/x"]],
    "TRAIN_STEP": ["famx.train", ["pretrain", "--gin.TRAIN_STEP=3"]],
    "passkey_tyni": ["famx.train", ["passkey_tyni", "--gin.MODEL_DIR=/x"]],
    "argument to": ["famx.convert", ["--from=a", "to"]],
    "no_such_main": ["famx.no_such_main", []],
}


def test_commands_of_famx_parse_and_mistakes_are_found():
    found = [
        module(call)
        for block in BLOCKS
        if not block.page.startswith("docs/tutorials/")  # `test_tutorials.py` runs these
        for call in commands(block)
        if module(call) and module(call)[0].startswith("famx.")
    ]
    assert len(found) >= 20
    # A model that an earlier command of the page made: any will do.
    any_model = lambda x: "tiny" if re.fullmatch(r"/\S+/model\.gin", x) else x
    calls = [[name, list(map(any_model, arguments))] for name, arguments in found]
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "docs" / "command_check.py")],
        input=json.dumps([*calls, *MISTAKES.values()]), cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    problems = [(*call, answer) for call, answer in zip(calls, answers) if answer]
    assert not problems, "\n".join(map(str, problems))
    for word, answer in zip(MISTAKES, answers[len(calls) :]):
        assert answer and word in answer


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_options_of_other_mains_exist(block):
    for name, arguments in filter(None, map(module, commands(block))):
        path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        assert path.is_file(), name
        if name.startswith("benchmarks."):
            known = re.findall(r'"(--\w+)"', (ROOT / "benchmarks" / "command.py").read_text())
            known += [f"--{word}" for word in re.findall(r'options=\{"(\w+)"', path.read_text())]
            known += re.findall(r'"(--\w+)"', path.read_text())
            for option in arguments:
                assert not option.startswith("--") or option.partition("=")[0] in known, option


def test_extras_that_pages_install_exist():
    setup = (ROOT / "setup.py").read_text()
    known = re.findall(r'^        "([\w-]+)": [\[A-Z]', setup, re.MULTILINE)
    asked = [x for page in PAGES for x in re.findall(r"(?:famx|\.)\[([\w,-]+)\]", page.read_text())]
    assert asked and {name for names in asked for name in names.split(",")} <= set(known)
