"""PassKey over documents of growing length."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from famx.base.errors import ConfigError
from famx.base.files import write_json
from famx.data.metrics import exact_match
from famx.data.probes.passkey import PasskeyTask
from famx.evaluation.common import (
    HEALTH_TOKENS,
    check_vocabulary,
    is_of_memory,
    memory_figures,
    streamer_of,
)
from famx.models import DecoderModel

PROBES = {
    "hold": dict(filler="random_words", second_key=0.0),
    "hold_repeated": dict(filler="repeated", second_key=0.0),
    "overwrite": dict(filler="random_words", second_key=1.0, second_key_depth=0.5),
}


@dataclasses.dataclass
class PasskeyEvaluation:
    """Exact match of the key over documents of growing length, streamed.

    Hold and overwrite belong together: a memory that only holds is write-once. `hold` has one key
    at the start of the document and the question at its end; `overwrite` has a second key half way,
    which must replace the first.

    Attributes:
      task: its header, vocabulary and digits are kept; its split becomes "eval". An answer is right if
        all its tokens are. None: the task that the run trains on, else the paper's.
      blocks: lengths of the documents, in blocks, during training.
      report_blocks: lengths at the end.
      train_blocks: longest document seen in training, to be marked; None: not marked.
      examples: documents per length and probe.
      seed: of the documents; they are of another split than training's whatever the seed.
      health: whether the memory is looked at, see `famx.evaluation`: its figures are of the longest
        documents of `hold`, and every score is taken once more with the memory zeroed.
      health_tokens: how much is read at most for the memory's figures.
    """

    task: PasskeyTask | None = None
    blocks: Sequence[int] = (4, 16, 64)
    report_blocks: Sequence[int] = (4, 16, 64, 256, 1024, 4096)
    train_blocks: int | None = None
    examples: int = 64
    seed: int = 1
    health: bool = True
    health_tokens: int = HEALTH_TOKENS

    def with_task(self, make_task: Callable[..., Any]) -> "PasskeyEvaluation":
        """This evaluation with the task of a run, unless it has its own; see `famx.evaluation`.

        Raises:
          ConfigError: the run's task is another one.
        """
        if self.task is not None:
            return self
        task = make_task()
        if not isinstance(task, PasskeyTask):
            raise ConfigError(
                f"PasskeyEvaluation measures PassKey, but the run trains on {type(task).__name__}: set"
                " PasskeyEvaluation.task, or choose another evaluation."
            )
        return dataclasses.replace(self, task=task)

    def __call__(self, model: DecoderModel, params, step: int) -> dict[str, float]:
        """`{"<probe>/<blocks>": exact match}`, and what `health` adds."""
        del step
        return self._measure(model, params, self.blocks)

    def report(self, model: DecoderModel, params, model_dir: str) -> str:
        """Measures all lengths, writes passkey.json and passkey.png, and returns the table."""
        from famx.evaluation.figures import lengths_figure  # slow to import, needed at the end alone

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
            "memory_config": model.config.memory.to_dict(),
            "examples": self.examples,
            "train_blocks": self.train_blocks,
            "exact_match": {p: {str(b): v for b, v in row.items()} for p, row in table.items()},
            "memory": {k.removeprefix("memory/"): v for k, v in scores.items() if is_of_memory(k)},
        }
        write_json(folder / "passkey.json", result)
        lengths_figure({"": table}, size, self.train_blocks).savefig(folder / "passkey.png", dpi=150)
        lines = ["Exact match over %d fresh documents per cell, streamed:" % self.examples]
        lines.append("blocks".rjust(8) + "tokens".rjust(10) + "".join(p.rjust(20) for p in table))
        for b in self.report_blocks:
            cells = [f"{row[b]:.3f}" if b in row else "-" for row in table.values()]
            lines.append(f"{b:8d}{b * size:10d}" + "".join(c.rjust(20) for c in cells))
        return "\n".join([*lines, "Written to MODEL_DIR: passkey.json, passkey.png"])

    def check(self, model: DecoderModel) -> None:
        """Raises ConfigError if the probes do not fit the model's block size or vocabulary."""
        for options in PROBES.values():
            try:
                self._task(model.config.block_size, options)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        check_vocabulary(self._base_task.vocab, model, "PasskeyEvaluation.task")

    @property
    def _base_task(self) -> PasskeyTask:
        return PasskeyTask() if self.task is None else self.task

    def _task(self, block_size: int, options) -> PasskeyTask:
        common = dict(
            split="eval", seed=self.seed, depth=0.0, block_size=block_size, second_key_depth=None,
            second_key_recent=False,
        )  # fmt: skip
        return dataclasses.replace(self._base_task, **{**common, **options})

    def _measure(self, model, params, lengths) -> dict[str, float]:
        size = model.config.block_size
        health = self.health and model.config.memory.exists
        scores, zeroed, longest = {}, {}, None
        for blocks in lengths:
            for probe, options in PROBES.items():
                task = self._task(size, options)
                if task.min_length > blocks * size:
                    continue
                batch = task.batch(range(self.examples), blocks * size)
                answers = _answers(model, params, batch)
                scores[f"{probe}/{blocks}"] = float(exact_match(answers, batch["answer"]).mean())
                if health:
                    answers = _answers(model, params, batch, zero_memory=True)
                    match = exact_match(answers, batch["answer"])
                    zeroed[f"memory/zeroed/{probe}/{blocks}"] = float(match.mean())
                    if probe == "hold" and (longest is None or blocks * size > longest.shape[1]):
                        longest = batch["decoder_input_tokens"]
        if longest is not None:
            zeroed |= memory_figures(model, params, longest, self.health_tokens)
        return scores | zeroed


def _answers(model, params, batch, zero_memory: bool = False) -> np.ndarray:
    """The likeliest tokens in the answers' places, int32 `[B, answer_width]`, padded as answers are."""
    c, tokens, starts = model.config, batch["decoder_input_tokens"], batch["answer_start"]
    # The answers are the last tokens; score those blocks alone.
    tail = math.ceil((tokens.shape[1] - starts.min()) / c.block_size) * c.block_size
    # Without memory nothing before the reach of the window can matter, and it is not read.
    reach = c.num_layers * c.memory_segments * c.block_size
    skipped = max(tokens.shape[1] - tail - reach, 0) if zero_memory else 0
    streamer = streamer_of(model.module, zero_memory)
    state = streamer.initial_state(params, len(tokens))
    state = state.replace(position=state.position + skipped)
    if tokens.shape[1] - skipped > tail:
        _, state = streamer.read(params, state, tokens[:, skipped:-tail])
    best, _ = streamer.predict(params, state, tokens[:, -tail:])
    places = (starts - tokens.shape[1])[:, None] + np.arange(batch["answer"].shape[1])
    found = np.take_along_axis(best, np.minimum(places, -1) + tail, axis=1)
    return np.where(places < 0, found, batch["answer"])
