"""Bits per token and accuracy over whole documents."""

import dataclasses
import math
import os
import shlex
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from famx.base.distributed import on_host
from famx.base.errors import ConfigError
from famx.base.ranges import NonNegative, Object, Positive
from famx.base.values import checked
from famx.data.rows.lanes import ContinuousLanes
from famx.data.tasks import Kind, kind_of, vocabulary_of
from famx.decoding import Sampling
from famx.evaluation.common import (
    HEALTH_TOKENS,
    check_vocabulary,
    compared,
    memory_figures,
    streamer_of,
)
from famx.models import DecoderModel
from famx.modules import DecoderState

_SAMPLE_START = 64  # tokens of a document before a sample
_TEMPERATURE = 0.8  # of a sample: the likeliest tokens alone soon repeat themselves
_WIDTH = 78  # characters of a line of a sample


@checked
@dataclasses.dataclass
class TextEvaluation:
    """Bits per token and next-token accuracy over whole documents.

    Documents are read in parallel lanes: each lane carries its state from chunk to chunk and starts
    the next document when one ends. With byte tokens, bits per token are bits per byte.

    Attributes:
      documents: sequence of held-out documents, such as `TextFiles(split="validation")`; None: the
        split "validation" of the task that the run trains on.
      batch_size: maximum number of lanes; no more are used than there are documents.
      length: tokens per lane and call, rounded down to whole blocks (at least one).
      max_tokens: number of tokens after which reading stops; None reads every document to its end.
      health: whether to report memory scalars, see `famx.evaluation`. Scores with the memory zeroed
        are computed on the first `health_tokens` tokens; `memory/kept/...` holds the scores of the
        same tokens with the memory. The memory statistics are measured on a single document.
      health_tokens: maximum number of tokens read for each of these.
      sample_tokens: number of tokens of the sample that `report` shows; 0: none.
      distances: numbers of tokens from a document's start at which its next part begins, in any order;
        `bits_per_token/from/<start>` is reported of each part, the first of which is from 0.
    """

    documents: Sequence[Any] | Object | None = None
    batch_size: Positive = 8
    length: Positive = 2048
    max_tokens: Positive | None = 200_000
    health: bool = True
    health_tokens: Positive = HEALTH_TOKENS
    sample_tokens: NonNegative = 200
    distances: Sequence[Positive] = ()

    def __post_init__(self):
        self.distances = tuple(sorted(set(self.distances)))

    def with_task(self, make_task: Callable[..., Any]) -> "TextEvaluation":
        """A copy that reads the split "validation" of a run's task; this evaluation if it has documents.

        Raises:
          ConfigError: the task has no documents, or no split "validation".
        """
        if self.documents is not None:
            return self
        documents = make_task(split="validation")
        if kind_of(documents) not in (Kind.DOCUMENTS, Kind.SCORED):
            raise ConfigError(
                f"TextEvaluation reads documents, but the run trains on {type(documents).__name__}: set"
                " TextEvaluation.documents, or choose another evaluation."
            )
        return dataclasses.replace(self, documents=documents)

    def __call__(self, model: DecoderModel, params, step: int) -> dict[str, float]:
        """Returns `bits_per_token`, also by distance, `accuracy` and, with `health`, memory scalars."""
        del step
        texts: Any = self.documents
        size, documents = model.config.block_size, len(texts)
        lanes = ContinuousLanes(
            texts, min(self.batch_size, documents), max(self.length // size, 1) * size,
            bos_id=_bos_id(self.documents),
        )  # fmt: skip
        health = self.health and model.config.memory.exists
        reader, blind = (
            _LaneReader(model, params, lanes.batch_size, self.distances, zero) for zero in (False, True)
        )
        total = kept = zeroed = np.zeros((len(self.distances) + 1, 3))
        taken, done = 0, np.zeros(lanes.batch_size, bool)
        for batch in lanes:
            # ContinuousLanes hands out documents in the order of these resets, so counting resets
            # tells which lanes have started a second pass.
            for lane in np.flatnonzero(batch["reset"]):
                done[lane], taken = taken >= documents, taken + 1
            read = total[:, 2].sum()
            if done.all() or (self.max_tokens is not None and read >= self.max_tokens):
                break
            batch["decoder_loss_weights"][done] = 0  # count each document once
            total = total + reader(batch)
            if health and read < self.health_tokens:
                kept, zeroed = total, zeroed + blind(batch)
        scores = self._scores(total)
        if health:
            scores |= compared(self._scores(kept), self._scores(zeroed))
            tokens = _opening(self.documents, self.health_tokens)
            scores |= memory_figures(model, params, tokens, self.health_tokens)
        return scores

    def _scores(self, sums) -> dict[str, float]:
        """Scores from the sums of a `_LaneReader`; parts of a document that no token is in have none."""
        scores = _text_scores(sums.sum(axis=0))
        for start, part in zip((0, *self.distances), sums):
            if self.distances and part[2]:
                scores[f"bits_per_token/from/{start}"] = _text_scores(part)["bits_per_token"]
        return scores

    def report(self, model: DecoderModel, params, model_dir: str | os.PathLike) -> str:
        """A sample of the model's writing after the beginning of a held-out document, and how to chat.

        A model without vocabulary shows nothing at all.
        """
        vocabulary = model.vocabulary
        if vocabulary is None:
            return ""
        where = shlex.quote(str(model_dir))
        talk = f"Talk to it: famx chat --checkpoint={where} --temperature={_TEMPERATURE}"
        if not self.sample_tokens:
            return talk
        tokens = _opening(self.documents, _SAMPLE_START)
        streamer = streamer_of(model.module)
        sampling = Sampling(
            self.sample_tokens, _TEMPERATURE, stop_tokens=tuple(sorted({*vocabulary.end_ids} - {None}))
        )
        logits, state = streamer.read(params, streamer.initial_state(params, 1), tokens)
        out = streamer.generate(params, logits, state, sampling)
        written = on_host(out.tokens)[0, : int(on_host(out.lengths)[0])]
        special = {vocabulary.bos_id, *sampling.stop_tokens}
        ids = [i for i in written.tolist() if i < vocabulary.vocab_size and i not in special]
        began = [i for i in tokens[0].tolist() if i not in special]
        return "\n".join(
            [
                "How a held-out document begins:",
                _quoted(vocabulary.decode(began)),
                f"How the model continues (temperature {_TEMPERATURE}):",
                _quoted(vocabulary.decode(ids)),
                talk,
            ]
        )

    def check(self, model: DecoderModel) -> None:
        """Raises ConfigError if there are no documents, or their vocabulary is not the model's."""
        if self.documents is None:
            raise ConfigError("TextEvaluation.documents is not set: name the documents to read.")
        check_vocabulary(vocabulary_of(self.documents), model, "TextEvaluation.documents")


class _LaneReader:
    """Reads batches of lanes, and sums the scores of their tokens by distance from the document's start.

    Args:
      model: the model.
      params: its parameters.
      rows: number of lanes.
      distances: numbers of tokens from a document's start at which its next part begins.
      zero_memory: set the memory to zero before each block.
    """

    def __init__(self, model: DecoderModel, params, rows: int, distances, zero_memory: bool):
        self._streamer = streamer_of(model.module, zero_memory)
        self._model, self._params, self._distances = model, params, np.asarray(distances, np.int64)
        self._state: DecoderState | None = None
        self._distance = np.zeros(rows, np.int64)  # of the lanes' next tokens

    def __call__(self, batch) -> np.ndarray:
        """`[nats, correct tokens, tokens]` of each part of the documents, float64 `[parts, 3]`."""
        reset, weights = batch["reset"], batch["decoder_loss_weights"].astype(np.float64)
        state = self._state
        if state is None or reset.any():  # all lanes in the first batch
            start = self._streamer.initial_state(self._params, len(reset))
            state = start if state is None else _select(start, reset, state)
        read, targets = self._model.inputs(batch), batch["decoder_target_tokens"]
        (log_p, right), self._state = self._streamer.score(self._params, state, read, targets)
        distance = np.where(reset, 0, self._distance)[:, None] + np.arange(weights.shape[1])
        self._distance = distance[:, -1] + 1
        part = np.searchsorted(self._distances, distance.ravel(), side="right")
        values = (-log_p.astype(np.float64) * weights, right * weights, weights)
        parts = len(self._distances) + 1
        return np.stack([np.bincount(part, x.ravel(), parts) for x in values], axis=1)


@jax.jit
def _select(start: DecoderState, reset, state: DecoderState) -> DecoderState:
    return start.select(reset, state)


def _quoted(text: str) -> str:
    """Text as indented lines, without characters that would move the cursor."""
    shown = "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "\ufffd" for c in text)
    lines = [part for line in shown.splitlines() for part in textwrap.wrap(line, _WIDTH) or [""]]
    return textwrap.indent("\n".join(lines), "  ", lambda line: True)


def _text_scores(sums) -> dict[str, float]:
    nats, right, count = sums
    return {"bits_per_token": float(nats / count / math.log(2)), "accuracy": float(right / count)}


def _opening(documents, limit: int) -> np.ndarray:
    """First `limit` input tokens of a long document, int32 `[1, L]`.

    The first document of at least `limit` tokens among the first 64, otherwise the longest of them.
    """
    longest = np.zeros(0, np.int32)
    for i in range(min(len(documents), 64)):
        tokens = documents[i]
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        longest = max(longest, tokens[:limit], key=len)
        if len(longest) >= limit:
            break
    return np.insert(longest, 0, _bos_id(documents))[None, :-1].astype(np.int32)


def _bos_id(documents) -> Any:
    vocabulary = vocabulary_of(documents)
    return 1 if vocabulary is None else vocabulary.bos_id
