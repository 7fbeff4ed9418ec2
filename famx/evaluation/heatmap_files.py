"""Files of a heat map: a CSV, a picture, and a page with the figures of the cell under the pointer."""

import csv
import html
import io
import json
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from famx.base.errors import ConfigError
from famx.base.files import replacing, write_text
from famx.base.palette import UNSEEN
from famx.base.text import short_count

_COLUMNS = ("length", "blocks", "depth", "seed", "accuracy", "right", "examples", "seconds")
_SCALE = matplotlib.colormaps["cividis"].with_extremes(bad=UNSEEN)
_LETTERED = 160  # cells up to which a picture has their numbers
_ACROSS = 4  # panels side by side

Cells = Mapping[tuple[int, float, int], Mapping[str, Any]]


def write(folder: pathlib.Path, cells: Cells, settings: Mapping[str, Any], grid: Any) -> None:
    """Writes heatmap.csv with all cells, and heatmap.png and heatmap.html with those of the grid.

    Args:
      folder: an existing directory.
      cells: the measured cells by length, depth and seed.
      settings: what they share: `probe`, `step`, `block_size`, `options` and `examples`.
      grid: lengths, depths and seeds of the picture, those of `famx.evaluation.heatmap.Grid`.

    Raises:
      ConfigError: a file cannot be written.
    """
    if not cells:
        return
    write_text(folder / "heatmap.csv", table(cells, settings["block_size"]))
    with replacing(folder / "heatmap.png") as path:
        heat_figure(cells, settings, grid).savefig(path, dpi=130, format="png")
    write_text(folder / "heatmap.html", page(cells, settings, grid))


def table(cells: Cells, block_size: int) -> str:
    """All cells as CSV, sorted by length, depth and seed."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for _, cell in sorted(cells.items()):
        writer.writerow({**cell, "blocks": cell["length"] // block_size})
    return text.getvalue()


def heat_figure(cells: Cells, settings: Mapping[str, Any], grid: Any) -> Figure:
    """Accuracy by length and depth: a panel for the mean over the seeds, and one for each of several."""
    panels = _panels(cells, grid)
    down = -(-len(panels) // _ACROSS)
    across = min(len(panels), _ACROSS)
    wide, high = 1.2 + 0.62 * len(grid.lengths), 1.5 + 0.36 * len(grid.depths)
    size = max(across * wide + 1.2, 6), max(down * high + 0.8, 3)
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(down, across, squeeze=False)
    for axes in all_axes.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, values) in zip(all_axes.flat, panels.items()):
        numbers = [[float("nan") if x is None else x for x in row] for row in values]
        image = axes.imshow(numbers, cmap=_SCALE, vmin=0, vmax=1, aspect="auto")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(grid.lengths)), map(short_count, grid.lengths), rotation=45)
        axes.set_yticks(range(len(grid.depths)), [f"{depth:g}" for depth in grid.depths])
        axes.set_xlabel("tokens")
        if len(grid.lengths) * len(grid.depths) <= _LETTERED:
            for i, row in enumerate(values):
                for j, x in enumerate(row):
                    if x is not None:
                        color = "white" if x < 0.5 else "black"
                        axes.text(j, i, f"{x:.2f}", ha="center", va="center", fontsize=7, color=color)
    all_axes[0][0].set_ylabel("depth: 0 is the beginning")
    figure.colorbar(image, ax=all_axes, label="share of right answers", shrink=0.8)
    figure.suptitle(_title(settings))
    return figure


def _title(settings: Mapping[str, Any]) -> str:
    return f"{settings['probe']}, checkpoint {settings['step']}: right answers by length and depth"


def _panels(cells: Cells, grid: Any) -> dict[str, list[list[float | None]]]:
    """Accuracy by title, depth and length; None: not measured."""
    seeds: list[Sequence[int]] = [grid.seeds]
    names = [f"seed {grid.seeds[0]}"]
    if len(grid.seeds) > 1:
        names = [f"mean of {len(grid.seeds)} seeds", *(f"seed {seed}" for seed in grid.seeds)]
        seeds += [[seed] for seed in grid.seeds]

    def mean(length, depth, of):
        found = [cells[length, depth, seed]["accuracy"] for seed in of if (length, depth, seed) in cells]
        return statistics.fmean(found) if found else None

    return {
        name: [[mean(length, depth, of) for length in grid.lengths] for depth in grid.depths]
        for name, of in zip(names, seeds)
    }


# ---------------------------------------------------------------- page


def page(cells: Cells, settings: Mapping[str, Any], grid: Any) -> str:
    """The heat map as an HTML page that needs no network: a menu of seeds, figures under the pointer.

    Raises:
      ConfigError: nothing is measured.
    """
    if not cells:
        raise ConfigError("There is nothing to show: no cell is measured.")
    data = {
        "lengths": grid.lengths,
        "depths": grid.depths,
        "panels": _panels(cells, grid),
        "seeds": list(grid.seeds),
        "block": settings["block_size"],
        "colors": [to_hex(_SCALE(i / 100)) for i in range(101)],
        "unseen": UNSEEN,
        "cells": [
            [*key, *(cell[name] for name in ("right", "examples", "seconds"))]
            for key, cell in sorted(cells.items())
        ],
    }
    # A "</script>" in the data would end the script element that holds it.
    text = json.dumps(data).replace("<", "\\u003c")
    about = (
        f"Checkpoint {settings['step']}, {settings['examples']} documents a cell, read in blocks of"
        f" {settings['block_size']} tokens with a state of constant size; options"
        f" {json.dumps(settings['options'])}. An answer is right if each of its tokens is the likeliest."
    )
    parts = {"TITLE": html.escape(_title(settings)), "ABOUT": html.escape(about), "DATA": text}
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], _PAGE)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>@TITLE@</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 1em auto; max-width: 1100px; padding: 0 1em; }
h1 { font-size: 1.3em; margin: 0 0 .4em; }
p { margin: 0 0 .6em; color: #444; }
table { border-collapse: collapse; margin: 1em 0; }
th { font-weight: normal; padding: 2px 8px; text-align: right; }
td { min-width: 54px; height: 34px; text-align: center; border: 1px solid white; cursor: default; }
td:hover { outline: 2px solid #D55E00; }
#tip { position: fixed; display: none; background: white; border: 1px solid #888; padding: 6px 10px;
  box-shadow: 0 1px 4px #0004; pointer-events: none; white-space: pre; z-index: 1; }
#scale { display: inline-block; width: 202px; height: 12px; margin: 0 .4em; }
</style>
</head>
<body>
<h1>@TITLE@</h1>
<p>@ABOUT@</p>
<label>show <select id="choice"></select></label>
<span>&emsp;0<canvas id="scale" width="101" height="1"></canvas>1, grey: not measured</span>
<table id="map"></table>
<p>Rows: depth of what is asked for; 0 is the beginning of the document. Columns: its tokens.</p>
<div id="tip"></div>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const map = document.getElementById("map"), tip = document.getElementById("tip");
const choice = document.getElementById("choice");
const cells = new Map(data.cells.map(c => [c.slice(0, 3).join("/"), c]));
const number = n => n.toLocaleString("en-US");

function figures(length, depth, title, value) {
  const lines = [`${number(length)} tokens (${number(length / data.block)} blocks), depth ${depth}`];
  lines.push(value === null ? "not measured" : `${title}: ${value.toFixed(3)}`);
  for (const seed of data.seeds) {
    const cell = cells.get([length, depth, seed].join("/"));
    if (cell) lines.push(`seed ${seed}: ${cell[3]} of ${cell[4]} right, ${cell[5].toFixed(1)} s`);
  }
  return lines.join("\\n");
}

function draw() {
  const title = choice.value, values = data.panels[title];
  map.replaceChildren();
  data.depths.forEach((depth, i) => {
    const row = map.insertRow(), head = document.createElement("th");
    head.textContent = depth;
    row.append(head);
    data.lengths.forEach((length, j) => {
      const value = values[i][j], cell = row.insertCell();
      cell.style.background = value === null ? data.unseen : data.colors[Math.round(100 * value)];
      cell.style.color = value !== null && value < .5 ? "white" : "black";
      cell.textContent = value === null ? "" : value.toFixed(2);
      cell.addEventListener("mousemove", event => {
        tip.textContent = figures(length, depth, title, value);
        tip.style.display = "block";
        tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
        tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
      });
      cell.addEventListener("mouseleave", () => { tip.style.display = "none"; });
    });
  });
  const row = map.insertRow();
  for (const text of ["", ...data.lengths.map(number)]) {
    const head = document.createElement("th");
    head.textContent = text;
    row.append(head);
  }
}

const brush = document.getElementById("scale").getContext("2d");
data.colors.forEach((color, i) => { brush.fillStyle = color; brush.fillRect(i, 0, 1, 1); });
for (const title of Object.keys(data.panels)) choice.add(new Option(title, title));
choice.addEventListener("change", draw);
draw();
</script>
</body>
</html>
"""
