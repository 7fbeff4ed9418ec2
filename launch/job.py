"""What every launcher starts: `famx.train` with gin files, settings and environment variables."""

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
from famx.base.gin_checks import nearest
from launch import settings
from launch.commands import Commands

STOPPED = 42  # exit code of a run that was stopped and can go on; xpk restarts on it too
ROOT = pathlib.Path(__file__).resolve().parent.parent

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config(), of launch/configs/.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print every command and every file, and do nothing.")

DELETE = flags.DEFINE_enum(
    "delete", "end", ["end", "always", "never"],
    "Delete what was created: at the end of the training, also on Ctrl-C, or never.",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """A training, whatever starts it.

    Attributes:
      name: of the job.
      gin_files: as they were named.
      gin_flags: flags of famx.train that name these files and the settings.
      model_dir: MODEL_DIR, if gin's settings were checked.
      shown, secret: environment variables.
      stage: the local directory in which files are put together.
      train_steps: TRAIN_STEPS, if gin's settings were checked and it is a number.
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
        """The command that trains."""
        return [python, "-m", "famx.train", *flags, *self.gin_flags]

    def write_gin_files(self, commands: Commands) -> None:
        """Copies them, and what they include, to where they are found by the same names.

        Raises ConfigError for one that is not named relative to the current directory.
        """
        for name, source in sorted(set(_with_includes(self.gin_files))):
            commands.copy(source, self.stage / name)

    def write_environment(self, commands: Commands) -> None:
        """environment.sh, for its owner alone: a shell that sources it has the variables."""
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
    """Runs `launch(config, job, commands)` with what the flags say; its result is the exit code.

    What can be checked is, before: the config, and gin's files and settings. Bad input ends in one
    sentence, exit code 2.

    Args:
      kind: of config, a function of `launch.settings`.
      launch: does it.
      default: file of launch/configs/ that stands in for `--config`.
      check_gin: where the training itself could tell only later, or for money.
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
    """Raises ConfigError for a --config that cannot be read and a --config.FIELD that there is not."""
    if {"--help", "--helpfull", "--helpshort"} & set(argv):
        return
    text = "\n".join(argv)
    path = re.search(r"^--?config[=\n](.*)$", text, re.MULTILINE)
    if path is None:
        raise ConfigError("--config is not set: give it a file of launch/configs/, or one of your own.")
    if not os.path.isfile(path[1]):
        raise ConfigError(f"--config={path[1]}: there is no such file.")
    get_config = runpy.run_path(path[1]).get("get_config")
    config = get_config() if callable(get_config) else None
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={path[1]} needs a function get_config() that returns a ConfigDict.")
    for name in re.findall(r"^--?config\.([^=\n]*)", text, re.MULTILINE):
        field, *inner = name.split(".")
        if field == "environment" and field in config:
            raise ConfigError(
                "Set environment variables in the config file, or take them from here with"
                " --config.environment_from=\"('NAME',)\"."
            )
        if field not in config or inner:
            raise ConfigError(f"--config has no field {name}.{nearest(name, list(config))}")


def make_job(config: ConfigDict, check_gin: bool = True) -> Job:
    """The training that config and flags describe.

    Raises ConfigError if gin refuses it, or if MODEL_DIR is not an absolute path; without `check_gin`
    that is left to the training.
    """
    files = [*config.gin_files, *flags.FLAGS.gin_file]
    bindings = [*config.gin_bindings, *flags.FLAGS.gin_bindings]
    for text in (*files, *bindings):
        if any(c in text for c in "\n\r\0"):
            raise ConfigError(f"A gin file or setting must be a single line, not {text!r}.")
    if check_gin:
        gin_utils.parse_gin(files, bindings)
    model_dir = _model_dir() if check_gin else ""
    steps = _macro("TRAIN_STEPS") if check_gin else None
    shown, secret = settings.environment(config)
    stage = pathlib.Path(config.stage_dir).expanduser().absolute() / f"famx-{config.name}"
    words = [f"--gin_file={name}" for name in files] + [f"--gin_bindings={text}" for text in bindings]
    steps = steps if isinstance(steps, int) else None
    return Job(config.name, tuple(files), tuple(words), model_dir, shown, secret, stage, steps)


def _macro(name: str) -> Any:
    try:
        return gin.query_parameter(f"%{name}")
    except ValueError:
        return None


def _model_dir() -> str:
    value = _macro("MODEL_DIR")
    if not isinstance(value, str) or not os.path.isabs(value):
        raise ConfigError(f"MODEL_DIR must be an absolute path, not {value}: --gin.MODEL_DIR=\"'/dir'\".")
    return os.path.normpath(value)


def _with_includes(names: Sequence[str]) -> Iterator[tuple[str, pathlib.Path]]:
    """Gin files, and those that they include, as they are named and where they lie."""
    for name in names:
        if os.path.isabs(name) or ".." in pathlib.PurePath(name).parts:
            raise ConfigError(
                f"The gin file {name} would not be found on another machine: name it relative to the"
                " current directory, and keep it below."
            )
        path = next((p for p in (pathlib.Path(name), gin_utils.gin_root() / name) if p.is_file()), None)
        if path is None:
            continue  # gin says so, and what is near
        yield name, path.resolve()
        included = re.findall(r"^\s*include\s+['\"]([^'\"]+)['\"]", path.read_text(), re.MULTILINE)
        yield from _with_includes(included)


def add_wheel(config: ConfigDict, job: Job, commands: Commands) -> str:
    """Puts famx's wheel, the config's or one built from this source tree, into the stage; its name."""
    if config.wheel:
        wheel = pathlib.Path(config.wheel).expanduser()
        if not re.fullmatch(r"famx-[A-Za-z0-9_.+!-]+\.whl", wheel.name) or not wheel.is_file():
            raise ConfigError(f"--config.wheel must be the path of famx's wheel, not {config.wheel!r}.")
        commands.copy(wheel.resolve(), job.stage / wheel.name)
        return wheel.name
    if not (ROOT / "setup.py").exists():
        raise ConfigError("There is no source tree to build famx's wheel from: set --config.wheel.")
    # In a folder of its own: build/ of a source tree may hold modules that are gone.
    build = job.stage.with_name(f"build-{job.name}")
    commands.make_directory(build)
    commands.write(build / "build.cfg", f"[build]\nbuild_base = {build}\n")
    words = ("env", f"DIST_EXTRA_CONFIG={build / 'build.cfg'}", sys.executable, "-m", "pip", "wheel")
    if commands.run(*words, "--quiet", "--no-deps", f"--wheel-dir={job.stage}", str(ROOT)):
        raise ConfigError("famx's wheel could not be built: see the lines above, or set --config.wheel.")
    return f"famx-{famx.__version__}-py3-none-any.whl"


def check_model_dir(config: ConfigDict, job: Job) -> None:
    """Raises ConfigError unless MODEL_DIR lies in the bucket, which outlives the workers."""
    if config.mount.rstrip("/") not in map(str, pathlib.PurePath(job.model_dir).parents):
        raise ConfigError(
            f"MODEL_DIR {job.model_dir} would be lost with the workers: the bucket is mounted at"
            f" {config.mount}, so choose --gin.MODEL_DIR=\"'{config.mount.rstrip('/')}/{job.name}'\"."
        )
