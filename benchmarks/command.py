"""The command line that all benchmarks share."""

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
    """Runs the sections asked for, printing and writing each as soon as it is measured.

    Args:
      module: name after `python -m`.
      description: one line.
      sections: by name; each is called with the sizes and the number of rounds.
      full, quick: sizes, without and with `--quick`.
      repeats: rounds, if none are asked for.
      argv: arguments; None: those of the process.
      options: more arguments, each a field of the sizes; name -> keywords of `add_argument`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--only", help=f"sections, separated by commas: {','.join(sections)}")
    parser.add_argument(
        "--repeats", type=int, help=f"rounds of each section ({repeats}; with --quick 3)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a test, no measurement")
    parser.add_argument("--markdown", type=pathlib.Path, help="page to fill tables into")
    parser.add_argument("--json", type=pathlib.Path, help="file to write all figures to")
    for name, keywords in options.items():
        parser.add_argument(f"--{name}", **keywords)
    args = parser.parse_args(argv)
    sizes = quick if args.quick else full
    sizes = dataclasses.replace(sizes, **{name: getattr(args, name) for name in options})
    names = list(sections) if args.only is None else args.only.split(",")
    repeats = (3 if args.quick else repeats) if args.repeats is None else args.repeats
    _check(parser, sections, names, repeats, args.markdown, args.json)

    done = []
    for name in names:
        before = machine()
        table = sections[name](sizes, repeats)
        warning = ("tiny sizes: a test, not a measurement",) if args.quick else ()
        notes = (*table.notes, _line(before), *warning)
        table = dataclasses.replace(table, notes=notes)
        done.append(table)
        print(table.text(), end="\n\n", flush=True)
        if args.markdown:
            tables.fill_markdown(args.markdown, table)
        if args.json:
            tables.write_json(args.json, before, done)


def _check(parser, sections, names, repeats, markdown, json):
    """Ends with one sentence, before anything is compiled, if the run could not succeed."""
    for name in names:
        if name not in sections:
            near = difflib.get_close_matches(name, sections, n=1, cutoff=0)[0]
            parser.error(f"there is no section {name!r}; did you mean {near!r}?")
    if repeats < 1:
        parser.error(f"--repeats must be at least 1, got {repeats}.")
    if json and not json.parent.is_dir():
        parser.error(f"the folder of --json {json} does not exist; make it first.")
    if markdown:
        if not markdown.is_file():
            parser.error(f"--markdown {markdown} is no file; copy docs/benchmarks.md there first.")
        missing = tables.missing_markers(markdown, names)
        if missing:
            parser.error(
                f"{markdown} has no place for {missing[0]}: add the lines"
                f" '<!-- table: {missing[0]} -->' and '<!-- end -->'."
            )


def _line(found) -> str:
    load = "" if found["load"] is None else f"; load {found['load']} before"
    return f"{found['cpu']}, {found['cores']} cores; {found['device']}; jax {found['jax']}{load}"
