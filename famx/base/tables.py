"""Tables as plain text, as markdown inside a page, and as JSON."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from famx.base import files


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of figures under one heading.

    Attributes:
      name: name of the section that measured them.
      title: one line.
      notes: sizes and method, one line each.
      rows: value by column: a number, a text, or a dataclass with `__str__`. A column that a row does not
        have is shown as "-" in it.
    """

    name: str
    title: str
    notes: tuple[str, ...]
    rows: list[dict[str, Any]]

    def text(self) -> str:
        """The table for a terminal: title, notes, and aligned columns."""
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self.title, *self.notes, *lines])

    def markdown(self) -> str:
        """The table for a page, with its notes below."""
        cells = self._cells()
        head, *body = ["| " + " | ".join(row) + " |" for row in cells]
        rule = "|" + "---:|" * len(cells[0])
        above = [f"**{self.title}**", ""] if self.title else []
        below = ["", "  \n".join(self.notes)] if self.notes else []
        return "\n".join([*above, head, rule, *body, *below])

    def json(self) -> dict[str, Any]:
        """All figures without rounding, as JSON can hold them."""
        plain = lambda x: dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x
        rows = [{name: plain(value) for name, value in row.items()} for row in self.rows]
        return {"title": self.title, "notes": self.notes, "rows": rows}

    def _cells(self) -> list[list[str]]:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        return [columns] + [[_cell(row.get(name, "-")) for name in columns] for row in self.rows]


def _cell(value) -> str:
    return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """A number with digits that suit its size."""
    digits = 6 if value < 0.01 else 3 if value < 10 else 1 if value < 1000 else 0
    return f"{value:.{digits}f}"


def missing_markers(path: pathlib.Path, names) -> list[str]:
    """Names of the sections without markers in the page."""
    page = path.read_text(encoding="utf-8")
    return [name for name in names if not _place(name).search(page)]


def fill_markdown(path: pathlib.Path, table: Table) -> None:
    """Replace the text between `<!-- table: NAME -->` and `<!-- end -->`."""
    page = path.read_text(encoding="utf-8")
    filled = lambda match: f"{match[1]}\n{table.markdown()}\n{match[2]}"
    files.write_text(path, _place(table.name).sub(filled, page))


def write_json(path: pathlib.Path, machine: Mapping[str, Any], tables: list[Table]) -> None:
    """Write a description of the machine and the figures of the tables, without rounding."""
    sections = {table.name: table.json() for table in tables}
    files.write_json(path, {"machine": dict(machine), "sections": sections}, allow_nan=False)


def _place(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- table: {re.escape(name)} -->)\n.*?(<!-- end -->)", re.DOTALL)
