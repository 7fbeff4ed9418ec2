"""The table of written answers to probes: cells in files of their own, and tables of all cells."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from famx.base.files import replacing, write_json

NOT_MEASURED = "not measured"


@dataclasses.dataclass
class Cell:
    """A probe at a length, with or without memory.

    Attributes:
      probe: name of the probe.
      length: number of tokens of prompt and answer.
      memory: whether the model reads with its memory.
      settings: whatever else the score depends on, as JSON values.
      result: `score` (0 to 100), `metric`, `trivial` (scores of trivial strategies by name), `seconds`
        and `answers`; None: not measured.
    """

    probe: str
    length: int
    memory: bool
    settings: Mapping[str, Any]
    result: dict[str, Any] | None = None

    @property
    def score(self) -> float | None:
        """The score, 0 to 100; None: not measured."""
        return None if self.result is None else self.result["score"]

    def read(self, folder: pathlib.Path | None) -> bool:
        """Takes over an earlier result with the same settings; returns whether there is one."""
        if folder is None:
            return False
        try:
            found = json.loads((folder / self._file).read_text(encoding="utf-8"))
            if found["settings"] != json.loads(json.dumps(self.settings)):
                return False
            float(found["result"]["score"])
            self.result = found["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def write(self, folder: pathlib.Path | None) -> None:
        """Writes a measured cell, all or nothing."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            fields = dataclasses.asdict(self)
            write_json(folder / self._file, fields)

    @property
    def _file(self) -> str:
        return f"{self.probe}-{self.length}-{_memory(self)}_memory.json"

    def __str__(self) -> str:
        shown = NOT_MEASURED
        if self.result is not None:
            shown = f"{self.result['metric']} {self.score:.1f} ({self.result['seconds']} s)"
        return f"{self.probe} at {self.length} tokens {_memory(self)} memory: {shown}"


class ProbeTable:
    """All cells of a checkpoint, and their files.

    Args:
      folder: directory of the files; None: nothing is written.
      step: training step of the checkpoint.
      cells: the cells, in the order in which they are measured.

    Attributes:
      cells: the cells.
      folder: directory of the cells' files, or None.
    """

    def __init__(self, folder: pathlib.Path | None, step: int, cells: Sequence[Cell]):
        self.cells, self._step, self._parent = cells, step, folder
        self.folder = None if folder is None else folder / f"{step}.cells"

    def write(self) -> None:
        """Writes `<step>.table.json` and `<step>.table.md`."""
        if self._parent is None:
            return
        self._parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for cell in self.cells:
            row = {"probe": cell.probe, "length": cell.length, "memory": cell.memory, **cell.settings}
            if cell.result is None:
                rows.append({**row, "score": None, "state": NOT_MEASURED})
            else:
                known = {name: cell.result[name] for name in ("score", "metric", "trivial", "seconds")}
                rows.append({**row, **known, "state": "measured"})
        write_json(self._parent / f"{self._step}.table.json", {"step": self._step, "cells": rows})
        with replacing(self._parent / f"{self._step}.table.md") as path:
            path.write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """The table: a row for each probe with and without memory, and for the best trivial strategy."""
        lengths = sorted({cell.length for cell in self.cells})
        probes = dict.fromkeys(cell.probe for cell in self.cells)
        at = {(cell.probe, cell.memory, cell.length): cell for cell in self.cells}
        lines = [
            f"# Written answers of checkpoint {self._step}",
            "",
            "Scores from 0 to 100, by number of tokens of prompt and answer. The best trivial answer"
            " ignores the question; its strategy is named.",
            "",
            "| probe | memory | " + " | ".join(map(str, lengths)) + " |",
            "|---|---|" + "---|" * len(lengths),
        ]
        for probe in probes:
            for memory in (True, False):
                cells = [at.get((probe, memory, length)) for length in lengths]
                if any(cells):
                    shown = " | ".join(_shown(cell) for cell in cells)
                    lines.append(f"| {probe} | {'with' if memory else 'without'} | {shown} |")
            either = [at.get((probe, True, x)) or at.get((probe, False, x)) for x in lengths]
            lines.append(f"| {probe} | best trivial answer | " + " | ".join(map(_trivial, either)) + " |")
        missing = sum(cell.result is None for cell in self.cells)
        lines += ["", f"{len(self.cells) - missing} of {len(self.cells)} cells are measured."]
        return "\n".join(lines) + "\n"


def _memory(cell: Cell) -> str:
    return "with" if cell.memory else "without"


def _shown(cell: Cell | None) -> str:
    return NOT_MEASURED if cell is None or cell.result is None else f"{cell.score:.1f}"


def _trivial(cell: Cell | None) -> str:
    if cell is None or cell.result is None or not cell.result["trivial"]:
        return NOT_MEASURED
    name, score = max(cell.result["trivial"].items(), key=lambda item: item[1])
    return f"{score:.1f} ({name})"
