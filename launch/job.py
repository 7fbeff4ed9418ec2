"""The job that every launcher starts: `famx.train`, or `famx.ablate`, with gin files and environment."""

import dataclasses
import os
import pathlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin
from absl import flags
from ml_collections import ConfigDict, config_flags

import famx
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.files import is_stored
from famx.base.gin_checks import nearest
from famx.base.peers import LOST
from launch import settings
from launch.commands import Commands

STOPPED = 42  # exit code of famx.train after a graceful stop
RESTARTED = (STOPPED, LOST)  # exit codes after which the same command continues
ROOT = pathlib.Path(__file__).resolve().parent.parent
_URL = re.compile(r"^\s*MODEL_DIR\s*=\s*['\"](gs://[^'\"]*)['\"]", re.MULTILINE)

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Launch config: a Python file that defines get_config(), see launch/configs/."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print all commands and files without running or writing anything."
)

DELETE = flags.DEFINE_enum(
    "delete", "end", ["end", "always", "never"],
    "When to delete the slices or workload of this launch. end: when training has ended; always: also"
    " on Ctrl-C; never: keep them.",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run, or a study, independent of where it is launched.

    Attributes:
      name: name of the job.
      gin_files: gin files, as the user named them; of a study, those of its runs, too.
      gin_flags: flags that pass these files and the gin bindings to famx.train.
      model_dir: MODEL_DIR, or the directory of the study; "" if gin was not parsed.
      shown: environment variables whose values may be printed.
      secret: environment variables whose values must not be printed.
      stage: local directory where the files of the launch are collected.
      train_steps: TRAIN_STEPS; None if gin was not parsed, or it is not an integer.
    """

    name: str
    gin_files: tuple[str, ...]
    gin_flags: tuple[str, ...]
    model_dir: str
    shown: Mapping[str, str]
    secret: Mapping[str, str]
    stage: pathlib.Path
    train_steps: int | None = None

    def train(self, python: str, *flags: str) -> list[str]:
        """The training command, with the Python interpreter `python` and additional flags."""
        return [python, "-m", "famx.train", *flags, *self.gin_flags]

    def study(self, python: str, *flags: str) -> list[str]:
        """The command of a task of a study."""
        return [python, "-m", "famx.ablate", *flags, *self.gin_flags]

    def write_gin_files(self, commands: Commands) -> None:
        """Copies the gin files and the files they include to the stage, under the same relative names.

        Raises:
          ConfigError: a file is not named relative to the current directory, or is outside of it.
        """
        for name, source in sorted(set(_with_includes(self.gin_files))):
            commands.copy(source, self.stage / name)

    def write_environment(self, commands: Commands) -> None:
        """Writes environment.sh, which exports all variables and only its owner can read."""
        path = self.stage / "environment.sh"
        masked = dict.fromkeys(self.secret, "***")
        commands.write(path, _exports(self.shown | self.secret), shown=_exports(self.shown | masked))


def _exports(values: Mapping[str, str]) -> str:
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())


def run(
    kind: str,
    launch: Callable[[ConfigDict, Job, Commands], int],
    default: str | None = None,
    check_gin: bool = True,
) -> None:
    """The main program of a launcher: parses flags, checks everything, and calls `launch`.

    The config, the gin files and the gin bindings are checked first. A mistake of the user ends the
    process with one sentence and exit code 2; otherwise the result of `launch` is the exit code.

    Args:
      kind: kind of config that the launcher takes, see `launch.settings`.
      launch: function of config, job and commands that starts the training.
      default: file of launch/configs/ to use if `--config` is not given; None requires the flag.
      check_gin: whether to parse gin here. Without it mistakes show when training starts, which is
        fine on this machine but not on slices that cost money.
    """

    def main():
        config = settings.check(_CONFIG.value, kind)
        job = make_job(config, check_gin)
        commands = Commands(_DRY_RUN.value, job.secret.values())
        try:
            sys.exit(launch(config, job, commands))
        except KeyboardInterrupt:
            sys.exit(130)

    if default is not None and not any(re.match("--?config(=|$)", arg) for arg in sys.argv):
        sys.argv.insert(1, f"--config={ROOT / 'launch' / 'configs' / default}")
    try:
        check_config_flags(sys.argv[1:])
    except ConfigError as error:
        print(f"famx: error: {error}", file=sys.stderr)
        sys.exit(2)
    gin_utils.run(main)


def check_config_flags(argv: Sequence[str]) -> None:
    """Checks `--config` and the names of `--config.FIELD` flags.

    It runs before absl parses the flags, because ml_collections reports these mistakes with a
    traceback.

    Raises:
      ConfigError: the file is missing or defines no config, or a field does not exist.
    """
    if {"--help", "--helpfull", "--helpshort"} & set(argv):
        return
    text = "\n".join(argv)
    path = re.search(r"^--?config[=\n](.*)$", text, re.MULTILINE)
    if path is None:
        raise ConfigError("--config is not set: pass a file of launch/configs/ or one of your own.")
    if not os.path.isfile(path[1]):
        raise ConfigError(f"--config={path[1]}: no such file.")
    get_config = runpy.run_path(path[1]).get("get_config")
    config = get_config() if callable(get_config) else None
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={path[1]} must define get_config() that returns a ConfigDict.")
    for name in re.findall(r"^--?config\.([^=\n]*)", text, re.MULTILINE):
        field, *inner = name.split(".")
        if field == "environment" and field in config:
            raise ConfigError(
                "Set environment variables in the config file, or copy them from this environment with"
                " --config.environment_from=\"('NAME',)\"."
            )
        if field == "labels" and field in config:
            raise ConfigError("Set labels in the config file: labels={'team': 'name'}.")
        if field not in config or inner:
            raise ConfigError(f"--config has no field {name}.{nearest(name, list(config))}")


def make_job(config: ConfigDict, check_gin: bool = True) -> Job:
    """The job described by the config and the command line.

    Args:
      config: a checked config.
      check_gin: whether to parse the gin files and bindings, see `run`.

    Raises:
      ConfigError: a gin file or binding is invalid, or MODEL_DIR is not an absolute path (both only
        with `check_gin`), or an environment variable is.
    """
    files = [*config.gin_files, *flags.FLAGS.gin_file]
    bindings = _in_mount(config, files, [*config.gin_bindings, *flags.FLAGS.gin_bindings])
    for text in (*files, *bindings):
        if any(c in text for c in "\n\r\0"):
            raise ConfigError(f"A gin file name or binding must be a single line, not {text!r}.")
    if check_gin:
        gin_utils.import_modules()
        gin_utils.parse_gin(files, bindings)
    of_runs: tuple[str, ...] = ()
    if config.get("study_tasks"):
        from famx.study import commands as study_commands  # with libraries for figures

        study = gin_utils.call(study_commands.study)
        model_dir, of_runs = os.path.normpath(study.directory), tuple(study.gin_files)
    else:
        model_dir = _model_dir() if check_gin else ""
    steps = _macro("TRAIN_STEPS") if check_gin else None
    shown, secret = settings.environment(config)
    stage = pathlib.Path(config.stage_dir).expanduser().absolute() / f"famx-{config.name}"
    gin_flags = [f"--gin_file={name}" for name in files]
    gin_flags += [f"--gin_bindings={text}" for text in bindings]
    gin_flags += [f"--import={name}" for name in flags.FLAGS["import"].value]
    steps = steps if isinstance(steps, int) else None
    files = (*files, *of_runs)
    return Job(config.name, files, tuple(gin_flags), model_dir, shown, secret, stage, steps)


def _macro(name: str) -> Any:
    """Value of a gin macro; None if it is not set."""
    try:
        return gin.query_parameter(f"%{name}")
    except ValueError:
        return None


def _model_dir() -> str:
    value = _macro("MODEL_DIR")
    if isinstance(value, str) and is_stored(value):  # with a mount, it is a path there by now
        return value.rstrip("/")
    if not isinstance(value, str) or not os.path.isabs(value):
        raise ConfigError(
            f"MODEL_DIR must be an absolute path, not {value}: set --gin.MODEL_DIR=/dir."
        )
    return os.path.normpath(value)


def _in_mount(config: ConfigDict, files: Sequence[str], bindings: Sequence[str]) -> list[str]:
    """`bindings` with paths of the config's bucket, gs://BUCKET/..., as workers see them in the mount.

    A MODEL_DIR that a gin file places in the bucket gets a binding, too.

    Raises:
      ConfigError: MODEL_DIR is in another bucket.
    """
    if not config.get("mount"):
        return list(bindings)
    bucket, mount = re.escape(f"gs://{config.bucket}"), config.mount.rstrip("/")
    inside = lambda text: re.sub(rf"{bucket}(?=[/'\"]|$)", mount, text)
    bindings = [inside(text) for text in bindings]
    given = [text for text in bindings if re.match(r"\s*MODEL_DIR\s*=", text)]
    texts = given[-1:] or [path.read_text() for _, path in _with_includes(files[::-1])]
    urls = [url for text in texts for url in _URL.findall(text)]
    if not urls:
        return bindings
    model_dir = inside(urls[0])
    if model_dir == urls[0]:
        raise ConfigError(
            f"MODEL_DIR {model_dir} is not in the bucket gs://{config.bucket} of --config.bucket, which"
            " the workers mount: name the same bucket in both."
        )
    return [*bindings, f"MODEL_DIR = {model_dir!r}"]


def _with_includes(names: Sequence[str]) -> Iterator[tuple[str, pathlib.Path]]:
    """Yields `(name, path)` of the gin files and of all files that they include."""
    for name in names:
        if os.path.isabs(name) or ".." in pathlib.PurePath(name).parts:
            raise ConfigError(
                f"The gin file {name} would not be found on another machine: keep it below the current"
                " directory and give its relative path."
            )
        path = next((p for p in (pathlib.Path(name), gin_utils.gin_root() / name) if p.is_file()), None)
        if path is None:
            continue  # gin reports a missing file itself, with the nearest name
        yield name, path.resolve()
        included = re.findall(r"^\s*include\s+['\"]([^'\"]+)['\"]", path.read_text(), re.MULTILINE)
        yield from _with_includes(included)


def add_wheel(config: ConfigDict, job: Job, commands: Commands) -> str:
    """Copies the wheel of the config to the stage, or builds one from this source tree.

    Returns:
      The wheel's file name.

    Raises:
      ConfigError: the wheel does not exist or could not be built.
    """
    if config.wheel:
        wheel = pathlib.Path(config.wheel).expanduser()
        if not re.fullmatch(r"famx-[A-Za-z0-9_.+!-]+\.whl", wheel.name) or not wheel.is_file():
            raise ConfigError(f"--config.wheel must be the path of a famx wheel, not {config.wheel!r}.")
        commands.copy(wheel.resolve(), job.stage / wheel.name)
        return wheel.name
    if not (ROOT / "setup.py").exists():
        raise ConfigError("There is no source tree to build famx's wheel from: set --config.wheel.")
    # Build outside the source tree: its build/ may hold modules that have since been deleted.
    build = job.stage.with_name(f"build-{job.name}")
    commands.make_directory(build)
    commands.write(build / "build.cfg", f"[build]\nbuild_base = {build}\n")
    pip_wheel = ("env", f"DIST_EXTRA_CONFIG={build / 'build.cfg'}", sys.executable, "-m", "pip", "wheel")
    if commands.run(*pip_wheel, "--quiet", "--no-deps", f"--wheel-dir={job.stage}", str(ROOT)):
        raise ConfigError("Building famx's wheel failed: see the lines above, or set --config.wheel.")
    return f"famx-{famx.__version__}-py3-none-any.whl"


def check_model_dir(config: ConfigDict, job: Job) -> None:
    """Raises ConfigError if MODEL_DIR is not in the bucket: the workers' disks are deleted with them."""
    if config.mount.rstrip("/") not in map(str, pathlib.PurePath(job.model_dir).parents):
        there = f"gs://{config.bucket}/{job.name}"
        what, advice = "MODEL_DIR", f"set --gin.MODEL_DIR={there}"
        if config.get("study_tasks"):
            what, advice = "The study's directory", f"make it one such as {there}"
        raise ConfigError(
            f"{what} {job.model_dir} would be lost with the workers: the bucket is mounted at"
            f" {config.mount}, so {advice}."
        )
