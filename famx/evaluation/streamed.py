"""Answers of streamed documents: whether a model says them, and how likely it finds them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from famx.decoding import Streamer
from famx.evaluation.common import streamer_of
from famx.models import DecoderModel


class AnswerScores(NamedTuple):
    """Scores of answers, for each token after all tokens before it.

    Attributes:
      right: whether all tokens of an answer are the most likely ones, bool `[B]`.
      loss: mean negative log-likelihood of its tokens, nats, `[B]`, at least float32.
    """

    right: np.ndarray
    loss: np.ndarray


def score_answers(
    model: DecoderModel,
    params: Any,
    tokens: np.ndarray,
    starts: np.ndarray,
    answers: np.ndarray,
    pad_id: int,
    zero_memory: bool = False,
    piece_blocks: int | None = None,
    done: Callable[[int], None] = lambda tokens: None,
) -> AnswerScores:
    """Reads documents and scores their answers.

    Args:
      model: the model.
      params: its parameters.
      tokens: inputs of documents that end with their answers, or with padding after them, int32 `[B, L]`.
      starts: where each answer begins, int32 `[B]`.
      answers: the answers, int32 `[B, W]`, padded at the end; each has a token at least.
      pad_id: the id that pads the answers.
      zero_memory: set the memory to zero before every block.
      piece_blocks: number of blocks between two calls of `done`; None: all but the last are one piece.
      done: called with the number of tokens of each document that were just read.

    Returns:
      The scores.
    """
    c, length = model.config, tokens.shape[1]
    # Nothing follows the answers, so logits are computed for the last blocks only.
    tail = math.ceil((length - starts.min()) / c.block_size) * c.block_size
    # Without memory, tokens outside the reach of the stacked windows cannot influence the answer, so
    # reading them is skipped.
    reach = c.num_layers * c.memory_segments * c.block_size
    skipped = max(length - tail - reach, 0) if zero_memory else 0
    streamer: Streamer = streamer_of(model.module, zero_memory)
    state = streamer.initial_state(params, len(tokens))
    state = state.replace(position=state.position + skipped)
    piece = length if piece_blocks is None else piece_blocks * c.block_size
    for start in range(skipped, length - tail, piece):
        end = min(start + piece, length - tail)
        _, state = streamer.read(params, state, tokens[:, start:end])
        done(end - start)
    last = tokens[:, -tail:]
    width, counted = last.shape[1], answers != pad_id
    places = (starts - length + width)[:, None] + np.arange(answers.shape[1])
    rows, columns = np.nonzero(counted)[0], places[counted]
    targets = np.zeros_like(last)
    targets[rows, columns] = answers[counted]
    (log_likelihood, best), _ = streamer.score(params, state, last, targets)
    done(width)
    asked = np.zeros(last.shape, bool)
    asked[rows, columns] = True
    loss = -np.sum(np.where(asked, log_likelihood, 0), axis=1) / counted.sum(axis=1)
    return AnswerScores(np.all(best | ~asked, axis=1), loss)
