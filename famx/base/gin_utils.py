"""Gin on the command line, with t5x's flags and a plain sentence for every bad binding.

    famx train passkey_tiny --gin.TRAIN_STEPS=100

Gin ignores some mistakes and reports others with a traceback. Here an unknown file, configurable,
parameter or macro, a macro that nothing uses, and a value that was never set each raise a
`ConfigError` that names the nearest existing name.
"""

import contextlib
import functools
import importlib
import inspect
import os
import pathlib
import re
import sys
import tokenize
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
from absl import app, flags, logging
from gin import config as gin_config
from gin.resource_reader import system_path_reader

from famx.base import command_line, gin_overrides, native_stderr, unread_output, waiting
from famx.base.errors import ConfigError
from famx.base.files import as_path, write_text
from famx.base.gin_arguments import find_gin_file, gin_files
from famx.base.gin_arguments import rewrite_gin_args as rewrite_gin_args  # part of this interface
from famx.base.gin_checks import check_all_used as check_all_used  # part of this module's interface
from famx.base.gin_checks import check_macros, check_required, nearest, not_set, short, unset_macros
from famx.base.gin_names import with_known_names
from famx.base.gin_values import check_bindings
from famx.base.packages import install_hint

_UNKNOWN = "No configurable matching "  # how gin's errors about names begin


def gin_root() -> pathlib.Path:
    """Directory that contains gin_configs/: the package when it came as a wheel, else the repository."""
    package = pathlib.Path(__file__).resolve().parents[1]
    return package if (package / "gin_configs").is_dir() else package.parent


def parse_gin(
    gin_files: Sequence[str],
    gin_bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    unneeded: Sequence[str] = (),
) -> None:
    """Parses files, then bindings (later ones win), checks names and values, and locks the configuration.

    Args:
      gin_files: files, looked up with their includes in the current directory, in `search_paths` and
        in the directory of famx's own gin_configs/; those in there also by name, as `passkey_tiny`. A
        module whose functions they bind without importing it must have been imported before.
      gin_bindings: bindings such as `TRAIN_STEPS = 100`. They name classes and functions of famx as a
        file would that imports their modules: `@modules.Memory()`.
      search_paths: further directories.
      unneeded: macros that may be unset; they become None.

    Raises:
      ConfigError: something is unknown, unused or unset, and the sentence names the nearest known name;
        or a value is not what the annotation of its parameter allows.
    """
    prefixes = [*search_paths, str(gin_root())]
    for prefix in prefixes:
        if prefix not in gin_config._LOCATION_PREFIXES:
            gin.add_config_file_search_path(prefix)
    with _only_files_on_disk(), gin_overrides.recorded() as overrides:
        for name in gin_files:
            with _PlainErrors(prefixes, name):
                gin.parse_config_file(find_gin_file(name, prefixes))
        overrides.commanding = True
        for binding in gin_bindings:
            with _PlainErrors(prefixes, binding=binding):
                try:
                    gin.parse_config(binding)
                except ValueError as error:
                    if not str(error).startswith(_UNKNOWN):
                        raise
                    gin.parse_config(with_known_names(binding))
    unset = unset_macros(unneeded)
    for name in unset:
        gin.parse_config(f"{name} = None")
    check_macros()
    check_required()
    check_bindings(unset)
    gin.finalize()


def operative_config() -> str:
    """Settings that calls have used so far, defaults included, as gin text."""
    return gin.operative_config_str()


def write_operative_config(model_dir: str) -> None:
    """Writes `operative_config()` to `<model_dir>/config.gin`, replacing it in one move."""
    path = as_path(model_dir) / "config.gin"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, operative_config())


def define_gin_flags() -> None:
    """Declares t5x's gin flags and `--import`, unless they are declared already."""
    if "gin_file" in flags.FLAGS:
        return
    file = "Gin file: a path, or a name that `famx examples` lists; later files win."
    flags.DEFINE_multi_string("gin_file", [], file)
    flags.DEFINE_multi_string("gin_bindings", [], "Binding NAME = VALUE, in gin's own syntax.")
    flags.DEFINE_list("gin_search_paths", [], "Further directories to look for gin files in.")
    define_import_flag()


def define_import_flag() -> None:
    """Declares `--import`."""
    text = "Module of yours to import first, such as one that registers a task or has a memory."
    flags.DEFINE_multi_string("import", [], text)


def require_gin_file(about: str | None) -> None:
    """Raises ConfigError if no gin file was given; `about`: docstring of the main, with an example."""
    if not flags.FLAGS.gin_file:
        raise ConfigError(
            "No gin file says what to run. A complete command is"
            f" `{command_line.example(about)}`; `famx examples` lists those that come with famx."
        )


def parse_gin_flags(unneeded: Sequence[str] = (), default: str | None = None) -> None:
    """Imports the modules of `--import`, and calls `parse_gin` with the values of gin's flags.

    Args:
      unneeded: see `parse_gin`.
      default: gin file to parse if none was given.
    """
    values = flags.FLAGS
    import_modules()
    files = values.gin_file or ([default] if default else [])
    parse_gin(files, values.gin_bindings, values.gin_search_paths, unneeded)


def import_modules() -> None:
    """Imports the modules that `--import` names.

    Raises:
      ConfigError: one of them does not exist. What a module raises itself is passed on.
    """
    for name in flags.FLAGS["import"].value or ():
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name) or name.endswith(".py"):
            raise ConfigError(f"--import={name} must name a module: my_module for my_module.py.")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"--import={name}: there is no module {error.name} in {os.getcwd()} or installed."
            ) from error


def run(
    main: Callable[[], Any],
    define_flags: Callable[[], None] | None = None,
    gin_flags: bool = True,
    own_flags: bool = True,
    argument: str | None = None,
) -> None:
    """Runs a main under absl; a ConfigError ends it in one sentence, with exit code 2.

    Args:
      main: what to run; it takes its flags from `absl.flags.FLAGS`.
      define_flags: declares the flags of the main; None: it has none, or declared them when imported.
      gin_flags: whether gin configures the main, so that gin's flags are declared too.
      own_flags: whether the arguments are flags; if not, the main reads them from `sys.argv`, and only
        `--help` as the first of them is answered here.
      argument: flag that the first argument is the value of if it is no flag, or, for a flag that may be
        repeated, the arguments before the first flag; None: there are no such arguments.
    """
    command_line.declare(define_gin_flags if gin_flags else define_import_flag, define_flags)

    def flags_parser(argv: list[str]) -> list[str]:
        settings = "settings are written --gin.NAME=VALUE." if gin_flags else "see --help."
        if not own_flags:
            argv = _without_others(argv)
        command_line.parse(rewrite_gin_args(argv) if gin_flags else argv, main, settings, argument)
        if not gin_flags:
            import_modules()
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax reports every step of every save
        _cache_compiled_programs()
        return argv[:1]

    with native_stderr.without_noise(), waiting.announced():
        app.run(_exit_on_bad_input(lambda argv: main()), flags_parser=_exit_on_bad_input(flags_parser))


def _without_others(argv: list[str]) -> list[str]:
    """The arguments that famx answers of a main that reads `sys.argv` itself, which keeps the others."""
    if argv[1:2] in (["-h"], ["--help"]):
        return argv[:2]
    ours = [argument for argument in argv[1:] if argument.startswith("--import=")]
    sys.argv = [argument for argument in sys.argv if argument not in ours]
    return [argv[0], *ours]


def _cache_compiled_programs() -> None:
    """Puts jax's compilation cache below the user's home, unless JAX_COMPILATION_CACHE_DIR is set."""
    name = "JAX_COMPILATION_CACHE_DIR"
    directory = os.environ.get(name, os.path.join(os.path.expanduser("~"), ".cache", "famx", "xla"))
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(name.lower(), directory)
    else:  # mains import jax only after their flags are parsed; it then reads the variable
        os.environ[name] = directory


def call(configurable: Callable[[], Any]) -> Any:
    """Calls a configurable whose arguments gin builds.

    A ValueError that famx raises while the arguments are built becomes a ConfigError, and so does a
    parameter without a value. Every other error, and whatever the call itself raises, is passed on.
    """
    name = configurable.__name__
    try:
        return configurable()
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        text = str(error)
        missing = re.match(r"(?:(\w+)\.__init__|(\w+))\(\) missing \d+ required .*?: '(\w+)'", text)
        if missing and f"In call to configurable '{missing[1] or missing[2]}' " in text:
            raise ConfigError(not_set(f"{missing[1] or missing[2]}.{missing[3]}")) from error
        inside = f"In call to configurable '{name}' " in text  # gin's note; none for arguments
        if inside or isinstance(error, TypeError) or not _raised_by_famx(error):
            raise
        raise ConfigError(_call_error_sentence(error)) from error


def call_with(
    configurable: Callable[[], Any], gin_files: Sequence[str], settings: Mapping[str, Any] | None = None
) -> Any:
    """Calls a configurable under its own gin configuration, so that a notebook can run several.

    Clears what was configured before, and this configuration once the call ends.

    Args:
      configurable: a function such as `famx.training.loop.train`.
      gin_files: see `parse_gin`.
      settings: values by name, as in `{"TRAIN_STEPS": 100, "MODEL_DIR": "/tmp/famx/model"}`; numbers,
        strings, paths, and lists, tuples and dicts of them. A string that begins with @, such as
        "@modules.Memory()", is a reference.
    """
    bindings = [f"{name} = {_literal(value)}" for name, value in (settings or {}).items()]
    gin.clear_config()
    try:
        parse_gin(gin_files, bindings)
        return call(configurable)
    finally:
        gin.clear_config()


def _literal(value: Any) -> str:
    if isinstance(value, str) and value.startswith("@"):
        return value
    return repr(str(value) if isinstance(value, os.PathLike) else value)


def _raised_by_famx(error: Exception) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("famx.")


def _exit_on_bad_input(function):
    @functools.wraps(function)
    def wrapped(argv):
        try:
            with unread_output.exits_quietly():
                return function(argv)
        except (ConfigError, RuntimeError) as error:
            sentence = _call_error_sentence(error)
            if sentence is None:
                raise
        print(f"famx: error: {sentence}", file=sys.stderr)
        sys.exit(2)

    return wrapped


def _call_error_sentence(error: Exception) -> str | None:
    """Sentence of an error raised in a configured call, without the lines that gin appends."""
    text = str(error).split("\n  In call to configurable")[0].split("\n  No values supplied")[0]
    if isinstance(error, ValueError):
        return text
    if re.match(r"Unable to initialize backend|Unknown backend", text):
        reason = text.splitlines()[0].split(" (set JAX_PLATFORMS")[0].rstrip(".")
        return f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {reason}."
    missing = re.match(r"Required bindings for `(.+)` not provided in config: \['(\w+)'", text)
    return missing and not_set(f"{missing[1]}.{missing[2]}")


# ---------------------------------------------------------------- gin's errors as sentences


@contextlib.contextmanager
def _only_files_on_disk():
    """Disables gin's reader of package paths, which logs an error for every file it does not find."""
    readers = gin_config._FILE_READERS
    gin_config._FILE_READERS = [pair for pair in readers if pair[0] is not system_path_reader]
    try:
        yield
    finally:
        gin_config._FILE_READERS = readers


class _PlainErrors:
    """Context manager that turns what gin raises while parsing into a ConfigError."""

    def __init__(self, prefixes: Sequence[str], file: str | None = None, binding: str | None = None):
        self.prefixes, self.binding = prefixes, binding
        self.place = f"The gin file {file}" if file else "A binding"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None or isinstance(error, ConfigError) or not isinstance(error, Exception):
            return
        sentence = self._sentence(error)
        if sentence is not None:
            raise ConfigError(sentence) from error

    def _sentence(self, error: Exception) -> str | None:
        if isinstance(error, RecursionError):  # its text, which gin extends at each level, is too long
            return f"{self.place} includes itself, directly or through other gin files: take that out."
        text = str(error)
        place = re.search(r'In file "(.+)", line (\d+)', text)
        where = f" (in {place[1]}, line {place[2]})" if place else ""
        if isinstance(error, tokenize.TokenError):  # a bracket that is not closed
            position = ("", error.args[1][0], 0, "")
            return self._syntax_sentence(SyntaxError("a bracket or a text is not closed", position))
        if isinstance(error, SyntaxError):
            return self._syntax_sentence(error)
        if isinstance(error, UnicodeDecodeError):
            return f"{self.place}, or a file that it includes, is not UTF-8: convert it."
        if match := re.match(r"Unable to open file: (.+?)\. Searched", text):
            names = list(gin_files(self.prefixes))
            return f"There is no gin file {match[1]}." + nearest(match[1], names)
        if isinstance(error, ImportError):
            sentence = f"A gin file imports a module that cannot be imported: {text.splitlines()[0]}."
            return sentence + install_hint(error)
        if match := re.match(r"No configurable matching (?:reference )?'@?([^'()]+)", text):
            names = [short(selector) for selector, _ in gin_config._REGISTRY.items()]
            name = match[1].rsplit("/", 1)[-1]
            return f"Nothing configurable is named {name}{where}." + nearest(name, names)
        if match := re.match(r"Configurable '(.+)' doesn't have a parameter named '(.+)'", text):
            names = _parameters(match[1])
            hint = nearest(match[2], names) or _elsewhere(match[2])
            return f"{match[1]} has no parameter {match[2]}{where}.{hint}"
        if isinstance(error, (ValueError, KeyError, NameError, AttributeError)):
            return f"The gin configuration is wrong{where}: {text.splitlines()[0]}"
        return None

    def _syntax_sentence(self, error: SyntaxError) -> str:
        if self.binding is not None:
            name, _, value = (part.strip() for part in self.binding.partition("="))
            return (
                f"The value of --gin.{name} cannot be read: {value}. What begins with a quote, a bracket,"
                " % or @ is a Python literal, %MACRO or @function; text that begins so needs its own"
                f" quotes, as in --gin.{name}=\"'text'\"."
            )
        place = f" in {error.filename}" if error.filename else ""
        where = f"{place}, line {error.lineno}" if error.lineno else place
        return f"{self.place} cannot be read{where}: {error.msg.splitlines()[0].rstrip('.')}."


def _parameters(selector: str) -> list[str]:
    match = gin_config._REGISTRY.get_match(selector)
    return list(inspect.signature(inspect.unwrap(match.wrapped)).parameters) if match else []


def _elsewhere(parameter: str) -> str:
    """Returns ' Did you mean X.parameter?' if few configurables have a parameter of this name."""
    names = dict.fromkeys(
        f"{short(selector)}.{parameter}" for selector, _ in gin_config._REGISTRY.items()
        if parameter in _parameters(selector)
    )  # fmt: skip
    return f" Did you mean {' or '.join(names)}?" if 0 < len(names) < 4 else ""
