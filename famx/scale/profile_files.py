"""Files of a profile: one table, as Markdown and CSV, and one figure with theory's lines."""

import collections
import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from famx.base.files import replacing, write_text
from famx.base.palette import MEMORY, OWN, PAST, ZEROED
from famx.base.tables import Table, number
from famx.base.text import short_count

_COLORS = {"fam": MEMORY, "bswa": PAST, "full": OWN}
_NAMES = {"fam": "FAM", "bswa": "BSWA", "full": "full attention"}
_PASSES = {"training": "training step", "reading": "reading", "at_once": "reading, the text at once"}
_GIB = 2**30

Cell = dict[str, Any]


def write(folder: pathlib.Path, cells: Sequence[Cell]) -> None:
    """Writes profile.md, profile.csv and profile.png of all cells.

    Raises:
      ConfigError: a file cannot be written.
    """
    if not cells:
        return
    write_text(folder / "profile.md", table(cells).markdown() + "\n")
    write_text(folder / "profile.csv", _csv(cells))
    with replacing(folder / "profile.png") as path:
        profile_figure(cells).savefig(path, dpi=130, format="png")


def _in_order(cells: Sequence[Cell]) -> list[Cell]:
    """By device, size, pass, length and variant; smaller models first."""
    parameters: dict[str, int] = collections.defaultdict(int)
    for cell in cells:
        parameters[cell["size"]] = max(parameters[cell["size"]], cell.get("parameters", 0))

    def key(cell: Cell) -> tuple[Any, ...]:
        size, places = cell["size"], (list(_PASSES).index(cell["pass"]), cell["tokens"])
        return cell["on"], parameters[size], size, *places, list(_NAMES).index(cell["variant"])

    return sorted(cells, key=key)


def table(cells: Sequence[Cell]) -> Table:
    """A row for each cell: what was measured, what was compiled, and the memory by kind."""
    rows = []
    for cell in _in_order(cells):
        memory, batch = cell.get("memory", {}), cell.get("batch", 1)
        mib = lambda *kinds, memory=memory: _mib(sum(memory.get(kind, 0) for kind in kinds))
        per_token = lambda name, cell=cell, batch=batch: (
            number(1e6 * cell[name] / cell["tokens"] / batch) if name in cell else "-"
        )
        spread = f" [{per_token('lower')}, {per_token('upper')}]" if "seconds" in cell else ""
        rows.append({
            "size": cell["size"],
            "on": cell["on"],
            "pass": cell["pass"],
            "tokens": f"{cell['tokens']:,}",
            "variant": _NAMES[cell["variant"]],
            "measured, µs a token": per_token("seconds") + spread,
            "time / BSWA": f"{cell['to_bswa']:.3f}" if "to_bswa" in cell else "-",
            "bound as scheduled, µs a token": per_token("scheduled"),
            "weights and moments, MiB": mib("parameters", "optimiser"),
            "states, MiB": mib("states"),
            "temporaries, MiB": mib("temporaries"),
            "needed, MiB": _mib(cell["bytes"]) if "bytes" in cell else "-",
            "fits": ("yes" if cell["fits"] else "no") if "fits" in cell else "-",
            "peak, MiB": f"{_mib(cell['peak'])} ({cell['peak_of']})" if "peak" in cell else "-",
            "note": cell.get("note", ""),
        })  # fmt: skip
    notes = (
        "memory by kind: of the compiled program, on each device; peak: of the process or the device"
        " while it ran",
        "measured: median of interleaved rounds [quartiles]; bound: of the compiled program, nothing ran",
    )
    return Table("profile", "", notes, rows)


def _mib(count: float) -> str:
    mib = count / 2**20
    return f"{mib:,.0f}" if mib >= 100 else f"{mib:.2f}"


def _csv(cells: Sequence[Cell]) -> str:
    kinds = dict.fromkeys(kind for cell in cells for kind in cell.get("memory", {}))
    rows = []
    for cell in _in_order(cells):
        row = {name: value for name, value in cell.items() if name != "memory"}
        rows.append(row | {f"memory_{k}": cell.get("memory", {}).get(k) for k in kinds})
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------- figure


def profile_figure(cells: Sequence[Cell]) -> Figure:
    """Seconds and memory over length, side by side: a row for each model, place and pass.

    Dotted lines are theory's; see `theory`.
    """
    groups: dict[tuple[str, str], list[Cell]] = collections.defaultdict(list)
    for cell in _in_order(cells):
        groups[cell["size"], cell["on"]].append(cell)
    passes = [name for name in _PASSES if any(cell["pass"] == name for cell in cells)]
    size = 9.5, 1 + 2.7 * len(passes) * len(groups)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(passes) * len(groups), 2, squeeze=False)
    panels = [(group, pass_) for group in groups for pass_ in passes]
    for row, ((size, on), pass_) in zip(grid, panels, strict=True):
        of_pass = [cell for cell in groups[size, on] if cell["pass"] == pass_]
        for axes, quantity in zip(row, ("seconds", "memory")):
            _panel(axes, of_pass, quantity)
            axes.set_title(f"{size} on {on}: {_PASSES[pass_]}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("tokens of a row")
    lines = [Line2D([], [], color=_COLORS[v], label=_NAMES[v]) for v in _NAMES]
    lines += [
        Line2D([], [], color=ZEROED, marker="o", label="measured time; memory of the compiled program"),
        Line2D([], [], color=ZEROED, marker="s", mfc="none", ls="--", label="bound, compiled program"),
        Line2D([], [], color=ZEROED, ls=":", label="theory"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _panel(axes: Any, cells: Sequence[Cell], quantity: str) -> None:
    """One quantity of one pass over length: time on a logarithmic axis, memory from 0."""
    drawn = set()
    names = ("seconds", "scheduled") if quantity == "seconds" else ("bytes",)
    for variant in _NAMES:
        for name in names:
            line = [cell for cell in cells if cell["variant"] == variant and name in cell]
            if not line:
                continue
            unit = _GIB if name == "bytes" else 1
            style = dict(marker="s", mfc="none", ls="--") if name == "scheduled" else dict(marker="o")
            tokens = [cell["tokens"] for cell in line]
            drawn.update(tokens)
            color = _COLORS[variant]
            axes.plot(tokens, [cell[name] / unit for cell in line], color=color, ms=4, **style)
            expected = [x / unit for x in theory(line, name)]
            axes.plot(tokens, expected, color=color, ls=":", lw=2.5, alpha=0.5)
    if drawn:
        axes.set_xscale("log")
        if quantity == "seconds":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(sorted(drawn), map(short_count, sorted(drawn)), rotation=45, fontsize=8)
        axes.xaxis.minorticks_off()
    axes.set_visible(bool(drawn))
    axes.set_ylabel("seconds a row" if quantity == "seconds" else "GiB a device")
    axes.grid(alpha=0.3)


def theory(line: Sequence[Cell], name: str) -> list[float]:
    """What theory says of a line of one variant and pass.

    Time grows with the operations of the model: in proportion to the length with a window, with its
    square in full attention; the line goes through the longest text. Memory does not grow for texts that
    are streamed, and else in proportion to the tokens that are held at once: the line goes through the
    two shortest texts.

    Args:
      line: cells of rising length.
      name: "seconds" or "scheduled" (time), or "bytes" (memory).
    """
    first, last = line[0], line[-1]
    if name != "bytes":
        return [last[name] * cell["model_flops"] / last["model_flops"] for cell in line]
    if len(line) == 1 or (first["pass"] == "reading" and first["variant"] != "full"):
        return [first["bytes"]] * len(line)
    rate = (line[1]["bytes"] - first["bytes"]) / (line[1]["tokens"] - first["tokens"])
    return [first["bytes"] + rate * (cell["tokens"] - first["tokens"]) for cell in line]
