"""Benchmark of CPU training against other Transformers with memory: `python -m benchmarks.peers`.

Each implementation runs in its own process, and the processes take turns. See docs/benchmarks.md.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib

import jax

from benchmarks import command
from benchmarks.peer_shape import Shape
from benchmarks.turns import LeftOut, Worker
from famx.base.tables import Table
from famx.scale.timing import Spread, interleave

_FAMX = "benchmarks.peers_famx:build"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark (`--quick` uses `QUICK`), and the place of meliad.

    Attributes:
      small: sizes of the smaller models.
      large: sizes of the larger models.
      steps: training steps per turn.
      meliad: root of a clone of google-research/meliad; None leaves it out.
    """

    small: Shape = Shape(
        vocabulary=512, layers=4, width=256, heads=4, feed_forward=1024, block=256, memory_length=16,
        batch=2, length=4096,
    )  # fmt: skip
    large: Shape = Shape(
        vocabulary=512, layers=8, width=512, heads=8, feed_forward=2048, block=512, memory_length=32,
        batch=1, length=4096,
    )  # fmt: skip
    steps: int = 1
    meliad: pathlib.Path | None = None


_TINY = Shape(
    vocabulary=32, layers=2, width=16, heads=2, feed_forward=32, block=16, memory_length=4, batch=1,
    length=128,
)  # fmt: skip
QUICK = Sizes(small=_TINY, large=_TINY, steps=2)


# Implementations of PyTorch and their builders, by the number M of past blocks that they attend to.
TORCH = {
    1: {
        "block-recurrent-transformer-pytorch": ("benchmarks.peers_torch:block_recurrent", {}),
        "transformers Mistral, sdpa": ("benchmarks.peers_torch:sliding_window", {"segments": 1}),
    },
    0: {
        "recurrent-memory-transformer-pytorch": ("benchmarks.peers_torch:recurrent_memory", {}),
        "infini-transformer-pytorch": ("benchmarks.peers_torch:infini", {}),
    },
}


def one_segment(sizes: Sizes, repeats: int, shape: Shape, name: str) -> Table:
    """Table of the implementations that attend to the current and the previous block."""
    builds = {
        "famx FAM": (_FAMX, {"segments": 1, "memory": True}),
        "famx BSWA": (_FAMX, {"segments": 1, "memory": False}),
        "famx FAM, 1 key/value head": (_FAMX, {"segments": 1, "memory": True, "kv_heads": 1}),
        **TORCH[1],
        "meliad Block-Recurrent": (
            "benchmarks.peers_meliad:block_recurrent",
            {"path": sizes.meliad and str(sizes.meliad)},
        ),
    }
    notes = (
        "block-recurrent-transformer-pytorch: one key/value head, N state vectors in the middle"
        " layer only; Mistral: a window of 2 S tokens, no recurrence; meliad: N state vectors in"
        " the middle layer, ungated feed-forward with the same number of parameters",
    )
    return _measure(name, 1, shape, builds, sizes.steps, repeats, notes)


def no_segment(sizes: Sizes, repeats: int, shape: Shape, name: str) -> Table:
    """Table of the implementations that attend to the current block and a memory."""
    builds = {
        "famx FAM": (_FAMX, {"segments": 0, "memory": True}),
        "famx BSWA": (_FAMX, {"segments": 0, "memory": False}),
        **TORCH[0],
    }
    notes = (
        "recurrent-memory-transformer-pytorch: N memory tokens before and N after each block;"
        " infini-transformer-pytorch: a matrix of fast weights per head and layer",
    )
    return _measure(name, 0, shape, builds, sizes.steps, repeats, notes)


def _measure(name, segments, shape: Shape, builds, steps, repeats, notes) -> Table:
    left_out = []
    with contextlib.ExitStack() as stack:
        workers = {}
        for label, (build, arguments) in builds.items():
            arguments = {"shape": dataclasses.asdict(shape), **arguments}
            try:
                workers[label] = stack.enter_context(Worker(label, build, arguments))
            except LeftOut as reason:
                if build == _FAMX:
                    raise
                left_out.append(f"left out: {reason}")
        runs = {label: functools.partial(w.run, steps) for label, w in workers.items()}
        times = interleave(runs, repeats)
        losses = {label: worker.run(1) for label, worker in workers.items()}
    tokens, reference = steps * shape.batch * shape.length, next(iter(builds))
    rows = [
        {
            "model": label,
            "parameters": worker.facts["parameters"],
            "seconds a step": times.spread(label, 1 / steps),
            "tokens/s": Spread.of(tokens / times.seconds[label]),
            "tokens/s, FAM / this": times.ratio(label, reference),
            "loss": f"{worker.facts['first_loss']:.3f} to {losses[label]:.3f}",
            "gradient": f"{worker.facts['reach']:.0e}" if worker.facts["reach"] else "0",
        }
        for label, worker in workers.items()
    ]
    versions = sorted({worker.facts["version"] for worker in workers.values()})
    sizes = (
        f"S {shape.block}, M {segments}, N {shape.memory_length}; {shape.layers} layers, width"
        f" {shape.width}, {shape.heads} heads of {shape.head_dim}, gated feed-forward"
        f" {shape.feed_forward}, vocabulary {shape.vocabulary}; batch {shape.batch}, {shape.length}"
        f" tokens; float32, AdamW; {repeats} rounds of {steps} steps; {', '.join(versions)}"
    )
    title = f"Training speed of several implementations, M {segments}, width {shape.width}"
    return Table(name, title, (sizes, *notes, *left_out), rows)


SECTIONS = {
    "peers_m1": lambda s, repeats: one_segment(s, repeats, s.small, "peers_m1"),
    "peers_m0": lambda s, repeats: no_segment(s, repeats, s.small, "peers_m0"),
    "peers_large_m1": lambda s, repeats: one_segment(s, repeats, s.large, "peers_large_m1"),
    "peers_large_m0": lambda s, repeats: no_segment(s, repeats, s.large, "peers_large_m0"),
}


def _clone(path: str) -> pathlib.Path:
    if not (pathlib.Path(path) / "transformer" / "memory" / "decoder_stack.py").is_file():
        raise argparse.ArgumentTypeError(
            f"{path} is not a clone of google-research/meliad: it has no"
            " transformer/memory/decoder_stack.py."
        )
    return pathlib.Path(path).resolve()


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark's command line."""
    meliad = {"type": _clone, "metavar": "PATH", "help": "clone of google-research/meliad"}
    command.run(
        "benchmarks.peers", __doc__.splitlines()[0], SECTIONS, Sizes(), QUICK, 7, argv,
        options={"meliad": meliad},
    )  # fmt: skip


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # as in the worker processes
    main()
