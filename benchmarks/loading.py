"""Time that comparing a checkpoint with its digests adds to loading it.

    python -m benchmarks.loading --megabytes=1200 --repeats=15

Writes a checkpoint of random float32 parameters with Adam's moments to a temporary directory, which the
page cache then holds, so that reading it costs least and comparing it shows most. Loads, in turns, all of
it and the parameters alone, with and without the comparison; prints medians and quartiles of quotients.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from famx.model_dir.checkpointer import Checkpointer
from famx.scale.timing import Spread, interleave

_LAYERS = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; `argv`: arguments, by default those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1200, help="size of the state in memory")
    parser.add_argument("--repeats", type=int, default=15, help="number of rounds")
    parser.add_argument("--directory", default=None, help="where to write, by default TMPDIR")
    values = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=values.directory) as directory:
        _measure(pathlib.Path(directory), values.megabytes, values.repeats)


def _measure(directory: pathlib.Path, megabytes: int, repeats: int) -> None:
    rng, width = np.random.default_rng(0), max(1, megabytes * 10**6 // (3 * 4 * _LAYERS * 1024))
    draw = lambda: jnp.asarray(rng.standard_normal((8, 128, width), np.float32))
    make = lambda: {f"layer_{i}": draw() for i in range(_LAYERS)}
    tree = {"target": make(), "state": {"mu": make(), "nu": make()}}
    size = sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6
    with Checkpointer(directory) as checkpointer:
        began = time.perf_counter()
        checkpointer.save(1, tree, {"step": 1})
        blocked = time.perf_counter() - began
        checkpointer.wait()
        saved = time.perf_counter() - began
    print(f"{size:.0f} MB; saved in {saved:.2f} s, of which training waits {blocked:.2f} s")
    want = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    del tree
    with Checkpointer(directory) as compared, Checkpointer(directory) as known:
        known.verify(1)  # so that it does not compare again
        for name, part in (("everything", want), ("parameters", {"target": want["target"]})):
            partial = part is not want
            _print(name, lambda c, part=part, partial=partial: c.restore(1, part, partial), compared,
                   known, repeats)  # fmt: skip


def _print(name: str, load, compared: Checkpointer, known: Checkpointer, repeats: int) -> None:
    cpu = {True: [], False: []}

    def timed(checkpointer: Checkpointer):
        began = time.process_time()
        tree = jax.block_until_ready(load(checkpointer)[0])
        cpu[checkpointer is compared].append(time.process_time() - began)
        return tree

    timings = interleave({True: lambda: timed(compared), False: lambda: timed(known)}, repeats)
    processor = Spread.of(np.asarray(cpu[True][1:]) / np.asarray(cpu[False][1:]))
    print(
        f"{name}: {timings.spread(False)} s without; with the comparison {timings.ratio(True, False)}"
        f" times the time, {processor} times the time of processors"
    )


if __name__ == "__main__":
    main()
