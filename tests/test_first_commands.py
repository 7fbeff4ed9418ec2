"""What a newcomer types first: the listed commands, `--help`, `--import`, tasks, examples."""

import importlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys

import pytest
from processes import start_process
from test_famx_main import run

import famx
import famx.data
from famx.__main__ import COMMANDS
from famx.base import command_line, examples
from famx.data.tasks import registry
from famx.data.tools.listing import task_options, task_table

ROOT = pathlib.Path(famx.__file__).parents[1]
FILES = sorted(path for path in (ROOT / "gin_configs").glob("*/*.gin") if path.parent.name != "t5x")


def test_the_listed_commands_parse():
    """By the flags and gin of their mains; see `tests/docs/command_check.py`."""
    modules = {name: importlib.import_module(module) for name, module in COMMANDS.items()}
    listed = [shlex.split(command_line.example(module.__doc__)) for module in modules.values()]
    assert [name for _, name, *_ in listed] == list(COMMANDS)
    calls = [[COMMANDS[name], arguments] for _, name, *arguments in listed]
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "docs" / "command_check.py")],
        input=json.dumps(calls), capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [problem for problem in json.loads(result.stdout) if problem] == []


def test_help_of_a_main_with_gin_names_files_and_settings():
    _, out, _ = run("-m", "famx", "train", "--help")
    assert "\nUsage: famx train FILE ... [--gin.NAME=VALUE ...] [--FLAG=VALUE ...]\n" in out
    assert "\n  --gin.NAME=VALUE\n" in out and "\n  --gin_file\n" in out
    _, out, _ = run("-m", "famx", "chat", "--help")
    assert "\nUsage: famx chat [--FLAG=VALUE ...]\n" in out and "--gin" not in out


@pytest.mark.parametrize("command", [[], ["examples"], ["train", "--help"]], ids=" ".join)
def test_output_that_nobody_reads_any_more_ends_a_command_silently(command):
    """As in `famx examples | head -1`."""
    process = start_process(
        [sys.executable, "-m", "famx", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 128 + signal.SIGPIPE)


# ---------------------------------------------------------------- --import


@pytest.mark.sampled(4)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_imports_modules_of_the_user(command, tmp_path):
    (tmp_path / "my_module.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "config.gin").write_text("")
    arguments = {"train": ["passkey_tiny"], "compile": ["tiny", "--topology=cpu:1"], "replay": ["."]}
    result = run("-m", "famx", command, *arguments.get(command, []), "--import=my_module", cwd=tmp_path)
    assert result == (1, "", "imported\n")


@pytest.mark.parametrize("name, sentence", [
    ("no_module", "--import=no_module: there is no module no_module in {} or installed."),
    ("my_module.py", "--import=my_module.py must name a module: my_module for my_module.py."),
    ("a/b", "--import=a/b must name a module: my_module for my_module.py."),
])  # fmt: skip
def test_a_module_that_is_not_there_is_one_sentence(name, sentence, tmp_path):
    code, _, err = run("-m", "famx", "tasks", f"--import={name}", cwd=tmp_path)
    assert (code, err) == (2, f"famx: error: {sentence.format(tmp_path)}\n")


def test_a_module_that_imports_what_is_not_there_keeps_its_traceback(tmp_path):
    (tmp_path / "my_module.py").write_text("import no_such_library\n")
    code, _, err = run("-m", "famx", "tasks", "--import=my_module", cwd=tmp_path)
    assert code == 1 and "Traceback" in err and "my_module.py" in err and "no_such_library" in err


# ---------------------------------------------------------------- tasks and examples


def test_tasks_lists_those_of_the_user_and_their_options(tmp_path):
    (tmp_path / "my_module.py").write_text(
        "import famx.data\nfrom famx.base.ranges import Positive\n"
        "def my_task(words: Positive, noise: float = 0.5):\n"
        "    '''Words with noise.'''\n"
        "famx.data.register('my_task', my_task)\n"
    )
    _, out, _ = run("-m", "famx", "tasks", "--import=my_module", cwd=tmp_path)
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "your files" in rows["my_task"] and rows["my_task"].endswith(" Words with noise.")
    assert " nothing " in rows["passkey_words"] and "isa-afp.org" in rows["isabelle"]
    assert "xlsum_... (45)" in rows and "xlsum_english" not in rows
    _, out, _ = run("-m", "famx", "tasks", "my_task", "--import=my_module", cwd=tmp_path)
    assert out.splitlines()[0] == "my_task: Words with noise. Needs: your files."
    assert "words   (must be given)  a whole number of at least 1" in out.splitlines()
    assert "noise   0.5              a number" in out.splitlines()
    code, _, err = run("-m", "famx", "tasks", "pasky", cwd=tmp_path)
    assert code == 2 and "No task's name contains pasky. Did you mean passkey" in err


def test_a_part_of_a_name_lists_all_that_have_it():
    names = [line.split()[0] for line in task_table("xlsum_e").splitlines()[1:-2]]
    assert names == ["xlsum_english"]
    assert len(task_table("xlsum").splitlines()) == 46 + 3


@pytest.mark.parametrize("name", famx.data.names())
def test_every_task_has_options_that_can_be_shown(name):
    text = task_options(name)
    assert text.startswith(f"{name}: ") and "\nOPTION " in text
    fixed = getattr(registry.factory(name), "keywords", {})
    shown = {line.split()[0] for line in text.split("\n\n")[1].splitlines()[1:]}
    assert not shown & set(fixed)


def test_examples_lists_every_file_and_shows_one(tmp_path):
    _, out, _ = run("-m", "famx", "examples", cwd=tmp_path)
    listed = {line.split(maxsplit=1)[0] for line in out.splitlines() if line}
    assert {path.stem for path in FILES} <= listed
    _, out, _ = run("-m", "famx", "examples", "passkey_tiny", cwd=tmp_path)
    assert "famx train passkey_tiny --gin.MODEL_DIR=/tmp/famx/passkey_tiny" in out and "Cost: " in out
    assert out.splitlines()[-1].endswith("gin_configs/examples/passkey_tiny.gin")
    code, _, err = run("-m", "famx", "examples", "nothing_like_it", cwd=tmp_path)
    assert code == 2 and err.startswith("famx: error: There is no gin file nothing_like_it.")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_has_a_short_description(path):
    found = examples.read_example(path)
    assert 10 < len(found.about) <= 150
    if path.parent.name == "examples":
        assert found.command.startswith("famx train ") and path.stem in found.command.split()
