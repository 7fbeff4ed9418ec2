"""What the cells of a study measured: one table with a row for each number, a summary and figures.

Measures are named by where they come from:

| name | what it is |
|---|---|
| `train/<name>` | a scalar of the last line of the log, such as `train/loss` |
| `<split>/<name>` | the last value of an evaluation during the run |
| `passkey/<probe>/<blocks>` | exact match after that many blocks, from passkey.json |
| `zeroed/<probe>/<blocks>` | the same with the memory zeroed |
| `answer_loss/<probe>/<blocks>` | the loss of the answer there, in nats per token, from passkey.json |
"""

import csv
import fnmatch
import io
import pathlib
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from famx.base import tables
from famx.base.errors import ConfigError
from famx.base.files import replacing, write_text
from famx.evaluation.figures import lengths_figure, passkey_results
from famx.study.grid import Cell, Study
from famx.study.runner import is_complete, read_record
from famx.training.run_log import read_metrics

_ABOUT = ("famx", "jax", "seconds", "command")
_OF_PASSKEY = ("passkey/", "zeroed/", "answer_loss/")  # prefixes of measures
_NOT_SCALARS = ("step", "split", "time")


def measures(directory: pathlib.Path) -> Iterator[tuple[str, float]]:
    """Yields `(name, value)` of all that a run measured."""
    last: dict[str, float] = {}
    for line in read_metrics(str(directory)):
        last |= {
            f"{line['split']}/{key}": value for key, value in line.items() if key not in _NOT_SCALARS
        }
    yield from last.items()
    if (directory / "passkey.json").is_file():
        results = passkey_results(directory)
        for probe, row in results["exact_match"].items():
            yield from ((f"passkey/{probe}/{blocks}", value) for blocks, value in row.items())
        for probe, row in results.get("answer_loss", {}).get("kept", {}).items():
            yield from ((f"answer_loss/{probe}/{blocks}", value) for blocks, value in row.items())
        memory = results.get("memory") or {}
        yield from ((name, value) for name, value in memory.items() if name.startswith("zeroed/"))


def rows(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """A row for each measure of each complete cell: axes, seed, measure, value, versions and command."""
    found = []
    for cell in cells:
        if is_complete(cell):
            record = read_record(cell)
            about = {name: record.get(name) for name in _ABOUT}
            about["command"] = " ".join(record["command"])
            for name, value in measures(cell.directory):
                found.append(
                    {**cell.choices, "seed": cell.seed, "measure": name, "value": value, **about}
                )
    return found


def write(study: Study, cells: Sequence[Cell]) -> str:
    """Writes results.csv, .parquet (with pyarrow), summary.md and figures; returns the summary.

    All are of those of the study's `cells` that are complete. passkey.png is of the runs with PassKey,
    lengths.png of measures of the summary whose names end with a length, such as `eval/accuracy/256`;
    each is there if there are such.

    Raises:
      ConfigError: no cell is complete, or a measure of the summary does not exist.
    """
    found, directory = rows(cells), pathlib.Path(study.directory)
    if not found:
        raise ConfigError(f"None of the cells of {directory} is complete yet: run the study first.")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_text(directory / "results.csv", text.getvalue())
    _write_parquet(directory / "results.parquet", found)
    table = summary(study, found, len(cells))
    write_text(directory / "summary.md", table.markdown() + "\n")
    figures = {
        "passkey.png": _passkey_figure(study, cells, found),
        "lengths.png": _lengths_figure(study, found),
    }
    for name, figure in figures.items():
        if figure is not None:
            with replacing(directory / name) as path:
                figure.savefig(path, dpi=150, format="png")
    return table.text()


def _write_parquet(path: pathlib.Path, found: Sequence[Mapping[str, Any]]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(found)), temporary)


def _named(study: Study, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The measures of the summary.

    Raises:
      ConfigError: the study names one that no run has.
    """
    known = dict.fromkeys(row["measure"] for row in found)
    names = list[str]()
    for pattern in study.measures:
        named = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not named:
            raise ConfigError(f"No run measured {pattern}: choose from {', '.join(known)}.")
        names += [name for name in named if name not in names]
    names = names or [name for name in known if name.startswith("passkey/")]
    return names or [name for name in known if name in ("train/loss", "train/accuracy")]


def summary(study: Study, found: Sequence[Mapping[str, Any]], cells: int) -> tables.Table:
    """A row for each choice of a number of cells: median of the seeds and, of several, their range."""
    names = _named(study, found)
    values: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in found:
        choices = tuple(row[axis] for axis in study.axes)
        values.setdefault(choices, {}).setdefault(row["measure"], []).append(row["value"])
    made = []
    for choices, of_choice in values.items():
        row = dict(zip(study.axes, choices, strict=True))
        row["seeds"] = max(map(len, of_choice.values()))
        made.append(row | {name: spread(of_choice.get(name, ())) for name in names})
    title = "Median of the seeds, and their range"
    return tables.Table("study", title, (f"{cells} cells",), made)


def spread(values: Sequence[float]) -> str:
    """Median and range of one or more values, such as `0.95 [0.90, 0.97]`; `-` of none."""
    if not values:
        return "-"
    middle, low, high = (f"{x:.3g}" for x in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} [{low}, {high}]"


# {panel title: {line label: {number of blocks or of positions: scores of the seeds}}}
_Scores = dict[str, dict[str, dict[int, list[float]]]]


def _passkey_figure(
    study: Study, cells: Iterable[Cell], found: Sequence[Mapping[str, Any]]
) -> Figure | None:
    """Exact match over the number of blocks: a line for each choice, a panel for each probe."""
    first = next(_passkeys(cells), None)
    if first is None:
        return None
    names = {row["measure"] for row in found if row["measure"].startswith("passkey/")}
    scores = _over_lengths(study, found, names)
    medians, ranges = _spread({of.removeprefix("passkey/"): lines for of, lines in scores.items()})
    return lengths_figure(medians, first["block_size"], first["train_blocks"], ranges=ranges)


def _lengths_figure(study: Study, found: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Measures over the length that ends their names: a line for each choice, a panel for each."""
    names = {name for name in _named(study, found) if not name.startswith(_OF_PASSKEY)}
    scores = _over_lengths(study, found, names)
    if not scores:
        return None
    medians, ranges = _spread(scores)
    labels = ("positions of a sequence", "score")
    return lengths_figure(medians, 1, None, ranges=ranges, labels=labels)


def _over_lengths(study: Study, found: Sequence[Mapping[str, Any]], names: Collection[str]) -> _Scores:
    """The values of those of these measures whose names end with a number; the rest is the panel."""
    scores: _Scores = {}
    for row in found:
        of, _, length = row["measure"].rpartition("/")
        if row["measure"] in names and length.isdecimal():
            line = ", ".join(row[axis] for axis in study.axes) or "run"
            values = scores.setdefault(of, {}).setdefault(line, {})
            values.setdefault(int(length), []).append(row["value"])
    return scores


def _spread(scores: _Scores):
    """Medians of the seeds, and the pairs of their lowest and highest scores."""
    of = lambda function: {
        panel: {line: {n: function(x) for n, x in row.items()} for line, row in lines.items()}
        for panel, lines in scores.items()
    }
    return of(statistics.median), of(lambda values: (min(values), max(values)))


def _passkeys(cells: Iterable[Cell]) -> Iterator[Mapping[str, Any]]:
    """What is in passkey.json of each complete cell that has one."""
    for cell in cells:
        if is_complete(cell) and (cell.directory / "passkey.json").is_file():
            yield passkey_results(cell.directory)
