"""Configs and command lines of the launchers: what passes is safe, what does not gets a sentence."""

import pathlib
import re
import shlex
import sys

import gin
import hypothesis
import pytest
from absl import flags
from gin import config as gin_config
from hypothesis import strategies as st

from famx.base.errors import ConfigError
from launch import job as jobs
from launch import settings

CONFIGS = jobs.ROOT / "launch" / "configs"
FILLED = {
    "tpu": dict(project="my-project", zone="us-west4-a", accelerator="v5litepod-256", bucket="my-bucket"),
    "gke": dict(
        project="my-project", zone="us-west4-a", accelerator="v6e-8", bucket="my-bucket",
        cluster="my-cluster", image="gcr.io/x/y:1",
    ),
    "slurm": {},
    "local": {},
}  # fmt: skip


def check(kind, **changes):
    return settings.check(getattr(settings, kind)(**{**FILLED[kind], **changes}), kind)


# ---------------------------------------------------------------- configs


def test_a_bucket_may_be_given_as_its_address():
    for kind in ("tpu", "gke"):
        assert check(kind, bucket="gs://my-bucket/").bucket == "my-bucket"


@pytest.mark.parametrize(
    "kind,changes,sentence",
    [
        ("tpu", {"name": "a b"}, "--config.name must be lower-case letters"),
        ("tpu", {"name": "x; rm -rf /"}, "--config.name must be"),
        ("tpu", {"name": "a" * 41}, "at most 40"),
        ("tpu", {"name": "fam\n"}, "--config.name must be"),
        ("tpu", {"zone": "us-west4"}, "a zone such as us-west4-a, not 'us-west4'"),
        ("tpu", {"zone": ""}, "--config.zone is not set."),
        ("tpu", {"project": "$(id)"}, "the id of a Google Cloud project"),
        ("tpu", {"bucket": "gs://b"}, "a bucket, such as gs://my-bucket or my-bucket"),
        ("tpu", {"bucket": "s3://my-bucket"}, "a bucket, such as gs://my-bucket or my-bucket"),
        ("tpu", {"mount": "relative"}, "an absolute path"),
        (
            "tpu",
            {"accelerator": "v5litepod-255"},
            "sizes of v5litepod are 1, 4, 8, 16, 32, 64, 128, 256.",
        ),
        ("tpu", {"accelerator": "v5lite-256"}, "Did you mean v5litepod?"),
        ("tpu", {"accelerator": "h100-8"}, "Known families are v2, v3, v4, v5litepod, v5p, v6e."),
        ("tpu", {"accelerator": "v4-9"}, "sizes of v4 are 8, 16, 32, 64 and multiples of 128 up to"),
        ("tpu", {"accelerator": "v5p"}, "Unknown accelerator 'v5p'"),
        ("tpu", {"provisioning": "cheap"}, "on_demand, spot, reserved or, with launch.tpu, flex_start"),
        ("tpu", {"provisioning": "flex_start"}, "Set --config.max_run_duration if and only if"),
        ("tpu", {"max_run_duration": "6h"}, "Set --config.max_run_duration if and only if"),
        ("tpu", {"reservation": "r"}, "Set --config.reservation if and only if"),
        ("tpu", {"labels": {"Team": "x"}}, "The label Team=x of --config.labels must have lower-case"),
        ("tpu", {"labels": {"team": "a b"}}, "The label team=a b of --config.labels must have"),
        ("gke", {"provisioning": "flex_start"}, "--config.provisioning=flex_start is for launch.tpu"),
        ("tpu", {"num_slices": 0}, "--config.num_slices must be at least 1, not 0."),
        ("tpu", {"extras": "tpu; id"}, "names of extras with commas between them"),
        ("tpu", {"python": "3.12; id"}, "a version such as 3.12"),
        ("gke", {"image": ""}, "Set exactly one of --config.image and --config.base_image."),
        ("gke", {"base_image": "python:3.12"}, "Set exactly one of --config.image and"),
        ("gke", {"provisioning": "reserved"}, "Set --config.reservation if and only if"),
        ("slurm", {"partition": "a b"}, "--config.partition must be one word"),
        ("slurm", {"time": "long"}, "a Slurm time"),
        ("slurm", {"memory": "1G\n#SBATCH --exclusive"}, "a size such as 500G"),
        ("local", {"processes": 0}, "--config.processes must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(kind, changes, sentence):
    with pytest.raises(ConfigError) as caught:
        check(kind, **changes)
    assert sentence in str(caught.value)


def test_the_software_version_follows_from_the_accelerator():
    version = lambda accelerator: check("tpu", accelerator=accelerator).runtime_version
    assert version("v5litepod-256") == "v2-alpha-tpuv5-lite" and version("v6e-8") == "v2-alpha-tpuv6e"
    assert version("v5p-128") == "v2-alpha-tpuv5" and version("v4-16") == "tpu-ubuntu2204-base"
    assert check("tpu", runtime_version="my-version").runtime_version == "my-version"


WORDS = ("name", "project", "zone", "accelerator", "bucket", "mount", "network", "service_account",
         "runtime_version", "valid_until_duration", "provisioning", "python")  # fmt: skip


@hypothesis.given(st.sampled_from(WORDS), st.text(st.sampled_from("a1-z/.$;'\"\n `(@_"), min_size=1))
def test_what_passes_means_nothing_to_a_shell(field, value):
    try:
        config = check("tpu", **{field: value})
    except ConfigError:
        return
    assert shlex.quote(config[field]) == value


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_the_configs_of_the_repository_lack_nothing_but_what_is_ones_own(path):
    config = jobs.runpy.run_path(str(path))["get_config"]()
    kind = config.kind
    own = {k: v for k, v in FILLED[kind].items() if k not in ("accelerator", "image")}
    with config.unlocked():
        config.update(own)
    checked = settings.check(config, kind)
    assert checked.accelerator == config.accelerator if "accelerator" in config else True


def test_unknown_fields_are_named():
    with pytest.raises(ConfigError, match="A tpu config has no field zoen. Did you mean zone?"):
        settings.tpu(zoen="x")
    config = settings.local()
    with config.unlocked():
        config.procesess = 2
    with pytest.raises(
        ConfigError, match="A local config has no field procesess. Did you mean processes?"
    ):
        settings.check(config, "local")
    with pytest.raises(ConfigError, match="launch.tpu was given a local config"):
        settings.check(settings.local(), "tpu")


def test_secret_is_what_is_named_so_or_comes_from_outside(monkeypatch):
    monkeypatch.setenv("USER_NAME", "me")
    config = settings.tpu(
        environment={"HF_TOKEN": "a", "WANDB_API_KEY": "b", "db_password": "c", "KEYBOARD": "d", "N": 1},
        environment_from=("USER_NAME",),
    )
    shown, secret = settings.environment(config)
    assert shown == {"KEYBOARD": "d", "N": "1"}
    assert secret == {"HF_TOKEN": "a", "WANDB_API_KEY": "b", "db_password": "c", "USER_NAME": "me"}


@pytest.mark.parametrize(
    "changes,sentence",
    [
        ({"environment": {"A B": "x"}}, "'A B' is not a valid name of an environment variable."),
        ({"environment": {"A": "x\ny"}}, "The value of A must be a single line."),
        ({"environment_from": ("NO_SUCH_VARIABLE",)}, "NO_SUCH_VARIABLE, which is not set."),
    ],
)
def test_bad_variables(changes, sentence):
    with pytest.raises(ConfigError) as caught:
        settings.environment(settings.tpu(**changes))
    assert sentence in str(caught.value)


# ---------------------------------------------------------------- command lines


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    """A function that runs a launcher within this process and returns (exit code, config, job)."""
    monkeypatch.chdir(tmp_path)

    def call(kind, *args, check_gin=True, default=None):
        _forget()
        seen = []
        monkeypatch.setattr(sys, "argv", ["launch", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            jobs.run(kind, lambda *args: seen.append(args) or 0, default, check_gin)
        config, job, commands = seen[0] if seen else (None, None, None)
        return caught.value.code, config, job

    yield call
    _forget()
    flags.FLAGS.mark_as_parsed()


def _forget():
    gin.clear_config()
    gin_config._IMPORTS.clear()
    for name in list(flags.FLAGS):
        if name.startswith("config."):
            delattr(flags.FLAGS, name)
    for name in ("gin_file", "gin_bindings", "gin_search_paths", "config", "dry_run"):
        if name in flags.FLAGS:
            flags.FLAGS[name].unparse()


GIN = "--gin_file=gin_configs/examples/own_text.gin"
MODEL_DIR = "--gin.MODEL_DIR='/mnt/famx/x'"
V5E = f"--config={CONFIGS / 'v5e_256.py'}"
MINE = ("--config.project=my-project", "--config.zone=us-west4-a", "--config.bucket=my-bucket")


def test_fields_and_gin_settings_of_the_command_line(command_line):
    code, config, job = command_line("tpu", V5E, *MINE, "--config.num_slices=2", GIN, MODEL_DIR)
    assert code == 0 and config.num_slices == 2 and config.accelerator == "v5litepod-256"
    assert config.provisioning == "spot" and job.model_dir == "/mnt/famx/x"
    assert job.gin_flags == (GIN, "--gin_bindings=MODEL_DIR = '/mnt/famx/x'")


def test_paths_of_the_bucket_become_paths_of_its_mount(command_line, tmp_path):
    files = "--gin.TEXT_FILES=('gs://my-bucket/books', \"gs://my-bucket\", 'gs://my-bucket-2/x')"
    moved = "--gin_bindings=TEXT_FILES = ('/mnt/famx/books', \"/mnt/famx\", 'gs://my-bucket-2/x')"
    model_dir = "--gin.MODEL_DIR='gs://my-bucket/x/'"
    code, _, job = command_line("tpu", V5E, *MINE, GIN, files, model_dir)
    assert code == 0 and job.model_dir == "/mnt/famx/x"
    assert job.gin_flags == (GIN, moved, "--gin_bindings=MODEL_DIR = '/mnt/famx/x/'")
    (tmp_path / "mine.gin").write_text(
        "include 'gin_configs/examples/own_text.gin'\nMODEL_DIR = 'gs://my-bucket/y'\n"
    )
    code, _, job = command_line("tpu", V5E, *MINE, "--gin_file=mine.gin")
    assert code == 0 and job.model_dir == "/mnt/famx/y"
    assert job.gin_flags == ("--gin_file=mine.gin", "--gin_bindings=MODEL_DIR = '/mnt/famx/y'")


def test_without_a_mount_a_run_may_be_in_a_bucket(command_line):
    code, _, job = command_line("local", GIN, "--gin.MODEL_DIR=gs://my-bucket/x/", default="local.py")
    assert code == 0 and job.model_dir == "gs://my-bucket/x"
    assert job.gin_flags == (GIN, "--gin_bindings=MODEL_DIR = 'gs://my-bucket/x/'")


def test_a_config_that_is_not_needed(command_line):
    code, config, job = command_line(
        "local", "--config.processes=3", GIN, default="local.py", check_gin=False
    )
    assert code == 0 and config.processes == 3 and job.gin_flags == (GIN,)


def test_gin_files_travel_with_what_they_include(command_line, tmp_path):
    (tmp_path / "mine.gin").write_text('include "gin_configs/examples/own_text.gin"\n')
    _, _, job = command_line("tpu", V5E, *MINE, "--gin_file=mine.gin", MODEL_DIR)
    job = jobs.dataclasses.replace(job, stage=tmp_path / "stage")
    job.write_gin_files(jobs.Commands(dry_run=False))
    copied = {str(path.relative_to(tmp_path / "stage")) for path in (tmp_path / "stage").rglob("*.gin")}
    assert copied >= {"mine.gin", "gin_configs/examples/own_text.gin", "gin_configs/runs/pretrain.gin"}
    outside = jobs.dataclasses.replace(job, gin_files=(str(tmp_path / "mine.gin"),))
    with pytest.raises(ConfigError, match="would not be found on another machine"):
        outside.write_gin_files(jobs.Commands(dry_run=False))


@pytest.mark.parametrize(
    "args,sentence",
    [
        ((GIN,), "--config is not set: pass a file of launch/configs/"),
        (("--config=no.py",), "--config=no.py: no such file."),
        ((V5E, "--config.zoen=x"), "--config has no field zoen. Did you mean zone?"),
        ((V5E, "--config.environment.A=x"), "Set environment variables in the config file"),
        ((V5E, GIN, MODEL_DIR), "--config.project is not set."),
        ((V5E, *MINE, "--config.accelerator=v5litepod-7", GIN, MODEL_DIR), "sizes of v5litepod are"),
        ((V5E, *MINE, GIN), "MODEL_DIR is not set"),
        ((V5E, *MINE, GIN, "--gin.MODEL_DIR='runs/x'"), "MODEL_DIR must be an absolute path, not runs/x"),
        ((V5E, *MINE, GIN, "--gin.MODEL_DIR='gs://b/x'"), "MODEL_DIR gs://b/x is not in the bucket gs://my"),
        ((V5E, *MINE, GIN, "--config.labels.team=x"), "Set labels in the config file: labels={'te"),
        ((V5E, *MINE, GIN, MODEL_DIR, "--gin.DecoderConfig.blocksize=4"), "Did you mean block_size?"),
        (
            (V5E, *MINE, "--gin_file=gin_configs/examples/own_texts.gin"),
            "Did you mean gin_configs/examples",
        ),
        ((V5E, *MINE, GIN, MODEL_DIR, "--gin.X='a\nb'"), "must be a single line"),
        ((V5E, *MINE, GIN, MODEL_DIR, "stray"), "Unknown argument stray"),
    ],
)
def test_bad_command_lines_end_in_one_sentence(command_line, capsys, args, sentence):
    code, config, _ = command_line("tpu", *args)
    error = capsys.readouterr().err
    assert code == 2 and config is None, error
    assert error.splitlines()[-1].startswith("famx: error: ") and sentence in error, error


def test_a_config_file_without_a_config(command_line, capsys, tmp_path):
    pathlib.Path("mine.py").write_text("get_config = lambda: {}\n")
    assert command_line("tpu", "--config=mine.py")[0] == 2
    assert "must define get_config() that returns a ConfigDict" in capsys.readouterr().err


COMMANDS = re.findall(
    r"^python -m launch\.(\w+) (.*)$", (jobs.ROOT / "docs" / "launch.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("kind,args", COMMANDS, ids=[kind for kind, _ in COMMANDS])
def test_the_commands_of_the_documentation(command_line, monkeypatch, kind, args):
    monkeypatch.chdir(jobs.ROOT)
    code, config, job = command_line(
        kind, *shlex.split(args), check_gin=kind != "local", default="local.py"
    )
    assert code == 0 and config.kind == kind and job.gin_flags


def test_the_documentation_has_a_command_for_each_launcher():
    assert sorted(kind for kind, _ in COMMANDS) == ["gke", "local", "slurm", "tpu"]
