"""Answers of streamed documents: what a model says, token by token, where each document's answer is."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from famx.decoding import Streamer
from famx.evaluation.common import streamer_of
from famx.models import DecoderModel


def streamed_answers(
    model: DecoderModel,
    params: Any,
    tokens: np.ndarray,
    starts: np.ndarray,
    answers: np.ndarray,
    pad_id: int,
    zero_memory: bool = False,
    piece_blocks: int | None = None,
    done: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Most likely tokens at the answer positions, each after all tokens before it.

    Args:
      model: the model.
      params: its parameters.
      tokens: inputs of documents that end with their answers, or with padding after them, int32 `[B, L]`.
      starts: where each answer begins, int32 `[B]`.
      answers: the answers, int32 `[B, W]`, padded at the end.
      pad_id: the id that pads the answers.
      zero_memory: set the memory to zero before every block.
      piece_blocks: number of blocks between two calls of `done`; None: all but the last are one piece.
      done: called with the number of tokens of each document that were just read.

    Returns:
      int32 `[B, W]`, padded like `answers`.
    """
    c, length = model.config, tokens.shape[1]
    # Nothing follows the answers, so predictions are computed for the last blocks only.
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
    best, _ = streamer.predict(params, state, tokens[:, -tail:])
    done(min(tail, length))
    places = (starts - length)[:, None] + np.arange(answers.shape[1])
    found = np.take_along_axis(best, np.minimum(places, -1) + tail, axis=1)
    return np.where(answers == pad_id, answers, found)
