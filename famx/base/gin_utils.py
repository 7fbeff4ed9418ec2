"""gin on the command line with t5x's flags, where every bad binding ends in one plain sentence.

    python -m famx.train --gin_file=gin_configs/examples/x.gin --gin.TRAIN_STEPS=100

gin ignores some mistakes and reports others with a traceback. Here an unknown file, configurable,
parameter or macro, a macro that nothing uses and a value that was never set are `ConfigError`s that
name the nearest thing that exists.
"""

import contextlib
import functools
import inspect
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin
from absl import app, flags, logging
from gin import config as gin_config
from gin.resource_reader import system_path_reader

from famx.base.errors import ConfigError
from famx.base.files import write_text
from famx.base.gin_checks import check_all_used as check_all_used  # part of this module's interface
from famx.base.gin_checks import check_macros, check_required, nearest, not_set, short, unset_macros

_FLAG = "--gin."


def rewrite_gin_args(argv: Sequence[str]) -> list[str]:
    """Turns each `--gin.NAME=VALUE` into `--gin_bindings=NAME = VALUE`; leaves the rest alone."""
    return [_rewrite(arg) for arg in argv]


def _rewrite(arg: str) -> str:
    if not arg.startswith(_FLAG):
        return arg
    name, equals, value = arg.removeprefix(_FLAG).partition("=")
    if not equals or not name.strip() or not value.strip():
        raise ConfigError(f"{arg} is no gin binding: write it as --gin.NAME=VALUE.")
    return f"--gin_bindings={name} = {value}"


def gin_root() -> pathlib.Path:
    """The directory that holds gin_configs/: the package in a wheel, the repository otherwise."""
    package = pathlib.Path(__file__).resolve().parents[1]
    return package if (package / "gin_configs").is_dir() else package.parent


def parse_gin(
    gin_files: Sequence[str],
    gin_bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    unneeded: Sequence[str] = (),
) -> None:
    """Parses files, then bindings (later ones win), checks them all and locks the configuration.

    Files and their includes are looked for in the current directory, in `search_paths` and beside
    famx's own gin_configs/. Raises ConfigError, naming the nearest known name, for anything
    unknown, unused or unset. Modules whose functions the files bind must be imported before. Macros
    that are `unneeded` may be unset: they are None.
    """
    prefixes = [*search_paths, str(gin_root())]
    for prefix in prefixes:
        if prefix not in gin_config._LOCATION_PREFIXES:
            gin.add_config_file_search_path(prefix)
    with _only_files_on_disk():
        for name in gin_files:
            with _PlainErrors(prefixes):
                gin.parse_config_file(name)
        for binding in gin_bindings:
            with _PlainErrors(prefixes, binding):
                gin.parse_config(binding)
    for name in unset_macros(unneeded):
        gin.parse_config(f"{name} = None")
    check_macros()
    check_required()
    gin.finalize()


def operative_config() -> str:
    """The settings that calls have used so far, defaults included, as gin text."""
    return gin.operative_config_str()


def write_operative_config(model_dir: str) -> None:
    """Writes `operative_config()` to `<model_dir>/config.gin`, replacing it in one move."""
    path = pathlib.Path(model_dir) / "config.gin"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, operative_config())


def define_flags() -> None:
    """Defines t5x's gin flags, unless they are defined already."""
    if "gin_file" in flags.FLAGS:
        return
    flags.DEFINE_multi_string("gin_file", [], "Gin file; repeat it, later ones win.")
    flags.DEFINE_multi_string("gin_bindings", [], "One binding, also written --gin.NAME=VALUE.")
    flags.DEFINE_list("gin_search_paths", [], "Comma-separated directories to look for gin files.")


def parse_gin_flags(unneeded: Sequence[str] = ()) -> None:
    """`parse_gin` with the values of the flags."""
    values = flags.FLAGS
    parse_gin(values.gin_file, values.gin_bindings, values.gin_search_paths, unneeded)


def run(main: Callable[[], Any], gin_flags: bool = True) -> None:
    """Runs `main()` under absl; a ConfigError ends it, exit code 2.

    Args:
      main: the main; it finds its flags in `absl.flags.FLAGS`.
      gin_flags: whether it is set up by gin: defines gin's flags.
    """
    if gin_flags:
        define_flags()

    def flags_parser(argv):
        argv = app.parse_flags_with_usage(rewrite_gin_args(argv) if gin_flags else argv)
        if len(argv) > 1:
            known = "settings are --gin_file and --gin.NAME=VALUE." if gin_flags else "see --help."
            raise ConfigError(f"Unknown argument {argv[1]}: {known}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax reports every step of every save
        if "jax" in sys.modules:
            cache = os.path.join(os.path.expanduser("~"), ".cache", "famx", "xla")
            cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", cache)
            sys.modules["jax"].config.update("jax_compilation_cache_dir", cache)
        return argv

    app.run(_exit_on_bad_input(lambda argv: main()), flags_parser=_exit_on_bad_input(flags_parser))


def call(configurable: Callable[[], Any]) -> Any:
    """Calls a configurable whose arguments gin makes; what these refuse is a ConfigError.

    That is a ValueError that famx itself raises while the arguments are made, or a parameter that
    has no value. Every other error, and whatever the call itself raises, stays as it is.
    """
    name = configurable.__name__
    try:
        return configurable()
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        text = str(error)
        found = re.match(r"(?:(\w+)\.__init__|(\w+))\(\) missing \d+ required .*?: '(\w+)'", text)
        if found and f"In call to configurable '{found[1] or found[2]}' " in text:
            raise ConfigError(not_set(f"{found[1] or found[2]}.{found[3]}")) from error
        inside = f"In call to configurable '{name}' " in text  # gin's note; none for arguments
        if inside or isinstance(error, TypeError) or not _raised_by_famx(error):
            raise
        raise ConfigError(_call_error_sentence(error)) from error


def call_with(
    configurable: Callable[[], Any], gin_files: Sequence[str], settings: Mapping[str, Any] | None = None
) -> Any:
    """`call` under a configuration of its own, so that one process, such as a notebook, runs several.

    What was configured before is forgotten, and this configuration is when the call ends.

    Args:
      configurable: such as `famx.training.loop.train`.
      gin_files: see `parse_gin`.
      settings: bindings by name, as in `{"TRAIN_STEPS": 100, "MODEL_DIR": "/tmp/famx/model"}`: numbers,
        texts, paths, and lists, tuples and dicts of them.
    """
    plain = lambda value: str(value) if isinstance(value, os.PathLike) else value
    bindings = [f"{name} = {plain(value)!r}" for name, value in (settings or {}).items()]
    gin.clear_config()
    try:
        parse_gin(gin_files, bindings)
        return call(configurable)
    finally:
        gin.clear_config()


def _raised_by_famx(error: Exception) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("famx.")


def _exit_on_bad_input(function):
    @functools.wraps(function)
    def wrapped(argv):
        try:
            return function(argv)
        except (ConfigError, RuntimeError) as error:
            sentence = _call_error_sentence(error)
            if sentence is None:
                raise
        print(f"famx: error: {sentence}", file=sys.stderr)
        sys.exit(2)

    return wrapped


def _call_error_sentence(error: Exception) -> str | None:
    """The sentence of an error raised in a configured call, without what gin appended to it."""
    text = str(error).split("\n  In call to configurable")[0].split("\n  No values supplied")[0]
    if isinstance(error, ValueError):
        return text
    missing = re.match(r"Required bindings for `(.+)` not provided in config: \['(\w+)'", text)
    return missing and not_set(f"{missing[1]}.{missing[2]}")


# ---------------------------------------------------------------- gin's errors as sentences


@contextlib.contextmanager
def _only_files_on_disk():
    """Leaves out gin's reader of package paths, which logs an error for every miss."""
    readers = gin_config._FILE_READERS
    gin_config._FILE_READERS = [pair for pair in readers if pair[0] is not system_path_reader]
    try:
        yield
    finally:
        gin_config._FILE_READERS = readers


class _PlainErrors:
    """Context manager: turns what gin raises while parsing into a ConfigError."""

    def __init__(self, prefixes: Sequence[str], binding: str | None = None):
        self.prefixes, self.binding = prefixes, binding

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None or isinstance(error, ConfigError) or not isinstance(error, Exception):
            return
        sentence = self._sentence(error)
        if sentence is not None:
            raise ConfigError(sentence) from error

    def _sentence(self, error: Exception) -> str | None:
        text = str(error)
        place = re.search(r'In file "(.+)", line (\d+)', text)
        where = f" (in {place[1]}, line {place[2]})" if place else ""
        if isinstance(error, SyntaxError):
            return self._syntax_sentence(error)
        if found := re.match(r"Unable to open file: (.+?)\. Searched", text):
            names = list(_gin_files(self.prefixes))
            return f"There is no gin file {found[1]}." + nearest(found[1], names)
        if isinstance(error, ImportError):
            return f"A gin file imports a module that cannot be imported: {text.splitlines()[0]}."
        if found := re.match(r"No configurable matching (?:reference )?'@?([^'()]+)", text):
            names = [short(selector) for selector, _ in gin_config._REGISTRY.items()]
            name = found[1].rsplit("/", 1)[-1]
            return f"Nothing configurable is named {name}{where}." + nearest(name, names)
        if found := re.match(r"Configurable '(.+)' doesn't have a parameter named '(.+)'", text):
            names = _parameters(found[1])
            return f"{found[1]} has no parameter {found[2]}{where}." + nearest(found[2], names)
        if isinstance(error, (ValueError, KeyError, NameError, AttributeError)):
            return f"The gin configuration is wrong{where}: {text.splitlines()[0]}"
        return None

    def _syntax_sentence(self, error: SyntaxError) -> str:
        if self.binding is not None:
            name, _, value = (part.strip() for part in self.binding.partition("="))
            return (
                f"The value of --gin.{name} cannot be read: {value}. It must be a Python literal,"
                f" %MACRO or @function; text needs quotes, as in --gin.{name}=\"'text'\"."
            )
        place = f" in {error.filename}, line {error.lineno}" if error.filename else ""
        return f"A gin file cannot be read{place}: {error.msg.splitlines()[0].rstrip('.')}."


def _gin_files(prefixes: Sequence[str]) -> Iterator[str]:
    for prefix in prefixes:
        root = pathlib.Path(prefix)
        base = root / "gin_configs" if (root / "gin_configs").is_dir() else root
        for path in sorted(base.rglob("*.gin")):
            yield str(path.relative_to(root))


def _parameters(selector: str) -> list[str]:
    match = gin_config._REGISTRY.get_match(selector)
    return list(inspect.signature(inspect.unwrap(match.wrapped)).parameters) if match else []
