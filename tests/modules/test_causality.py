"""Invariant 3: no token changes a logit before it, and how far a token reaches."""

import numpy as np
import pytest
from helpers import VOCAB, config, random_params, random_tokens, read
from memories_table import MEMORIES, REMEMBERING

from famx.memories import Fam, Landmark
from famx.modules import Memory

LENGTH = 18
BASE = dict(dtype="float64", blocks_per_chunk=2)
VARIANTS = {
    "paper": dict(),
    "no segments": dict(memory_segments=0),
    "bswa": dict(memory=Memory()),
    "zero positions": dict(memory=Fam(2, positions="zero"), attention_backend="blockwise"),
    "float positions": dict(memory=Fam(4, positions="float")),
    "prefix": dict(memory=Fam(2, start_from="prefix"), attention_backend="xla"),
    "gated": dict(memory=Fam(2, update="gated", normalize=True)),
    "scaled, normalized": dict(memory=Fam(2, update_scale=0.5, normalize=True), memory_segments=0),
    "window mask": dict(window_mask=True, memory_segments=2),
    "window mask, blockwise, bswa": dict(
        window_mask=True, memory=Memory(), attention_backend="blockwise", blocks_per_chunk=1
    ),
    "parallel block": dict(parallel_block=True, num_layers=3, num_kv_heads=1),
    "stopped segments": dict(stop_gradient_segments=True, attention_backend="blockwise"),
    **{name: dict(memory=memory) for name, memory in MEMORIES.items()},
}


def influence(c, length=LENGTH, seed=0):
    """`[L, L]`: how much changing token `i` changes the logits at `j`."""
    tokens = random_tokens(1, length, seed)
    changed = np.repeat(tokens, length, axis=0)
    diagonal = np.arange(length)
    changed[diagonal, diagonal] = (changed[diagonal, diagonal] + 1) % VOCAB
    logits, _ = read(c, random_params(c, seed), np.concatenate([tokens, changed]))
    return np.abs(np.asarray(logits[1:]) - np.asarray(logits[:1])).max(axis=-1)


@pytest.mark.sampled(14)
@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_changes_a_logit_before_it(name):
    change = influence(config(**{**BASE, **VARIANTS[name]}))
    before = np.tril(np.ones_like(change, dtype=bool), -1)
    assert change[before].max() == 0
    assert change.diagonal().min() > 1e-3


ENDLESS = [name for name, memory in REMEMBERING.items() if not isinstance(memory, Landmark)]


@pytest.mark.sampled(18)
@pytest.mark.parametrize("name", ["paper", "no segments", "zero positions", "prefix", *ENDLESS])
def test_with_memory_every_token_reaches_all_that_follow(name):
    change = influence(config(**{**BASE, **VARIANTS[name]}), length=26)
    after = np.triu(np.ones_like(change, dtype=bool))
    assert change[after].min() > 1e-13
    assert change[0, -1] > 1e-12


@pytest.mark.parametrize("layers,segments", [(2, 1), (1, 2), (3, 0)])
@pytest.mark.parametrize("window", [False, True])
def test_without_memory_the_reach_is_exact(layers, segments, window):
    c = config(num_layers=layers, memory_segments=segments, window_mask=window, memory=Memory(), **BASE)
    length, size = 22, c.block_size
    change = influence(c, length)
    source, target = np.arange(length)[:, None], np.arange(length)
    # One layer moves information within a block, or `M` blocks (window mask: `M * S` tokens) on.
    if window:
        reached = target - source <= c.reach
    else:
        reached = target // size - source // size <= layers * segments
    np.testing.assert_array_equal(change > 0, reached & (source <= target))
    assert c.reach == layers * segments * size
    limit = c.reach if window else c.reach + size - 1  # the own block comes on top
    assert (change > 0)[target - source > limit].sum() == 0
    assert (change > 0)[target - source == limit].any()


def test_a_ring_of_pieces_forgets():
    c = config(memory=Landmark(piece=2, pieces=3), **BASE)
    change = influence(c, length=34)
    distance = np.arange(34) - np.arange(34)[:, None]
    ring = c.memory.piece * c.memory.pieces + c.memory_segments * c.block_size
    assert change[distance >= c.num_layers * (ring + c.block_size)].max() == 0
    assert change[distance == c.num_layers * ring].max() > 1e-6


def test_with_memory_there_is_no_reach():
    assert config().reach is None


def test_the_memory_sees_a_block_only_when_it_is_complete():
    c = config(memory_segments=0, num_layers=1, **BASE)
    params, tokens = random_params(c), random_tokens(1, 7)
    changed = tokens.copy()
    changed[0, 4:] = (changed[0, 4:] + 1) % VOCAB
    _, state = read(c, params, tokens)
    _, other = read(c, params, changed)
    np.testing.assert_array_equal(state.memory, other.memory)
    changed[0, 3] = (changed[0, 3] + 1) % VOCAB  # the last token of the block that was compressed
    _, other = read(c, params, changed)
    assert np.abs(np.asarray(state.memory) - np.asarray(other.memory)).max() > 1e-3
