"""Interactive attention maps: a self-contained HTML page, drawn by plotly, that needs no network.

The page has menus for block, layer and head. Pointing at a cell shows its query, key and probability, and
shades the text of the keys below the map by the attention of that query. The URL may preselect a map:
`#block=3&layer=0&head=mean`.
"""

import base64
import html
import json
import re

import numpy as np

from famx.analysis.figures import MEMORY, OWN, PAST, UNSEEN
from famx.analysis.maps import AttentionMaps
from famx.analysis.pictures import Axis
from famx.base.errors import ConfigError

_MAX_CELLS = 20_000_000  # cells of all maps together, which make a page of about 55 MB
_UNSEEN = 2**16 - 1  # code of a masked cell; probabilities are stored as multiples of 1 / 65534


def attention_page(maps: AttentionMaps, title: str = "Attention maps") -> str:
    """Renders all kept blocks, layers and heads as an HTML page.

    Args:
      maps: the maps.
      title: heading of the page.

    Raises:
      ConfigError: plotly is not installed, no block was kept, or the maps are too large for a page.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(
            "The interactive page needs the package 'plotly': run pip install 'famx[notebooks]'."
        ) from error
    if not maps.blocks:
        raise ConfigError("There is nothing to show: no block was kept.")
    heads = [*maps.heads, *(["mean"] if len(maps.heads) > 1 else [])]
    columns = maps.memory_columns + maps.ids.shape[1]
    cells = (maps.block_size + maps.memory_columns) * columns
    cells *= len(maps.blocks) * len(maps.layers) * len(heads)
    if cells > _MAX_CELLS:
        raise ConfigError(
            f"The page would hold {cells:,} probabilities, more than the limit of {_MAX_CELLS:,}: keep"
            " fewer blocks, layers or heads."
        )
    axes, values, kinds = {}, {}, set()
    for block in maps.blocks:
        for layer in maps.layers:
            for head in heads:
                picture = maps.as_picture(layer, None if head == "mean" else head, block)
                values[f"{block}/{layer}/{head}"] = _packed(picture.values)
        axes[block] = {"rows": _axis(picture.rows, block), "columns": _axis(picture.columns, block)}
        kinds.update(axes[block]["columns"]["kind"])
    data = {
        "choices": {"block": maps.blocks, "layer": maps.layers, "head": heads},
        "axes": axes,
        "values": values,
        "colors": {"memory": MEMORY, "past": PAST, "own": OWN, "unseen": UNSEEN},
        "kinds": [kind for kind in ("memory", "past", "own") if kind in kinds],
    }
    # A "</script>" in a token's text would end the script element that holds the data.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    about = _ABOUT + (_ABOUT_MEMORY if maps.memory_columns else "")
    parts = {"TITLE": html.escape(title), "ABOUT": about, "DATA": text, "PLOTLY": get_plotlyjs()}
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], _PAGE)


def _packed(values: np.ndarray) -> str:
    """Probabilities as base64-encoded little-endian uint16."""
    cells = np.where(np.isnan(values), _UNSEEN, np.round(values * (_UNSEEN - 1)))
    return base64.b64encode(cells.astype("<u2").tobytes()).decode()


def _axis(axis: Axis, block: int) -> dict:
    kind = lambda b, memory: "memory" if memory else "own" if b == block else "past"
    return {
        "block": axis.block.tolist(),
        "slot": axis.slot.tolist(),
        "text": axis.labels,
        "kind": [kind(b, memory) for b, memory in zip(axis.block.tolist(), axis.memory.tolist())],
        "segments": [[a, b, kind(n, memory), n] for a, b, n, memory in axis.segments()],
    }


_ABOUT = "Each row is a query, each column a key; grey keys are not visible to the query."
_ABOUT_MEMORY = (
    " F0, F1, … are the memory (FAM): as keys, the memory that the block attends to; as queries, the"
    " memory while it compresses the block."
)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>@TITLE@</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 1em auto; max-width: 1100px; padding: 0 1em; }
h1 { font-size: 1.3em; margin: 0 0 .4em; }
p { margin: 0 0 .6em; color: #444; }
label { margin-right: 1.2em; }
.key { display: inline-block; width: 1em; height: 1em; margin: 0 .3em 0 1em; vertical-align: -.15em; }
#row { min-height: 1.5em; margin: .5em 0; }
#text span { display: inline-block; padding: 0 .2em; margin: 1px; white-space: pre;
  border-bottom: 3px solid transparent; min-width: .4em; }
</style>
<script>@PLOTLY@</script>
</head>
<body>
<h1>@TITLE@</h1>
<p>@ABOUT@</p>
<div id="choices"></div>
<div id="map"></div>
<div id="row"></div>
<div id="text"></div>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const kindNames = {memory: "FAM", past: "past block", own: "own block"};
const chosen = {}, map = document.getElementById("map");
const help = "Point at the map to shade the text below by the attention of that query."
  + " Click to pin the query.";
let pinned = null, shown = null;  // pinned: row of the query; shown: axes and values of the current map

function decode(text, columns) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const view = new DataView(bytes.buffer), rows = [];
  for (let i = 0; i < bytes.length / 2; i++) {
    if (i % columns === 0) rows.push([]);
    const cell = view.getUint16(2 * i, true);
    rows[rows.length - 1].push(cell === 65535 ? null : cell / 65534);
  }
  return rows;
}

const escaped = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const short = text => text.length > 12 ? text.slice(0, 11) + "…" : text;
const name = (axis, i) => axis.kind[i] === "memory" ? axis.text[i]
  : `${axis.block[i]}:${axis.slot[i]} ${axis.text[i]}`;

function margins(axes) {
  const shapes = [], annotations = [];
  for (const side of ["rows", "columns"]) {
    for (const [first, end, kind, block] of axes[side].segments) {
      const color = data.colors[kind];
      const [a, b] = [first - .5, end - .5];
      const strip = side === "rows" ? {xref: "paper", x0: -.012, x1: 0, y0: a, y1: b}
        : {yref: "paper", y0: 1, y1: 1.018, x0: a, x1: b};
      shapes.push({type: "rect", fillcolor: color, line: {width: 0}, ...strip});
      if (side === "columns") annotations.push({
        x: (a + b) / 2, y: 1.02, yref: "paper", yanchor: "bottom", showarrow: false,
        text: kind === "memory" ? "FAM" : `block ${block}`, font: {size: 11}});
      if (first === 0) continue;
      const bordered = kind === "memory" || axes[side].kind[first - 1] === "memory";
      const line = {color: bordered ? data.colors.memory : "white", width: 1};
      shapes.push({type: "line", line, ...(side === "rows"
        ? {xref: "paper", x0: 0, x1: 1, y0: a, y1: a} : {yref: "paper", y0: 0, y1: 1, x0: a, x1: a})});
    }
  }
  return {shapes, annotations};
}

function ticks(axis, room) {
  const step = Math.ceil(axis.text.length / room), at = [];
  for (let i = 0; i < axis.text.length; i += step) at.push(i);
  return {tickvals: at, ticktext: at.map(i => escaped(short(axis.text[i]))), tickfont: {size: 9}};
}

function draw() {
  const axes = data.axes[chosen.block], {rows, columns} = axes;
  const z = decode(data.values[`${chosen.block}/${chosen.layer}/${chosen.head}`], columns.text.length);
  // Colours follow the square root of the probability, which makes small ones visible.
  const root = z.map(row => row.map(p => p === null ? null : Math.sqrt(p)));
  const top = root.reduce((m, row) => row.reduce((n, x) => Math.max(n, x || 0), m), 0) || 1;
  // Texts for every cell of a large map would take too much memory; the line below the map has them.
  const small = z.length * columns.text.length < 300000;
  const label = small ? z.map((row, i) => row.map((p, j) => p === null ? ""
    : `query ${escaped(name(rows, i))}<br>key ${escaped(name(columns, j))}`
      + ` (${kindNames[columns.kind[j]]})<br>${p.toPrecision(3)}`)) : undefined;
  const marks = [0, .01, .05, .1, .2, .4, .6, .8, 1].filter(p => Math.sqrt(p) <= top);
  const trace = {type: "heatmap", z: root, zmin: 0, zmax: top, colorscale: "Cividis", text: label,
    hovertemplate: `${small ? "%{text}" : "row %{y}, column %{x}"}<extra></extra>`, hoverongaps: false,
    colorbar: {title: {text: "attention"}, tickvals: marks.map(Math.sqrt), ticktext: marks.map(String)}};
  const cell = Math.min(18, 1000 / Math.max(rows.text.length, columns.text.length));
  const height = Math.max(210, cell * rows.text.length);
  const layout = {height: height + 150,
    margin: {l: 60, t: 60, r: 20, b: 60}, plot_bgcolor: data.colors.unseen,
    xaxis: {showgrid: false, zeroline: false,
      automargin: true, tickangle: -90, ...ticks(columns, 60)},
    yaxis: {autorange: "reversed", showgrid: false, zeroline: false,
      automargin: true, ticklabelstandoff: 14, ...ticks(rows, height / 12)},
    ...margins(axes)};
  shown = {axes, z};
  Plotly.react(map, [trace], layout, {
    responsive: true, displaylogo: false, showSendToCloud: false});  // never upload the text
  if (pinned !== null && pinned >= z.length) pinned = null;
  showText();
  if (pinned === null) document.getElementById("row").textContent = help;
  else shade(pinned);
}

function showText() {
  const {columns} = shown.axes, text = document.getElementById("text");
  text.replaceChildren(...columns.text.map((token, j) => {
    const span = document.createElement("span");
    span.textContent = token;
    span.title = name(columns, j);
    span.style.borderBottomColor = data.colors[columns.kind[j]];
    return span;
  }));
}

function shade(row, column) {
  const {rows, columns} = shown.axes, weights = shown.z[row];
  const spans = document.getElementById("text").children;
  const top = Math.max(...weights.map(p => p || 0)) || 1;
  weights.forEach((p, j) => {
    spans[j].style.background = p === null ? "none" : `rgba(213, 94, 0, ${Math.sqrt(p / top) * .8})`;
    spans[j].style.color = p === null ? "#999" : "black";
  });
  const cell = column === undefined ? ""
    : `, key ${name(columns, column)}: ${weights[column].toPrecision(3)}`;
  document.getElementById("row").textContent =
    `Query ${name(rows, row)}${cell}. The text is shaded by the attention of this query`
    + (pinned === row ? " (pinned; click again to release)." : ".");
}

const fromUrl = new URLSearchParams(location.hash.slice(1));
for (const [menu, values] of Object.entries(data.choices)) {
  const label = document.createElement("label"), select = document.createElement("select");
  for (const value of values) select.add(new Option(value, value));
  const initial = menu === "layer" ? 0 : values.length - 1;  // first layer, last block, mean over heads
  const wanted = fromUrl.get(menu);
  select.value = values.map(String).includes(wanted) ? wanted : values[initial];
  select.id = menu;
  chosen[menu] = select.value;
  select.addEventListener("change", () => { chosen[menu] = select.value; draw(); });
  label.append(`${menu} `, select);
  document.getElementById("choices").append(label);
}
for (const kind of data.kinds) {
  const key = document.createElement("span");
  key.className = "key";
  key.style.background = data.colors[kind];
  document.getElementById("choices").append(key, kindNames[kind]);
}
draw();
map.on("plotly_hover", event => { if (pinned === null) shade(...event.points[0].pointIndex); });
map.on("plotly_click", event => {
  const row = event.points[0].pointIndex[0];
  pinned = pinned === row ? null : row;
  shade(row);
});
</script>
</body>
</html>
"""
