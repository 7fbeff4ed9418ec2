"""Benchmark of a training step in this checkout and in another one: `python -m benchmarks.checkouts`.

Each checkout runs in its own process, and the processes take turns. See docs/benchmarks.md.
"""

import argparse
import contextlib
import dataclasses
import pathlib

from benchmarks import command
from benchmarks.turns import ROOT, Worker
from famx.base.tables import Table
from famx.scale.timing import interleave

# Runs in each checkout. It uses only what both checkouts must have in common.
_PROGRAM = """
import pathlib
import famx
from benchmarks import sections, turns, workloads

def build(memory, quick):
    sizes = sections.QUICK if quick else sections.Sizes()
    config = sizes.config(getattr(sizes, memory), sizes.layers)
    batch = {"paper": 1, "small": sizes.small_batch}[memory]
    step = workloads.train_step(config, batch, getattr(sizes, f"{memory}_length"))
    folder = str(pathlib.Path(famx.__file__).resolve().parents[1])
    facts = {"temp_bytes": step.temp_bytes, "folder": folder}
    return turns.Peer(lambda: float(step.run()[1]["loss"].compute()), facts)

turns._main()
"""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Which sizes of `benchmarks.train_step` to measure, and in which other checkout.

    Attributes:
      quick: use the tiny sizes.
      other: root of the other checkout.
    """

    quick: bool = False
    other: pathlib.Path | None = None


def train_step(sizes: Sizes, repeats: int, memory: str) -> Table:
    """Table of a FAM training step in both checkouts; `memory` is "paper" or "small"."""
    arguments = {"memory": memory, "quick": sizes.quick}
    with contextlib.ExitStack() as stack:
        start = lambda name, root: stack.enter_context(
            Worker(name, "__main__:build", arguments, root, ("-c", _PROGRAM))
        )
        workers = {"this": start("this", ROOT), "other": start("other", sizes.other)}
        times = interleave({name: lambda w=w: w.run(1) for name, w in workers.items()}, repeats)
    rows = [
        {
            "checkout": name,
            "seconds": times.spread(name),
            "time / other": times.ratio(name, "other"),
            "temp MiB": worker.facts["temp_bytes"] / 2**20,
            "first loss": worker.facts["first_loss"],
        }
        for name, worker in workers.items()
    ]
    notes = (", ".join(f"{name}: {w.facts['folder']}" for name, w in workers.items()),)
    title = f"Training step of FAM, this checkout over another, {memory} sizes"
    return Table(f"checkouts_{memory}", title, (*notes, f"{repeats} repeats"), rows)


SECTIONS = {
    "paper": lambda sizes, repeats: train_step(sizes, repeats, "paper"),
    "small": lambda sizes, repeats: train_step(sizes, repeats, "small"),
}


def _checkout(path: str) -> pathlib.Path:
    if not (pathlib.Path(path) / "benchmarks" / "turns.py").is_file():
        raise argparse.ArgumentTypeError(f"{path} is not a checkout of famx with benchmarks/turns.py.")
    return pathlib.Path(path).resolve()


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark's command line."""
    other = {"type": _checkout, "metavar": "PATH", "required": True, "help": "root of the other checkout"}
    command.run(
        "benchmarks.checkouts", __doc__.splitlines()[0], SECTIONS, Sizes(), Sizes(quick=True), 15, argv,
        options={"other": other},
    )  # fmt: skip


if __name__ == "__main__":
    main()
