"""Benchmark of packing documents into rows: `python -m benchmarks.data_pipeline`.

All pipelines read the same documents, each in its own process, in turns. Pin the benchmark to one core
with `taskset -c 1`. Documents are random bytes, one token each, with log-normally distributed sizes.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks import command
from famx.base import tables
from famx.scale.timing import Spread, peak_memory

REFERENCE = "seqio.trim_and_pack_dataset"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark; `--quick` uses `QUICK`.

    Attributes:
      documents: number of documents.
      median: median document size in tokens.
      length: tokens per row.
      seconds: duration of the measurement after the first batch.
    """

    documents: int = 5000
    median: int = 1500
    length: int = 8704
    seconds: float = 4.0


QUICK = Sizes(documents=40, median=20, length=64, seconds=0.01)
_BATCH = 8


def make_documents(sizes: Sizes) -> list[np.ndarray]:
    """Random documents of lower-case letters, int32 token ids, identical in every process."""
    rng = np.random.default_rng(0)
    counts = 1 + (sizes.median * rng.lognormal(0, 1, sizes.documents)).astype(int)
    tokens = rng.integers(97, 123, counts.sum(), np.int32) + 3
    return np.split(tokens, np.cumsum(counts)[:-1])


# ---------------------------------------------------------------- pipelines
# Each takes documents and sizes and returns a function that creates the iterator over batches. Only the
# time of that function is measured, not that of preparing the documents.


def _packed_rows(documents, sizes, **kwargs):
    from famx.data.rows.packing import PackedRows

    return lambda: PackedRows(documents, _BATCH, sizes.length, **kwargs)


def _weighted(documents, sizes):
    pairs = [(tokens, np.full(len(tokens), 0.5, np.float32)) for tokens in documents]
    return _packed_rows(pairs, sizes)


def _jsonl(documents, sizes):
    from famx.data import ByteVocabulary
    from famx.data.rows.packing import PackedRows
    from famx.data.storage.records import JsonlRecords, RecordDocuments

    folder = tempfile.TemporaryDirectory()
    path = pathlib.Path(folder.name) / "documents.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for tokens in documents:
            text = (tokens - 3).astype(np.uint8).tobytes().decode()
            file.write(json.dumps({"text": text}) + "\n")

    def start():
        records = JsonlRecords(path)
        records.folder = folder  # keeps the temporary directory alive as long as the records
        texts = RecordDocuments(records, "text", vocabulary=ByteVocabulary())
        return PackedRows(texts, _BATCH, sizes.length)

    return start


def _dataset(documents, weights=False):
    import tensorflow as tf

    counts, tokens = [len(tokens) for tokens in documents], np.concatenate(documents)
    features = {"targets": tokens}
    if weights:
        features["loss_weights"] = np.full(len(tokens), 0.5, np.float32)
    ragged = {k: tf.RaggedTensor.from_row_lengths(v, counts) for k, v in features.items()}
    return tf.data.Dataset.from_tensor_slices(ragged).repeat()


def _converter(documents, sizes, weights=False):
    from famx.data.seqio import FamFeatureConverter

    dataset, lengths = _dataset(documents, weights), {"targets": sizes.length}
    convert = FamFeatureConverter(pack=True)
    return lambda: convert(dataset, lengths).batch(_BATCH).as_numpy_iterator()


def _seqio(documents, sizes):
    import seqio

    dataset, lengths = _dataset(documents), {"targets": sizes.length}
    pack = seqio.trim_and_pack_dataset
    return lambda: pack(dataset, lengths).batch(_BATCH).as_numpy_iterator()


PIPELINES: dict[str, Callable] = {
    "PackedRows": _packed_rows,
    "PackedRows, whole documents": functools.partial(_packed_rows, whole_documents=True),
    "PackedRows, weights": _weighted,
    "PackedRows, JSON lines": _jsonl,
    "FamFeatureConverter": _converter,
    "FamFeatureConverter, weights": functools.partial(_converter, weights=True),
    REFERENCE: _seqio,
}


# -------------------------------------------------------------- measurement
def measure(name: str, sizes: Sizes) -> dict[str, float]:
    """Measures one pipeline in this process. Padding does not count as tokens."""
    start = PIPELINES[name](make_documents(sizes), sizes)
    before = peak_memory(forget=True)
    began = time.perf_counter()
    batches = start()
    next(batches)
    first, memory = time.perf_counter() - began, peak_memory() - before
    tokens, began = 0, time.perf_counter()
    while True:
        batch = next(batches)
        tokens += np.count_nonzero(batch.get("decoder_target_tokens", batch.get("targets")))
        seconds = time.perf_counter() - began
        if seconds > sizes.seconds:
            return {"tokens/s": tokens / seconds, "first s": first, "first MiB": memory}


def section(sizes: Sizes, repeats: int) -> tables.Table:
    """Table of all pipelines, each measured `repeats` times in a new process, in turns."""
    figures = {name: [] for name in PIPELINES}
    for turn in range(repeats):
        for name in PIPELINES if turn % 2 == 0 else reversed(PIPELINES):
            arguments = [sys.executable, "-m", "benchmarks.data_pipeline", f"--measure={name}"]
            done = subprocess.run(
                arguments + ["--quick"] * (sizes == QUICK), stdout=subprocess.PIPE, text=True, check=True,
                env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"},
            )  # fmt: skip
            figures[name].append(json.loads(done.stdout.splitlines()[-1]))
    column = lambda name, key, scale=1: np.array([x[key] for x in figures[name]]) * scale
    rows = [
        {
            "pipeline": name,
            "Mtoken/s": Spread.of(column(name, "tokens/s", 1e-6)),
            "tokens/s / seqio": Spread.of(column(name, "tokens/s") / column(REFERENCE, "tokens/s")),
            "first batch s": Spread.of(column(name, "first s")),
            "first batch MiB": Spread.of(column(name, "first MiB")),
        }
        for name in PIPELINES
    ]
    total = sum(map(len, make_documents(sizes)))
    notes = (
        f"rows of {sizes.length} tokens, batches of {_BATCH}; {sizes.documents} documents of"
        f" {total} bytes, median {sizes.median}",
        f"{repeats} processes each; time and additional memory of the first batch, then"
        f" {sizes.seconds:g} s of batches",
    )
    return tables.Table("data_pipeline", "Packed rows on the host", notes, rows)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark's command line, or measures one pipeline in a subprocess of it."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("--measure="):  # started by `section`
        sizes = QUICK if "--quick" in argv else Sizes()
        print(json.dumps(measure(argv[0].removeprefix("--measure="), sizes)))
        return
    sections = {"data_pipeline": section}
    command.run("benchmarks.data_pipeline", __doc__.splitlines()[0], sections, Sizes(), QUICK, 5, argv)


if __name__ == "__main__":
    main()
