"""Benchmark of training steps at realistic sizes on one GPU or TPU: `python -m benchmarks.device`.

FAM and BSWA with every attention backend of the device, timed in turns in one process. See docs/gpu.md.
"""

import dataclasses

import jax

from benchmarks import command
from benchmarks.timing import Spread, interleave
from benchmarks.workloads import train_step
from famx.base.chips import peak_flops
from famx.base.tables import Table
from famx.memories import Fam
from famx.modules import DecoderConfig, Memory
from famx.modules.backends import ATTENTION_BACKENDS, refusal, resolve_backend
from famx.training.flops import train_flops


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark; `--quick` uses `QUICK`.

    Attributes:
      small: DecoderConfig fields of SmolLM2-135M.
      large: DecoderConfig fields of the paper's 1B model.
      memory: block size S, memory segments M and memory length N.
      length: tokens per example.
      small_batch: examples per step of the small model.
      large_batch: examples per step of the large model.
      remat: rematerialisation policy; recomputed operations do not count as work.
      loss_chunk: number of tokens whose logits are materialised at once.
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
    length: int = 8704
    small_batch: int = 4
    large_batch: int = 1
    remat: str = "full"
    loss_chunk: int = 1024

    def config(self, model: tuple[tuple[str, int], ...], **changes) -> DecoderConfig:
        """Config of `model` in bfloat16 with these sizes, and with `changes` applied last."""
        size, segments, length = self.memory
        memory = Fam(length) if length else Memory()
        fields = dict(block_size=size, memory_segments=segments, memory=memory, remat=self.remat)
        return DecoderConfig(**{**dict(model), **fields, "dtype": "bfloat16", **changes})


_TINY = (("vocab_size", 32), ("num_layers", 1), ("embed_dim", 16), ("num_heads", 2), ("mlp_dim", 32))
QUICK = Sizes(_TINY, _TINY, (16, 1, 4), length=40, small_batch=1, loss_chunk=16)


def backends(config: DecoderConfig, device: jax.Device) -> list[str]:
    """Attention backends that can compute this model on `device`."""

    def runs(backend):
        if backend == "auto" or refusal(config, backend):
            return False
        try:
            resolve_backend(dataclasses.replace(config, attention_backend=backend), device)
        except ValueError:
            return False
        return True

    return [backend for backend in ATTENTION_BACKENDS if runs(backend)]


def section(name: str, title: str, sizes: Sizes, model, batch: int, repeats: int) -> Table:
    """Table of training steps of FAM and BSWA with each backend, and of the share of the peak rate."""
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    steps, configs = {}, {}
    for backend in backends(sizes.config(model), device):
        for kind, changes in (("FAM", {}), ("BSWA", {"memory": Memory()})):
            config = sizes.config(model, attention_backend=backend, **changes)
            configs[f"{kind} {backend}"] = config
            steps[f"{kind} {backend}"] = train_step(config, batch, sizes.length, sizes.loss_chunk)
    times = interleave({key: step.run for key, step in steps.items()}, repeats)
    rows = []
    for key, config in configs.items():
        kind, backend = key.split()
        work = sum(train_flops(config, batch, sizes.length).values())
        rate = work / times.seconds[key]
        rows.append({
            "model": kind,
            "backend": backend,
            "seconds": times.spread(key),
            "tokens/s": Spread.of(batch * sizes.length / times.seconds[key]),
            "time / BSWA": times.ratio(key, f"BSWA {backend}"),
            "TFLOP": work / 1e12,
            "TFLOP/s": Spread.of(rate / 1e12),
            "MFU %": "peak not known" if peak is None else Spread.of(100 * rate / peak),
            "temp MiB": steps[key].temp_bytes / 2**20,
        })  # fmt: skip
    c = next(iter(configs.values()))
    shown_peak = "not known" if peak is None else f"{peak / 1e12:g} TFLOP/s in bfloat16, dense"
    notes = (
        f"S {c.block_size}, M {c.memory_segments}, N {c.memory_columns}; {c.num_layers} layers, width"
        f" {c.embed_dim}, {c.num_heads} heads of {c.head_dim}, gated feed-forward {c.mlp_dim}, vocabulary"
        f" {c.vocab_size}; batch {batch}, {sizes.length} tokens; bfloat16, remat {c.remat}, logits of"
        f" {sizes.loss_chunk} tokens at once; AdamW; {repeats} repeats",
        f"one device, {device.device_kind}; its peak: {shown_peak}",
    )
    return Table(name, title, notes, rows)


def small(sizes: Sizes, repeats: int) -> Table:
    """Training steps at the sizes of SmolLM2-135M."""
    title = "Training step of 135M on one device"
    return section("device_135m", title, sizes, sizes.small, sizes.small_batch, repeats)


def large(sizes: Sizes, repeats: int) -> Table:
    """Training steps at the sizes of the paper's 1B model."""
    title = "Training step of 1B on one device"
    return section("device_1b", title, sizes, sizes.large, sizes.large_batch, repeats)


SECTIONS = {"device_135m": small, "device_1b": large}


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark's command line."""
    command.run("benchmarks.device", __doc__.splitlines()[0], SECTIONS, Sizes(), QUICK, 10, argv)


if __name__ == "__main__":
    main()
