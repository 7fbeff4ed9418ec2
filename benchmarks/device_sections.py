"""Sections of `benchmarks.device`; each is a plan of the rows of its table."""

import dataclasses
import functools
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

import jax
import numpy as np

import famx.data
from benchmarks import peers, peers_famx, workloads
from benchmarks.budget import Budget
from benchmarks.peer_shape import Shape
from benchmarks.plans import Figures, Plan, Results, Row, in_turns, timed
from benchmarks.turns import Worker
from benchmarks.workloads import Workload
from famx.base.chips import peak_flops
from famx.lora import Lora
from famx.memories import Fam
from famx.models import DecoderModel, loss_weights
from famx.modules import Decoder, DecoderConfig, Memory
from famx.modules.backends import ATTENTION_BACKENDS, refusal, resolve_backend
from famx.scale.timing import Spread, Timings
from famx.training import loop
from famx.training.flops import train_flops
from famx.training.run import Run
from famx.training.run_log import read_metrics

# Seconds that a measurement needs on an H100, compilation included, until it was measured in this
# process: those of training are figures of an older version, the others are estimates.
NEEDS = {
    "train FAM": 70.0, "train BSWA": 15.0, "finetune FAM": 70.0, "finetune BSWA": 25.0,
    "prefill FAM": 20.0, "prefill BSWA": 15.0, "decode FAM": 25.0, "decode BSWA": 20.0,
    "peer FAM": 45.0, "peer": 25.0,
}  # fmt: skip
_LOG_LINES = 3  # of a finetuning run; the first one includes the compilation and does not count


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark (`--quick` uses `QUICK`), and the values of its options.

    Attributes:
      small: DecoderConfig fields of SmolLM2-135M.
      large: DecoderConfig fields of the paper's 1B model.
      memory: block size S, memory segments M and memory length N.
      long: rows, and tokens of a row, of a training step of the small model.
      short: likewise, for more and shorter rows.
      large_rows: likewise, for the large model.
      finetune_memory: S, M and N of finetuning.
      finetune: rows, and tokens of a row, of a finetuning step.
      finetune_log: steps between two lines of the log.
      lora_rank: rank of the adapters.
      prefill: batch sizes, and tokens that each example reads, whole blocks.
      decode: batch sizes.
      peer: sizes of the comparison with other implementations.
      loss_chunk: number of tokens whose logits are materialised at once in training.
      needs: seconds of each kind of measurement, until it was measured.
      budget_seconds: seconds for all sections.
      backends: "auto", or "all" to measure training with every attention backend.
    """

    small: tuple[tuple[str, int], ...] = (
        ("vocab_size", 49_152), ("num_layers", 30), ("embed_dim", 576), ("num_heads", 9),
        ("num_kv_heads", 3), ("mlp_dim", 1536),
    )  # fmt: skip
    large: tuple[tuple[str, int], ...] = (
        ("vocab_size", 256_000), ("num_layers", 18), ("embed_dim", 1536), ("num_heads", 12),
        ("mlp_dim", 12_288),
    )  # fmt: skip
    memory: tuple[int, int, int] = (1024, 3, 64)
    long: tuple[int, int] = (8, 8704)
    short: tuple[int, int] = (32, 2048)
    large_rows: tuple[int, int] = (2, 8704)
    finetune_memory: tuple[int, int, int] = (256, 0, 64)
    finetune: tuple[int, int] = (32, 2048)
    finetune_log: int = 5
    lora_rank: int = 64
    prefill: tuple[tuple[int, ...], int] = ((1, 8), 16_384)
    decode: tuple[int, ...] = (1, 16, 64)
    peer: Shape = Shape(
        vocabulary=512, layers=12, width=768, heads=12, feed_forward=2048, block=512, memory_length=32,
        batch=4, length=4096, dtype="bfloat16",
    )  # fmt: skip
    loss_chunk: int = 1024
    needs: Mapping[str, float] = dataclasses.field(default_factory=lambda: NEEDS)
    budget_seconds: float = 240.0
    backends: str = "auto"

    def config(
        self, model: tuple[tuple[str, int], ...], memory: tuple[int, int, int] | None = None, **changes
    ) -> DecoderConfig:
        """FAM config of `model` in bfloat16, with `changes` applied last; `memory` is S, M and N."""
        size, segments, length = memory or self.memory
        fields = dict(block_size=size, memory_segments=segments, memory=Fam(length), dtype="bfloat16")
        return DecoderConfig(**{**dict(model), **fields, **changes})


_TINY = (("vocab_size", 128), ("num_layers", 1), ("embed_dim", 16), ("num_heads", 2), ("mlp_dim", 32))
QUICK = Sizes(
    small=_TINY, large=_TINY, memory=(16, 1, 4), long=(1, 40), short=(2, 24), large_rows=(1, 40),
    finetune_memory=(16, 0, 4), finetune=(2, 64), finetune_log=2, lora_rank=4, prefill=((1,), 32),
    decode=(1, 2), peer=dataclasses.replace(peers.QUICK.small, dtype="bfloat16"), loss_chunk=16,
    needs=dict.fromkeys(NEEDS, 5.0),
)  # fmt: skip


# ---------------------------------------------------------------- training


def training(name: str, model: str, sizes: Sizes, repeats: int, fields, rows: tuple[int, int]) -> Plan:
    """Training steps of FAM and BSWA, with one or all attention backends."""
    batch, length = rows
    base = sizes.config(fields, remat="attention")
    groups = [
        [_training_row(config, rows, sizes) for config in _both(base, attention_backend=backend)]
        for backend in backends(base, jax.devices()[0], sizes.backends)
    ]
    return Plan(
        name,
        f"Training step of {model} on one device, {batch} x {length} tokens",
        (_shape(base), f"{_loss_note(sizes, base)}; AdamW; at most {repeats} repeats", _device_note()),
        ("seconds", "tokens/s", "time / BSWA", "TFLOP", "TFLOP/s", "MFU %", "temp MiB"),
        groups,
        functools.partial(in_turns, repeats=repeats, figures=_training_figures),
    )


def _training_row(config: DecoderConfig, rows: tuple[int, int], sizes: Sizes) -> Row:
    batch, length = rows
    return Row(
        {"model": _kind(config), "backend": config.attention_backend},
        f"train {_kind(config)}",
        lambda: workloads.train_step(config, batch, length, sizes.loss_chunk),
        tokens=batch * length,
        work=sum(train_flops(config, batch, length).values()),
    )


def _training_figures(row: Row, workload: Workload, times: Timings) -> Figures:
    return {
        **_speed(row, times),
        "time / BSWA": _ratio(row, "BSWA", times),
        "TFLOP": row.work / 1e12,
        **_share(row.work, times.seconds[row]),
        "temp MiB": workload.temp_bytes / 2**20,
    }


def backends(config: DecoderConfig, device: jax.Device, which: str) -> list[str]:
    """The backend that `auto` picks on `device`; if `which` is "all", then all others that can run."""

    def runs(backend):
        if backend == "auto" or refusal(config, backend):
            return False
        try:
            resolve_backend(dataclasses.replace(config, attention_backend=backend), device)
        except ValueError:
            return False
        return True

    first = resolve_backend(config, device)
    others = [backend for backend in ATTENTION_BACKENDS if runs(backend) and backend != first]
    return [first, *others] if which == "all" else [first]


# ---------------------------------------------------------------- finetuning


def finetuning(sizes: Sizes, repeats: int) -> Plan:
    """Finetuning with LoRA as `famx.train` does it, on a task that is made on the host."""
    base = sizes.config(sizes.small, sizes.finetune_memory, remat="dots")
    (batch, length), log = sizes.finetune, sizes.finetune_log
    del repeats  # one run for each row
    groups = [
        [Row({"model": _kind(c)}, f"finetune {_kind(c)}", functools.partial(_finetuning_run, c, sizes))]
        for c in _both(base)
    ]
    notes = (
        f"{_shape(base)}; {_loss_note(sizes, base)}; adapters of rank {sizes.lora_rank} on all"
        " projections, frozen kernels in bfloat16; AdamW; PassKey",
        f"`famx.training.loop.train`, waiting for the host included: {_LOG_LINES - 1} lines of the log,"
        f" {log} steps each, after the first; data_wait: share of the time in which the loop waits for a"
        " batch",
        _device_note(),
    )
    columns = ("seconds", "tokens/s", "data_wait %", "TFLOP/s", "MFU %")
    title = f"Finetuning 135M with LoRA on one device, {batch} x {length} tokens"
    return Plan("device_finetune", title, notes, columns, groups, _finetuned)


def _finetuning_run(config: DecoderConfig, sizes: Sizes) -> Run:
    model = DecoderModel(Decoder(config), loss_chunk=sizes.loss_chunk, lora=Lora(rank=sizes.lora_rank))
    (batch, length), log = sizes.finetune, sizes.finetune_log
    return workloads.finetuning(model, batch, length, _LOG_LINES * log, log)


def _finetuned(rows: Sequence[Row], budget: Budget) -> Results:
    results = {}
    for row in rows:
        results[row], seconds = timed(lambda run=row.start: _finetuning_figures(run(), budget))
        budget.learn(row.kind, seconds)
    return results


def _finetuning_figures(run: Run, budget: Budget) -> Figures:
    folder = budget.at_end.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    loop.train(dataclasses.replace(run, model_dir=folder))
    lines = read_metrics(folder, "train")[1:]
    column = lambda name: np.array([line[name] for line in lines])
    data, config = run.data, run.model.config
    task = famx.data.get(data.task, **data.options)
    weighted = np.count_nonzero(loss_weights(task.batch(range(data.batch_size), data.length)))
    work = train_flops(config, data.batch_size, data.length, learning=run.learning, weighted=weighted)
    return {
        "seconds": Spread.of(column("step_seconds")),
        "tokens/s": Spread.of(column("tokens_per_second")),
        "data_wait %": Spread.of(100 * column("data_wait")),
        **_share(sum(work.values()), column("step_seconds")),
    }


# ---------------------------------------------------------------- inference


def prefill(sizes: Sizes, repeats: int) -> Plan:
    """Reading a long text with a `Streamer`."""
    batches, length = sizes.prefill
    title = f"Reading with 135M on one device, {length} tokens"
    start = functools.partial(workloads.prefill, length=length)
    return _inference("prefill", title, sizes, repeats, batches, length, start)


def decode(sizes: Sizes, repeats: int) -> Plan:
    """Generating token by token with a `Streamer`."""
    length = sizes.memory[0]  # a whole block, so that updates of the memory are counted in full
    title = f"Generation with 135M on one device, {length} tokens"
    start = functools.partial(workloads.decode, tokens=length)
    return _inference("decode", title, sizes, repeats, sizes.decode, length, start)


def _inference(what: str, title: str, sizes: Sizes, repeats: int, batches, length: int, start) -> Plan:
    base = sizes.config(sizes.small, param_dtype="bfloat16")
    groups = [
        [
            Row(
                {"batch": batch, "model": _kind(config)},
                f"{what} {_kind(config)}",
                functools.partial(start, config, batch),
                tokens=batch * length,
            )
            for config in _both(base)
        ]
        for batch in batches
    ]

    def figures(row: Row, workload: Workload, times: Timings) -> Figures:
        milliseconds = times.spread(row, 1e3 / length)
        ratio = _ratio(row, "BSWA", times)
        return {**_speed(row, times), "ms per token": milliseconds, "time / BSWA": ratio}

    columns = ("seconds", "tokens/s", "ms per token", "time / BSWA")
    notes = (
        f"{_shape(base)}, weights likewise; `famx.decoding.Streamer`; at most {repeats} repeats",
        f"tokens/s of all examples together; ms per token: time for one token of every example, of"
        f" {length}",
        _device_note(),
    )
    measure = functools.partial(in_turns, repeats=repeats, figures=figures)
    return Plan(f"device_{what}", title, notes, columns, groups, measure)


# ---------------------------------------------------------------- other implementations


def others(sizes: Sizes, repeats: int) -> Plan:
    """Training steps of PyTorch implementations, each in turns with FAM of the same shape."""
    platform = jax.default_backend()
    shape = dataclasses.replace(sizes.peer, device="cuda" if platform == "gpu" else "cpu")
    groups = [
        [_fam_row(shape, segments), _peer_row(shape, segments, label, *build)]
        for segments, builds in peers.TORCH.items()
        for label, build in builds.items()
    ]

    def figures(row: Row, workload: Workload, times: Timings) -> Figures:
        ratio = _ratio(row, "famx FAM", times)
        return {**_speed(row, times), "parameters": workload.parameters, "tokens/s, FAM / this": ratio}

    notes = (
        f"S {shape.block}, N {shape.memory_length}; {shape.layers} layers, width {shape.width},"
        f" {shape.heads} heads of {shape.head_dim}, gated feed-forward {shape.feed_forward}, vocabulary"
        f" {shape.vocabulary}; bfloat16, parameters in float32, AdamW; at most {repeats} repeats",
        "PyTorch in its own process, with autocast and fused attention; every row is timed in turns with"
        " FAM of the same M, in the row above it",
        _device_note(),
    )
    return Plan(
        "device_peers",
        f"Training speed of several implementations on one device, {shape.batch} x {shape.length} tokens",
        notes,
        ("seconds", "tokens/s", "tokens/s, FAM / this", "parameters"),
        groups,
        functools.partial(in_turns, repeats=repeats, figures=figures),
        lambda: torch_refusal(platform),
    )


def _fam_row(shape: Shape, segments: int) -> Row:
    config = peers_famx.config_of(shape, segments)
    start = lambda: workloads.train_step(config, shape.batch, shape.length)
    labels = {"M": segments, "model": "famx FAM"}
    return Row(labels, "peer FAM", start, tokens=shape.batch * shape.length)


def _peer_row(shape: Shape, segments: int, label: str, build: str, arguments: dict) -> Row:
    def start():
        worker = Worker(label, build, {"shape": dataclasses.asdict(shape), **arguments})
        parameters = worker.facts["parameters"]
        return Workload(lambda: worker.run(1), parameters=parameters, close=worker.close)

    return Row({"M": segments, "model": label}, "peer", start, tokens=shape.batch * shape.length)


def torch_refusal(platform: str) -> str | None:
    """One sentence that says why PyTorch cannot use this device, or None."""
    if importlib.util.find_spec("torch") is None:
        return "the package torch is not installed."
    if platform not in ("cpu", "gpu"):
        return f"PyTorch is not measured on a device of the kind {platform}."
    if platform == "gpu":
        program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        if subprocess.run([sys.executable, "-c", program], capture_output=True).returncode:
            return "the installed torch finds no CUDA device."
    return None


# ---------------------------------------------------------------- figures and notes


def _both(config: DecoderConfig, **changes) -> list[DecoderConfig]:
    """The FAM config and the same one without a memory, both with `changes`."""
    return [dataclasses.replace(config, memory=memory, **changes) for memory in (config.memory, Memory())]


def _kind(config: DecoderConfig) -> str:
    return "FAM" if config.memory_columns else "BSWA"


def _speed(row: Row, times: Timings) -> Figures:
    return {
        "seconds": times.spread(row),
        "tokens/s": Spread.of(row.tokens / times.seconds[row]),
    }


def _ratio(row: Row, model: str, times: Timings) -> Spread | str:
    """Time of the row divided by that of the row of `model`, if it was measured as well."""
    reference = [other for other in times.seconds if other.labels["model"] == model]
    return times.ratio(row, reference[0]) if reference else ""


def _share(work: int, seconds: np.ndarray) -> Figures:
    peak = peak_flops(jax.devices()[0].device_kind)
    rate = work / seconds
    share = "peak not known" if peak is None else Spread.of(100 * rate / peak)
    return {"TFLOP/s": Spread.of(rate / 1e12), "MFU %": share}


def _shape(c: DecoderConfig) -> str:
    return (
        f"S {c.block_size}, M {c.memory_segments}, N {c.memory_columns}; {c.num_layers} layers, width"
        f" {c.embed_dim}, {c.num_heads} heads of {c.head_dim}, gated feed-forward {c.mlp_dim}, vocabulary"
        f" {c.vocab_size}; {c.dtype}"
    )


def _loss_note(sizes: Sizes, config: DecoderConfig) -> str:
    return f"remat {config.remat}, logits of {sizes.loss_chunk} tokens at once"


def _device_note() -> str:
    kind = jax.devices()[0].device_kind
    peak = peak_flops(kind)
    shown = "not known" if peak is None else f"{peak / 1e12:g} TFLOP/s in bfloat16, dense"
    return f"one device, {kind}; its peak: {shown}"


# In order of worth: the later ones are left out first if the time is short.
SECTIONS = {
    "device_135m": lambda s, n: training("device_135m", "135M", s, n, s.small, s.long),
    "device_1b": lambda s, n: training("device_1b", "1B", s, n, s.large, s.large_rows),
    "device_finetune": finetuning,
    "device_decode": decode,
    "device_prefill": prefill,
    "device_135m_short": lambda s, n: training("device_135m_short", "135M", s, n, s.small, s.short),
    "device_peers": others,
}
