"""Honest evaluation: fresh examples, read from their start with a state of constant size."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from famx.data.lanes import ContinuousLanes
from famx.data.passkey import PasskeyTask, exact_match
from famx.errors import ConfigError
from famx.models import DecoderModel
from famx.state_passing import continue_lanes
from famx.streaming import Streamer

PROBES = {
    "hold": dict(filler="random_words", second_key=0.0),
    "hold_repeated": dict(filler="repeated", second_key=0.0),
    "overwrite": dict(filler="random_words", second_key=1.0, second_key_depth=0.5),
}


class _Streamers:
    """One streamer per decoder, so that a later evaluation compiles nothing again."""

    def __init__(self):
        self._made = {}

    def of(self, model: DecoderModel) -> Streamer:
        if model.module not in self._made:
            self._made[model.module] = Streamer(model.module)
        return self._made[model.module]


@dataclasses.dataclass
class PasskeyEvaluation:
    """Exact match of the key over documents of growing length, streamed.

    Hold and overwrite belong together: a memory that only holds is write-once. `hold` has one key
    at the start of the document and the question at its end; `overwrite` has a second key half way,
    which must replace the first.

    Attributes:
      task: its header, vocabulary and digits are kept; its split becomes "eval".
      blocks: lengths of the documents, in blocks, during training.
      report_blocks: lengths at the end.
      train_blocks: longest document seen in training, to be marked; None: not marked.
      examples: documents per length and probe.
      seed: of the documents; they are of another split than training's whatever the seed.
    """

    task: PasskeyTask
    blocks: Sequence[int] = (4, 16, 64)
    report_blocks: Sequence[int] = (4, 16, 64, 256, 1024, 4096)
    train_blocks: int | None = None
    examples: int = 64
    seed: int = 1
    _streamers: _Streamers = dataclasses.field(default_factory=_Streamers, repr=False)

    def __call__(self, model: DecoderModel, params, step: int) -> dict[str, float]:
        """`{"<probe>/<blocks>": exact match}`."""
        del step
        return self._measure(model, params, self.blocks)

    def report(self, model: DecoderModel, params, model_dir: str) -> str:
        """Measures all lengths, writes passkey.json and passkey.png, and returns the table."""
        scores = self._measure(model, params, self.report_blocks)
        size = model.config.block_size
        table = {
            probe: {b: scores[f"{probe}/{b}"] for b in self.report_blocks if f"{probe}/{b}" in scores}
            for probe in PROBES
        }
        folder = pathlib.Path(model_dir)
        result = {
            "block_size": size,
            "memory_segments": model.config.memory_segments,
            "fam_length": model.config.fam_length,
            "examples": self.examples,
            "train_blocks": self.train_blocks,
            "exact_match": {p: {str(b): v for b, v in row.items()} for p, row in table.items()},
        }
        (folder / "passkey.json").write_text(json.dumps(result, indent=2) + "\n")
        _plot(table, size, self.train_blocks, folder / "passkey.png")
        lines = ["Exact match over %d fresh documents per cell, streamed:" % self.examples]
        lines.append("blocks".rjust(8) + "tokens".rjust(10) + "".join(p.rjust(20) for p in table))
        for b in self.report_blocks:
            cells = [f"{row[b]:.3f}" if b in row else "-" for row in table.values()]
            lines.append(f"{b:8d}{b * size:10d}" + "".join(c.rjust(20) for c in cells))
        return "\n".join(lines + [f"Written: {folder / 'passkey.json'}, {folder / 'passkey.png'}"])

    def check(self, model: DecoderModel) -> None:
        """Raises ConfigError if the probes cannot be made for the model's block size."""
        for options in PROBES.values():
            try:
                self._task(model.config.block_size, options)
            except ValueError as error:
                raise ConfigError(str(error)) from error

    def _task(self, block_size: int, options) -> PasskeyTask:
        common = dict(split="eval", seed=self.seed, depth=0.0, block_size=block_size)
        return dataclasses.replace(self.task, **common, **options)

    def _measure(self, model, params, lengths) -> dict[str, float]:
        streamer = self._streamers.of(model)
        size = model.config.block_size
        scores = {}
        for blocks in lengths:
            for probe, options in PROBES.items():
                task = self._task(size, options)
                if task.min_length > blocks * size:
                    continue
                batch = task.batch(range(self.examples), blocks * size)
                tokens = batch["decoder_input_tokens"]
                # The question and the answer lie in the last tokens; score those blocks alone.
                tail = math.ceil((len(task._question) + task.digits) / size) * size
                state = streamer.initial_state(params, self.examples)
                state = streamer.read(params, state, tokens[:, :-tail])
                best, _ = streamer.predict(params, state, tokens[:, -tail:])
                match = exact_match(best[:, -task.digits :], batch["answer"])
                scores[f"{probe}/{blocks}"] = float(match.mean())
        return scores


def _plot(table, block_size: int, train_blocks: int | None, path: pathlib.Path):
    import matplotlib  # slow to import, needed at the end alone

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (probe, row), marker in zip(table.items(), "os^"):
        axes.plot(list(row), list(row.values()), marker=marker, label=probe)
    if train_blocks:
        axes.axvline(train_blocks, color="gray", linestyle="--", label="longest in training")
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(f"blocks of {block_size} tokens read before the answer")
    axes.set_ylabel("exact match")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@dataclasses.dataclass
class TextEvaluation:
    """Bits per token and next-token accuracy over whole documents, read by continuous lanes.

    With bytes as tokens, bits per token are bits per byte.

    Attributes:
      documents: held-out documents, such as `TextFiles(split="validation")`.
      batch_size: lanes at most.
      length: tokens per call, rounded down to whole blocks.
      max_tokens: how much is read at most; None: every document to its end.
    """

    documents: Any
    batch_size: int = 8
    length: int = 2048
    max_tokens: int | None = 200_000
    _jitted: dict = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, model: DecoderModel, params, step: int) -> dict[str, float]:
        """`bits_per_token` and `accuracy`."""
        del step
        run = self._jitted.setdefault(model.module, jax.jit(_lane_step(model)))
        size, documents = model.config.block_size, len(self.documents)
        lanes = ContinuousLanes(
            self.documents, min(self.batch_size, documents), max(self.length // size, 1) * size
        )
        shapes = jax.eval_shape(lambda p: model.initial_state(p, lanes.batch_size), params)
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)  # every lane is reset
        nats, hits, count = 0.0, 0.0, 0.0
        taken, done = 0, np.zeros(lanes.batch_size, bool)
        for batch in lanes:
            for lane in np.flatnonzero(batch["reset"]):  # lanes take documents in this order
                done[lane], taken = taken >= documents, taken + 1
            if done.all() or (self.max_tokens is not None and count >= self.max_tokens):
                break
            batch["decoder_loss_weights"][done] = 0  # each document is read once
            state, metrics = run(params, state, batch)
            nats += float(metrics["loss"].total)
            hits += float(metrics["accuracy"].total)
            count += float(metrics["loss"].count)
        return {"bits_per_token": nats / count / math.log(2), "accuracy": hits / count}


def _lane_step(model: DecoderModel):
    def run(params, state, batch):
        initial = model.initial_state(params, batch["reset"].shape[0])
        state = continue_lanes(state, initial, batch["reset"])
        _, metrics, state = model.loss(params, batch, None, state)
        return state, metrics

    return run
