"""The command line shared by all benchmarks."""

import argparse
import dataclasses
import difflib
import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from benchmarks.timing import machine
from famx.base import tables


def run(
    module: str,
    description: str,
    sections: Mapping[str, Callable[[Any, int], tables.Table]],
    full: Any,
    quick: Any,
    repeats: int,
    argv: list[str] | None = None,
    options: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> None:
    """Runs the selected sections; prints and writes each table as soon as it is measured.

    Args:
      module: module name for the usage message, as after `python -m`.
      description: one-line description for `--help`.
      sections: `{name: function(sizes, repeats) -> Table}`.
      full: sizes of a real measurement.
      quick: sizes with `--quick`.
      repeats: default number of rounds.
      argv: command-line arguments; None takes those of the process.
      options: additional arguments, each of which sets the field of `full` or `quick` with its name:
        `{name: keyword arguments of add_argument}`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--only", help=f"comma-separated sections to run: {','.join(sections)}")
    parser.add_argument(
        "--repeats", type=int, help=f"rounds per section (default {repeats}; 3 with --quick)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test that everything runs")
    parser.add_argument("--markdown", type=pathlib.Path, help="Markdown page whose tables are replaced")
    parser.add_argument("--json", type=pathlib.Path, help="file for all figures, unrounded")
    for name, keywords in options.items():
        parser.add_argument(f"--{name}", **keywords)
    args = parser.parse_args(argv)
    sizes = quick if args.quick else full
    sizes = dataclasses.replace(sizes, **{name: getattr(args, name) for name in options})
    names = list(sections) if args.only is None else args.only.split(",")
    repeats = (3 if args.quick else repeats) if args.repeats is None else args.repeats
    _check(parser, sections, names, repeats, args.markdown, args.json)

    measured = []
    for name in names:
        host = machine()  # before the measurement, which itself raises the load
        table = sections[name](sizes, repeats)
        warning = ("tiny sizes: a test, not a measurement",) if args.quick else ()
        notes = (*table.notes, _machine_note(host), *warning)
        table = dataclasses.replace(table, notes=notes)
        measured.append(table)
        print(table.text(), end="\n\n", flush=True)
        if args.markdown:
            tables.fill_markdown(args.markdown, table)
        if args.json:
            tables.write_json(args.json, host, measured)


def _check(parser, sections, names, repeats, markdown, json):
    """Exits with a one-sentence error, before anything is compiled, if an argument is invalid."""
    for name in names:
        if name not in sections:
            near = difflib.get_close_matches(name, sections, n=1, cutoff=0)[0]
            parser.error(f"unknown section {name!r}; did you mean {near!r}?")
    if repeats < 1:
        parser.error(f"--repeats must be at least 1, got {repeats}.")
    if json and not json.parent.is_dir():
        parser.error(f"the directory of --json {json} does not exist; create it first.")
    if markdown:
        if not markdown.is_file():
            parser.error(f"--markdown {markdown} is not a file; copy docs/benchmarks.md there first.")
        missing = tables.missing_markers(markdown, names)
        if missing:
            parser.error(
                f"{markdown} has no markers for table {missing[0]}: add the lines"
                f" '<!-- table: {missing[0]} -->' and '<!-- end -->'."
            )


def _machine_note(host) -> str:
    load = "" if host["load"] is None else f"; load {host['load']} before"
    return f"{host['cpu']}, {host['cores']} cores; {host['device']}; jax {host['jax']}{load}"
