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
from famx.base.files import as_path
from famx.base.palette import MEMORY, PAST, ZEROED
from famx.training.run_log import read_metrics

Scores = Mapping[str, Mapping[int, float]]  # {line label: {blocks read: score}}
_LABELS = {"exact_match": "exact match"}
# What a reader sees who does not know the probes' names.
_PROBES = {
    "hold": "One key, then random words",
    "hold_repeated": "One key, then one sentence\nagain and again",
    "hold_text": "One key, then real text",
    "hold_headerless": "One key, not announced",
    "hold_anywhere": "One key, anywhere in the text",
    "hold_unaligned": "One key, asked for\nanywhere in a block",
    "overwrite": "A second key replaces the first",
}
_WITHOUT = "the same model without a memory"
_KINDS = {"fam": "FAM", "infini": "Infini-attention", "none": _WITHOUT}
_TWIN = "_bswa"  # end of the name of a MODEL_DIR whose run has no memory


def passkey_results(model_dir: str | os.PathLike) -> dict[str, Any]:
    """Contents of a run's passkey.json, which `PasskeyEvaluation.report` writes.

    Document lengths, the keys of `exact_match[probe]`, are converted from strings to integers.

    Raises:
      ConfigError: the run has no passkey.json.
    """
    path = as_path(model_dir) / "passkey.json"
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


def recall_figure(model_dir: str | os.PathLike) -> Figure:
    """What a run remembers: its memory, the same memory set to zero, and its twin without a memory.

    The twin is the run in the directory of the same name with `_bswa` at its end, and the other way
    round; without one there is no line for it.

    Args:
      model_dir: `MODEL_DIR` of a run that has a passkey.json.
    """
    folder = as_path(model_dir).absolute()
    own = passkey_results(folder)
    runs = sorted([own, *_twin(folder, own)], key=_is_without_memory)
    panels: dict[str, dict[str, dict[int, float]]] = {}
    colors = {}
    for probe in own["exact_match"]:
        lines = panels[_PROBES.get(probe, probe)] = {}
        for run in runs:
            kind = run["memory_config"]["kind"]
            label, begin = _KINDS.get(kind, kind), f"zeroed/{probe}/"
            of_zeroed = {n: x for n, x in run.get("memory", {}).items() if n.startswith(begin)}
            zeroed = {int(name.removeprefix(begin)): score for name, score in of_zeroed.items()}
            for name, row, color in (
                (label, run["exact_match"].get(probe), PAST if _is_without_memory(run) else MEMORY),
                (f"{label}, memory set to zero", dict(sorted(zeroed.items())), ZEROED),
            ):
                if row:
                    lines[name], colors[name] = row, color
    mark = "longest text in training"
    figure = lengths_figure(panels, own["block_size"], own["train_blocks"], colors, mark)
    figure.suptitle("How often is the key repeated without a mistake after so much text?")
    figure.axes[0].set_ylabel("share of the documents")
    return figure


def _twin(folder: pathlib.Path, own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of the run of the same blocks with or without memory, or nothing."""
    end = folder.name.removesuffix(_TWIN)
    other = folder.with_name(end if end != folder.name else f"{folder.name}{_TWIN}")
    try:
        twin = passkey_results(other)
        fits = twin["block_size"] == own["block_size"]
        return [twin] if fits and _is_without_memory(twin) != _is_without_memory(own) else []
    except (ConfigError, ValueError, LookupError, TypeError):  # none, or of another version
        return []


def _is_without_memory(results: Mapping[str, Any]) -> bool:
    return results["memory_config"]["kind"] == "none"


def lengths_figure(
    panels: Mapping[str, Scores],
    block_size: int,
    train_blocks: int | None,
    colors: Mapping[str, str] | None = None,
    mark: str = "the curriculum's longest",
    ranges: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]] | None = None,
    labels: tuple[str, str] | None = None,
) -> Figure:
    """Exact match, or another score between 0 and 1, over the number of blocks read.

    Args:
      panels: `{panel title: {line label: {blocks: score}}}`.
      block_size: tokens per block, for the axis label.
      train_blocks: length marked by a vertical line; None or 0 draws none.
      colors: colour of each line; None: one after another.
      mark: label of the vertical line.
      ranges: `{panel title: {line label: {blocks: (lowest, highest)}}}`, shaded; None: there are none.
      labels: what stands at the axes; None: blocks of `block_size` tokens, and exact match.
    """
    across, up = labels or (f"blocks of {block_size} tokens read before the answer", "exact match")
    figure = Figure(figsize=(max(7, 4 * len(panels)), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colors = dict(zip(names, line_colors(len(names)))) if colors is None else colors
    markers, legend = dict(zip(names, "os^vDP*X" * 9)), {}
    for axes, (title, lines) in zip(grid, panels.items()):
        for name, row in lines.items():
            color = colors[name]
            style = dict(marker=markers[name], color=color, alpha=0.8, clip_on=False)
            axes.plot(list(row), list(row.values()), label=name, **style)
            if ranges is not None:
                low, high = zip(*ranges[title][name].values(), strict=True)
                axes.fill_between(list(row), low, high, color=color, alpha=0.15, linewidth=0)
        if train_blocks:
            axes.axvline(train_blocks, color="gray", linestyle="--", label=mark)
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({blocks for row in lines.values() for blocks in row}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel(across)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
        legend |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    grid[0].set_ylabel(up)
    shown = [name for name in (*names, mark) if name in legend]
    handles = [legend[name] for name in shown]
    figure.legend(handles, shown, loc="outside lower center", ncols=4, fontsize="small")
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
