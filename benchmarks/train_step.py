"""Measures training steps and forward passes: `python -m benchmarks.train_step`.

Ratios of functions that take turns in one process, medians with quartiles. See docs/benchmarks.md.
"""

import argparse
import dataclasses
import difflib
import pathlib

from benchmarks import tables
from benchmarks.sections import QUICK, SECTIONS, Sizes
from benchmarks.timing import machine


def main(argv: list[str] | None = None) -> None:
    """Runs the sections asked for, printing and writing each as soon as it is measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", help=f"sections, separated by commas: {','.join(SECTIONS)}")
    parser.add_argument("--repeats", type=int, help="rounds of each section (15; with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a test, no measurement")
    parser.add_argument("--markdown", type=pathlib.Path, help="page to fill tables into")
    parser.add_argument("--json", type=pathlib.Path, help="file to write all figures to")
    args = parser.parse_args(argv)
    names = list(SECTIONS) if args.only is None else args.only.split(",")
    repeats = (3 if args.quick else 15) if args.repeats is None else args.repeats
    _check(parser, names, repeats, args.markdown, args.json)

    sizes = QUICK if args.quick else Sizes()
    done = []
    for name in names:
        before = machine()
        table = SECTIONS[name](sizes, repeats)
        warning = ("tiny sizes: a test, not a measurement",) if args.quick else ()
        notes = (*table.notes, _line(before), *warning)
        table = dataclasses.replace(table, notes=notes)
        done.append(table)
        print(table.text(), end="\n\n", flush=True)
        if args.markdown:
            tables.fill_markdown(args.markdown, table)
        if args.json:
            tables.write_json(args.json, before, done)


def _check(parser, names, repeats, markdown, json):
    """Ends with one sentence, before anything is compiled, if the run could not succeed."""
    for name in names:
        if name not in SECTIONS:
            near = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0)[0]
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


if __name__ == "__main__":
    main()
