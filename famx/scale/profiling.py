"""Time and memory of training and reading over length: measured here, or compiled for elsewhere.

Every figure is of a program of `famx.scale.programs`, or of the streaming that `famx` itself reads with.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import MinLen

from famx.base.cell_log import CellLog
from famx.base.chips import Chip, find
from famx.base.errors import ConfigError
from famx.base.files import nearest_existing
from famx.base.progress import Progress
from famx.base.ranges import OneOf, Positive
from famx.base.text import clock
from famx.base.values import check
from famx.decoding import Streamer
from famx.mesh import batch_sharding
from famx.scale import topologies
from famx.scale.programs import Program
from famx.scale.report import Report, compile_report
from famx.scale.timing import Timings, interleave, peak_memory
from famx.scale.variants import PASSES, VARIANTS, Options, gin_file_of, lower, ready_run, run_of
from famx.training.run import Run
from famx.training.step import make_initializer

CELLS = "profile.jsonl"
KEYS = ("on", "size", "variant", "pass", "tokens", *(field.name for field in dataclasses.fields(Options)))
_NO_CHIP = Chip("cpu", 0.0, 0.0, 0.0)

Cell = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a profile covers; every combination is a cell.

    Attributes:
      sizes: names or gin files of models (`famx.scale.variants.gin_file_of`).
      lengths: tokens of a row.
      variants: of "fam", "bswa" and "full" (full attention).
      passes: of "training", "reading" (block by block, as famx streams) and "at_once" (the whole text in
        one call, as the paper prefills).
      options: what all programs have in common.
      repeats: number of rounds in which variants are timed in turns.
      most_seconds: a program that would take longer, by what a shorter text took, is not timed.

    Raises:
      ConfigError: on construction, a value is out of range; the sentence names the command's flag.
    """

    sizes: Sequence[str]
    lengths: Sequence[int]
    variants: Sequence[str] = VARIANTS
    passes: Sequence[str] = PASSES[:2]
    options: Options = Options()
    repeats: int = 3
    most_seconds: float = 60.0

    def __post_init__(self):
        several = {
            "sizes": str, "lengths": Positive, "variants": Annotated[str, OneOf(VARIANTS)],
            "passes": Annotated[str, OneOf(PASSES)],
        }  # fmt: skip
        for name, annotation in several.items():
            values = list(dict.fromkeys(getattr(self, name)))
            check(f"--{name}", values, Annotated[Sequence[annotation], MinLen(1)])
            object.__setattr__(self, name, tuple(values))
        object.__setattr__(self, "lengths", tuple(sorted(self.lengths)))


def make_profile(out: str | None, plan: Plan, topology: str | None = None) -> list[Cell]:
    """Measures or compiles what is missing of a profile, and writes it to `out`.

    Each cell is written to `out`/profile.jsonl as soon as it is known; profile.md, profile.csv and
    profile.png have all cells of that file, those of other machines too. A call that is interrupted or
    killed is resumed by the same call.

    Args:
      out: directory to write to; made if it is missing.
      plan: the cells.
      topology: what to compile for, see `famx.scale.topologies.devices`; None: this machine's first
        device, on which the programs also run.

    Returns:
      All cells of the file.

    Raises:
      ConfigError: a setting is not valid; known before anything is compiled or made.
    """
    if not out:
        raise ConfigError("There is nowhere to write to: add --out=DIR.")
    folder = pathlib.Path(out)
    if not nearest_existing(folder).is_dir():
        raise ConfigError(f"--out={out} cannot be made: {nearest_existing(folder)} is a file.")
    for size in plan.sizes:
        gin_file_of(size)
    place = _Place.of(topology)
    runs = {size: run_of(size, plan.options) for size in plan.sizes}
    for size, run in runs.items():
        _check_lengths(size, run, plan, place)
    with CellLog(folder / CELLS, {"format": 1}, KEYS) as log:
        work = _Work(plan, place, runs, log)
        groups = list(work.pending())
        with Progress("profile", len(groups)) as progress:
            for done, (size, pass_, length) in enumerate(groups, 1):
                for cell in work.cells(size, pass_, length):
                    log.add(cell)
                _write(folder, log)
                line = functools.partial(_line, progress, f"{size} {pass_} {length:,} tokens")
                progress.update(done, line=line)
        _write(folder, log)
        return list(log.cells.values())


def _line(progress: Progress, what: str) -> str:
    eta = "" if progress.remaining is None else f", eta {clock(progress.remaining)}"
    return f"profile: {progress.done} of {progress.total} ({what}){eta}"


def _write(folder: pathlib.Path, log: CellLog) -> None:
    from famx.scale.profile_files import write  # matplotlib is slow to import

    write(folder, list(log.cells.values()))


def _check_lengths(size: str, run: Run, plan: Plan, place: "_Place") -> None:
    block = run.model.config.block_size
    for length in plan.lengths:
        if length % block:
            raise ConfigError(
                f"--lengths has {length}, which is no whole number of the blocks of {block} tokens of"
                f" --sizes={size}: use multiples of {block}."
            )
    for variant in plan.variants:
        ready_run(run, variant, plan.lengths[0], plan.options, place.devices)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Devices to compile for.

    Attributes:
      name: as the table shows it.
      devices: the devices, which exist if `here`.
      chip: their published rates.
      here: whether programs run.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: Chip
    here: bool

    @classmethod
    def of(cls, topology: str | None) -> "_Place":
        if topology is not None:
            devices, chip = topologies.devices(topology)
            return cls(topology, devices, chip, False)
        devices = jax.devices()[:1]
        kind = devices[0].device_kind
        return cls(kind, devices, find(kind) or _NO_CHIP, True)


class _Work:
    """The cells of a plan at a place, variants together so that they can be timed in turns."""

    def __init__(self, plan: Plan, place: _Place, runs: Mapping[str, Run], log: CellLog):
        self._plan, self._place, self._runs, self._log = plan, place, runs, log
        self._reports: dict[tuple[str, str], Report] = {}  # of streaming, the same at every length
        self._streams: dict[tuple[str, str], tuple[Streamer, Any]] = {}

    def pending(self) -> Iterator[tuple[str, str, int]]:
        """Size, pass and length of the groups that have a cell which is not in the log."""
        plan = self._plan
        for group in itertools.product(plan.sizes, plan.passes, plan.lengths):
            keys = (self._key(*group, variant) for variant in self._variants(group[1]))
            if any(key not in self._log.cells for key in keys):
                yield group

    def cells(self, size: str, pass_: str, length: int) -> Iterator[Cell]:
        """Compiles the variants of a group and, on this machine, runs them in turns."""
        cells, functions = {}, {}
        for variant in self._variants(pass_):
            cell = cells[variant] = dict(zip(KEYS, self._key(size, pass_, length, variant)))
            options, devices = self._plan.options, self._place.devices
            run = ready_run(self._runs[size], variant, length, options, devices)
            try:
                report, program = self._report(size, variant, pass_, run)
            except jax.errors.JaxRuntimeError as error:
                cell["note"] = f"not compiled: {str(error).splitlines()[0][:120]}"
                continue
            cell |= _compiled(report, run)
            if self._place.here:
                reason = self._refusal(cell)
                if reason is None:
                    functions[variant] = self._function(size, variant, pass_, run, program)
                else:
                    cell["note"] = reason
        if functions:
            times = interleave(functions, self._plan.repeats)
            for variant, function in functions.items():
                peak_memory(forget=True)
                jax.block_until_ready(function())
                cells[variant] |= _measured(times, variant, self._place.devices[0])
        yield from cells.values()

    def _variants(self, pass_: str) -> Sequence[str]:
        """Full attention reads at once in the pass "reading"; a second time would be the same."""
        alone = self._plan.passes == ("at_once",)
        return [v for v in self._plan.variants if v != "full" or pass_ != "at_once" or alone]

    def _key(self, size: str, pass_: str, length: int, variant: str) -> tuple[Any, ...]:
        options = dataclasses.astuple(self._plan.options)
        return (self._place.name, size, variant, pass_, length, *options)

    def _report(self, size: str, variant: str, pass_: str, run: Run) -> tuple[Report, Program | None]:
        """The report of a program, and the program unless it is one that was compiled before."""
        streamed = pass_ == "reading" and variant != "full"
        if streamed and (size, variant) in self._reports:
            return self._reports[size, variant], None
        program = lower(run, variant, pass_)
        report = compile_report(program, run.mesh, self._place.name, self._place.chip)
        if streamed:
            self._reports[size, variant] = report
        return report, program

    def _refusal(self, cell: Cell) -> str | None:
        """Why a program is not run: it does not fit, or takes too long by what a shorter text took."""
        if cell["bytes"] > (free := _free_bytes(self._place)):
            return f"not run: needs {cell['bytes'] / 2**30:.1f} GiB of {free / 2**30:.1f}"
        same = [name for name in KEYS if name != "tokens"]
        before = [
            other for other in self._log.cells.values()
            if all(other[name] == cell[name] for name in same) and other["tokens"] < cell["tokens"]
        ]  # fmt: skip
        timed = [other for other in before if "seconds" in other]
        if not timed:
            return None if not before else "not run: a shorter text was not, either"
        last = max(timed, key=lambda other: other["tokens"])
        expected = last["seconds"] * cell["model_flops"] / last["model_flops"]
        if expected <= self._plan.most_seconds:
            return None
        return f"not run: about {clock(expected)}, more than --most_seconds"

    def _function(
        self, size: str, variant: str, pass_: str, run: Run, program: Program | None
    ) -> Callable[[], Any]:
        """A function that runs a pass over one batch."""
        tokens = _tokens(run)
        if pass_ == "training":
            assert program is not None
            return _training(run, program, tokens)
        if pass_ == "reading" and variant != "full":
            if (size, variant) not in self._streams:
                self._streams[size, variant] = Streamer(run.model.module), _params(run)
            streamer, params = self._streams[size, variant]
            start = functools.partial(streamer.initial_state, params, len(tokens))
            return lambda: streamer.read(params, start(), tokens, aligned=True)
        assert program is not None
        compiled, params = program.lowered.compile(), _params(run)
        apply = lambda params: run.model.module.apply(
            {"params": params}, len(tokens), method="initial_state"
        )
        start = jax.jit(lambda params: jax.tree.map(jnp.copy, apply(params)))
        return lambda: compiled(params, start(params), tokens)


def _compiled(report: Report, run: Run) -> Cell:
    """What a report says of a batch of rows of the run's length."""
    calls = run.data.length / report.length
    cell = dict(
        devices=report.devices,
        batch=report.batch,
        parameters=report.parameters,
        memory=dict(report.memory),
        bytes=report.needed,
        available=report.available,
        fits=report.fits,
        model_flops=None if report.model_flops is None else report.model_flops * calls,
    )
    if report.bound:
        cell["roofline"] = report.bound.roofline * calls
        cell["scheduled"] = report.bound.scheduled * calls
        cell["limit"] = report.bound.limit
    return cell


def _measured(times: Timings, variant: str, device: jax.Device) -> Cell:
    spread = times.spread(variant)
    cell = dict(seconds=spread.median, lower=spread.lower, upper=spread.upper)
    if "bswa" in times.seconds:
        cell["to_bswa"] = times.ratio(variant, "bswa").median
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return cell | {"peak": stats["peak_bytes_in_use"], "peak_of": "device"}
    return cell | {"peak": int(peak_memory() * 2**20), "peak_of": "process"}


def _free_bytes(place: _Place) -> float:
    """Bytes that a program may need on this machine's device."""
    stats = place.devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 2**10
    return float("inf")


def _tokens(run: Run) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = run.data.batch_size, run.data.length
    return rng.integers(1, run.model.config.vocab_size, shape, dtype=np.int32)


def _params(run: Run) -> Any:
    initialize, _ = make_initializer(run)
    return initialize(jax.random.key(0)).params


def _training(run: Run, program: Program, tokens: np.ndarray) -> Callable[[], Any]:
    """Training steps, each from the state of the step before."""
    batch = {
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": np.roll(tokens, -1, axis=1),
        "decoder_loss_weights": np.ones(tokens.shape, np.float32),
    }
    batch = jax.device_put(batch, batch_sharding(run.mesh))
    compiled = program.lowered.compile()
    states = [make_initializer(run)[0](jax.random.key(0))]

    def step():
        state, metrics = compiled(states.pop(), batch)
        states.append(state)
        return metrics

    return step
