"""Bits per token and accuracy over whole documents."""

import dataclasses
import functools
import math
import os
import shlex
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from famx.base.distributed import on_host
from famx.base.errors import ConfigError
from famx.base.ranges import NonNegative, Object, Positive
from famx.base.values import checked
from famx.base.waiting import Announced
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
from famx.modules import Decoder

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
    """

    documents: Sequence[Any] | Object | None = None
    batch_size: Positive = 8
    length: Positive = 2048
    max_tokens: Positive | None = 200_000
    health: bool = True
    health_tokens: Positive = HEALTH_TOKENS
    sample_tokens: NonNegative = 200

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
        """Returns `bits_per_token`, `accuracy` and, with `health`, memory scalars."""
        del step
        texts: Any = self.documents
        size, documents = model.config.block_size, len(texts)
        lanes = ContinuousLanes(
            texts, min(self.batch_size, documents), max(self.length // size, 1) * size,
            bos_id=_bos_id(self.documents),
        )  # fmt: skip
        health = self.health and model.config.memory.exists
        read, read_blind = (_lane_step(model.module, model.loss_chunk, z) for z in (False, True))
        shapes = jax.eval_shape(lambda p: model.initial_state(p, lanes.batch_size), params)
        # Placeholders: the first batch resets every lane, so these zeros are never read.
        state = blind = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        total = kept = zeroed = np.zeros(3)
        taken, done = 0, np.zeros(lanes.batch_size, bool)
        for batch in lanes:
            # ContinuousLanes hands out documents in the order of these resets, so counting resets
            # tells which lanes have started a second pass.
            for lane in np.flatnonzero(batch["reset"]):
                done[lane], taken = taken >= documents, taken + 1
            if done.all() or (self.max_tokens is not None and total[2] >= self.max_tokens):
                break
            batch["decoder_loss_weights"][done] = 0  # count each document once
            both = health and total[2] < self.health_tokens
            state, sums = read(params, state, batch)
            total = total + on_host(sums).astype(np.float64)
            if both:
                blind, sums = read_blind(params, blind, batch)
                kept, zeroed = total, zeroed + on_host(sums).astype(np.float64)
        scores = _text_scores(total)
        if health:
            scores |= compared(_text_scores(kept), _text_scores(zeroed))
            tokens = _opening(self.documents, self.health_tokens)
            scores |= memory_figures(model, params, tokens, self.health_tokens)
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


@functools.lru_cache(maxsize=8)
def _lane_step(module: Decoder, loss_chunk: int | None, zero_memory: bool):
    """Jitted `f(params, state, batch) -> (state, sums)`.

    `sums` is `[nats, correct tokens, tokens]`. With `zero_memory`, blocks are read one at a time and
    the memory is zeroed before each.
    """
    # A plain model, so that regularisers of the training loss are not counted.
    model = DecoderModel(module, loss_chunk=loss_chunk)
    names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")

    def read(params, state, batch):
        _, metrics, state = model.loss(params, batch, None, state)
        loss, accuracy = metrics["loss"], metrics["accuracy"]
        return state, jnp.stack([loss.total, accuracy.total, loss.count])

    @jax.jit
    def run(params, state, batch):
        initial = model.initial_state(params, batch["reset"].shape[0])
        state = initial.select(batch["reset"], state)
        if not zero_memory:
            return read(params, state, batch)
        rows, size = batch["reset"].shape[0], module.config.block_size
        blocks = {name: batch[name].reshape(rows, -1, size).swapaxes(0, 1) for name in names}
        without = lambda state, block: read(params, state.zero_memory(), block)
        state, sums = jax.lax.scan(without, state, blocks)
        return state, jnp.sum(sums, axis=0)

    return Announced(run, "the evaluation on texts")


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
