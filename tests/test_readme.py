"""The README's Python blocks and commands run, and the commands of all examples parse."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from tiny import make_model, make_params
from trained import write_model_dir

from famx.data.probes.passkey_text import passkey_words

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted((ROOT / "gin_configs" / "examples").glob("*.gin"))


def commands(text):
    """The arguments of every `famx train` in a text, line continuations joined."""
    joined = re.sub(r"\\\n[# ]*", "", text)
    return [shlex.split(m) for m in re.findall(r"^#   famx train ([^\n]*)", joined, re.MULTILINE)]


def parses(arguments):
    code = (
        "from famx.base import gin_utils; from famx import train;"
        "gin_utils.run(gin_utils.parse_gin_flags, train.define_flags, argument='gin_file')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        if "smollm2" not in block:  # tests/conversion/test_smollm2.py runs that
            exec(block, names)
    assert names["logits"].shape == (1, 100, 256)
    assert names["state"].position.tolist() == [200]
    assert len((tmp_path / "prompts.jsonl").read_text().splitlines()) == 4
    assert names["task"].vocab.encode((tmp_path / "book.txt").read_text())


@pytest.mark.slow
def test_the_commands_that_use_a_model_run(tmp_path):
    """They run in the README's order, on a model of random weights instead of the trained one."""
    words = passkey_words()
    model = make_model(vocab_size=128, block_size=32)
    directory = write_model_dir(tmp_path / "model", model, make_params(model.module), words)
    question = "What is the pass key? The pass key is"
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"inputs": question}) + "\n")
    (tmp_path / "book.txt").write_text("The grass is green. " * 40)
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    ran = []
    for command in blocks:
        main = re.search(r"famx (infer|memory|chat|eval) ", command)
        if main is None or "smollm2" in command:
            continue
        command = command.replace("/tmp/famx/passkey_tiny", directory)
        command = command.replace("famx ", f"{sys.executable} -m famx ")
        command = command.strip() + ' --gin.PasskeyEvaluation.blocks="(16,)"' * (main[1] == "eval")
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, (command, run.stderr)
        ran.append((main[1], run.stdout))
    assert [name for name, _ in ran] == ["infer", "memory", "chat", "eval"]
    (line,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert line["inputs"] == question and isinstance(line["prediction"], str)
    assert "tokens read" in ran[1][1] and (tmp_path / "book.famem").is_file()
    assert len(ran[2][1].splitlines()) == 1 and "hold/16" in ran[3][1]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_says_its_command_at_the_top(path):
    (arguments,) = commands(path.read_text())
    assert path.stem in arguments
    # The imported model does not exist here; any other model file parses as well.
    parses([x.replace("/tmp/famx/smollm2/model.gin", "tiny") for x in arguments])


def test_its_figures_are_those_of_the_pages_that_it_names():
    rows = re.findall(r"^\| .+ \| (.+) \| \[\w+\]\((.+)\) \|$", README, re.MULTILINE)
    assert len(rows) >= 6
    for measured, page in rows:
        numbers = re.findall(r"\d+\.\d+", measured)
        assert numbers and not [x for x in numbers if x not in (ROOT / page).read_text()], measured
