"""Reports on compiled programs: memory per device and bounds on time, as tables and JSON values."""

import collections
import contextlib
import dataclasses
import itertools
import pathlib
import re
import tempfile
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from famx.base.chips import Chip
from famx.base.files import write_text
from famx.base.tables import Table
from famx.scale import bounds, collectives, costs, hlo, kernels, launches
from famx.scale.programs import Program

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_LOOPS = 12  # number of loops that a report lists
_TOKENS = re.compile(r"/tokens/while$")  # the loop of `famx.decoding.generate` whose run is a token
# Parts of a loop's name that tell the pass it belongs to; the first match counts.
_PASSES = {"rematted_computation": "recomputed", "transpose(": "backward", "jvp(": "forward"}


@dataclasses.dataclass(frozen=True)
class Report:
    """Report on one program for one topology.

    Bytes, operations and seconds are those of one device unless stated otherwise.

    Attributes:
      program: name of the program: "train", or "train_stage_<number>" of a run of stages; "prefill";
        "decode".
      topology: name of the topology.
      mesh: `{axis: size}`.
      batch: rows of the global batch.
      length: tokens per row that are read or written.
      memory: bytes by kind. `temporaries` are activations, gradients and everything else allocated
        during a run; for a program that does not fit, what the compiler says it would need.
      available: bytes available to a program, as the compiler says, otherwise the chip's memory.
      fits: whether the program could be compiled and, on a GPU, whose compiler has no limit, needs no
        more than is available.
      parameters: number of parameters of the model.
      chip: the chip, with its published rates.
      model_flops: operations that the result depends on, on all devices; None if not counted.
      flops: executed operations; None if the program does not fit.
      bytes: main memory traffic; None if the program does not fit.
      bound: bounds on the time of a run; None if the chip's rates are unknown or it does not fit.
      collectives: rows with kind, mesh axes, group size, count and bytes sent; for a GPU also seconds at
        full rate, and the share of them during which other work is scheduled ("hidden").
      loops: the loops that take longest by the schedule, with seconds per resource.
      kernels: for a GPU, a row for the program and each loop: its pass, how often it runs, and kernels
        and launches (CUDA graphs, and kernels outside of them) of one run; None if unknown.
      each: of these, what a block of prefill or a token of decode takes: `{"block" or "token": totals}`.
      notes: what the figures leave out.
    """

    program: str
    topology: str
    mesh: dict[str, int]
    batch: int
    length: int
    memory: dict[str, int]
    available: float
    fits: bool
    parameters: int
    chip: Chip
    model_flops: int | None = None
    flops: float | None = None
    bytes: float | None = None
    bound: bounds.Bound | None = None
    collectives: tuple[dict[str, Any], ...] = ()
    loops: tuple[dict[str, Any], ...] = ()
    kernels: tuple[dict[str, Any], ...] = ()
    each: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        return int(np.prod(list(self.mesh.values())))

    @property
    def needed(self) -> int:
        """Bytes needed per device, over all kinds."""
        return sum(self.memory.values())

    @property
    def utilisation(self) -> dict[str, float]:
        """Upper bound of the model FLOPs utilisation (MFU) by each time bound; empty if unknown."""
        if self.bound is None or self.model_flops is None:
            return {}
        ideal = self.model_flops / self.devices / self.chip.flops
        return {name: ideal / getattr(self.bound, name) for name in ("roofline", "scheduled")}

    def tokens_per_second(self) -> float | None:
        """Upper bound of the tokens per second on all devices, by the roofline; None if unknown."""
        return self.bound and self.batch * self.length / self.bound.roofline

    def launched(self) -> dict[str, int]:
        """Kernels, CUDA graphs and single launches of one run of a GPU program; {} for others."""
        return _launched(self.kernels)

    def hidden(self) -> float | None:
        """Share of the time of a GPU program's collectives during which other work is scheduled."""
        total = sum(row.get("seconds", 0) for row in self.collectives)
        if not total:
            return None
        return sum(row["seconds"] * row["hidden"] for row in self.collectives) / total

    def line(self) -> str:
        """A one-line summary."""
        gib = lambda count: f"{count / 2**30:.2f}"
        where = f"{self.program} on {self.topology}: "
        room = f"{gib(self.needed)} of {gib(self.available)} GiB" if self.available else (
            f"{gib(self.needed)} GiB"
        )
        if not self.fits:
            over = self.needed - self.available
            return f"{where}does not fit, {room} on each device, {gib(over)} GiB too many"
        text = f"{where}fits, {room}" if self.available else f"{where}{room}"
        text += "".join(f"; {n:,} {name}" for name, n in self.launched().items())
        for unit, launched in self.each.items():
            text += f"; a {unit} " + ", ".join(f"{n:,} {name}" for name, n in launched.items())
        if (hidden := self.hidden()) is not None:
            text += f"; {hidden:.0%} of the collectives' time beside other work"
        if self.bound is None:
            return text
        b = self.bound
        text += (
            f"; at least {b.roofline:.3f} s ({b.limit}; compute {b.compute:.3f}, memory {b.memory:.3f},"
            f" interconnect {b.interconnect:.3f}, network {b.network:.3f}),"
            f" {b.scheduled:.3f} s as scheduled"
        )
        if self.utilisation:
            u = self.utilisation
            text += f"; MFU at most {u['roofline']:.1%}, {u['scheduled']:.1%} as scheduled"
        if self.program.startswith("train"):
            text += f"; at most {self.tokens_per_second():,.0f} tokens/s"
        return text

    def plain(self) -> dict[str, Any]:
        """The report and its derived figures as JSON values."""
        values = dataclasses.asdict(self)
        values["needed"] = self.needed
        if self.bound is not None:
            values["bound"]["roofline"] = self.bound.roofline
        values["utilisation"] = self.utilisation
        values["launched"] = self.launched()
        values["row"] = self.row()
        values["tokens_per_second"] = self.tokens_per_second()
        return values

    def tables(self) -> list[Table]:
        """Everything in the report, as tables for a terminal."""
        shape = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        title = f"{self.program}, {self.topology}, {self.devices} devices, mesh {shape}"
        size = f"{self.parameters:,} parameters; batch {self.batch} x {self.length} tokens"
        notes = (size, *self.notes)
        kinds = {**self.memory, "total": self.needed, "available": self.available}
        rows = [{"memory per device": kind, "GiB": n / 2**30} for kind, n in kinds.items()]
        tables = [Table("memory", title, notes, rows)]
        if self.flops is not None:
            tables.append(Table("work", "work per device", (), self._work()))
        if self.collectives:
            rows = [{**row, "GB": row["bytes"] / 1e9} for row in self.collectives]
            rows = [{k: v for k, v in row.items() if k != "bytes"} for row in rows]
            title = "collectives per run and device"
            if (hidden := self.hidden()) is not None:
                title += f", {hidden:.0%} of their time beside other work"
            tables.append(Table("collectives", title, (), rows))
        if self.loops:
            title = "loops, seconds per run as scheduled"
            tables.append(Table("loops", title, (), list(self.loops)))
        if self.kernels:
            title = ", ".join(f"{n:,} {name}" for name, n in self.launched().items())
            rows = [{k: "-" if v is None else v for k, v in row.items()} for row in self.kernels]
            notes = [
                f"a {unit}: {', '.join(f'{n:,} {name}' for name, n in launched.items())}"
                for unit, launched in self.each.items()
            ]
            tables.append(Table("kernels", f"kernels and launches: {title}", tuple(notes), rows))
        return tables

    def row(self) -> dict[str, Any]:
        """The figures for a table that compares programs."""
        gib = lambda *kinds: f"{sum(self.memory.get(kind, 0) for kind in kinds) / 2**30:.2f}"
        row = {
            "program": self.program,
            "on": self.topology,
            "batch": f"{self.batch} x {self.length}",
            "weights and moments, GiB": gib("parameters", "optimiser"),
            "temporaries, GiB": gib("temporaries"),
            "needed / available": f"{self.needed / 2**30:.1f} / {self.available / 2**30:.1f}",
            "fits": "yes" if self.fits else "no",
        }
        if self.flops and self.model_flops:
            row["executed / model"] = f"{self.flops * self.devices / self.model_flops:.2f}"
        if self.bound:
            names = ("compute", "memory", "interconnect", "scheduled")
            row |= {f"{name}, s": f"{getattr(self.bound, name):.3f}" for name in names}
        if self.utilisation:
            row["MFU at most"] = f"{self.utilisation['roofline']:.1%}"
            row["as scheduled"] = f"{self.utilisation['scheduled']:.1%}"
        return row | {name: f"{n}" for name, n in self.launched().items()}

    def _work(self) -> list[dict[str, Any]]:
        rows = []
        if self.model_flops is not None:
            model = self.model_flops / self.devices
            rows.append({"": "model TFLOP", "amount": model / 1e12, "seconds": "-"})
            rows.append({"": "executed / model", "amount": self.flops / model, "seconds": "-"})
        amounts = {"executed TFLOP": self.flops / 1e12, "main memory GB": self.bytes / 1e9}
        b = self.bound
        seconds = [b.compute, b.memory] if b else ["-", "-"]
        for (name, amount), s in zip(amounts.items(), seconds):
            rows.append({"": name, "amount": amount, "seconds": s})
        if b:
            sent = sum(row["bytes"] for row in self.collectives) / 1e9
            rows.append({"": "interconnect GB", "amount": sent, "seconds": b.interconnect})
            rows.append({"": "network", "amount": "-", "seconds": b.network})
            rows.append({"": "as scheduled", "amount": "-", "seconds": b.scheduled})
        return rows


def compile_report(
    program: Program, mesh, topology: str, chip: Chip, hlo_dir: pathlib.Path | None = None
) -> Report:
    """Compiles a program and reports what it needs and executes.

    Args:
      program: the lowered program.
      mesh: its mesh.
      topology: name of the topology, for the report.
      chip: the chip of the devices.
      hlo_dir: directory to which the optimised HLO is written as `<program>.hlo`; None writes none.

    Raises:
      jax.errors.JaxRuntimeError: compilation failed for a reason other than a lack of memory, which
        is reported by `fits=False`.
    """
    platform = next(iter(mesh.devices.flat)).platform
    names = dict(
        program=program.name, topology=topology, mesh=dict(mesh.shape), batch=program.batch,
        length=program.length, parameters=program.parameters, model_flops=program.model_flops, chip=chip,
    )  # fmt: skip
    memory = program.argument_bytes()
    try:
        compiled, text, launched = _compile(program, platform)
    except jax.errors.JaxRuntimeError as error:
        shortage = _shortage(str(error), sum(memory.values()))
        if shortage is None:
            raise
        temporaries, available = shortage
        return Report(
            **names, memory={**memory, "temporaries": temporaries}, available=available, fits=False
        )
    analysis = compiled.memory_analysis()
    memory["temporaries"] = analysis.temp_size_in_bytes
    memory["results"] = max(  # those that do not reuse the memory of donated arguments
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0
    )
    memory["program"] = analysis.generated_code_size_in_bytes
    if hlo_dir is not None:
        hlo_dir.mkdir(parents=True, exist_ok=True)
        write_text(hlo_dir / f"{program.name}.hlo", text)
    region = costs.count(hlo.parse(text), kernels.of_model(program.config))
    network = bounds.Network([mesh.devices.flat[place] for place in first_slice(mesh)], chip)
    gpu = platform == "gpu"
    too_large = gpu and chip.memory and sum(memory.values()) > chip.memory
    regions = list(launches.by_region(region, launched)) if gpu else []
    return Report(
        **names, memory=memory, available=chip.memory, fits=not too_large,
        flops=region.total("flops"), bytes=region.total("bytes"),
        bound=bounds.bound(region, chip, network) if chip.flops else None,
        collectives=_collectives(region, mesh, chip if gpu and chip.link else None, network),
        loops=_loops(region, chip, network) if chip.flops else (),
        kernels=_kernels(regions), each=_each(program, regions), notes=_notes(region, text, gpu),
    )  # fmt: skip


def _compile(program: Program, platform: str) -> tuple[Any, str, launches.Launches | None]:
    """The compiled program, its optimised HLO text, and what the host launches if it is for a GPU.

    jaxlib 0.10.2 cannot read back the programs with asynchronous gathers that libtpu 0.0.52 writes, so
    for TPUs the text is taken from the compiler's dump, as are a GPU's launches.
    """
    if platform not in ("tpu", "gpu"):
        compiled = program.lowered.compile()
        return compiled, compiled.as_text(), None
    with _no_compilation_cache(), tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = program.lowered.compile(compiler_options=dump)
        files = pathlib.Path(folder)
        if platform == "gpu":
            thunks = list(files.glob("*.thunk_sequence_after_thunk_passes.txt"))
            launched = launches.parse(thunks[0].read_text()) if len(thunks) == 1 else None
            return compiled, compiled.as_text(), launched
        (text,) = files.glob("*.after_optimizations.txt")
        return compiled, text.read_text(), None


@contextlib.contextmanager
def _no_compilation_cache():
    """Compiles without JAX's cache, whose programs are not dumped and cannot be loaded without a device.

    JAX looks at the setting only once, hence the resets.
    """
    enabled = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _shortage(message: str, arguments: int) -> tuple[int, int] | None:
    """Parses the compiler's out-of-memory error: bytes of temporaries, and bytes available.

    None if the message is another error. `arguments` are the bytes of the program's arguments, which
    some compilers include in what they report.
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    size = r"([\d.]+)([KMGT]?)i?B?\b"
    number = lambda match, i: int(float(match[i]) * _UNITS[match[i + 1]])
    if match := re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", message):
        return number(match, 1), number(match, 3)
    if match := re.search(rf"Used {size} of {size}", message):  # includes the arguments
        return max(number(match, 1) - arguments, 0), number(match, 3)
    return None


def _collectives(region, mesh, gpu: Chip | None, network) -> tuple[dict[str, Any], ...]:
    """Rows of the report's collectives, those of the same kind, axes and group size added up."""
    totals = collections.defaultdict(lambda: np.zeros(4))  # {key: count, bytes, seconds, hidden seconds}
    hidden = bounds.hidden_seconds(region, gpu, network) if gpu else {}
    for collective, count in region.all_collectives().items():
        between = collective.kind.startswith(collectives.DCN)
        axes = "slices" if between else mesh_axes(collective.groups, mesh)
        key = collective.kind, axes, collective.size
        if collective.kind == "collective-permute":
            key = *key[:2], len(collective.groups)
        seconds = sum(network.seconds(collections.Counter([collective]))) if gpu else 0
        totals[key] += count, count * collective.sent, count * seconds, hidden.get(collective, 0)
    rows = []
    for (kind, axes, size), figures in totals.items():
        count, sent, seconds, beside = figures.tolist()
        row = {"kind": kind, "axes": axes, "group": size, "count": int(count), "bytes": sent}
        if gpu:
            row |= {"seconds": seconds, "hidden": beside / seconds if seconds else 0.0}
        rows.append(row)
    return tuple(sorted(rows, key=lambda row: -row["bytes"]))


def first_slice(mesh) -> list[int]:
    """Indices in the flattened mesh of the devices of the first slice. All slices run one program."""
    slices = [getattr(device, "slice_index", None) for device in mesh.devices.flat]
    return [place for place, index in enumerate(slices) if index == slices[0]]


def mesh_axes(groups, mesh) -> str:
    """Names of the mesh axes along which the members of a group differ, such as "fsdp"; "-" for none."""
    shape, devices = tuple(mesh.shape.values()), first_slice(mesh)
    differ = set()
    for group in groups:
        places = np.array([np.unravel_index(devices[member], shape) for member in group])
        differ |= set(np.flatnonzero((places != places[0]).any(axis=0)).tolist())
    return ", ".join(name for i, name in enumerate(mesh.shape) if i in differ) or "-"


def _loops(region, chip, network) -> tuple[dict[str, Any], ...]:
    """Rows of the report's loops, the slowest first."""
    rows = []
    for runs, path, inner in region.walk():
        interconnect, between_slices = network.seconds(inner.collectives)
        rows.append({
            "loop": _short(path[-1]),
            "runs": runs,
            "compute": runs * inner.flops / chip.flops,
            "memory": runs * inner.bytes / chip.bandwidth,
            "interconnect": runs * interconnect,
            "network": runs * between_slices,
            "scheduled": runs * bounds.scheduled_seconds(inner, chip, network),
        })  # fmt: skip
    rows.sort(key=lambda row: -row["scheduled"])
    return tuple(rows[:_LOOPS])


def _kernels(regions) -> tuple[dict[str, Any], ...]:
    """Rows of the report's kernels, in the order of the program; `regions` are of `by_region`."""
    return tuple(
        {
            "loop": _short(path[-1]),
            "pass": next((name for part, name in _PASSES.items() if part in path[-1]), "-"),
            "runs": runs,
            "kernels": inner.kernels,
            "graphs": launches_of and launches_of.graphs,
            "single launches": launches_of and launches_of.single,
        }
        for runs, path, inner, launches_of in regions
    )


def _each(program: Program, regions) -> dict[str, dict[str, int]]:
    """What a block of prefill or a token of decode launches, see `Report.each`."""
    rows = _kernels(regions)
    if rows and program.name == "prefill":
        return {"block": _launched(rows, program.length // program.config.block_size)}
    tokens = [row for row, (_, path, *_) in zip(rows, regions) if any(map(_TOKENS.search, path))]
    return {"token": _launched(tokens, tokens[0]["runs"])} if tokens else {}


def _launched(rows, parts: int = 1) -> dict[str, int]:
    """Totals of rows of kernels, divided by a number of parts; {} without rows."""
    known = all(row["graphs"] is not None for row in rows)
    names = ("kernels", "graphs", "single launches") if known else ("kernels",)
    total = lambda name: sum(row["runs"] * (row[name] or 0) for row in rows)
    return {name: round(total(name) / parts) for name in names} if rows else {}


def _short(name: str) -> str:
    """A loop's name without the parts that all loops have in common."""
    parts = name.split("/")
    parts = parts[1:] if parts[0].startswith("jit(") and parts[1:] else parts
    specific = [p for p in parts if p not in ("while", "body", "closed_call", "checkpoint")]
    return "/".join(name for name, _ in itertools.groupby(specific or parts))[-72:]


def _notes(region, text: str, gpu: bool) -> tuple[str, ...]:
    notes = []
    unknown = [_short(path[-1]) for _, path, inner in region.walk() if inner.trips is None]
    if unknown:
        notes.append(f"loops without a known number of runs, counted once: {', '.join(unknown)}")
    uncounted = sorted({kernel for _, _, inner in region.walk() for kernel in inner.uncounted})
    if uncounted:
        notes.append(f"kernels with unknown operations, not counted: {', '.join(uncounted)}")
    if gpu:
        notes.append("memory traffic includes what the L2 cache serves, which can make times too long")
    if 'custom_call_target="__cudnn' in text:
        notes.append("workspaces of cuDNN are chosen on the device and not included in the memory")
    return tuple(notes)
