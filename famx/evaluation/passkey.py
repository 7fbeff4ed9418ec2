"""PassKey retrieval at increasing document lengths (paper section 3.3)."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax

from famx.base.errors import ConfigError
from famx.base.files import as_path, check_writable, replacing, write_json
from famx.base.ranges import OneOf, Positive, Seed
from famx.base.values import checked
from famx.data.probes.passkey import PasskeyTask
from famx.evaluation.common import (
    HEALTH_TOKENS,
    check_vocabulary,
    is_of_memory,
    memory_figures,
)
from famx.evaluation.streamed import AnswerScores, score_answers
from famx.models import DecoderModel
from famx.training.settings import last_task

PROBES = {
    "hold": dict(filler="random_words", second_key=0.0),
    "hold_repeated": dict(filler="repeated", second_key=0.0),
    "hold_text": dict(filler="python_stdlib", second_key=0.0),
    "hold_headerless": dict(filler="random_words", second_key=0.0, header=False),
    "hold_anywhere": dict(filler="random_words", second_key=0.0, depth=None),
    "hold_unaligned": dict(filler="random_words", second_key=0.0),  # and with padding
    "overwrite": dict(filler="random_words", second_key=1.0, second_key_depth=0.5),
}
STANDARD_PROBES = ("hold", "hold_repeated", "overwrite")


@checked
@dataclasses.dataclass
class PasskeyEvaluation:
    """Exact match of the pass key in streamed documents of increasing length.

    The standard probes are three. In `hold` and `hold_repeated` one key is at the start of the document
    and the question at its end; the filler is random words or, as in the paper, one repeated sentence.
    In `overwrite` a second key in the middle replaces the first. Both kinds are needed: a memory that is
    written once and never again passes `hold` and fails `overwrite`.

    The others of `PROBES` are `hold` with one change each, which a model passes only if it was trained
    for it: `hold_text` has real text as filler (not in words), `hold_headerless` no header,
    `hold_anywhere` a key at any depth, and in `hold_unaligned` the question is anywhere in the last
    block, not at its end.

    Attributes:
      task: the task whose header, vocabulary and number of digits are used; its split is set to
        "eval". A header that it draws is always there, except in `hold_headerless`. An answer counts as
        correct only if all its tokens are. None takes the task that the run trains on; outside of a run,
        the paper's task in the model's vocabulary, with the header and the digits that the checkpoint's
        run trained on if that is known.
      blocks: document lengths, in blocks, that `__call__` scores during training.
      report_blocks: document lengths, in blocks, that `report` scores at the end of training.
      train_blocks: longest training document in blocks, marked in the figure; None draws no mark.
      examples: number of documents per length and probe.
      seed: seed of the documents. Whatever it is, training never sees them: the split is part of the
        random seed.
      health: whether to report memory scalars, see `famx.evaluation`. The statistics are measured on
        the longest `hold` documents, and every score is repeated with the memory zeroed.
      health_tokens: maximum number of tokens read for the memory statistics.
      probes: names of the probes that are scored.
    """

    task: PasskeyTask | None = None
    blocks: Sequence[Positive] = (4, 16, 64)
    report_blocks: Sequence[Positive] = (4, 16, 64, 256, 1024, 4096)
    train_blocks: Positive | None = None
    examples: Positive = 64
    seed: Seed = 1
    health: bool = True
    health_tokens: Positive = HEALTH_TOKENS
    probes: Sequence[Annotated[str, OneOf(tuple(PROBES))]] = STANDARD_PROBES

    def with_task(self, make_task: Callable[..., Any]) -> "PasskeyEvaluation":
        """A copy that evaluates a run's task, or itself if its task is set; see `famx.evaluation`.

        Raises:
          ConfigError: the run's task is not PassKey.
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

    def of_run(self, settings: Mapping[str, Any], model: DecoderModel) -> "PasskeyEvaluation":
        """A copy whose documents have the header and the digits of those that a run trained on last.

        Args:
          settings: settings of the run, as `MODEL_DIR/settings.json` has them; {}: they are not known.
          model: the model.

        Returns:
          The copy; this evaluation if its task is set, or if the run did not train on PassKey.
        """
        trained = last_task(settings)
        if self.task is not None or not {"header", "digits", "second_key"} <= trained.keys():
            return self
        task = _task_of(model, header=trained["header"], digits=trained["digits"])
        return dataclasses.replace(self, task=task)

    def __call__(self, model: DecoderModel, params, step: int) -> dict[str, float]:
        """Returns `{"<probe>/<blocks>": exact match in 0..1}` and, with `health`, memory scalars."""
        del step
        return self._measure(model, params, self.blocks)[0]

    def report(self, model: DecoderModel, params, model_dir: str) -> str:
        """Scores all of `report_blocks` and writes passkey.json and passkey.png to `model_dir`.

        The file also has the mean loss of the answers in nats per token, with the memory ("kept") and
        with it zeroed. The picture is `famx.evaluation.figures.recall_figure`.

        Args:
          model: the model.
          params: its parameters.
          model_dir: directory of the two files, which is made if it is missing.

        Returns:
          A plain-text table of the scores.

        Raises:
          ConfigError: the directory cannot be written; before anything is measured.
        """
        from famx.evaluation.figures import recall_figure  # matplotlib is slow to import

        folder = as_path(model_dir)
        if jax.process_index() == 0:
            _check(folder)
        scores, losses = self._measure(model, params, self.report_blocks)
        size = model.config.block_size
        table = self._by_probe(scores)
        result = {
            "block_size": size,
            "memory_segments": model.config.memory_segments,
            "memory_config": model.config.memory.to_dict(),
            "examples": self.examples,
            "train_blocks": self.train_blocks,
            "exact_match": _with_texts(table),
            "answer_loss": {
                name: _with_texts(self._by_probe(of_answers)) for name, of_answers in losses.items()
            },
            "memory": {k.removeprefix("memory/"): v for k, v in scores.items() if is_of_memory(k)},
        }
        if jax.process_index() == 0:
            write_json(folder / "passkey.json", result)
            with replacing(folder / "passkey.png") as picture:
                recall_figure(folder).savefig(picture, dpi=150, format="png")
        lines = [f"Exact match over {self.examples} fresh documents per cell, streamed:"]
        lines.append("blocks".rjust(8) + "tokens".rjust(10) + "".join(p.rjust(20) for p in table))
        for b in self.report_blocks:
            cells = [f"{row[b]:.3f}" if b in row else "-" for row in table.values()]
            lines.append(f"{b:8d}{b * size:10d}" + "".join(c.rjust(20) for c in cells))
        return "\n".join([*lines, "Written to MODEL_DIR: passkey.json, passkey.png"])

    def _by_probe(self, numbers: Mapping[str, float]) -> dict[str, dict[int, float]]:
        """`{"<probe>/<blocks>": number}` as `{probe: {blocks: number}}`, for `report_blocks` alone."""
        lengths = self.report_blocks
        return {
            probe: {b: numbers[f"{probe}/{b}"] for b in lengths if f"{probe}/{b}" in numbers}
            for probe in self.probes
        }

    def check(self, model: DecoderModel) -> None:
        """Raises ConfigError if a probe does not fit the model's block size or vocabulary."""
        for probe in self.probes:
            try:
                task = self._task(model, probe)
            except ValueError as error:
                raise ConfigError(str(error)) from error
            check_vocabulary(task.vocab, model, "PasskeyEvaluation.task")

    def _task(self, model: DecoderModel, probe: str) -> PasskeyTask:
        """The task of a probe, for a model's block size."""
        task, block_size = self.task or _task_of(model), model.config.block_size
        common = dict(
            split="eval", seed=self.seed, depth=0.0, block_size=block_size, second_key_depth=None,
            second_key_recent=False, header=task.header > 0, padding=0,
        )  # fmt: skip
        if probe == "hold_unaligned":  # the question is in the last block in any case
            common["padding"] = max(block_size - task.asked_width, 0)
        return dataclasses.replace(task, **{**common, **PROBES[probe]})

    def _measure(self, model, params, lengths) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """What `__call__` returns, and the losses of the answers in nats per token.

        The losses are `{"kept": {"<probe>/<blocks>": loss}}`, with `health` those of "zeroed" as well.
        """
        size = model.config.block_size
        health = self.health and model.config.memory.exists
        scores, zeroed, longest = {}, {}, None
        losses: dict[str, dict[str, float]] = {"kept": {}, **({"zeroed": {}} if health else {})}
        for blocks in lengths:
            for probe in self.probes:
                task = self._task(model, probe)
                if task.min_length > blocks * size:
                    continue
                batch = task.batch(range(self.examples), blocks * size)
                name = f"{probe}/{blocks}"
                found = _scored(model, params, batch, task.vocab.pad_id)
                scores[name], losses["kept"][name] = float(found.right.mean()), float(found.loss.mean())
                if health:
                    found = _scored(model, params, batch, task.vocab.pad_id, zero_memory=True)
                    zeroed[f"memory/zeroed/{name}"] = float(found.right.mean())
                    losses["zeroed"][name] = float(found.loss.mean())
                    if probe == "hold" and (longest is None or blocks * size > longest.shape[1]):
                        longest = batch["decoder_input_tokens"]
        if longest is not None:
            zeroed |= memory_figures(model, params, longest, self.health_tokens)
        return scores | zeroed, losses


def _check(folder: pathlib.Path) -> None:
    try:
        check_writable(folder)
    except OSError as error:
        raise ConfigError(f"Cannot write the report to {folder}: {error.strerror or error}.") from error


def _task_of(model: DecoderModel, **fields) -> PasskeyTask:
    """A task in the model's vocabulary, if it is known."""
    return PasskeyTask(**fields, **({} if model.vocabulary is None else {"vocabulary": model.vocabulary}))


def _scored(model: DecoderModel, params, batch, pad_id: int, zero_memory: bool = False) -> AnswerScores:
    tokens, starts, answers = (batch[name] for name in ("decoder_input_tokens", "answer_start", "answer"))
    return score_answers(model, params, tokens, starts, answers, pad_id, zero_memory=zero_memory)


def _with_texts(table: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    """The table with its lengths as JSON has them."""
    return {probe: {str(b): value for b, value in row.items()} for probe, row in table.items()}
