"""Sections of `benchmarks.train_step`; each times its workloads in turns and returns a table."""

import dataclasses
from collections.abc import Callable

from benchmarks.workloads import Workload, forward, matrix_product, train_step
from famx.base.tables import Table
from famx.memories import Fam
from famx.modules import DecoderConfig, Memory
from famx.scale.timing import Spread, interleave
from famx.training.flops import train_flops

ORDERS = (1, 2, 4, None)  # values of blocks_per_chunk; None puts all blocks into one chunk


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark; `--quick` uses `QUICK`.

    Attributes:
      paper: the paper's block size S, memory segments M and memory length N.
      small: smaller S, M and N.
      model: other DecoderConfig fields.
      layers: number of layers in training steps.
      forward_layers: number of layers in forward passes.
      paper_length: tokens per example of a training step with `paper` (batch size 1).
      small_length: tokens per example of a training step with `small`.
      small_batch: examples per training step with `small`.
      orders: values of `blocks_per_chunk` to compare.
      full_lengths: input lengths for the comparison with full attention.
      stream_lengths: input lengths for reading block by block.
      matrix: rows and columns of the reference matrix product.
    """

    paper: tuple[int, int, int] = (1024, 3, 64)
    small: tuple[int, int, int] = (256, 1, 16)
    model: tuple[tuple[str, int], ...] = (
        ("vocab_size", 512), ("embed_dim", 256), ("num_heads", 4), ("head_dim", 64),
        ("mlp_dim", 1024),
    )  # fmt: skip
    layers: int = 4
    forward_layers: int = 2
    paper_length: int = 8192
    small_length: int = 4096
    small_batch: int = 2
    orders: tuple[int | None, ...] = ORDERS
    full_lengths: tuple[int, ...] = (4096, 16384, 32768)
    stream_lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    matrix: int = 2048

    def config(self, memory: tuple[int, int, int], layers: int, **changes) -> DecoderConfig:
        """Config with the given `(S, M, N)` and number of layers; `changes` are applied last."""
        size, segments, length = memory
        memory = Fam(length) if length else Memory()
        fields = dict(block_size=size, memory_segments=segments, memory=memory, num_layers=layers)
        return DecoderConfig(**{**dict(self.model), **fields, **changes})


# `paper` and `small` are equal here, so that sections share compiled workloads.
QUICK = Sizes(
    paper=(16, 1, 4), small=(16, 1, 4), layers=1, forward_layers=1, paper_length=64,
    small_length=64, small_batch=1, orders=(1, None), full_lengths=(64,), stream_lengths=(64, 128),
    matrix=128,
    model=(
        ("vocab_size", 32), ("embed_dim", 16), ("num_heads", 2), ("head_dim", 8), ("mlp_dim", 32),
    ),
)  # fmt: skip


def fam_vs_bswa(sizes: Sizes, repeats: int) -> Table:
    """Training step of FAM compared with BSWA, at the paper's S, M and N."""
    fam = sizes.config(sizes.paper, sizes.layers)
    configs = {"FAM": fam, "BSWA": dataclasses.replace(fam, memory=Memory())}
    length = sizes.paper_length
    steps = {name: train_step(config, 1, length) for name, config in configs.items()}
    work = {name: sum(train_flops(c, 1, length).values()) for name, c in configs.items()}
    times = _measure(steps, repeats)
    rows = [
        {
            "model": name,
            "seconds": times.spread(name),
            "time / BSWA": times.ratio(name, "BSWA"),
            "operations / BSWA": work[name] / work["BSWA"],
            "temp MiB": _mib(step),
        }
        for name, step in steps.items()
    ]
    title = "Training step, FAM over BSWA"
    return Table("fam_vs_bswa", title, (_shape(fam, 1, length, repeats),), rows)


def chunks(sizes: Sizes, repeats: int) -> Table:
    """Training steps with 1, 2, 4 and all blocks per chunk, at the small and the paper's sizes."""
    rows, notes = [], []
    for memory, batch, length, rounds in (
        (sizes.small, sizes.small_batch, sizes.small_length, repeats),
        (sizes.paper, 1, sizes.paper_length, -(-repeats // 3)),
    ):
        config = sizes.config(memory, sizes.layers)
        notes.append(_shape(config, batch, length, rounds))
        steps = {
            str(order or "all"): train_step(
                dataclasses.replace(config, blocks_per_chunk=order), batch, length
            )
            for order in sizes.orders
        }
        times = _measure(steps, rounds)
        for name, step in steps.items():
            rows.append({
                "S": config.block_size,
                "blocks per chunk": name,
                "seconds": times.spread(name),
                "time / all": times.ratio(name, "all"),
                "temp MiB": _mib(step),
                "temp / all": step.temp_bytes / steps["all"].temp_bytes,
            })  # fmt: skip
    return Table("chunks", "Training step by blocks per chunk", tuple(notes), rows)


def matmul_share(sizes: Sizes, repeats: int) -> Table:
    """Rate of operations of a training step as a share of the machine's matrix-product rate."""
    fam = sizes.config(sizes.small, sizes.layers)
    configs = {"FAM": fam, "BSWA": dataclasses.replace(fam, memory=Memory())}
    batch, length = sizes.small_batch, sizes.small_length
    steps = {name: train_step(config, batch, length) for name, config in configs.items()}
    product, product_flops = matrix_product(sizes.matrix)
    times = _measure({**steps, "product": product}, repeats)
    rate = Spread.of(product_flops / times.seconds["product"] / 1e9)
    rows = []
    for name, config in configs.items():
        work = sum(train_flops(config, batch, length).values())
        rows.append({
            "model": name,
            "seconds": times.spread(name),
            "tokens/s": Spread.of(batch * length / times.seconds[name]),
            "GFLOP": work / 1e9,
            "GFLOP/s": Spread.of(work / times.seconds[name] / 1e9),
            "machine GFLOP/s": rate,
            "share %": times.ratio("product", name, 100 * work / product_flops),
        })  # fmt: skip
    notes = (
        _shape(fam, batch, length, repeats),
        f"machine: float32 product of two matrices of {sizes.matrix} x {sizes.matrix}",
    )
    return Table("matmul_share", "Share of the matrix-product rate", notes, rows)


def dtypes(sizes: Sizes, repeats: int) -> Table:
    """Training step that computes in bfloat16 compared with float32; parameters are float32 in both."""
    wide = sizes.config(sizes.small, sizes.layers)
    batch, length = sizes.small_batch, sizes.small_length
    configs = {name: dataclasses.replace(wide, dtype=name) for name in ("float32", "bfloat16")}
    steps = {name: train_step(config, batch, length) for name, config in configs.items()}
    times = _measure(steps, repeats)
    rows = [
        {
            "dtype": name,
            "seconds": times.spread(name),
            "time / float32": times.ratio(name, "float32"),
            "temp MiB": _mib(step),
        }
        for name, step in steps.items()
    ]
    notes = (_shape(wide, batch, length, repeats, "parameters float32"),)
    return Table("dtypes", "Training step by compute dtype", notes, rows)


def full_vs_fam(sizes: Sizes, repeats: int) -> Table:
    """Forward pass of full causal attention compared with FAM, over the input length."""
    rows, repeats = [], -(-repeats // 3)  # a round takes half a minute on a small machine
    fam = sizes.config(sizes.paper, sizes.forward_layers)
    for length in sizes.full_lengths:
        full = sizes.config((length, 0, 0), sizes.forward_layers)
        by_block = dataclasses.replace(fam, blocks_per_chunk=1)
        reads = {
            "full": forward(full, 1, length, logits=True, full=True),
            "FAM": forward(fam, 1, length, logits=True),
            "FAM by block": forward(by_block, 1, length, logits=True),
        }
        times = _measure(reads, repeats)
        for name in list(reads)[1:]:
            rows.append({
                "tokens": length,
                "order": "all blocks" if name == "FAM" else "one block",
                "full, s": times.spread("full"),
                "FAM, s": times.spread(name),
                "time, full / FAM": times.ratio("full", name),
                "full, temp MiB": _mib(reads["full"]),
                "FAM, temp MiB": _mib(reads[name]),
                "temp, full / FAM": reads["full"].temp_bytes / reads[name].temp_bytes,
            })  # fmt: skip
    notes = (_shape(fam, 1, None, repeats), "full: the same model with all tokens in one block")
    return Table("full_vs_fam", "Forward pass, full attention over FAM", notes, rows)


def over_length(sizes: Sizes, repeats: int) -> Table:
    """Time per token and memory of reading block by block, over the input length."""
    config = sizes.config(sizes.paper, sizes.forward_layers, blocks_per_chunk=1)
    lengths = {str(length): length for length in sizes.stream_lengths}
    reads = {name: forward(config, 1, length, logits=False) for name, length in lengths.items()}
    times = _measure(reads, repeats)
    first = next(iter(lengths))
    rows = [
        {
            "tokens": length,
            "microseconds per token": times.spread(name, 1e6 / length),
            f"per token / {first}": times.ratio(name, first, lengths[first] / length),
            "temp MiB": _mib(reads[name]),
            f"temp / {first}": reads[name].temp_bytes / reads[first].temp_bytes,
        }
        for name, length in lengths.items()
    ]
    title = "Forward pass of FAM, one block at a time"
    return Table("length", title, (_shape(config, 1, None, repeats),), rows)


SECTIONS: dict[str, Callable[[Sizes, int], Table]] = {
    "fam_vs_bswa": fam_vs_bswa,
    "chunks": chunks,
    "matmul_share": matmul_share,
    "dtypes": dtypes,
    "full_vs_fam": full_vs_fam,
    "length": over_length,
}


def _measure(workloads: dict[str, Workload], repeats: int):
    return interleave({name: workload.run for name, workload in workloads.items()}, repeats)


def _mib(workload: Workload) -> float:
    return workload.temp_bytes / 2**20


def _shape(c: DecoderConfig, batch: int, length: int | None, repeats: int, dtype: str = "") -> str:
    tokens = "" if length is None else f", {length} tokens"
    mlp = "gated feed-forward" if c.gated_mlp else "feed-forward"
    return (
        f"S {c.block_size}, M {c.memory_segments}, N {c.memory_columns}; {c.num_layers} layers, width"
        f" {c.embed_dim}, {c.num_heads} heads of {c.head_dim}, {mlp} {c.mlp_dim}, vocabulary"
        f" {c.vocab_size}; batch {batch}{tokens}; {dtype or c.dtype}; {repeats} repeats"
    )
