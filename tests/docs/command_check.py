"""Parses commands without running them: flags exist, gin files are found, bindings fit.

    python tests/docs/command_check.py < commands.json

Reads a JSON list of `[module, arguments]`, each for `python -m module arguments`, and writes a list with
a message, or null, for each. What is imported once serves all: every command is parsed in a fork.
"""

import contextlib
import importlib.util
import io
import json
import os
import runpy
import sys

from absl import flags

import famx.conversion.importing  # noqa: F401, E402, imported once for all
import famx.evaluation  # noqa: F401
import famx.inference  # noqa: F401
import famx.training.loop  # noqa: F401
from famx.base import command_line, gin_utils


class Parsed(Exception):
    """The command was parsed; it is not run."""


def parse(main, define_flags=None, gin_flags=True, own_flags=True, argument=None):
    """Replacement of `gin_utils.run`: a main that gin configures runs up to the end of gin's parsing."""
    if sys.argv[0] == "famx.verify":  # takes paths
        raise Parsed
    if not own_flags:  # `famx.lm_eval`, whose arguments are those of another program
        if importlib.util.find_spec("lm_eval") is not None:
            from lm_eval._cli import HarnessCLI

            HarnessCLI().parse_args()
        raise Parsed
    general = gin_utils.define_gin_flags if gin_flags else gin_utils.define_import_flag
    command_line.declare(general, define_flags)
    argv = gin_utils.rewrite_gin_args(sys.argv) if gin_flags else sys.argv
    command_line.parse(argv, main, "see --help.", argument)
    if gin_flags and argument != "model_dir":  # of a run, which has the gin file
        main()
    raise Parsed


def parse_gin_flags(unneeded=(), default=None):
    """Replacement of `gin_utils.parse_gin_flags`."""
    values = flags.FLAGS
    files = values.gin_file or [default]
    gin_utils.parse_gin(files, values.gin_bindings, values.gin_search_paths, unneeded)
    raise Parsed


def problem(module: str, arguments: list[str]) -> str | None:
    """What is wrong with a command; None: nothing."""
    gin_utils.run, gin_utils.parse_gin_flags = parse, parse_gin_flags
    sys.argv = [module, *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_module(module, run_name="__main__")
    except Parsed:
        return None
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "it does not end in gin_utils.run"


def forked(module: str, arguments: list[str]) -> str | None:
    """`problem` in a process of its own, since flags and gin's bindings are global."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, json.dumps(problem(module, arguments)).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    os.wait()
    return json.loads(found)


if __name__ == "__main__":
    json.dump([forked(*command) for command in json.load(sys.stdin)], sys.stdout)
