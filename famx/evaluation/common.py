"""What the evaluations share: programs compiled once, figures of the memory, checks."""

import functools
from collections.abc import Mapping
from typing import Any

from famx.analysis import MemoryMonitor
from famx.base.errors import ConfigError
from famx.decoding import Streamer
from famx.models import DecoderModel

HEALTH_TOKENS = 65_536  # read at most for the memory's figures
_HEALTH_ROWS = 4  # examples that they are the mean of

# One of each per decoder, so that a later evaluation compiles nothing again.
streamer_of = functools.lru_cache(maxsize=8)(Streamer)
_monitor_of = functools.lru_cache(maxsize=8)(MemoryMonitor)


def is_of_memory(name: str) -> bool:
    """Whether a scalar tells of the memory and is no score."""
    return name.startswith("memory/")


def compared(kept: Mapping[str, float], zeroed: Mapping[str, float]) -> dict[str, float]:
    """`memory/kept/<score>` and `memory/zeroed/<score>` of the same tokens."""
    both = {"kept": kept, "zeroed": zeroed}
    return {f"memory/{how}/{k}": v for how, scores in both.items() for k, v in scores.items()}


def memory_figures(model: DecoderModel, params, tokens, max_tokens: int) -> dict[str, float]:
    """`MemoryHealth.scalars` of the first few rows of `tokens [B, L]`, cut to `max_tokens` in all."""
    tokens = tokens[:_HEALTH_ROWS]
    length = max(max_tokens // len(tokens), model.config.block_size)
    health = _monitor_of(model.module).measure(params, tokens[:, :length])
    return {} if health is None else health.scalars()


def check_vocabulary(vocabulary: Any, model: DecoderModel, name: str) -> None:
    """Raises ConfigError unless the ids of `vocabulary` are those that the model was trained on."""
    if vocabulary is None:
        return
    if vocabulary.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"The vocabulary of {name} has {vocabulary.vocab_size} tokens, the model's only"
            f" {model.config.vocab_size}: choose an evaluation with the model's vocabulary."
        )
    here, there = (getattr(v, "fingerprint", None) for v in (vocabulary, model.vocabulary))
    if here and there and here != there:
        raise ConfigError(
            f"The vocabulary of {name} ({vocabulary.kind}) is not the one that the model was trained"
            f" with ({model.vocabulary.kind}): choose an evaluation with the model's vocabulary."
        )
