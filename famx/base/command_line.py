"""Flags of the mains: declaration when a main starts, `--help`, and errors in one sentence."""

import contextlib
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from famx.base.errors import ConfigError
from famx.base.gin_checks import nearest
from famx.base.schemas import fits
from famx.base.text import first_command
from famx.base.values import SettingError, check

_HELP = {"-h", "-help", "--help", "-helpshort", "--helpshort"}
_HELP_FULL = {"-helpfull", "--helpfull"}
_WIDTH = 100
_SETTINGS = (
    "Setting of a gin file, such as --gin.TRAIN_STEPS=100 or --gin.Fam.update=residual. Text needs no"
    " quotes; numbers, lists, %MACRO and @function() are read as gin reads them. Repeatable."
)

# Help of the flag of the commands that can run as a pipeline, see `famx.data.beam`.
BEAM_OPTIONS = (
    "Divide the files among the workers of an Apache Beam pipeline with these flags of Beam's, such as "
    "'--direct_num_workers=4 --direct_running_mode=multi_processing' or '--runner=DataflowRunner ...'."
)

_declared: list[str] = []  # names of the flags of the main that is running


def declare(*definitions: Callable[[], None] | None) -> None:
    """Declares the flags of a main, and removes those of a main that ran before in this process.

    Args:
      definitions: functions that call `absl.flags.DEFINE_*`; None is skipped.
    """
    for name in filter(flags.FLAGS.__contains__, _declared):
        delattr(flags.FLAGS, name)
    _declared.clear()
    before = set(flags.FLAGS)
    for define in filter(None, definitions):
        define()
    _declared.extend(name for name in flags.FLAGS if name not in before)


def define(name: str, annotation: Any, default: Any, text: str, several: bool = False) -> None:
    """Declares a flag whose value is a number or a path, and must be what an annotation allows.

    Args:
      name: name of the flag.
      annotation: its type and range, see `famx.base.ranges`; the flag's text is read as that number.
      default: value if the flag is not given.
      text: help text.
      several: whether the flag may be given again for more values.
    """
    parser: Any = _SettingParser(name, annotation)
    serializer: Any = flags.ArgumentSerializer()
    if several:
        flags.DEFINE_multi(parser, serializer, name, default, text)
    else:
        flags.DEFINE(parser, name, default, text, serializer=serializer)


class _SettingParser(flags.ArgumentParser):
    """Parser of a flag's text that checks the value against an annotation."""

    def __init__(self, name: str, annotation: Any):
        self._name, self._annotation = name, annotation

    def parse(self, argument: Any) -> Any:
        value = argument
        for kind in (int, float):
            if isinstance(value, str) and not fits(self._annotation, value):
                with contextlib.suppress(ValueError):
                    value = kind(argument)
        return check(f"--{self._name}", value, self._annotation)

    def flag_type(self) -> str:
        return "setting"


def parse(
    argv: Sequence[str], main: Callable[[], Any], settings: str, argument: str | None = None
) -> None:
    """Parses the arguments into `absl.flags.FLAGS`; `--help` prints the help text and exits.

    Args:
      argv: the program, then its arguments.
      main: the main that runs; its module says what it does.
      settings: end of the sentence about a stray argument.
      argument: flag that the first argument is the value of if it is no flag, or, for a flag that may be
        repeated, the arguments before the first flag; None: there are none.

    Raises:
      ConfigError: a flag does not exist or its value is invalid, or an argument is not a flag.
    """
    if argument:
        most = len(argv) if isinstance(flags.FLAGS[argument], flags.MultiFlag) else 1
        values = list(itertools.takewhile(lambda arg: not arg.startswith("-"), argv[1:]))[:most]
        argv = [argv[0], *(f"--{argument}={value}" for value in values), *argv[1 + len(values) :]]
    options = set(argv[1 : argv.index("--")] if "--" in argv else argv[1:])
    if options & (_HELP | _HELP_FULL):
        print(_help_text(main, argument))
        if options & _HELP_FULL:
            print(f"\nAll flags:\n{flags.FLAGS.get_help()}")
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, ValueError) as error:  # ValueError for --noFLAG=VALUE
        raise ConfigError(_sentence(error)) from error
    if len(rest) > 1:
        raise ConfigError(f"Unknown argument {rest[1]}: {settings}")


def _sentence(error: Exception) -> str:
    """Sentence for an error of absl's parser."""
    if isinstance(error.__context__, SettingError):
        return str(error.__context__)
    if isinstance(error, flags.UnrecognizedFlagError):
        name = f"--{error.flagname}"
        return f"There is no flag {name}.{nearest(name, [f'--{known}' for known in flags.FLAGS])}"
    match = re.match(r"flag --(\w+)=(.*?): ", str(error), re.DOTALL)
    if match is None:
        return f"{str(error).rstrip('.')}."
    parser = flags.FLAGS[match[1]].parser
    choices = getattr(parser, "enum_values", None)
    wanted = f"one of {', '.join(choices)}" if choices else parser.syntactic_help or "true or false"
    return f"--{match[1]} must be {wanted}, not {match[2]}."


def example(about: str | None) -> str:
    """The first command in the docstring of a main, in one line.

    Raises:
      ValueError: there is none.
    """
    found = first_command(about or "")
    if not found:
        raise ValueError(f"No command in {about!r}.")
    return found


def _help_text(main: Callable[[], Any], argument: str | None = None) -> str:
    """The docstring of the main's module, its usage and its flags."""
    module = main.__globals__ if main.__module__ == "__main__" else vars(sys.modules["__main__"])
    spec = module.get("__spec__")
    program = sys.argv[0] if spec is None or sys.argv[0].startswith("famx ") else f"python -m {spec.name}"
    names = dict.fromkeys(_declared)
    for source in (main.__module__, sys.argv[0]):  # absl knows flags of `__main__` by the program's name
        names |= dict.fromkeys(flag.name for flag in flags.FLAGS.get_key_flags_for_module(source))
    about = (module.get("__doc__") or "").strip()
    usage = f"Usage: {program}{_arguments(argument)} [--FLAG=VALUE ...]"
    lines = [about, "", usage, *(["", "Flags:"] if names else [])]
    if "gin_bindings" in names:
        lines += ["  --gin.NAME=VALUE", _filled(_SETTINGS)]
    for name in names:
        flag = flags.FLAGS[name]
        choices = re.match(r"(<.+?>): ", flag.help)
        text = flag.help[choices.end() :] if choices else flag.help
        text = re.sub(r";\s+repeat this option to specify a list of values$", " Repeatable.", text)
        if flag.default not in (None, "", []):
            text += f" Default: {str(flag.default_as_str)[1:-1]}."
        lines.append(f"  --{'[no]' * flag.boolean}{name}" + (f"={choices[1]}" if choices else ""))
        lines.append(_filled(text))
    return "\n".join(lines)


def _filled(text: str) -> str:
    """The text about a flag, in lines below its name."""
    return textwrap.indent(textwrap.fill(text, _WIDTH - 6), " " * 6)


def _arguments(argument: str | None) -> str:
    """The arguments that need no flag, and settings, in the line of the usage."""
    settings = " [--gin.NAME=VALUE ...]" * ("gin_bindings" in flags.FLAGS)
    if argument is None:
        return settings
    word = "FILE" if argument == "gin_file" else argument.upper()
    return f" {word}{' ...' * isinstance(flags.FLAGS[argument], flags.MultiFlag)}{settings}"


# ---------------------------------------------------------------- values


def require(sentences: Mapping[str, str]) -> None:
    """Raises ConfigError for the first flag without a value.

    Args:
      sentences: error sentence by name of the flag.
    """
    for name, sentence in sentences.items():
        if not flags.FLAGS[name].value:
            raise ConfigError(sentence)


def json_object(text: str, flag: str) -> dict[str, Any]:
    """The JSON object in the value of a flag; empty for an empty text.

    Args:
      text: value of the flag.
      flag: its name, for the sentence of an error.

    Raises:
      ConfigError: the text is not JSON, or not an object.
    """
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--{flag} is not JSON: {error}. Write it as '{{\"name\": value}}'.") from error
    if not isinstance(value, dict):
        example = '{"data_dir": "/data"}'
        raise ConfigError(f"--{flag} must be a JSON object, such as '{example}'.")
    return value


def integers(values: Sequence[str] | None, flag: str) -> list[int] | None:
    """Integers of a comma-separated flag; None if the flag was not given.

    Args:
      values: value of the flag.
      flag: its name, for the sentence of an error.

    Raises:
      ConfigError: one of the values is not an integer.
    """
    return None if values is None else _read(int, values, flag)


def numbers(values: Sequence[str], flag: str) -> list[float]:
    """Numbers of a comma-separated flag; see `integers`."""
    return _read(float, values, flag)


def _read(kind: Callable[[str], Any], values: Sequence[str], flag: str) -> list[Any]:
    try:
        return [kind(value) for value in values]
    except ValueError:
        raise ConfigError(
            f"--{flag}={','.join(values)} cannot be read: write numbers with commas between them."
        ) from None
