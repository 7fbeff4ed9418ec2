"""Tables that are measured row by row within a time budget.

A plan names all rows of a table before anything is measured, so that a table is complete at any time: a
row has figures, or says in a word why it has none.
"""

import contextlib
import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from benchmarks import workloads
from benchmarks.budget import Budget
from benchmarks.turns import LeftOut
from benchmarks.workloads import Workload
from famx.base.tables import Table
from famx.scale.timing import Timings, interleave

NOT_MEASURED, NO_TIME, LEFT_OUT = "not measured", "no time left", "left out"


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A row of a table.

    Attributes:
      labels: first columns, which say what is measured.
      kind: kind of the measurement; those of one kind are expected to need the same time.
      start: makes what is measured, compiled if possible.
      tokens: tokens of one call, if the plan's `measure` asks for it.
      work: operations of one call, likewise.
    """

    labels: Mapping[str, Any]
    kind: str
    start: Callable[[], Any]
    tokens: int = 0
    work: int = 0


@dataclasses.dataclass(frozen=True)
class Failure:
    """A measurement that failed: a word for its row, and a sentence."""

    word: str
    sentence: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """The failure that an exception means; also prints the traceback of an unexpected one."""
        text = " ".join(str(error).split("\n  In call to configurable")[0].split())
        if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
            return cls("out of memory", text[:200])
        if isinstance(error, LeftOut):
            return cls(LEFT_OUT, text[:200])
        traceback.print_exception(error, file=sys.stderr)
        return cls(type(error).__name__, text[:200])


Figures = Mapping[str, Any]
Results = dict[Row, Figures | Failure]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table to be measured.

    Attributes:
      name: name of the section.
      title: title of the table.
      notes: sizes and method.
      columns: columns of figures; the first one has the word of a row without figures.
      groups: rows that are measured together, in the order of measurement.
      measure: measures some rows of a group.
      refusal: a sentence that says why nothing can be measured here, or None.
    """

    name: str
    title: str
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    groups: Sequence[Sequence[Row]]
    measure: Callable[[Sequence[Row], Budget], Results]
    refusal: Callable[[], str | None] = lambda: None

    def table(self, results: Mapping[Row, Figures | str | Failure]) -> Table:
        """The table with these results; rows without one are not measured."""
        rows, notes = [], list(self.notes)
        for row in (row for group in self.groups for row in group):
            result = results.get(row, NOT_MEASURED)
            if isinstance(result, Failure):
                where = LEFT_OUT if result.word == LEFT_OUT else _label(row)
                notes.append(f"{where}: {result.sentence}")
                result = result.word
            figures = {self.columns[0]: result} if isinstance(result, str) else result
            rows.append({**row.labels, **{name: figures.get(name, "") for name in self.columns}})
        return Table(self.name, self.title, tuple(dict.fromkeys(notes)), rows)

    def tables(self, budget: Budget) -> Iterator[Table]:
        """The table before the measurement, and after each group."""
        yield self.table({})
        refusal, results = self.refusal(), {}
        if refusal is not None:
            rows = {row: LEFT_OUT for group in self.groups for row in group}
            yield dataclasses.replace(self, notes=(*self.notes, f"left out: {refusal}")).table(rows)
            return
        for group in self.groups:
            possible = [row for row in group if budget.allows(row.kind)]
            results |= dict.fromkeys(group, NO_TIME)
            if possible:
                measured, _ = timed(lambda rows=possible: self.measure(rows, budget))
                failed = isinstance(measured, Failure)
                results |= dict.fromkeys(possible, measured) if failed else measured
            yield self.table(results)
        workloads.forget()


def in_turns(
    rows: Sequence[Row],
    budget: Budget,
    repeats: int,
    figures: Callable[[Row, Workload, Timings], Figures],
) -> Results:
    """Measures rows whose `start` makes a `Workload`, in turns.

    Args:
      rows: rows to measure; their programs are compiled at the same time.
      budget: learns what the rows' kinds need.
      repeats: number of rounds; fewer if there is no time for them.
      figures: makes the figures of a row from its workload and the timings, whose names are the rows.
    """
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(len(rows)) as pool:
            started = dict(zip(rows, pool.map(lambda row: timed(row.start), rows), strict=True))
        results, first = {}, {}
        for row, (workload, _) in started.items():
            if isinstance(workload, Failure):
                results[row] = workload
                continue
            stack.callback(workload.close)
            output, first[row] = timed(lambda run=workload.run: jax.block_until_ready(run()))
            if isinstance(output, Failure):
                results[row] = output
        rows = [row for row in rows if row not in results]
        if not rows:
            return results
        rounds = int(budget.remaining / sum(first[row] for row in rows))
        runs = {row: started[row][0].run for row in rows}
        times = interleave(runs, max(1, min(repeats, rounds)), warm_up=False)
        for row in rows:
            workload, compilation = started[row]
            results[row] = figures(row, workload, times)
            budget.learn(row.kind, compilation + first[row] + float(times.seconds[row].sum()))
    return results


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Result of the function, or its `Failure`; and the seconds that it took."""
    began = time.monotonic()
    try:
        result = function()
    except Exception as error:  # whatever a compiler, a device or a package raises; the rest continues
        result = Failure.of(error)
    return result, time.monotonic() - began


def _label(row: Row) -> str:
    return ", ".join(map(str, row.labels.values()))
