"""Which start of a memory lets a pretrained model learn to remember, and what it costs on plain text.

    python -m benchmarks.memory_choices --base=MODEL_DIR --to=/tmp/famx/choices --seeds 0 1 2

trains the model of `benchmarks.remember` once for each choice and seed. The size "twin" is for a small
byte-level model such as that of gin_configs/examples/own_text_bswa.gin, "smollm2" for a real one: short
documents alone. Each cell of the grid is a directory with its own result; what exists is not made again,
and a run that was stopped is resumed.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import command, remember
from benchmarks.memory_start import BIASED, ORDINARY, label
from benchmarks.remember import FILLERS, REACHED, Size
from famx.base import tables
from famx.base.errors import ConfigError
from famx.memories import Fam
from famx.scale.timing import machine

ON_CPU = {
    "DecoderConfig.dtype": "float32", "DecoderConfig.remat": "none", "FROZEN_DTYPE": None,
    "Every.log": 1, "Every.checkpoint": 10,
}  # fmt: skip
SIZES = {
    # Keys of one digit: longer ones take a byte-level model of this size more steps.
    "twin": Size(
        stages=(
            {"steps": 600, "until": {"exact_match": REACHED}, "block_size": 64, "blocks": 2,
             "batch_size": 16, "options": {"header": False, "digits": 1}},
            {"blocks": 4, "batch_size": 8, "curriculum": {"blocks": (2, 4)},
             "options": {"filler": FILLERS, "text_weight": 0.02}},
        ),
        steps=650,
        memory=Fam(8),
        settings={
            **ON_CPU, "Lora.rank": 16, "warmup_cosine.learning_rate": 4e-3, "Every.checkpoint": 100,
        },
        twin_steps=0,
        lengths=(2, 4, 8, 16),
        examples=64,
        text_blocks=16,
    ),
    "smollm2": Size(
        stages=({"block_size": 64, "blocks": 2, "batch_size": 16},),
        steps=140,
        memory=Fam(16),
        settings=remember.SIZES["cpu"].settings,
        twin_steps=0,
        lengths=(2, 4, 8),
        examples=16,
        texts=2,
        text_blocks=16,
    ),
}  # fmt: skip
CHOICES: tuple[tuple[dict[str, Any], str], ...] = (  # fields of Fam, and what the prompt starts as
    *(({}, prompt) for prompt in ("normal", "text", "bos")),
    *((ORDINARY, prompt) for prompt in ("normal", "text", "bos")),
    *((BIASED, prompt) for prompt in ("normal", "text", "bos")),
    ({"normalize": "measured"}, "text"),
    (ORDINARY | {"normalize": "measured"}, "text"),
    (ORDINARY | {"update": "gated"}, "text"),
    (BIASED | {"update": "gated"}, "bos"),
)


def rows(results: Sequence[tuple[str, dict[str, Any]]], size: Size) -> list[dict[str, Any]]:
    """Rows of the table: one for each choice, with the median and the range of its seeds."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for name, result in results:
        grouped.setdefault(name, []).append(result)
    return [{"memory": name} | _row(found, size) for name, found in grouped.items()]


def _row(found: list[dict[str, Any]], size: Size) -> dict[str, Any]:
    later = lambda name: [np.mean(result["plain_text"][name][1:]) for result in found]
    row = {
        "seeds": len(found),
        "loss before": _spread(later("fam, untrained")),
        f"steps to {REACHED}": _spread(
            [result["fam"]["reached"] or np.inf for result in found], "{:.0f}"
        ),
        "loss after": _spread(later("fam, trained")),
    }
    for blocks in size.lengths:
        scores = [result["fam"]["exact_match"]["hold"][str(blocks)] for result in found]
        row[f"hold, {blocks}"] = _spread(scores)
    return row


def _spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median and range, such as `0.95 [0.90, 0.97]`."""
    shown = [
        form.format(x) if np.isfinite(x) else "never"
        for x in (np.median(values), min(values), max(values))
    ]
    return (
        shown[0] if len(values) == 1 or len(set(shown)) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=pathlib.Path, required=True, help="MODEL_DIR without a memory")
    parser.add_argument("--to", type=pathlib.Path, required=True, help="directory for all cells")
    parser.add_argument("--size", choices=SIZES, default="twin")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="regular expression that names of choices contain")
    parser.add_argument("--tables", action="store_true", help="tabulate what exists; run nothing")
    parser.add_argument("--markdown", type=pathlib.Path, help="page whose table is replaced")
    values = parser.parse_args(argv)
    if not (values.base / "model.json").exists():
        raise ConfigError(f"{values.base} is no MODEL_DIR: train one with own_text_bswa.gin.")
    size, results = SIZES[values.size], []
    for seed in values.seeds:
        for fields, prompt in CHOICES:
            name = label(fields, prompt)
            directory = values.to.absolute() / name.replace(", ", "-").replace(" ", "_") / str(seed)
            if re.search(values.only, name) and (not values.tables or _result(directory).exists()):
                results.append((name, _cell(directory, values.base, size, name, fields, prompt, seed)))
    if not results:
        raise ConfigError(
            f"{values.to} has no results of these choices: check --only and --seeds, or leave out"
            " --tables to train them."
        )
    spread = "median and range of the seeds" if len(values.seeds) > 1 else f"seed {values.seeds[0]}"
    host, title = machine(), "Starts of a memory that learns"
    notes = (
        f"Loss: nats per token on plain text, after the first block. Blocks of {size.block_size} tokens,"
        f" memory of {size.memory.length}; {spread}",
        f"{host['cpu']}, {host['cores']} cores; jax {host['jax']}",
    )
    table = tables.Table(f"memory_choices_{values.size}", title, notes, rows(results, size))
    print(table.text())
    if values.markdown:
        tables.fill_markdown(values.markdown, table)


def _result(directory: pathlib.Path) -> pathlib.Path:
    return directory / "remember.json"


def _cell(
    directory: pathlib.Path, base: pathlib.Path, size: Size, name: str, fields, prompt: str, seed: int
) -> dict[str, Any]:
    """The result of one choice and seed, measured unless it exists."""
    if not _result(directory).exists():
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "base").exists():
            (directory / "base").symlink_to(base.absolute())
        memory = Fam(size.memory.length, **fields)
        figures = remember.remember(directory, size, memory, prompt, seed)
        print(name, f"seed {seed}", remember.write(directory, figures, size), sep="\n", flush=True)
    return json.loads(_result(directory).read_text())


if __name__ == "__main__":
    with command.exit_on_bad_input():
        main()
