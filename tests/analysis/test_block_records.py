"""Records of blocks: predictions against the model's own logits, updates, and how far back they reach."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from modules.helpers import config, precision, random_params, random_tokens

from famx.analysis import AttentionReader, attention_reader
from famx.analysis.pictures import NO_TOKEN
from famx.memories import Fam
from famx.modules import Decoder, Memory

S = 4
FLOAT64 = dict(dtype="float64", param_dtype="float64")


@functools.cache
def reader(c):
    return AttentionReader(Decoder(c))


def read_maps(c, params, tokens, **choice):
    with precision(c):
        return reader(c).read(params, [tokens], **choice)


@pytest.mark.parametrize("changes", [{}, dict(memory=Memory(), logit_softcap=3.0)], ids=["FAM", "BSWA"])
def test_predictions_are_those_of_the_models_logits(changes):
    c = config(memory_segments=1, **changes, **FLOAT64)
    params, tokens = random_params(c), random_tokens(1, 3 * S + 2)[0]
    with precision(c):
        logits = np.array(jax.jit(Decoder(c).apply)({"params": params}, tokens[None])[0][0])
    maps = read_maps(c, params, tokens, blocks=[1])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found, count = maps.records, len(tokens)
    assert found.blocks == (0, 1, 2, 3) and found.slots.tolist() == [[0, S]] * 3 + [[0, 2]]
    flat = lambda name: getattr(found, name).reshape(-1)
    np.testing.assert_array_equal(flat("ids")[:count], tokens)
    np.testing.assert_array_equal(flat("predicted")[:count], logits.argmax(-1))
    np.testing.assert_allclose(flat("probability")[:count], probabilities.max(-1), atol=1e-7)
    for i, token in enumerate(tokens[1:]):
        order = np.argsort(-logits[i]).tolist()
        assert flat("rank")[i] == 1 + order.index(token)
        np.testing.assert_allclose(flat("next_probability")[i], probabilities[i, token], atol=1e-7)
    assert not flat("rank")[count - 1 :].any() and not flat("next_probability")[count - 1 :].any()
    assert set(flat("ids")[count:]) == set(flat("predicted")[count:]) == {NO_TOKEN}
    assert set(maps.texts) >= set(flat("predicted")[:count].tolist())


def test_however_a_text_is_cut_the_next_token_is_known(monkeypatch):
    monkeypatch.setattr("famx.analysis.records._LOGITS", 1)  # one token at a time
    c = config()
    params, tokens = random_params(c), random_tokens(1, 3 * S)[0]
    whole = read_maps(c, params, tokens).records
    fresh = AttentionReader(Decoder(c)).read(params, [tokens[:3], [], tokens[3:5], tokens[5:]]).records
    for name in ("ids", "predicted", "rank", "slots"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(fresh, name))
    np.testing.assert_allclose(whole.next_probability, fresh.next_probability, atol=1e-5)


def test_updates_are_the_memorys_attention_of_every_complete_block():
    c = config(**FLOAT64)
    params, tokens = random_params(c), random_tokens(1, 3 * S + 1)[0]
    maps = read_maps(c, params, tokens)
    np.testing.assert_allclose(
        maps.records.updates, maps.memory.mean(axis=2).reshape(maps.records.updates.shape), atol=1e-12
    )
    assert not maps.records.updates[-1].any() and not maps.records.shares[-1].any()
    assert [maps.records.completed(block) for block in (-1, 0, 2, 3, 4)] == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_records_are_of_the_kept_blocks_and_of_the_newest(monkeypatch):
    c = config()
    params, tokens = random_params(c), random_tokens(1, 9 * S)[0]
    fresh = AttentionReader(Decoder(c))
    whole = fresh.read(params, [tokens], blocks=[1, -1]).records
    assert whole.blocks == tuple(range(9))
    monkeypatch.setattr(attention_reader, "_MAX_RECORD_BYTES", 1)
    assert fresh.read(params, [tokens], blocks=[1, -3]).records.blocks == (1, 6, 8)
    one = sum(getattr(whole, name).nbytes for name in ("ids", "predicted", "probability", "rank"))
    one += whole.next_probability.nbytes + whole.updates.nbytes + whole.shares.nbytes
    monkeypatch.setattr(attention_reader, "_MAX_RECORD_BYTES", 4 * one // 9)
    part = fresh.read(params, [tokens], blocks=[1]).records
    assert part.blocks == (1, 5, 6, 7, 8)
    chosen = list(part.blocks)
    for name in (field.name for field in dataclasses.fields(part)[1:]):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[chosen])


SHARES = {  # shares of the first update and of the second, whose attention on the block is 0.75
    "paper": ({}, 1, 0.5),
    "ordinary": (dict(first_residual="ordinary"), 0.5, 0.5),
    "gated": (dict(update="gated"), 1, 0.25),
    "gated, ordinary": (dict(update="gated", first_residual="ordinary"), 0.25, 0.25),
    "scaled": (dict(update_scale=0.5), 1, 0.25),
    "learned queries": (dict(query="learned"), 1, 1),
}


@pytest.mark.parametrize("name", SHARES)
def test_the_share_of_attention_follows_from_the_update(name):
    fields, first, later = SHARES[name]
    on_block = np.array([0.75, 0.75], np.float32)
    share = lambda is_first: np.asarray(Fam(2, **fields).attention_share(on_block, is_first))
    assert share(True).tolist() == [first] * 2 and share(False).tolist() == [later] * 2
    if fields.get("update") == "gated":
        assert np.asarray(Fam(2, **fields).attention_share(np.array([0.4]), False)) == [0]


def test_a_gate_that_is_closed_leaves_the_memory_out_of_the_trace():
    # The state knows how many updates there were, so reading that resumes has no first update.
    c = config(memory=Fam(2, update="gated", normalize=True), **FLOAT64)
    params, tokens = random_params(c), random_tokens(1, 3 * S)[0]
    records = read_maps(c, params, tokens).records
    gates = np.maximum(0, 2 * records.updates[..., 2:].sum(-1) - 1) / 2
    np.testing.assert_allclose(records.shares[1:], gates[1:], atol=1e-12)
    np.testing.assert_array_equal(records.shares[0], 1)
