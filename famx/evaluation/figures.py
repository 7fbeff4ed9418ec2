"""Figures of training curves and of PassKey accuracy over document length.

Every function returns a `matplotlib.figure.Figure`: save it with `savefig`, or let a notebook show it.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from famx.analysis.figures import line_colors
from famx.base.errors import ConfigError
from famx.training.run_log import read_metrics

Scores = Mapping[str, Mapping[int, float]]  # {line label: {blocks read: score}}
_LABELS = {"exact_match": "exact match"}


def passkey_results(model_dir: str | os.PathLike) -> dict[str, Any]:
    """Contents of a run's passkey.json, which `PasskeyEvaluation.report` writes.

    Document lengths, the keys of `exact_match[probe]`, are converted from strings to integers.

    Raises:
      ConfigError: the run has no passkey.json.
    """
    path = pathlib.Path(model_dir) / "passkey.json"
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: a run that evaluates with PasskeyEvaluation writes it at its end."
        )
    results = json.loads(path.read_text())
    exact_match = {
        probe: {int(blocks): score for blocks, score in row.items()}
        for probe, row in results["exact_match"].items()
    }
    return results | {"exact_match": exact_match}


def passkey_figure(model_dirs: Mapping[str, str | os.PathLike]) -> Figure:
    """Exact match over document length for several runs, with one panel per probe.

    Args:
      model_dirs: `{run label: MODEL_DIR}`. The first run sets the panels, the block size and the mark
        of the longest training document.
    """
    runs = {name: passkey_results(folder) for name, folder in model_dirs.items()}
    first = next(iter(runs.values()))
    panels = {
        probe: {name: run["exact_match"][probe] for name, run in runs.items()}
        for probe in first["exact_match"]
    }
    return lengths_figure(panels, first["block_size"], first["train_blocks"])


def lengths_figure(
    panels: Mapping[str, Scores], block_size: int, train_blocks: int | None,
    ranges: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]] | None = None,
) -> Figure:  # fmt: skip
    """Exact match over the number of blocks read.

    Args:
      panels: `{panel title: {line label: {blocks: score}}}`.
      block_size: tokens per block, for the axis label.
      train_blocks: length marked by a vertical line; None or 0 draws none.
      ranges: `{panel title: {line label: {blocks: (lowest, highest)}}}`, shaded; None: there are none.
    """
    figure = Figure(figsize=(max(7, 4 * len(panels)), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, lines) in zip(grid, panels.items()):
        for (name, row), marker, color in zip(lines.items(), "os^vDP*X" * 9, line_colors(len(lines))):
            style = dict(marker=marker, color=color, alpha=0.8, clip_on=False)
            axes.plot(list(row), list(row.values()), label=name, **style)
            if ranges is not None:
                low, high = zip(*ranges[title][name].values(), strict=True)
                axes.fill_between(list(row), low, high, color=color, alpha=0.15, linewidth=0)
        if train_blocks:
            axes.axvline(train_blocks, color="gray", linestyle="--", label="the curriculum's longest")
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({blocks for row in lines.values() for blocks in row}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel(f"blocks of {block_size} tokens read before the answer")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("exact match")
    handles = grid[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def learning_figure(
    model_dirs: Mapping[str, str | os.PathLike], names: Sequence[str] = ("loss", "exact_match")
) -> Figure:
    """Logged training scalars over the training step: one panel per scalar, one line per run.

    Args:
      model_dirs: `{run label: MODEL_DIR}`.
      names: names of the scalars. A run that did not log one has no line in its panel.
    """
    figure = Figure(figsize=(1 + 4.2 * len(names), 3.6), layout="constrained")
    runs = {name: read_metrics(str(folder), "train") for name, folder in model_dirs.items()}
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for (run, lines), color in zip(runs.items(), line_colors(len(runs))):
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points) if points else ([], []), label=run, color=color)
        axes.set_xlabel("step")
        axes.set_ylabel(_LABELS.get(name, name))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
