"""Any task that is made by index."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from famx.base.errors import ConfigError
from famx.data.tasks import Kind, has_settings, kind_of, registry
from famx.decoding import Streamer
from famx.evaluation.common import (
    HEALTH_TOKENS,
    check_vocabulary,
    compared,
    memory_figures,
    streamer_of,
)
from famx.models import DecoderModel


@dataclasses.dataclass
class TaskEvaluation:
    """Loss, next-token accuracy and exact match over fresh examples of a task, streamed.

    Tokens count with the loss weights that the task gives them. Exact match is there for a task that
    says where the answer starts: everything from there on must be right.

    Attributes:
      task: a task that is made by index, or its name, see `famx.data.tasks.registry`; None: the task that
        the run trains on.
      length: tokens of an example, any number that the task can fill.
      task_options: settings of a named task; split and seed are set here.
      examples: number of examples.
      batch_size: number of examples that are read at once.
      seed: seed of the examples; they are of the split "eval".
      health: whether the memory is looked at, see `famx.evaluation`. The scores with the memory zeroed
        are of the first batches, of about `health_tokens` tokens, and stand beside those of the same
        examples with it (`memory/kept/`).
      health_tokens: how much is read at most for the memory's figures.
    """

    task: Any = None
    length: int = 0
    task_options: Mapping[str, Any] | None = None
    examples: int = 64
    batch_size: int = 16
    seed: int = 1
    health: bool = True
    health_tokens: int = HEALTH_TOKENS

    def __post_init__(self):
        for name in ("length", "examples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"TaskEvaluation.{name} must be at least 1, not {getattr(self, name)}.")

    def with_task(self, make_task: Callable[..., Any]) -> "TaskEvaluation":
        """This evaluation with the task of a run, unless it has its own; see `famx.evaluation`."""
        return self if self.task is not None else dataclasses.replace(self, task=make_task())

    def __call__(self, model: DecoderModel, params, step: int) -> dict[str, float]:
        """`loss`, `bits_per_token`, `accuracy` and `exact_match`, and what `health` adds."""
        del step
        health = self.health and model.config.memory.exists
        rows = min(self.batch_size, self.examples)
        total = kept = zeroed = np.zeros(5)
        first = None
        for start in range(0, self.examples, rows):
            batch = self._task.batch(range(start, start + rows), self.length)
            batch["decoder_loss_weights"][self.examples - start :] = 0
            first = batch["decoder_input_tokens"] if first is None else first
            total = total + _task_sums(streamer_of(model.module), params, batch)
            if health and (start == 0 or (start + rows) * self.length <= self.health_tokens):
                blind = streamer_of(model.module, True)
                kept, zeroed = total, zeroed + _task_sums(blind, params, batch)
        scores = _task_scores(total)
        if health:
            scores |= compared(_task_scores(kept), _task_scores(zeroed))
            scores |= memory_figures(model, params, first, self.health_tokens)
        return scores

    def check(self, model: DecoderModel) -> None:
        """Raises ConfigError if there is no such task, or it fits neither the length nor the model."""
        shortest = self._task.min_length
        if self.length < shortest:
            raise ConfigError(
                f"TaskEvaluation.length is {self.length}, and the task {self._shown} needs at least"
                f" {shortest} tokens: raise it."
            )
        check_vocabulary(self._task.vocab, model, self._name)

    @property
    def _shown(self) -> str:
        return repr(self.task if isinstance(self.task, str) else type(self.task).__name__)

    @property
    def _name(self) -> str:
        return f"TaskEvaluation.task {self._shown}"

    @functools.cached_property
    def _task(self):
        task = self.task
        if task is None:
            raise ConfigError("TaskEvaluation.task is not set: name the task to evaluate.")
        if isinstance(task, str):
            try:
                task = registry.get(task, **(self.task_options or {}))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{self._name}: {error}") from error
        if kind_of(task) is not Kind.MADE or not has_settings(task, "split", "seed"):
            raise ConfigError(
                f"{self._name} is not made by index in a split for evaluation:"
                " read it with TextEvaluation, or choose another task."
            )
        return dataclasses.replace(task, split="eval", seed=self.seed)


def _task_sums(streamer: Streamer, params, batch) -> np.ndarray:
    """Weighted sums of nats, right tokens and tokens, then exact matches and examples, float64 `[5]`."""
    weights = batch["decoder_loss_weights"].astype(np.float64)
    state = streamer.initial_state(params, len(weights))
    tokens, targets = batch["decoder_input_tokens"], batch["decoder_target_tokens"]
    (log_p, right), _ = streamer.score(params, state, tokens, targets)
    sums = [-np.sum(log_p * weights), np.sum(right * weights), np.sum(weights), 0, 0]
    if "answer_start" in batch:
        before = np.arange(right.shape[1]) < batch["answer_start"][:, None]
        counted = weights.any(axis=1)
        sums[3:] = np.sum(np.all(right | before, axis=1) & counted), np.sum(counted)
    return np.array(sums, np.float64)


def _task_scores(sums) -> dict[str, float]:
    nats, right, weight, matched, examples = map(float, sums)
    loss = nats / (weight or 1)
    scores = {"loss": loss, "bits_per_token": loss / math.log(2), "accuracy": right / (weight or 1)}
    return scores | ({"exact_match": matched / examples} if examples else {})
