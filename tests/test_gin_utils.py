"""gin's flags, and one sentence for every kind of bad binding."""

import os
import subprocess
import sys

import gin
import pytest

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.gin_arguments import find_gin_file, shipped_files
from famx.memories import Fam
from famx.modules import Memory


@gin.configurable(module="famx_test")
class BuildMemory(Memory):
    kind = "built"


@gin.configurable(module="famx_test")
class BuildFam(Fam):
    kind = "built_fam"


@gin.configurable(module="famx_test")
def build_tool(alpha=1, beta=2, *, model_dir=None):
    return alpha, beta, model_dir


@gin.configurable(module="famx_test")
def build_strict(size=gin.REQUIRED):
    return size


@pytest.fixture(autouse=True)
def clean_gin():
    gin.clear_config()
    yield
    gin.clear_config()


def fails(bindings, files=(), paths=()):
    with pytest.raises(ConfigError) as caught:
        gin_utils.parse_gin(files, bindings, paths)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_rewrite_gin_args():
    argv = ["prog", "--gin_file=a.gin", "--gin.X='a=b'", "--gin.f.y=3", "--gin_bindings=Z=1"]
    assert gin_utils.rewrite_gin_args(argv) == [
        *("prog", "--gin_file=a.gin", "--gin_bindings=X = 'a=b'"),
        *("--gin_bindings=f.y = 3", "--gin_bindings=Z=1"),
    ]


@pytest.mark.parametrize("arg", ["--gin.X", "--gin.=3", "--gin.X="])
def test_rewrite_refuses_half_a_binding(arg):
    with pytest.raises(ConfigError, match="--gin.NAME=VALUE"):
        gin_utils.rewrite_gin_args([arg])


def test_files_bindings_and_macros_compose(tmp_path):
    (tmp_path / "base.gin").write_text("build_tool.alpha = %SIZE\nbuild_tool.beta = 5\nSIZE = 1\n")
    (tmp_path / "run.gin").write_text('include "base.gin"\nSIZE = 3\n')
    gin_utils.parse_gin(["run.gin"], ["build_tool.beta = {'k': [%SIZE]}"], [str(tmp_path)])
    assert build_tool() == (3, {"k": [3]}, None)


def test_later_binding_wins():
    gin_utils.parse_gin([], ["build_tool.alpha = 1", "build_tool.alpha = 7"])
    assert build_tool()[0] == 7


def test_configuration_is_locked():
    gin_utils.parse_gin([], ["build_tool.alpha = 1"])
    with pytest.raises(RuntimeError):
        gin.bind_parameter("build_tool.alpha", 2)


def test_unknown_configurable_names_the_nearest():
    assert "build_tol. Did you mean build_tool?" in fails(["build_tol.alpha = 1"])
    assert "Did you mean build_tool?" in fails(["build_strict.size = @build_tol()"])


def test_unknown_parameter_names_the_nearest():
    assert fails(["build_tool.alhpa = 1"]) == ("build_tool has no parameter alhpa. Did you mean alpha?")


def test_unknown_parameter_in_a_file_names_the_line(tmp_path):
    path = tmp_path / "x.gin"
    path.write_text("build_tool.alpha = 1\nbuild_tool.gamma_ray = 2\n")
    assert f"(in {path}, line 2)" in fails([], [str(path)])


def test_unknown_file_names_the_nearest(tmp_path):
    (tmp_path / "passkey_tiny.gin").write_text("")
    sentence = fails([], ["passkey_tiney.gin"], [str(tmp_path)])
    assert sentence == "There is no gin file passkey_tiney.gin. Did you mean passkey_tiny.gin?"


def test_unknown_include(tmp_path):
    (tmp_path / "x.gin").write_text('include "nowhere/at_all.gin"')
    assert "There is no gin file nowhere/at_all.gin." in fails([], [str(tmp_path / "x.gin")])


def test_import_that_fails(tmp_path):
    (tmp_path / "x.gin").write_text("import famx_no_such_module")
    assert "famx_no_such_module" in fails([], [str(tmp_path / "x.gin")])


def test_file_that_cannot_be_parsed(tmp_path):
    path = tmp_path / "x.gin"
    path.write_text("build_tool.alpha = 1\nbuild_tool.beta == 2\n")
    assert f"cannot be read in {path}, line 2" in fails([], [str(path)])


def test_what_begins_as_gin_must_be_gin():
    sentence = fails(["build_tool.alpha = (1, 2"])
    assert sentence.startswith("The value of --gin.build_tool.alpha cannot be read: (1, 2. What begins")
    assert "quotes, as in --gin.build_tool.alpha=\"'text'\"" in sentence


@pytest.mark.parametrize("text", [
    "runs/x", "ab", "~/runs", "/tmp/a b", "*.txt", "gs://b/x", "2026-11-27", "1e3x", "010", "3 apples",
    "x#1",
    "it's", 'say "a"', "f(1)", "a, b", "1, 2", "C:\\new", "none", "-", "é", "a=b", "a'",
])  # fmt: skip
def test_what_does_not_read_as_gin_is_the_text_itself(text):
    (binding,) = gin_utils.rewrite_gin_args([f"--gin.build_tool.alpha={text}"])
    gin_utils.parse_gin([], [binding.removeprefix("--gin_bindings=")])
    assert build_tool()[0] == text


@pytest.mark.parametrize("text, value", [
    ("3", 3), ("-3", -3), ("1e-3", 1e-3), ("1_000", 1000), (" 7 ", 7), ("True", True), ("None", None),
    ("'7'", "7"), ("'a b'", "a b"), ('"it\'s"', "it's"), ("(1, 'a')", (1, "a")),
    ("{'a': [2]}", {"a": [2]}),
    ("%SIZE", 5), ("@build_strict()", 6),
])  # fmt: skip
def test_what_reads_as_gin_is_gin(text, value):
    (binding,) = gin_utils.rewrite_gin_args([f"--gin.build_tool.alpha={text}"])
    more = ["SIZE = 5", "build_tool.beta = %SIZE", "build_strict.size = 6"]
    gin_utils.parse_gin([], [binding.removeprefix("--gin_bindings="), *more])
    assert build_tool()[0] == value and type(build_tool()[0]) is type(value)


def test_files_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    roots = [str(gin_utils.gin_root())]
    assert find_gin_file("passkey_tiny", roots) == "gin_configs/examples/passkey_tiny.gin"
    assert find_gin_file("passkey_tiny.gin", roots) == "gin_configs/examples/passkey_tiny.gin"
    assert find_gin_file("eval", roots) == "gin_configs/runs/eval.gin"
    assert find_gin_file("gin_configs/t5x/eval.gin", roots) == "gin_configs/t5x/eval.gin"
    (tmp_path / "passkey_tiny").mkdir()  # such as the MODEL_DIR of a run
    assert find_gin_file("passkey_tiny", roots) == "gin_configs/examples/passkey_tiny.gin"
    (tmp_path / "mine.gin").write_text("")
    assert find_gin_file("mine", roots) == "mine.gin"
    (tmp_path / "passkey_tiny.gin").write_text("")  # one's own comes first
    assert find_gin_file("passkey_tiny", roots) == "passkey_tiny.gin"


def test_names_of_shipped_files_are_not_ambiguous():
    names = [path.stem for path in shipped_files([str(gin_utils.gin_root())])]
    assert len(names) > 30 and len(set(names)) == len(names)


def test_unset_macro_is_named():
    sentence = fails(["build_tool.model_dir = %MODEL_DIR"])
    assert sentence == "MODEL_DIR is not set: add --gin.MODEL_DIR=/some/dir."


def test_unset_macro_inside_a_structure():
    assert "SIZE is not set" in fails(["build_tool.alpha = {'a': (1, [%SIZE])}"])


def test_required_macro_and_parameter():
    assert "SIZE is not set" in fails(["build_tool.alpha = %SIZE", "SIZE = %gin.REQUIRED"])
    gin.clear_config()
    assert "build_tool.alpha is not set" in fails(["build_tool.alpha = %gin.REQUIRED"])


def test_macro_that_nothing_uses_names_the_nearest():
    sentence = fails(["build_tool.alpha = %TRAIN_STEPS", "TRAIN_STEPS = 1", "TRAIN_STPES = 5"])
    assert sentence.startswith("Nothing uses TRAIN_STPES")
    assert sentence.endswith("Did you mean TRAIN_STEPS?")


def test_macro_used_by_a_macro_is_used():
    gin_utils.parse_gin([], ["build_tool.alpha = %A", "A = %B", "B = 4"])
    assert build_tool()[0] == 4


def test_check_all_used():
    gin_utils.parse_gin([], ["build_tool.alpha = 3", "in/build_tool.beta = 4"])
    with pytest.raises(ConfigError, match="build_tool.alpha has no effect"):
        gin_utils.check_all_used()
    gin_utils.check_all_used(ignore=["build_tool"])
    build_tool()
    with pytest.raises(ConfigError, match="in/build_tool.beta has no effect"):
        gin_utils.check_all_used()
    with gin.config_scope("in"):
        build_tool()
    gin_utils.check_all_used()


def test_a_macro_may_be_bound_for_what_another_run_would_call():
    """As LEARNING_RATE is bound to every optimiser; a direct binding must have an effect."""
    gin_utils.parse_gin([], ["RATE = 3", "build_tool.alpha = %RATE", "build_strict.size = %RATE"])
    with pytest.raises(ConfigError, match="has no effect"):
        gin_utils.check_all_used()
    build_tool()
    gin_utils.check_all_used()
    gin.clear_config()
    gin_utils.parse_gin([], ["RATE = 3", "build_tool.alpha = %RATE", "build_strict.size = 3"])
    build_tool()
    with pytest.raises(ConfigError, match="build_strict.size has no effect"):
        gin_utils.check_all_used()


def test_settings_in_a_file_of_what_was_replaced_may_be_without_effect(tmp_path):
    """Model files bind the length of their memory; a run may choose another memory."""
    files = [str(tmp_path / "a.gin")]
    (tmp_path / "a.gin").write_text(
        "MEMORY = @BuildFam()\nbuild_tool.alpha = %MEMORY\nBuildFam.length = 8\n"
        "BuildFam.bias = @build_strict()\nbuild_strict.size = %SIZE\nSIZE = 3\n"
    )
    gin_utils.parse_gin(files, ["MEMORY = @BuildMemory()"])
    assert isinstance(build_tool()[0], BuildMemory)
    assert gin_utils.check_all_used() == [
        "MEMORY is replaced: the settings of BuildFam in the gin files, such as"
        " BuildFam.length, have no effect.",
        "MEMORY is replaced: the settings of build_strict in the gin files, such as"
        " build_strict.size, have no effect.",
    ]
    gin.clear_config()
    # Without the macro, which nothing reads then.
    gin_utils.parse_gin(files, ["build_tool.alpha = None"])
    build_tool()
    assert len(gin_utils.check_all_used()) == 2


def test_settings_of_the_command_line_must_have_an_effect(tmp_path):
    files = [str(tmp_path / "a.gin")]
    text = "build_tool.alpha = @BuildFam()\nBuildFam.length = %LENGTH\nLENGTH = 8\n"
    (tmp_path / "a.gin").write_text(text)
    for binding in ("BuildFam.length = 4", "LENGTH = 4"):
        gin_utils.parse_gin(files, ["build_tool.alpha = None", binding])
        build_tool()
        with pytest.raises(ConfigError, match="BuildFam.length has no effect"):
            gin_utils.check_all_used()
        gin.clear_config()
    # What a later file replaces needs no line in the log; what nothing replaced is an error.
    (tmp_path / "b.gin").write_text("build_tool.alpha = None")
    gin_utils.parse_gin([*files, str(tmp_path / "b.gin")])
    build_tool()
    assert gin_utils.check_all_used() == []
    gin.clear_config()
    (tmp_path / "b.gin").write_text("in/build_strict.size = 1")
    gin_utils.parse_gin([*files, str(tmp_path / "b.gin")], ["build_tool.alpha = None"])
    build_tool()
    with pytest.raises(ConfigError, match="in/build_strict.size has no effect"):
        gin_utils.check_all_used()


def test_a_macro_that_a_binding_of_the_command_line_bypasses_is_no_mistake(tmp_path):
    (tmp_path / "a.gin").write_text("SIZE = 3\nbuild_tool.alpha = %SIZE\n")
    files = [str(tmp_path / "a.gin")]
    gin_utils.parse_gin(files, ["build_tool.alpha = 4"])
    assert build_tool()[0] == 4
    gin.clear_config()
    with pytest.raises(ConfigError, match="Nothing uses SIZE"):
        gin_utils.parse_gin(files, ["build_tool.alpha = 4", "SIZE = 5"])


def test_a_parameter_of_another_class_is_pointed_to():
    assert fails(["build_strict.beta = 1"]) == (
        "build_strict has no parameter beta. Did you mean build_tool.beta?"
    )


NAMES = """
import gin
from famx.base import gin_utils

@gin.configurable
def job(memory=None, schedule=None):
    print(type(memory).__name__, getattr(memory, "length", None))

gin_utils.parse_gin([], {bindings!r})
job()
print(gin.operative_config_str())
"""


@pytest.mark.parametrize("bindings, printed", [
    (["job.memory = @modules.Memory()"], "Memory None"),
    (["job.memory = @infini.Infini()"], "Infini None"),
    (["job.memory = @famx.memories.fam.Fam()", "fam.Fam.length = 5"], "Fam 5"),
    (["memories.Fam.length = 6", "job.memory = @fam.Fam()"], "Fam 6"),
    (["a/fam.Fam.length = 7", "job.memory = @a/fam.Fam()"], "Fam 7"),
])  # fmt: skip
def test_names_of_famx_are_known_without_a_gin_file(bindings, printed):
    code = NAMES.format(bindings=bindings)
    env = {**os.environ, "PYTHONPATH": str(gin_utils.gin_root())}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == printed


def test_a_name_that_famx_does_not_have_is_named():
    sentence = fails(["build_tool.alpha = @modules.Memroy()"])
    assert sentence.startswith("Nothing configurable is named modules.Memroy.")


def test_check_all_used_sees_a_caller_that_overrides():
    gin_utils.parse_gin([], ["build_tool.alpha = 3"])
    build_tool(alpha=1)
    with pytest.raises(ConfigError, match="alpha"):
        gin_utils.check_all_used()


def test_operative_config_is_written(tmp_path):
    gin_utils.parse_gin([], ["build_tool.alpha = 31"])
    build_tool()
    gin_utils.write_operative_config(str(tmp_path / "run"))
    text = (tmp_path / "run" / "config.gin").read_text()
    assert "build_tool.alpha = 31" in text and "build_tool.beta = 2" in text
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.gin"]


def test_call_with_has_a_configuration_of_its_own(tmp_path):
    (tmp_path / "a.gin").write_text("build_tool.alpha = 1\nbuild_tool.model_dir = %MODEL_DIR\n")
    gin_utils.parse_gin([], ["build_tool.beta = 31"])
    settings = {"MODEL_DIR": tmp_path / "x", "build_tool.alpha": {"a": (1, 2.5, None), "b": "it's"}}
    for _ in range(2):
        found = gin_utils.call_with(build_tool, [str(tmp_path / "a.gin")], settings)
        assert found == ({"a": (1, 2.5, None), "b": "it's"}, 2, str(tmp_path / "x"))
    assert build_tool() == (1, 2, None)  # all bindings are gone, earlier ones included


@pytest.mark.parametrize("settings", [{"build_tool.alhpa": 1}, {"SIZE": 1}, {"build_tool.beta": set()}])
def test_call_with_refuses_in_a_sentence_and_leaves_nothing(settings):
    with pytest.raises(ConfigError):
        gin_utils.call_with(build_tool, [], settings)
    assert build_tool() == (1, 2, None)


PROGRAM = """
import gin
from famx.base import gin_utils
from famx.base.errors import ConfigError

@gin.configurable
def job(steps=gin.REQUIRED, block=1):
    if block > 10:
        raise ConfigError("block is too large: use at most 10.")
    if block < 0:
        raise RuntimeError("a bug")
    print("ran", steps)

def main():
    gin_utils.parse_gin_flags()
    job()

gin_utils.run(main)
"""


def run_program(tmp_path, *args):
    (tmp_path / "prog.py").write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(gin_utils.gin_root())}
    return subprocess.run(
        [sys.executable, "prog.py", *args], cwd=tmp_path, env=env, capture_output=True, text=True
    )


def test_run_parses_flags(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.gin").write_text("job.steps = 3")
    result = run_program(
        tmp_path, "--gin_file=a.gin", "--gin_search_paths=other,sub", "--gin.job.block=4"
    )
    assert (result.returncode, result.stdout) == (0, "ran 3\n"), result.stderr


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["--gin.job.steps=1", "--gin.job.block=11"], "block is too large: use at most 10."),
        (["--gin.job.block=1"], "job.steps is not set: add --gin.job.steps=VALUE."),
        (["--gin.job.stesp=1"], "job has no parameter stesp. Did you mean steps?"),
        (["--gin.job"], "--gin.job is not a gin binding: write it as --gin.NAME=VALUE."),
    ],
)
def test_run_prints_one_sentence(tmp_path, args, sentence):
    result = run_program(tmp_path, *args)
    assert (result.returncode, result.stderr) == (2, f"famx: error: {sentence}\n")


def test_run_keeps_the_traceback_of_a_bug(tmp_path):
    result = run_program(tmp_path, "--gin.job.steps=1", "--gin.job.block=-1")
    assert result.returncode == 1 and "Traceback" in result.stderr and "a bug" in result.stderr
