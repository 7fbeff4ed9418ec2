"""Features in place of tokens: frontends and heads against numpy, and the invariants of the model."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import assert_close, config, jit, random_params, random_tokens, read

from famx.base.errors import ConfigError
from famx.decoding import Streamer
from famx.lora import Lora
from famx.memories import Fam
from famx.models import DecoderModel
from famx.models.decoder_model import loss_weights
from famx.modules import Decoder, DecoderConfig
from famx.modules.frontends import Frontend, Ids, Mixed, Vectors, from_dict
from famx.modules.heads import Values
from famx.training.memory_costs import memory_costs

WORDS, VECTORS, EDGES = Frontend(), Vectors("frames", 3), Ids("edges", (5, 4, 2))
FRONTENDS = {
    "vectors": VECTORS,
    "hidden": Vectors("frames", 3, hidden=6),
    "ids": EDGES,
    "mixed": Mixed((WORDS, VECTORS, EDGES)),
}
READ = ("hidden", "mixed")  # the others are parts of the mixed one


def of(frontend, **changes) -> DecoderConfig:
    return config(frontend=frontend, values=Values(2), **{"dtype": "float64", **changes})


@functools.cache
def params_of(c: DecoderConfig):
    with jax.enable_x64(True):
        shapes = nn.unbox(DecoderModel(Decoder(c)).abstract_params())
    rng = np.random.default_rng(0)
    draw = lambda path, x: rng.standard_normal(x.shape).astype(x.dtype) * 0.5 + ("scale" in str(path))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def inputs(frontend: Frontend, batch: int, length: int, seed=0):
    """Random features; of ids, some that no table has."""
    rng, found = np.random.default_rng(seed), {}
    for feature in frontend.features:
        shape = (batch, length, *feature.shape)
        most = {"kinds": 3, "tokens": 13}.get(feature.name, 4)
        real = feature.dtype == "float32"
        array = rng.standard_normal(shape) if real else rng.integers(0, most, shape)
        found[feature.name] = array.astype(feature.dtype)
    return found


@functools.cache
def reader(c: DecoderConfig):
    """Jitted `(logits, values, state)` of a reading."""

    def call(params, tokens, state, valid):
        apply = functools.partial(Decoder(c).apply, {"params": params})
        hidden, state = apply(tokens, state, valid, method="read")
        return apply(hidden, method="logits"), apply(hidden, method="values"), state

    return jit(c, call)


def part(tokens, start, end):
    return jax.tree.map(lambda x: x[:, start:end], tokens)


@pytest.mark.parametrize("name", READ)
def test_no_position_changes_a_result_before_it(name):
    c, length = of(FRONTENDS[name], blocks_per_chunk=2), 11
    tokens, others = inputs(c.frontend, 1, length), inputs(c.frontend, 1, length, seed=1)
    repeated = jax.tree.map(lambda x: np.repeat(x, length + 1, axis=0), tokens)
    for key, array in repeated.items():
        for i in range(length):
            array[i + 1, i] = (array[i + 1, i] + 1) % 3 if key == "kinds" else others[key][0, i] + 1
    logits, values, _ = reader(c)(params_of(c), repeated, None, None)
    for result in (logits, values):
        change = np.abs(np.asarray(result)[1:] - np.asarray(result)[:1]).max(axis=-1)
        assert change[np.tril(np.ones_like(change, bool), -1)].max() == 0
        assert change.diagonal().min() > 1e-4
        assert change[0, -1] > 1e-12  # through the memory


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", READ)
def test_any_cut_gives_the_same(name):
    c = of(FRONTENDS[name])
    params, tokens = params_of(c), inputs(c.frontend, 2, 11)
    logits, values, state = reader(c)(params, tokens, None, None)
    parts, after, start = [], None, 0
    for end in (5, 6, 11):
        *results, after = reader(c)(params, part(tokens, start, end), after, None)
        parts.append(results)
        start = end
    assert_close([np.concatenate(x, axis=1) for x in zip(*parts)], [np.asarray(logits), values], 1e-9)
    assert_close(after, state, 1e-9)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", READ)
def test_padding_changes_nothing(name):
    c = of(FRONTENDS[name])
    params, tokens = params_of(c), inputs(c.frontend, 2, 11)
    short = part(tokens, 0, 6)
    logits, values, state = reader(c)(params, short, None, None)
    valid = np.broadcast_to(np.arange(11) < 6, (2, 11))
    results = []
    for seed in (1, 2):
        padding = inputs(c.frontend, 2, 11, seed)
        padded = jax.tree.map(lambda a, b: np.concatenate([a, b[:, 6:]], axis=1), short, padding)
        more, more_values, after = reader(c)(params, padded, None, valid)
        results.append((more[:, :6], more_values[:, :6], after))
    assert_close(results[0], (logits, values, state), 1e-9)
    assert_close(results[0], results[1], 0)


def test_the_streamer_reads_features_of_different_lengths():
    c = of(FRONTENDS["mixed"], dtype="float32")
    params, tokens = params_of(c), inputs(c.frontend, 2, 11)
    streamer, lengths = Streamer(Decoder(c), widths=(3,)), np.array([11, 6])
    logits, state = streamer.logits(params, streamer.initial_state(params, 2), tokens, lengths)
    values, _ = streamer.values(params, streamer.initial_state(params, 2), tokens, lengths)
    valid = np.arange(11) < lengths[:, None]
    want, want_values, after = reader(c)(params, tokens, None, valid)
    assert_close(logits[valid], np.asarray(want)[valid], 1e-3)
    assert_close(values[valid], np.asarray(want_values)[valid], 1e-3)
    assert not values[~valid].any() and values.shape == (2, 11, 2)
    assert_close(state, after, 1e-3)


# ---------------------------------------------------------------- against numpy


def embedded(c, tokens):
    apply = lambda params, x: Decoder(c).apply({"params": params}, x, method="_embed")
    return np.asarray(jit(c, apply)(params_of(c), tokens))


def test_frontends_against_numpy():
    c = of(FRONTENDS["mixed"])
    params, tokens = params_of(c), inputs(c.frontend, 2, 11)
    tokens["edges"][0, 0] = 4, 3, 1
    tokens["edges"][0, 1] = 5, 4, -1  # in no table
    tokens["kinds"][0, :3] = 2, 2, 3  # the last one is no kind
    own = params["frontend"]
    table = own["parts_2"]["tables"]
    rows = np.zeros((2, 11, c.embed_dim))
    for column, (first, size) in enumerate(((0, 5), (5, 4), (9, 2))):
        ids = tokens["edges"][..., column]
        known = (ids >= 0) & (ids < size)
        rows += np.where(known[..., None], table[first + np.clip(ids, 0, size - 1)], 0)
    of_kind = [
        params["embedding"][tokens["tokens"]],
        tokens["frames"].astype(float) @ own["parts_1"]["kernel"] + own["parts_1"]["bias"],
        rows,
        np.zeros_like(rows),
    ]
    want = np.take_along_axis(np.stack(of_kind), tokens["kinds"][None, ..., None], axis=0)[0]
    np.testing.assert_allclose(embedded(c, tokens), want, rtol=1e-6, atol=1e-7)
    hidden = of(FRONTENDS["hidden"])
    own, tokens = params_of(hidden)["frontend"], inputs(hidden.frontend, 2, 3)
    inner = tokens["frames"].astype(float) @ own["hidden_kernel"] + own["hidden_bias"]
    gelu = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    want = gelu @ own["kernel"] + own["bias"]
    np.testing.assert_allclose(embedded(hidden, tokens), want, rtol=1e-6, atol=1e-7)


def test_words_of_a_mixed_sequence_are_plain_tokens():
    plain = config()
    mixed = dataclasses.replace(plain, frontend=FRONTENDS["mixed"])
    params, ids = random_params(plain), random_tokens(2, 11)
    tokens = {**inputs(mixed.frontend, 2, 11), "tokens": ids, "kinds": np.zeros_like(ids)}
    more = {**params, "frontend": params_of(of(FRONTENDS["mixed"], dtype="float32"))["frontend"]}
    logits, state = read(plain, params, ids)
    assert_close(read(mixed, more, tokens), (logits, state), 1e-6)
    assert_close(read(mixed, more, ids), (logits, state), 1e-6)  # all of them are words


@pytest.mark.parametrize("loss", ["squared", "absolute"])
def test_the_loss_against_numpy(loss):
    c = dataclasses.replace(of(VECTORS, dtype="float32"), values=Values(2, loss))
    model, params = DecoderModel(Decoder(c)), params_of(of(VECTORS, dtype="float32"))
    rng, shape = np.random.default_rng(0), (2, 8)
    batch = {
        "decoder_input_tokens": np.zeros(shape, np.int32),
        "decoder_input_frames": inputs(VECTORS, *shape)["frames"],
        "decoder_target_tokens": rng.integers(0, 13, shape).astype(np.int32),
        "decoder_loss_weights": (rng.random(shape) < 0.3).astype(np.float32),
        "decoder_target_values": rng.standard_normal((*shape, 2)).astype(np.float32),
        "decoder_value_weights": rng.random(shape).astype(np.float32),
    }
    result, metrics, _ = jax.jit(model.loss)(params, batch)
    logits, values, _ = reader(c)(params, {"frames": batch["decoder_input_frames"]}, None, None)
    logits, values = np.asarray(logits, np.float64), np.asarray(values, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, batch["decoder_target_tokens"][..., None], -1)[..., 0]
    difference = values - batch["decoder_target_values"]
    of_values = (difference**2 if loss == "squared" else np.abs(difference)).mean(-1)
    weights, value_weights = batch["decoder_loss_weights"], batch["decoder_value_weights"]
    total = (nats * weights).sum() + (of_values * value_weights).sum()
    weight = weights.sum() + value_weights.sum()
    np.testing.assert_allclose(result, total / weight, rtol=1e-4)
    np.testing.assert_allclose(metrics["value_loss"].total, (of_values * value_weights).sum(), rtol=1e-4)
    np.testing.assert_allclose(model.weight(batch), weight, rtol=1e-6)
    assert metrics["loss"].count == pytest.approx(weight)


def test_both_losses_reach_every_parameter():
    c = of(FRONTENDS["mixed"], dtype="float32")
    model, params = DecoderModel(Decoder(c)), params_of(c)
    shape = (1, 12)
    batch = {f"decoder_input_{name}": x for name, x in inputs(c.frontend, *shape).items()}
    batch |= {"decoder_target_tokens": np.ones(shape, np.int32)}
    batch |= {"decoder_target_values": np.ones((*shape, 2), np.float32)}
    batch |= {"decoder_value_weights": np.ones(shape, np.float32)}
    assert loss_weights(batch).all()
    gradient = jax.jit(jax.grad(lambda params: model.loss(params, batch)[0]))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


# ---------------------------------------------------------------- what is described and refused


@pytest.mark.parametrize("name", FRONTENDS)
def test_a_description_gives_the_same_model(name):
    model = DecoderModel(Decoder(of(FRONTENDS[name])))
    described = json.loads(json.dumps(model.describe()))
    assert DecoderModel.from_description(described).config == model.config
    assert from_dict(described["frontend"]) == FRONTENDS[name]


def test_a_model_of_tokens_is_described_as_before():
    c = config()
    assert not {"frontend", "values"} & c.to_dict().keys()
    assert DecoderConfig.from_dict(c.to_dict()) == c
    assert not {"frontend", "value_head"} & DecoderModel(Decoder(c)).abstract_params().keys()


def test_what_is_no_frontend_is_refused():
    with pytest.raises(ValueError, match="each needs a name of its own"):
        Mixed((VECTORS, Vectors("frames", 4)))
    with pytest.raises(ValueError, match="two parts at least"):
        Mixed((VECTORS,))
    with pytest.raises(ValueError, match="kind 'waves', which is not known"):
        from_dict({"kind": "waves"})
    with pytest.raises(ValueError, match="has no field depth; it has hidden, name, width"):
        from_dict({"kind": "vectors", "name": "a", "depth": 3})
    with pytest.raises(ConfigError, match="width must be a whole number of at least 1"):
        Vectors("frames", 0)


def test_a_model_refuses_what_it_does_not_read():
    c = of(VECTORS, dtype="float32")
    params, streamer = params_of(c), Streamer(Decoder(c))
    state = streamer.initial_state(params, 1)
    ids = np.zeros((1, 3), np.int32)
    with pytest.raises(ValueError, match=r"reads 'frames' \(3 float32\), not text"):
        streamer.read(params, state, ids)
    with pytest.raises(ValueError, match=r"reads 'frames' \(3 float32\)"):
        streamer.read(params, state, {"frames": np.zeros((1, 3, 4), np.float32)})
    with pytest.raises(ValueError, match="reads 'frames'"):
        Decoder(c).apply({"params": params}, ids)
    plain = Streamer(Decoder(config(memory=Fam(2))))
    with pytest.raises(ValueError, match="The model reads tokens alone"):
        plain.read(random_params(config()), state, {"frames": np.zeros((1, 3, 3), np.float32)})


def test_adapters_leave_the_frontend_and_the_head_alone():
    model = DecoderModel(Decoder(of(VECTORS, dtype="float32")), lora=Lora(rank=2, targets=".*"))
    model.lora.check(model.config)
    params = nn.unbox(model.abstract_params())
    assert set(params["frontend"]) == set(params["value_head"]) == {"kernel", "bias"}
    assert "lora_a" in params["layers"]["query"]


def test_what_a_memory_costs_does_not_depend_on_what_is_read():
    assert memory_costs(of(VECTORS)) == memory_costs(of(Frontend()))
