"""What the README shows runs: its Python block, and its commands as far as parsing goes."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted((ROOT / "gin_configs" / "examples").glob("*.gin"))


def commands(text):
    """The arguments of every `python -m famx.train` in a text, line continuations joined."""
    joined = re.sub(r"\\\n[# ]*", "", text)
    return [shlex.split(m) for m in re.findall(r"python -m famx\.train (--gin[^\n]*)", joined)]


def parses(arguments):
    code = (
        "import sys; from absl import flags; from famx import gin_utils; gin_utils.define_flags();"
        "flags.FLAGS(gin_utils.rewrite_gin_args(['x', *sys.argv[1:]])); gin_utils.parse_gin_flags()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_python_block_runs():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(block, names)
    assert names["logits"].shape == (1, 100, 256)
    assert names["state"].position.tolist() == [200]


@pytest.mark.parametrize("arguments", commands(README), ids=lambda a: a[0])
def test_readme_commands_parse(arguments):
    parses(arguments)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_says_its_command_at_the_top(path):
    (arguments,) = commands(path.read_text())
    assert f"--gin_file=gin_configs/examples/{path.name}" in arguments
    parses(arguments)


def test_linked_pages_exist():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
