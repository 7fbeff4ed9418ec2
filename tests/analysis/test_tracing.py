"""Traces against a slow oracle that follows every weight by itself."""

import functools

import numpy as np
import pytest
from modules.helpers import config, precision, random_params, random_tokens

from famx.analysis import AttentionReader, tracing
from famx.memories import Fam
from famx.modules import Decoder, Memory

S = 4
VARIANTS = {
    "FAM": {},
    "gated, M 2": dict(
        memory=Fam(3, update="gated", normalize=True), memory_segments=2, num_heads=4, head_dim=4
    ),
    "BSWA": dict(memory=Memory(), memory_segments=1),
}


@functools.cache
def made(name):
    c = config(num_layers=3, dtype="float64", param_dtype="float64", **VARIANTS[name])
    tokens = random_tokens(1, 4 * S + 3)[0]
    with precision(c):
        return AttentionReader(Decoder(c)).read(random_params(c), [tokens], label=lambda i: f"t{i}")


def slow_trace(maps, block, slot):
    """Weights by (block, slot), and of the first memory by (layer, token): one path after another."""
    tokens, start = {}, {}
    n, past, layers = maps.memory_columns, maps.memory_segments * maps.block_size, len(maps.layers)

    def add(table, key, weight):
        table[key] = table.get(key, 0) + weight

    def follow_memory(before, layer, number, weight):
        """Memory token `number` of a layer, as block `before` reads it."""
        if before == 0:
            return add(start, (layer, number), weight)
        attention = maps.memory[before - 1, layer].mean(0)[number]
        share = maps.records.shares[before - 1, layer, number]
        follow_memory(before - 1, layer, number, weight * (1 - share))
        for key, p in enumerate(attention):
            if key < n:
                follow_memory(before - 1, layer, key, weight * share * p)
            else:
                add(tokens, (before - 1, key - n), weight * share * p)

    def follow_token(layer, slot, weight):
        """The output of the first `layer` layers for a token of the block."""
        if layer == 0:
            return add(tokens, (block, slot), weight)
        follow_token(layer - 1, slot, weight / 2)
        for key, p in enumerate(maps.tokens[block, layer - 1].mean(0)[slot]):
            if not p:
                continue
            if key < n:
                follow_memory(block, layer - 1, key, weight / 2 * p)
            elif key < n + past:
                token = block * S - past + key - n
                add(tokens, divmod(token, S), weight / 2 * p)
            else:
                follow_token(layer - 1, key - n - past, weight / 2 * p)

    follow_token(layers, slot, 1.0)
    return tokens, start


@pytest.mark.parametrize("name", VARIANTS)
def test_a_trace_is_the_sum_over_all_paths(name):
    maps = made(name)
    for block, slot in ((0, 3), (2, 1), (3, 3), (4, 2)):
        tokens, start = slow_trace(maps, block, slot)
        found = tracing.trace(maps, block, slot)
        expected = {b: np.zeros(S) for b in found.weights}
        for (b, s), weight in tokens.items():
            expected[b][s] += weight
        for b, weights in found.weights.items():
            np.testing.assert_allclose(weights, expected[b], atol=1e-9)
        assert list(found.weights) == sorted(found.weights, reverse=True)
        for (layer, number), weight in start.items():
            np.testing.assert_allclose(found.start[layer, number], weight, atol=1e-9)
        total = sum(map(np.sum, found.weights.values())) + found.start.sum()
        np.testing.assert_allclose(total, 1, atol=1e-9)
        if maps.memory_columns:
            assert min(found.weights) == 0 and (block == 0 or found.weights[0].sum() > 0)


def test_one_update_is_its_attention_and_what_was_before():
    maps = made("FAM")
    found = tracing.trace_memory(maps.records, 1, 2, 0)  # the first update has no residual
    np.testing.assert_allclose(found.weights[0], maps.memory[0, 2].mean(0)[0, 2:])
    np.testing.assert_allclose(found.start[2], maps.memory[0, 2].mean(0)[0, :2])
    assert not found.start[:2].any() and list(found.weights) == [0]
    assert tracing.trace_memory(maps.records, 0, 1, 1).weights == {}


def test_a_trace_ends_where_the_records_do(monkeypatch):
    c = config()
    tokens = random_tokens(1, 6 * S)[0]
    monkeypatch.setattr("famx.analysis.attention_reader._MAX_RECORD_BYTES", 1)
    maps = AttentionReader(Decoder(c)).read(random_params(c), [tokens], blocks=[-2, -1])
    found = tracing.trace(maps, 5, 2)
    assert list(found.weights) == [5, 4] and found.start.sum() > 0.001
    (strongest, *_) = found.strongest(maps, 3)
    weights = {(b, s): w for b, row in found.weights.items() for s, w in enumerate(row)}
    b, s, text, weight = strongest
    assert weight == max(weights.values()) == weights[b, s] and text == str(tokens[b * S + s])


def test_what_cannot_be_traced_is_told():
    maps = made("FAM")
    for call, sentence in [
        (lambda: tracing.trace(maps, 7, 0), "There is no map of block 7; kept blocks: 0, 1, 2, 3, 4."),
        (lambda: tracing.trace(maps, 4, 3), "There is no token in slot 3: block 4 has slots 0 to 2."),
        (
            lambda: tracing.trace_memory(maps.records, 1, 0, 2),
            "There is no memory token 2 of layer 0 that",
        ),
        (
            lambda: tracing.trace_memory(made("BSWA").records, 1, 0, 0),
            "There is no memory token 0 of layer",
        ),
    ]:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(sentence)
