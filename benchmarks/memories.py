"""What the memories of a study cost beside each other: `python -m benchmarks.memories`.

State, parameters and operations are computed from the models of the study; training steps and reading are
timed in turns in one process and compared by ratios within a round, as in `benchmarks.train_step`.
"""

import dataclasses
import tempfile
from collections.abc import Callable

from benchmarks import command
from benchmarks.workloads import prefill, train_step
from famx.base import gin_utils
from famx.base.tables import Table
from famx.modules import DecoderConfig
from famx.scale.compiling import run_from_gin
from famx.scale.timing import interleave
from famx.study import commands
from famx.training.memory_costs import memory_costs


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark; `--quick` uses `QUICK`.

    Attributes:
      study: name of a study of `gin_configs/studies` with an axis `memory`.
      batch, length: rows of a training step, and their tokens.
      read: tokens of the text that is read, one example.
    """

    study: str = "memories"
    batch: int = 16
    length: int = 128
    read: int = 8192


QUICK = Sizes(batch=1, length=64, read=64)


def models(study: str) -> dict[str, DecoderConfig]:
    """The model of each memory of a study, with the first choice on every other axis."""
    found: dict[str, DecoderConfig] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = [f"gin_configs/studies/{study}.gin"]
        grid = gin_utils.call_with(commands.study, files, {"STUDY_DIR": folder})
        for cell in grid.cells():
            if cell.choices["memory"] not in found:
                grid.write_gin_file(cell)
                run = gin_utils.call_with(run_from_gin, [str(cell.gin_file)])
                found[cell.choices["memory"]] = run.model.config
    return found


def memories(sizes: Sizes, repeats: int) -> Table:
    """State, parameters, operations, and times as ratios to those of the study's first memory."""
    configs = models(sizes.study)
    first = next(iter(configs))
    steps = {name: train_step(c, sizes.batch, sizes.length).run for name, c in configs.items()}
    reads = {name: prefill(c, 1, sizes.read).run for name, c in configs.items()}
    training, reading = interleave(steps, repeats), interleave(reads, repeats)
    rows = []
    for name, config in configs.items():
        costs = memory_costs(config)
        rows.append({
            "memory": name,
            "state, bytes": costs.state_bytes,
            "window, bytes": costs.window_bytes,
            "parameters": costs.parameters,
            "operations, share": f"{costs.share_of_flops:.2f}",
            "waits": costs.waits,
            f"training time / {first}": training.ratio(name, first),
            f"reading time / {first}": reading.ratio(name, first),
        })  # fmt: skip
    c = configs[first]
    notes = (
        f"S {c.block_size}; {c.num_layers} layers, width {c.embed_dim}, {c.num_heads} heads; training of"
        f" {sizes.batch} rows of {sizes.length} tokens, reading of one text of {sizes.read};"
        f" {repeats} repeats",
    )
    return Table("memories", "What the memories cost", notes, rows)


SECTIONS: dict[str, Callable[[Sizes, int], Table]] = {"memories": memories}


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark's command line."""
    command.run("benchmarks.memories", __doc__.splitlines()[0], SECTIONS, Sizes(), QUICK, 15, argv)


if __name__ == "__main__":
    main()
