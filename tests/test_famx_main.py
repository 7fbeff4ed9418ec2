"""`famx COMMAND`: it is `python -m famx.COMMAND`; every main is short, light, and explains its flags."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

import famx
from famx.__main__ import COMMANDS, usage
from famx.base import command_line

PACKAGE = pathlib.Path(famx.__file__).parent
NOT_MAINS = {"__init__", "__main__", "mesh"}


def run(*command, cwd=None, **env):
    result = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **env},
    )  # fmt: skip
    return result.returncode, result.stdout, result.stderr


def test_the_commands_are_the_mains():
    mains = {path.stem for path in PACKAGE.glob("*.py")} - NOT_MAINS
    assert {name.replace("-", "_") for name in COMMANDS} == mains
    assert all(module == f"famx.{name.replace('-', '_')}" for name, module in COMMANDS.items())


@pytest.mark.parametrize("module", COMMANDS.values())
def test_a_main_is_short(module):
    assert len(PACKAGE.joinpath(f"{module.removeprefix('famx.')}.py").read_text().splitlines()) < 60


def test_without_a_command_all_are_listed():
    code, out, err = run("-m", "famx")
    assert (code, err) == (0, "") and out == usage() + "\n"
    assert (code, out, err) == run("-m", "famx", "--help")
    lines = re.findall(r"^  (\S+) +[A-Z].+[.?]\n {18}famx (\S+).*[^\\]$", out, re.MULTILINE)
    assert [name for name, _ in lines] == [name for _, name in lines] == list(COMMANDS)
    assert " famx train passkey_tiny --gin.MODEL_DIR=/tmp/famx/passkey_tiny\n" in out


@pytest.mark.parametrize("name, hint", [
    ("trian", "Did you mean train?"),
    ("inspect_dat", "Did you mean inspect-data?"),
    ("xyz", "See famx --help."),
])  # fmt: skip
def test_an_unknown_command_is_one_sentence(name, hint):
    assert run("-m", "famx", name) == (2, "", f"famx: error: There is no command {name}. {hint}\n")


@pytest.mark.sampled(6)
@pytest.mark.parametrize("command, arguments", [
    ("train", ["--gin_file=gin_configs/none.gin"]),
    ("train", ["--gin.TRAIN_STEPS"]),
    ("eval", ["stray"]),
    ("chat", ["--template=none"]),
    ("memory", ["--show=/no/such.famem"]),
    ("convert", ["--form=x"]),
    ("attention_maps", ["--layers=first"]),
    ("attention-maps", ["--layers=first"]),
    ("inspect_data", ["--task_options={", "--task=own_text"]),
    ("compile", ["--topology=cpu:8", "--programs=fly"]),
])  # fmt: skip
def test_a_command_answers_as_its_module_does(command, arguments):
    code, out, err = run("-m", "famx", command, *arguments)
    assert code == 2 and err.startswith("famx: error: ") and len(err.splitlines()) == 1, err
    assert (code, out, err) == run("-m", f"famx.{command.replace('-', '_')}", *arguments)


def test_the_usage_names_the_program():
    _, command, _ = run("-m", "famx", "attention_maps", "--help")
    _, module, _ = run("-m", "famx.attention_maps", "--help")
    assert "Usage: famx attention-maps [--FLAG=VALUE ...]\n" in command
    assert "Usage: python -m famx.attention_maps [--FLAG=VALUE ...]\n" in module
    assert command.replace("Usage: famx attention-maps", "Usage: python -m famx.attention_maps") == module


def test_a_script_elsewhere_finds_modules_of_the_current_directory(tmp_path):
    """As the console script in bin/ does: a gin file may import a module of the user's."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "famx"
    script.write_text("from famx.__main__ import main\nmain()\n")
    (tmp_path / "my_module.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "run.gin").write_text("import my_module\n")
    code, _, err = run(str(script), "train", "--gin_file=run.gin", cwd=tmp_path)
    assert (code, err) == (1, "imported\n")


LIGHT = """
import contextlib, io, json, os, runpy, sys
for name in ("jax", "flax", "numpy", "tensorflow", "seqio"):
    sys.modules[name] = None  # importing it now raises ImportError
from absl import flags
from famx.__main__ import COMMANDS
from famx.base import command_line
for name, module in COMMANDS.items():
    sys.argv = [f"famx {name}", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = end.code
    declared = {name: flags.FLAGS[name].help for name in command_line._declared}
    print(json.dumps([module, code, out.getvalue(), declared]))
"""


def test_help_needs_no_heavy_import_and_explains_every_flag():
    code, out, err = run("-c", LIGHT)
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line[0] for line in lines] == list(COMMANDS.values())
    for module, code, text, declared in lines:
        assert code == 0 and text.count("Usage: ") == 1, module
        for name, about in declared.items():
            assert re.search(rf"^  --(\[no\])?{name}(=.*)?$", text, re.MULTILINE), (module, name)
            about = about.split(">: ")[-1]
            assert re.match(r"[A-Z]", about) and not about.startswith("Of "), (module, name)
            assert "." in about, (module, name)


def test_choices_in_flags_are_those_of_the_code():
    """The mains name them, so that --help imports nothing."""
    from famx import convert, export
    from famx.conversion import exporting
    from famx.models import memory_start

    command_line.declare(convert.define_flags)
    assert flags.FLAGS["prompt"].parser.enum_values == list(memory_start.PROMPT_STARTS)
    command_line.declare(export.define_flags)
    assert flags.FLAGS["dtype"].parser.enum_values == list(exporting.DTYPES)
    command_line.declare()
