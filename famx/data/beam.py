"""Calls of a function divided over the workers of an Apache Beam pipeline.

Beam's own flags tell which runner executes it, on how many workers. Its DirectRunner, the default, runs
on this machine, here always as Beam's `FnApiRunner`, which alone has several workers. Files are read and
written under their usual paths, so all workers must see the same folders: on several machines, those of a
shared file system.
"""

import argparse
import functools
import glob
import json
import os
import shlex
import socket
from collections.abc import Callable
from typing import Any, NoReturn

from famx.base.errors import ConfigError
from famx.base.files import scratch_directory
from famx.base.gin_checks import nearest
from famx.base.packages import optional_package


def map_on_workers(
    function: Callable[[int], Any], count: int, folder: str, beam_options: str
) -> list[Any]:
    """Call a function with 0 to `count - 1` on the workers of a pipeline; return the results in order.

    Args:
      function: can be pickled, and returns JSON values. It may be called twice with the same number, as
        Beam repeats what failed.
      count: number of calls.
      folder: an existing folder that all workers see; used for the results.
      beam_options: flags of Beam, such as "--runner=DirectRunner --direct_num_workers=4".

    Raises:
      ConfigError: Apache Beam is missing, there is no such flag, a worker does not see the folder, or a
        call raised ValueError or OSError.
    """
    beam = _imported("apache_beam")
    options = _pipeline_options(beam_options)
    runner = options.get_all_options()["runner"]
    if runner in (None, "DirectRunner"):
        runner = _imported("apache_beam.runners.portability.fn_api_runner").FnApiRunner()
    if not count:
        return []
    with scratch_directory(os.path.join(folder, "beam")) as scratch:
        name = os.path.join(scratch, "results")
        with beam.Pipeline(runner, options) as pipeline:
            _ = (
                pipeline
                | beam.Create(range(count))
                | beam.Reshuffle()  # or one worker would get all of them
                | beam.Map(functools.partial(_call, function, str(scratch)))
                | beam.io.WriteToText(name)
            )
        found = {}
        for path in glob.glob(f"{glob.escape(name)}*"):
            with open(path, encoding="utf-8") as file:
                found |= {line["number"]: line for line in map(json.loads, file)}
    for i in range(count):
        if "error" in found[i]:
            raise ConfigError(found[i]["error"])
    return [found[i]["result"] for i in range(count)]


def _call(function: Callable[[int], Any], folder: str, number: int) -> str:
    """The result of one call as a line of JSON, or the sentence about a mistake of the user."""
    try:
        if not os.path.isdir(folder):
            raise ConfigError(
                f"The worker {socket.gethostname()} does not see {os.path.dirname(folder)}; all workers "
                "of the pipeline must share the folders that are read and written."
            )
        return json.dumps({"number": number, "result": function(number)})
    except (ValueError, OSError) as error:
        return json.dumps({"number": number, "error": str(error)})


def _imported(name: str) -> Any:
    return optional_package(name, "Pipelines of Apache Beam", "beam")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"--beam_options: {message}.")


def _pipeline_options(text: str) -> Any:
    """Beam's options from the text of its flags; ConfigError for a flag that Beam does not have."""
    module = _imported("apache_beam.options.pipeline_options")
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--beam_options cannot be read: {error}.") from error
    parser = _Parser(add_help=False, allow_abbrev=False)
    for options in module.PipelineOptions.__subclasses__():  # Beam itself only warns of unknown flags
        options._add_argparse_args(parser)
    known = {flag for action in parser._actions for flag in action.option_strings}
    unknown = parser.parse_known_args(arguments)[1]
    if unknown:
        flag = unknown[0].partition("=")[0]
        hint = nearest(flag, sorted(known))
        raise ConfigError(f"--beam_options: Apache Beam has no flag {flag}.{hint}")
    return module.PipelineOptions(arguments)
