"""The command line shared by all benchmarks."""

import argparse
import contextlib
import dataclasses
import difflib
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from famx.base import tables, unread_output
from famx.base.errors import ConfigError
from famx.scale.timing import machine


class Job:
    """The selected sections of a benchmark, and where their tables go.

    A section is a function `(sizes, repeats)` that returns its table, or a generator of ever more
    complete tables. The first one is made without measuring anything, and each one replaces the one
    before it on the page and in the JSON file.

    Args:
      sections: selected sections by name, in their order.
      sizes: sizes of the measurement, with the values of the benchmark's own options.
      repeats: number of rounds.
      quick: whether the sizes are tiny.
      page: Markdown page whose tables are replaced, or None.
      json: file for all figures, or None.
    """

    def __init__(self, sections, sizes, repeats, quick, page, json):
        self.sections, self.sizes, self.repeats, self.quick = sections, sizes, repeats, quick
        self._page, self._json = page, json
        self._lock = threading.Lock()
        # Newest table of each section that has begun, and the machine just before the section.
        self._measured: dict[str, tuple[tables.Table, dict[str, Any]]] = {}
        self._printed: set[str] = set()

    def run(self) -> None:
        """Measures the sections one after another; prints each table when it is complete."""
        for name in self.sections:
            host = machine()  # before the measurement, which itself raises the load
            for table in self._measure(name):
                with self._lock:
                    self._write(name, table, host)
            with self._lock:
                self._print(name)

    def cut_off(self, reason: str) -> None:
        """Writes all tables as far as they are measured. Nothing can be written after this."""
        self._lock.acquire()
        for name in self.sections:
            if name not in self._printed:
                table, host = self._measured.get(name) or (next(self._measure(name)), machine())
                notes = (*table.notes, f"cut off: {reason}")
                self._write(name, dataclasses.replace(table, notes=notes), host)
                self._print(name)

    def _measure(self, name: str) -> Iterator[tables.Table]:
        result = self.sections[name](self.sizes, self.repeats)
        return iter([result]) if isinstance(result, tables.Table) else result

    def _write(self, name: str, table: tables.Table, host: dict[str, Any]) -> None:
        self._measured[name] = table, host
        if self._page:
            tables.fill_markdown(self._page, self._noted(name))
        if self._json:
            tables.write_json(self._json, host, [self._noted(name) for name in self._measured])

    def _print(self, name: str) -> None:
        self._printed.add(name)
        print(self._noted(name).text(), end="\n\n", flush=True)

    def _noted(self, name: str) -> tables.Table:
        """The section's table with notes on the machine and on the sizes."""
        table, host = self._measured[name]
        warning = ("tiny sizes: a test, not a measurement",) if self.quick else ()
        return dataclasses.replace(table, notes=(*table.notes, _machine_note(host), *warning))


def parse(
    module: str,
    description: str,
    sections: Mapping[str, Callable[[Any, int], Any]],
    full: Any,
    quick: Any,
    repeats: int,
    argv: list[str] | None = None,
    options: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    on_request: Mapping[str, str] = MappingProxyType({}),
) -> Job:
    """Makes the job that the command line describes.

    Args:
      module: module name for the usage message, as after `python -m`.
      description: one-line description for `--help`.
      sections: sections by name, see `Job`.
      full: sizes of a real measurement.
      quick: sizes with `--quick`.
      repeats: default number of rounds.
      argv: command-line arguments; None takes those of the process.
      options: additional arguments, each of which sets the field of `full` or `quick` with its name:
        `{name: keyword arguments of add_argument}`.
      on_request: sections that run only if they are named, or with the flag: `{flag: section}`.
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
    for name, section in on_request.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"also run {section}")
    args = parser.parse_args(argv)
    sizes = quick if args.quick else full
    sizes = dataclasses.replace(sizes, **{name: getattr(args, name) for name in options})
    left_out = {section for flag, section in on_request.items() if not getattr(args, flag)}
    names = [name for name in sections if name not in left_out]
    names = names if args.only is None else args.only.split(",")
    repeats = (3 if args.quick else repeats) if args.repeats is None else args.repeats
    _check(parser, sections, names, repeats, args.markdown, args.json)
    selected = {name: sections[name] for name in names}
    return Job(selected, sizes, repeats, args.quick, args.markdown, args.json)


@contextlib.contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Context in which a ConfigError ends the process in one sentence, with exit code 2."""
    try:
        with unread_output.exits_quietly():
            yield
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(*args: Any, **kwargs: Any) -> None:
    """Runs the job of `parse`, which has the same arguments."""
    parse(*args, **kwargs).run()


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
