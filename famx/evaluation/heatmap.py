"""Heat maps of a probe: accuracy over length, depth and seed, measured row by row in constant memory."""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import MinLen

from famx.base.cell_log import CellLog
from famx.base.errors import ConfigError
from famx.base.files import nearest_existing
from famx.base.progress import Progress, compilation_seconds
from famx.base.ranges import Name, Positive, Seed, Share
from famx.base.text import clock
from famx.base.values import check
from famx.data.probes.probe import Probe
from famx.decoding.streaming import check_position
from famx.evaluation.probes import probe_of
from famx.evaluation.streamed import score_answers
from famx.mesh import make_mesh, make_rules, on_mesh
from famx.model_dir.identity import split_checkpoint
from famx.model_dir.loading import TrainedModel, check_model, load_model
from famx.models import DecoderModel

LENGTHS = (1024, 4096, 16_384, 65_536)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CELLS = "heatmap.jsonl"
KEYS = ("length", "depth", "seed")
_PIECE_BLOCKS = 64  # blocks between two looks at the clock

Cell = dict[str, Any]
_Key = tuple[int, float, int]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The cells of a heat map, one for each length, depth and seed.

    Attributes:
      probe: name of a probe (`famx.data.probes.PROBES`) that has a depth.
      lengths: tokens of the rows, each a whole number of the model's blocks.
      depths: places of what is asked for, as fractions of the context: 0 is its beginning, 1 its end.
      seeds: seeds of the rows, which belong to the split "eval".
      examples: number of rows of a cell.
      options: options of the probe. One that has a `block_size` gets the model's, unless it is given.

    Raises:
      ConfigError: on construction, a value is out of range; the sentence names the command's flag.
    """

    probe: str
    lengths: Sequence[int] = LENGTHS
    depths: Sequence[float] = DEPTHS
    seeds: Sequence[int] = (1, 2, 3)
    examples: int = 8
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check("--probe", self.probe, Name)
        check("--examples", self.examples, Positive)
        several = {"lengths": Positive, "depths": Share, "seeds": Seed}
        for name, annotation in several.items():
            values = list(getattr(self, name))
            check(f"--{name}", values, Annotated[Sequence[annotation], MinLen(1)])
            object.__setattr__(self, name, tuple(sorted(set(values))))

    def probes(self, model: DecoderModel) -> dict[_Key, Probe]:
        """The probe of each cell, short lengths first, after a look at a row of each.

        Raises:
          ConfigError: the probe has no depth, does not fit a length, or the model's vocabulary cannot
            spell it.
        """
        size = model.config.block_size
        for length in self.lengths:
            if length % size:
                raise ConfigError(
                    f"--lengths has {length}, which is no whole number of the model's blocks of {size}"
                    f" tokens: {length // size * size or size} and {(length // size + 1) * size} are."
                )
        probes = {}
        for seed in self.seeds:
            probe = probe_of(model, self.probe, self._options(model, seed), seed, "--probe")
            for length, depth in itertools.product(self.lengths, self.depths):
                try:
                    check_position(np.int64(length)[None])
                    probes[length, depth, seed] = probe.at_depth(depth, length)
                except ValueError as error:
                    raise ConfigError(f"--probe {self.probe!r}: {error}") from error
        for depth in self.depths:  # the shortest rows have the least room
            key = (self.lengths[0], depth, self.seeds[0])
            try:
                probes[key].batch([0], self.lengths[0])
            except ValueError as error:
                raise ConfigError(f"--lengths begin with {self.lengths[0]}, too few: {error}") from error
        return dict(sorted(probes.items()))

    def _options(self, model: DecoderModel, seed: int) -> dict[str, Any]:
        if "block_size" in self.options:
            return dict(self.options)
        plain = probe_of(model, self.probe, self.options, seed, "--probe")
        if not any(field.name == "block_size" for field in dataclasses.fields(plain)):
            return dict(self.options)
        return {**self.options, "block_size": model.config.block_size}


def make_heat_map(
    checkpoint: str | None, out: str | None, grid: Grid, batch_size: int = 32
) -> dict[_Key, Cell]:
    """Measures what is missing of a heat map, and writes it to `out`: cells, CSV, PNG and HTML.

    Each cell is written to `out`/heatmap.jsonl as soon as it is measured, and the other files whenever
    a length is complete. A call that is interrupted or killed is resumed by the same call.

    Args:
      checkpoint: `MODEL_DIR` or `MODEL_DIR/checkpoint_<step>`.
      out: directory to write to; made if it is missing.
      grid: the cells; those of another call with other lengths, depths or seeds are kept.
      batch_size: largest number of rows that are read together; it does not change scores beyond
        rounding. A row takes 4 bytes a token on the host.

    Returns:
      All cells of `grid`, by length, depth and seed.

    Raises:
      ConfigError: a setting is not valid; known before the weights are read and before anything is made.
    """
    if not checkpoint:
        raise ConfigError(
            "--checkpoint is not set: add --checkpoint=MODEL_DIR or MODEL_DIR/checkpoint_<step>."
        )
    if not out:
        raise ConfigError("There is nowhere to write to: add --out=DIR.")
    folder = pathlib.Path(out)
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise ConfigError(f"--out={out} cannot be made: {existing} is a file.")
    probes = grid.probes(check_model(split_checkpoint(checkpoint)[0]))
    trained = load_model(checkpoint)
    with CellLog(folder / CELLS, _settings(trained, grid), KEYS) as log:
        pending = [key for key in probes if key not in log.cells]
        if len(pending) < len(probes):
            print(f"{len(probes) - len(pending)} of {len(probes)} cells are measured already.")
        for _ in _measured(trained, probes, pending, grid, batch_size, log):
            write_files(folder, log, grid)
        write_files(folder, log, grid)
        return {key: log.cells[key] for key in probes}


def _settings(trained: TrainedModel, grid: Grid) -> dict[str, Any]:
    """What the cells depend on besides length, depth and seed."""
    return dict(
        model=str(trained.directory.parent.resolve()),
        step=trained.step,
        probe=grid.probe,
        options=dict(grid.options),
        examples=grid.examples,
        block_size=trained.model.config.block_size,
    )


def write_files(folder: pathlib.Path, log: CellLog, grid: Grid) -> None:
    """Writes heatmap.csv, heatmap.png and heatmap.html of all cells that are measured."""
    from famx.evaluation.heatmap_files import write  # matplotlib is slow to import

    write(folder, log.cells, log.settings, grid)


# ---------------------------------------------------------------- measuring


def _measured(
    trained: TrainedModel,
    probes: Mapping[_Key, Probe],
    pending: Sequence[_Key],
    grid: Grid,
    batch_size: int,
    log: CellLog,
) -> Iterator[int]:
    """Measures cells length by length, adds each to the log, and yields each length that is complete."""
    by_length = {n: list(keys) for n, keys in itertools.groupby(pending, lambda key: key[0])}
    batches = {n: _batches(keys, grid.examples, batch_size) for n, keys in by_length.items()}
    total = sum(n * len(rows) for n, of_length in batches.items() for rows in of_length)
    done, tokens = 0, 0
    with (
        Progress("heat map", total, unit="token") as progress,
        on_mesh(make_mesh(), make_rules()),
    ):

        def line() -> str:
            remaining = progress.remaining
            eta = "" if remaining is None else f", eta {clock(remaining)}"
            return (
                f"heat map: {done} of {len(pending)} cells, {tokens:,} of {total:,} tokens read,"
                f" {tokens / max(progress.working, 1e-9):,.0f} tokens/s{eta}"
            )

        def read(count: int) -> None:
            nonlocal tokens
            tokens += count
            progress.update(tokens, lambda: f"{done} of {len(pending)} cells", line)

        for length, of_length in batches.items():
            right = {key: [0, 0, 0.0] for key in by_length[length]}  # right, rows, seconds
            for rows in of_length:
                began = time.monotonic() - compilation_seconds()
                found = _right(trained, probes, length, rows, read)
                seconds = (time.monotonic() - compilation_seconds() - began) / len(rows)
                scored = dict(zip(rows, found, strict=True))  # the last row may be there several times
                for (key, _), is_right in scored.items():
                    sums = right[key]
                    sums[0], sums[1], sums[2] = sums[0] + int(is_right), sums[1] + 1, sums[2] + seconds
                    if sums[1] == grid.examples:
                        log.add(_cell(key, *sums))
                        done += 1
            yield length


def _batches(keys: Sequence[_Key], examples: int, most: int) -> list[list[tuple[_Key, int]]]:
    """Rows of cells in batches of one size, so that one program is compiled: the last row fills up."""
    rows = list(itertools.product(keys, range(examples)))
    count = -(-len(rows) // most)
    size = -(-len(rows) // count)
    rows += rows[-1:] * (count * size - len(rows))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _right(trained, probes, length: int, rows, read) -> np.ndarray:
    """Whether the answer of each row is right, bool `[B]`."""
    tokens, starts, answers = [], [], []
    for key, index in rows:
        batch = probes[key].batch([index], length)
        tokens.append(batch["decoder_input_tokens"])
        starts.append(batch["answer_start"])
        answers.append(batch["answer"])
    arrays = [np.concatenate(parts) for parts in (tokens, starts, answers)]
    return score_answers(
        trained.model, trained.params, *arrays, probes[rows[0][0]].vocab.pad_id,
        piece_blocks=_PIECE_BLOCKS, done=lambda count: read(count * len(rows)),
    ).right  # fmt: skip


def _cell(key: _Key, right: int, rows: int, seconds: float) -> Cell:
    length, depth, seed = key
    return dict(
        length=length, depth=depth, seed=seed, right=right, examples=rows, accuracy=right / rows,
        seconds=round(seconds, 3),
    )  # fmt: skip
