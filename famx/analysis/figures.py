"""Static figures of attention maps, drawn with matplotlib in colours safe for colour blindness.

Every function returns a `matplotlib.figure.Figure`: save it with `savefig`, or let a notebook show it.
The memory is orange, past blocks are blue, a block's own tokens green; grey cells are not visible to the
query. Colours follow the square root of the probability, which makes small ones visible. In very large
maps, neighbouring cells are drawn as one cell with their maximum.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import offset_copy

from famx.analysis.maps import AttentionMaps, AttentionSummary
from famx.analysis.pictures import Picture
from famx.base.palette import LINES, MEMORY, OWN, PAST, UNSEEN

_LABELLED = 120  # maximum number of tokens per axis that get a label each
_DRAWN = 1000  # maximum number of rows or columns drawn without pooling
_STRIP = 6  # width of the coloured margin in points
_NO_ATTENTION = "the memory attended to no block"
_OVERLAY = LinearSegmentedColormap.from_list("memory", [(MEMORY, 0.0), (MEMORY, 0.9)])
_SCALE = matplotlib.colormaps["cividis"].with_extremes(bad=UNSEEN)


def map_figure(picture: Picture) -> Figure:
    """Draws one map, queries in rows and keys in columns, with token labels if there is room."""
    rows, columns = picture.values.shape
    named = max(rows, columns) <= _LABELLED
    inch = 0.16 if named else min(0.16, 9 / max(rows, columns))
    width = max(inch * columns, 2.5)
    figure = _figure(2.6 + width, 1.6 + max(inch * rows, 2.0))
    axes = figure.subplots()
    image = _draw(axes, picture, named, width, np.nanmax(picture.values))
    keys, queries = _axis_titles(picture)
    axes.set_xlabel(keys)
    axes.set_ylabel(queries)
    figure.colorbar(image, ax=axes, label="attention", shrink=0.8, pad=0.02)
    head = "mean over heads" if picture.head is None else f"head {picture.head}"
    figure.suptitle(f"Attention, layer {picture.layer}, {head}")
    return figure


def heads_figure(maps: AttentionMaps, layer: int, block: int) -> Figure:
    """Draws the maps of all kept heads of one layer and block side by side, on one colour scale."""
    across = min(4, len(maps.heads))
    down = -(-len(maps.heads) // across)
    pictures = [maps.as_picture(layer, head, block) for head in maps.heads]
    rows, columns = pictures[0].values.shape
    high = 2.7 * rows / columns if _squares(rows, columns) else 2.4
    figure = _figure(1.2 + 3.2 * across, 1.2 + (0.6 + high) * down)
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(maps.heads) :]:
        axes.set_axis_off()
    top = max(np.nanmax(picture.values) for picture in pictures)
    for axes, head, picture in zip(grid.flat, maps.heads, pictures):
        image = _draw(axes, picture, False, 2.7, top)
        axes.set_title(f"head {head}", fontsize=10, pad=20)
    figure.colorbar(image, ax=grid, label="attention", shrink=0.8)
    figure.supxlabel(_axis_titles(pictures[0])[0], fontsize=10)
    figure.supylabel("queries", fontsize=10)
    figure.suptitle(f"Attention, layer {layer}, block {block}")
    return figure


def mass_figure(summary: AttentionSummary) -> Figure:
    """Draws the share of attention on memory, past blocks and block, per layer.

    The left panel shows the attention of the tokens, the right one that of the memory. Dots are the
    shares of each head on the memory.
    """
    figure = _figure(2.0 + 0.9 * max(4, summary.on_memory.shape[1]), 3.8)
    panels = {
        "block tokens": ("on_memory", "on_past", "on_block"),
        "memory while it compresses": ("memory_on_memory", "memory_on_block"),
    }
    colors = {"on_memory": MEMORY, "on_past": PAST, "on_block": OWN}
    labels = {"on_memory": "memory", "on_past": "past blocks", "on_block": "own block"}
    means = {name: summary.mean(name) for name in (*colors, "memory_on_memory")}
    if means["memory_on_memory"] is not None:
        means["memory_on_block"] = 1 - means["memory_on_memory"]
    for axes, (title, names) in zip(figure.subplots(1, 2, sharey=True), panels.items()):
        axes.set_title(title)
        axes.set_xlabel("layer")
        if means[names[0]] is None:
            _nothing(axes, _NO_ATTENTION)
            continue
        layers, bottom = np.arange(len(means[names[0]])), 0
        for name in names:
            part, kind = means[name].mean(axis=1), name.removeprefix("memory_")
            label = labels[kind] if part.any() else None
            axes.bar(layers, part, bottom=bottom, color=colors[kind], label=label, width=0.7)
            bottom = bottom + part
        heads = means[names[0]].shape[1]
        x = layers[:, None] + (np.linspace(-0.22, 0.22, heads) if heads > 1 else 0)
        dots = dict(color="black", s=10, zorder=3, label="memory, each head", clip_on=False)
        axes.scatter(x.ravel(), means[names[0]].ravel(), **dots)
        axes.set_xticks(layers)
        axes.set_ylim(0, 1)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("share of attention")
            legend = axes.get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def entropy_figure(summary: AttentionSummary) -> Figure:
    """Draws the entropy of attention over the blocks: mean and range over the heads of each layer."""
    figure = _figure(9, 3.6)
    panels = {"block tokens": "entropy", "memory while it compresses": "memory_entropy"}
    for axes, (title, name) in zip(figure.subplots(1, 2), panels.items()):
        values = getattr(summary, name)
        axes.set_title(title)
        axes.set_xlabel("block")
        axes.set_ylabel("entropy (nats)")
        if not len(values):
            _nothing(axes, _NO_ATTENTION)
            continue
        blocks = summary.first_block + np.arange(len(values))
        for layer, color in enumerate(line_colors(values.shape[1])):
            heads = values[:, layer]
            style = dict(color=color, marker="o" if len(blocks) < 40 else "", markersize=3)
            axes.plot(blocks, heads.mean(axis=-1), label=f"layer {layer}", **style)
            axes.fill_between(blocks, heads.min(-1), heads.max(-1), color=color, alpha=0.15, lw=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if values.shape[1] <= 12:
            axes.legend(fontsize=8)
    return figure


def travel_figure(summary: AttentionSummary, layer: int) -> Figure:
    """Draws the attention on and of each memory token of a layer over the blocks.

    The panels from top to bottom: attention of the block's tokens on the memory token, share of the
    memory token's attention on the block, and mean slot of that attention.
    """
    count = summary.read.shape[2]
    figure = _figure(9, 2.0 + 3 * max(1.1, 0.11 * count))
    panels = {"read": "attention of\nblock tokens", "written": "share of its attention\non the block"}
    shades = {"read": "cividis", "written": "cividis", "place": "viridis"}
    panels["place"] = f"mean slot of the block\n(0 to {int(summary.counts.max()) - 1})"
    first = summary.first_block - 0.5
    for axes, (name, title) in zip(figure.subplots(3, 1, sharex=True), panels.items()):
        values = getattr(summary, name)
        axes.set_ylabel("memory token")
        axes.set_facecolor(UNSEEN)
        if not values.size:
            _nothing(axes, "there are no memory tokens" if not count else _NO_ATTENTION)
            continue
        values = values[:, layer].T
        top = 1 if name == "written" else max(values.max(), 1e-6)
        image = axes.imshow(
            values, aspect="auto", cmap=shades[name], interpolation="nearest",
            norm=PowerNorm(0.5 if name == "read" else 1, 0, top),
            extent=(first, first + values.shape[1], count - 0.5, -0.5),
        )  # fmt: skip
        # An incomplete last block attends to the memory but does not update it, so only `read` has it.
        axes.set_xlim(first, first + len(summary.counts))
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes, pad=0.01).set_label(title, fontsize=8)
    axes.set_xlabel("block")
    figure.suptitle(f"Memory tokens of layer {layer} over blocks")
    return figure


def sources_figure(maps: AttentionMaps, layer: int, block: int) -> Figure:
    """Draws the tokens of a block that each memory token attends to most while compressing it."""
    all_sources = maps.sources(layer, block)
    weights = np.array([[weight for *_, weight in sources] for sources in all_sources])
    figure = _figure(2.2 + 1.5 * weights.shape[1], 1.5 + 0.26 * len(all_sources))
    axes = figure.subplots()
    image = axes.imshow(
        weights, aspect="auto", cmap="cividis", norm=PowerNorm(0.5, 0, max(weights.max(), 1e-6))
    )
    for row, sources in enumerate(all_sources):
        for column, (slot, text, weight) in enumerate(sources):
            dark = image.norm(weight) < 0.55
            shown = f"{_plain(_short(text))}  [{slot}]  {weight:.2f}"
            color = "white" if dark else "black"
            axes.text(column, row, shown, ha="center", va="center", fontsize=7, color=color)
    count = len(all_sources)
    axes.set_yticks(range(count), [f"F{n}" for n in range(count)], fontsize=7)
    axes.set_xticks(range(weights.shape[1]), [f"{n + 1}." for n in range(weights.shape[1])])
    axes.set_xlabel("source token  [slot in the block]  attention, mean over heads")
    axes.set_ylabel("memory token")
    figure.colorbar(image, ax=axes, label="attention", pad=0.02)
    figure.suptitle(f"What the memory of layer {layer} compressed of block {block}")
    return figure


def overlay_figure(
    image: np.ndarray, weights: np.ndarray, titles: Sequence[str], across: int = 4
) -> Figure:
    """Draws weights in the memory's colour over an image, on one scale: a panel for each map of weights.

    Args:
      image: the image `[height, width]`, drawn in light greys on which the colour is seen, large values
        dark.
      weights: not negative, `[n, rows, columns]`; each lies over the image's equal part.
      titles: title of each panel.
      across: number of panels in a row.
    """
    down = -(-len(weights) // across)
    figure = _figure(1.2 + 1.9 * across, 0.4 + 2.1 * down)
    grid = figure.subplots(down, across, squeeze=False)
    height, width = image.shape
    low, high = float(image.min()), float(image.max())
    top = max(float(weights.max()), 1e-6)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, of_panel, title in zip(grid.flat, weights, titles, strict=False):
        place = dict(extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
        axes.imshow(image, cmap="gray_r", vmin=low, vmax=low + 2 * (high - low), **place)
        drawn = axes.imshow(of_panel, cmap=_OVERLAY, vmin=0, vmax=top, **place)
        axes.set_title(title, fontsize=9)
    figure.colorbar(drawn, ax=grid, label="weight", shrink=0.8)
    return figure


def series_figure(
    series: np.ndarray, weights: np.ndarray, titles: Sequence[str], blocks: Sequence[int], label: str
) -> Figure:
    """Draws what is read one position after another, and beneath it weights of the memory on it.

    Args:
      series: the values at each position `[positions, values]`, such as the bands of frames of sound.
      weights: not negative, `[n, N, positions]`: n panels with a row for each memory token, on one scale.
      titles: title of each panel.
      blocks: first position of each block but the first, where lines are drawn.
      label: what the values are.
    """
    high = 0.5 + 0.11 * weights.shape[1]
    figure = _figure(9, 1.7 + (0.2 + high) * len(weights))
    heights = [1.4, *[high] * len(weights)]
    top, *panels = figure.subplots(1 + len(weights), 1, sharex=True, height_ratios=heights)
    place = dict(aspect="auto", interpolation="nearest")
    top.imshow(series.T, cmap="gray_r", origin="lower", **place)
    top.set_ylabel(label)
    for axes, of_panel, title in zip(panels, weights, titles, strict=True):
        drawn = axes.imshow(of_panel, cmap="cividis", vmin=0, vmax=max(weights.max(), 1e-6), **place)
        axes.set_ylabel("memory token")
        axes.set_title(title, fontsize=9)
        axes.yaxis.get_major_locator().set_params(integer=True)
    for axes, color in ((top, "black"), *((panel, "white") for panel in panels)):
        for first in blocks:
            axes.axvline(first - 0.5, color=color, linewidth=1)
    panels[-1].set_xlabel("position")
    figure.colorbar(drawn, ax=panels, label="weight")
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _squares(rows: int, columns: int) -> bool:
    """Whether a map of this shape is drawn with square cells."""
    return 0.4 < rows / columns < 2.5


def _axis_titles(picture: Picture) -> tuple[str, str]:
    """Labels of the key and query axes.

    As keys, the memory is the one before the update by the block; as queries, it is being updated.
    """
    if not picture.columns.memory.any():
        return "keys (grey: not seen by the query)", "queries"
    return (
        "keys (FAM: as the block finds it; grey: not seen by the query)",
        "queries (FAM: while it compresses the block)",
    )


def _draw(axes, picture: Picture, named: bool, width: float, top: float):
    """Draws one map with a coloured margin.

    Args:
      axes: axes to draw on.
      picture: the map.
      named: whether to label every token.
      width: approximate width of the axes in inches.
      top: largest value of the colour scale.

    Returns:
      The matplotlib image, for a colour bar.
    """
    rows, columns = picture.values.shape
    image = axes.imshow(
        _pooled(picture.values), cmap=_SCALE, norm=PowerNorm(0.5, 0, top), interpolation="nearest",
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
        aspect="equal" if named or _squares(rows, columns) else "auto",
    )  # fmt: skip
    drawn = set(picture.rows.block.tolist())
    for axis, is_row in ((picture.rows, True), (picture.columns, False)):
        base = axes.get_yaxis_transform() if is_row else axes.get_xaxis_transform()
        shift = {"x": -_STRIP / 2} if is_row else {"y": _STRIP / 2}
        margin = offset_copy(base, axes.figure, units="points", **shift)
        for first, end, block, memory in axis.segments():
            color = MEMORY if memory else OWN if block in drawn else PAST
            along, across = (first - 0.5, end - 0.5), (0, 0) if is_row else (1, 1)
            strip = Line2D(
                *((across, along) if is_row else (along, across)), color=color, linewidth=_STRIP,
                transform=margin, clip_on=False, solid_capstyle="butt",
            )  # fmt: skip
            axes.add_line(strip)
            if first:  # lines between segments, in the memory's colour on both sides of a memory
                line = axes.axhline if is_row else axes.axvline
                bordered = memory or axis.memory[first - 1]
                line(first - 0.5, color=MEMORY if bordered else "white", lw=0.9)
            room = width * (end - first) / columns
            short, name = ("", "FAM") if memory else (str(block), f"block {block}")
            if not is_row and room > 0.09:
                axes.annotate(
                    name if room > 0.075 * len(name) else short, ((first + end - 1) / 2, 1),
                    xytext=(0, _STRIP + 2), xycoords=base, textcoords="offset points",
                    ha="center", va="bottom", fontsize=7,
                )  # fmt: skip
    for axis, set_ticks, which in (
        (picture.columns, axes.set_xticks, "x"), (picture.rows, axes.set_yticks, "y"),
    ):  # fmt: skip
        if named:
            labels = [_plain(_short(text)) for text in axis.labels]
            set_ticks(range(len(labels)), labels, fontsize=6, rotation=90 if which == "x" else 0)
        else:
            # Blocks of keys are labelled above the map; a single block of queries is in the title.
            several = which == "y" and len(drawn) > 1
            middles = [((a + b - 1) / 2, n) for a, b, n, memory in axis.segments() if not memory]
            ticks = middles if several else []
            set_ticks([at for at, _ in ticks], [f"block {n}" for _, n in ticks], fontsize=7)
        axes.tick_params(axis=which, length=0, pad=_STRIP + 2 if which == "y" else 2)
    return image


def _pooled(values):
    """Reduces `values` to at most `_DRAWN` rows and columns by the maximum over neighbouring cells."""
    rows, columns = (-(-size // _DRAWN) for size in values.shape)
    if rows == columns == 1:
        return values
    padding = [(0, -size % n) for size, n in zip(values.shape, (rows, columns))]
    values = np.pad(values, padding, constant_values=np.nan)
    values = values.reshape(values.shape[0] // rows, rows, values.shape[1] // columns, columns)
    return np.fmax.reduce(values, axis=(1, 3))


def _nothing(axes, sentence: str):
    """Writes a sentence in place of a plot."""
    axes.text(0.5, 0.5, sentence, ha="center", va="center", transform=axes.transAxes, fontsize=9)


def line_colors(count: int):
    """Colours for `count` lines: Okabe and Ito's palette for up to 7, a colour map for more."""
    if count <= len(LINES):
        return LINES[:count]
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count))


def _short(text: str, limit: int = 12) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _plain(text: str) -> str:
    """The text with dollar signs escaped, which matplotlib would take for formulas."""
    return text.strip(" ").replace("$", r"\$") or "␣"
