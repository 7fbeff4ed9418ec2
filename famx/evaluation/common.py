"""Code shared by the evaluations: cached compiled programs, memory statistics and checks."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from famx.analysis import MemoryMonitor
from famx.base.errors import ConfigError
from famx.decoding import Streamer
from famx.models import DecoderModel
from famx.modules import Decoder, Memory
from famx.modules.memory import COLLECTION

HEALTH_TOKENS = 65_536  # default limit of tokens read for the memory statistics
_HEALTH_ROWS = 4  # number of examples over which the memory statistics are averaged

# Cached per decoder, so that evaluating the next checkpoint reuses the compiled programs.
streamer_of = functools.lru_cache(maxsize=8)(Streamer)
_monitor_of = functools.lru_cache(maxsize=8)(MemoryMonitor)


def is_of_memory(name: str) -> bool:
    """Whether the scalar `name` describes the memory, as opposed to being a score."""
    return name.startswith("memory/")


def compared(kept: Mapping[str, float], zeroed: Mapping[str, float]) -> dict[str, float]:
    """Names the scores of the same tokens with and without memory.

    Returns:
      `{"memory/kept/<score>": value, "memory/zeroed/<score>": value}`.
    """
    both = {"kept": kept, "zeroed": zeroed}
    return {f"memory/{how}/{k}": v for how, scores in both.items() for k, v in scores.items()}


def memory_figures(model: DecoderModel, params, tokens, max_tokens: int) -> dict[str, float]:
    """Memory statistics over the first rows of `tokens`.

    Args:
      model: the model.
      params: its parameters.
      tokens: int32 `[B, L]`, or a dict of features `[B, L, ...]`; at most the first 4 rows are used.
      max_tokens: total number of tokens read; rows are truncated to an equal share, of at least a block.

    Returns:
      `MemoryHealth.scalars()`; empty if the memory was never updated.
    """
    rows = min(len(jax.tree.leaves(tokens)[0]), _HEALTH_ROWS)
    length = max(max_tokens // rows, model.config.block_size)
    tokens = jax.tree.map(lambda x: x[:rows, :length], tokens)
    health = _monitor_of(model.module).measure(params, tokens)
    return {} if health is None else health.scalars()


def without_memory(model: DecoderModel, params) -> tuple[DecoderModel, Any]:
    """The same weights without memory: block sliding window attention.

    Returns:
      `(model, params)`; the memory's parameters are left out.
    """
    config = dataclasses.replace(model.config, memory=Memory())

    def rest(tree):
        if not isinstance(tree, Mapping):
            return tree
        return {name: rest(value) for name, value in tree.items() if name != COLLECTION}

    return dataclasses.replace(model, module=Decoder(config)), rest(params)


def check_vocabulary(vocabulary: Any, model: DecoderModel, name: str) -> None:
    """Checks that `vocabulary` assigns the token ids that the model was trained with.

    Args:
      vocabulary: the evaluation's vocabulary; None skips the check.
      model: the model. Without a vocabulary of its own only the vocabulary's size is checked.
      name: the setting at fault, for the error message.

    Raises:
      ConfigError: the vocabulary has more tokens than the model, or is another one.
    """
    if vocabulary is None:
        return
    if vocabulary.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"The vocabulary of {name} has {vocabulary.vocab_size} tokens, the model's only"
            f" {model.config.vocab_size}: choose an evaluation with the model's vocabulary."
        )
    given, trained = (getattr(v, "fingerprint", None) for v in (vocabulary, model.vocabulary))
    if given and trained and given != trained:
        raise ConfigError(
            f"The vocabulary of {name} ({vocabulary.kind}) is not the one that the model was trained"
            f" with ({model.vocabulary.kind}): choose an evaluation with the model's vocabulary."
        )
