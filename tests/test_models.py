"""The model definition: a value with losses, predictions and scores."""

import dataclasses
import functools
import types
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import COMPILE_FAST
from flax.linen import unbox

from famx.memories import Fam
from famx.models import DecoderModel, loss_weights
from famx.models.metrics import Mean
from famx.modules import Decoder, DecoderConfig

VOCAB, BATCH, LENGTH = 13, 3, 11
CONFIG = DecoderConfig(
    vocab_size=VOCAB, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12, block_size=4,
    memory_segments=1, memory=Fam(2),
)  # fmt: skip
jit = functools.partial(jax.jit, compiler_options=COMPILE_FAST)


def make_model(**options):
    return DecoderModel(Decoder(CONFIG), **options)


@functools.cache
def variables():
    params = jit(lambda key: unbox(make_model().init_params(key)))(jax.random.key(3))
    return jax.tree.map(lambda x: 2 * x, params)  # less uniform predictions


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (BATCH, LENGTH + 1), dtype=np.int32)
    return {
        "decoder_input_tokens": tokens[:, :-1],
        "decoder_target_tokens": tokens[:, 1:],
        "decoder_loss_weights": rng.choice([0, 0.1, 1], (BATCH, LENGTH)).astype(np.float32),
    }


@functools.cache
def forward(config=CONFIG):
    return jit(lambda params, tokens: Decoder(config).apply({"params": params}, tokens)[0])


def log_probabilities(batch):
    """Log-probabilities of the targets `[B, L]`, in numpy, and the logits."""
    logits = np.asarray(forward()(variables(), batch["decoder_input_tokens"]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(log_p, batch["decoder_target_tokens"][..., None], -1)[..., 0], logits


@functools.cache
def loss_call():
    return jit(make_model().loss)


# Loss.


@functools.cache
def value_and_grad(**options):
    model = make_model(**options)
    return jit(jax.value_and_grad(lambda p, b: model.loss(p, b)[:2], has_aux=True))


def test_the_loss_is_the_weighted_mean_cross_entropy():
    batch = make_batch()
    log_p, logits = log_probabilities(batch)
    weights = batch["decoder_loss_weights"]
    (loss, metrics), _ = value_and_grad()(variables(), batch)
    expected = -(log_p * weights).sum() / weights.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].compute(), expected, rtol=1e-5)
    right = logits.argmax(-1) == batch["decoder_target_tokens"]
    accuracy = (right * weights).sum() / weights.sum()
    np.testing.assert_allclose(metrics["accuracy"].compute(), accuracy, rtol=1e-5)
    assert metrics["memory_rms"].compute() > 0


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_a_chunked_loss_is_the_same_loss(chunk):
    batch = {**make_batch(), "answer_start": np.array([3, 9, 10], np.int32)}
    expected = value_and_grad(z_loss=0.01)(variables(), batch)
    got = value_and_grad(z_loss=0.01, loss_chunk=chunk)(variables(), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("weighted", [0, 1, 7, BATCH * LENGTH])
def test_logits_are_made_of_weighted_tokens_alone(weighted):
    """Chunks without a weight are skipped; values and gradients are those of all tokens at once."""
    batch, made = make_batch(), []
    weights = np.zeros(BATCH * LENGTH, np.float32)
    weights[np.random.default_rng(3).permutation(BATCH * LENGTH)[:weighted]] = 0.5
    batch["decoder_loss_weights"] = weights.reshape(BATCH, LENGTH)
    model = make_model(z_loss=0.01, loss_chunk=5)
    head = Decoder.logits

    def counted(module, hidden):
        jax.debug.callback(lambda: made.append(hidden.shape[0]))
        return head(module, hidden)

    with mock.patch.object(Decoder, "logits", counted):
        function = jax.jit(jax.value_and_grad(lambda p, b: model.loss(p, b)[:2], has_aux=True))
        got = function(variables(), batch)
        jax.block_until_ready(got)
        jax.effects_barrier()
    assert made == [5] * -(-weighted // 5)
    expected = value_and_grad(z_loss=0.01)(variables(), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, expected)


def test_z_loss_adds_the_squared_log_partition():
    batch = make_batch()
    logits, weights = log_probabilities(batch)[1], batch["decoder_loss_weights"]
    extra = (np.log(np.exp(logits).sum(-1)) ** 2 * weights).sum() / weights.sum()
    (plain, _), _ = value_and_grad()(variables(), batch)
    (more, _), _ = value_and_grad(z_loss=0.01)(variables(), batch)
    np.testing.assert_allclose(more - plain, 0.01 * extra, rtol=1e-3)


def test_weights_default_to_targets_that_are_not_padding():
    batch = make_batch()
    del batch["decoder_loss_weights"]
    batch["decoder_target_tokens"][1, 4:] = 0
    weights = loss_weights(batch)
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights, batch["decoder_target_tokens"] != 0)
    (loss, _), _ = value_and_grad()(variables(), batch)
    weighted = {**batch, "decoder_loss_weights": np.asarray(weights)}
    np.testing.assert_allclose(value_and_grad()(variables(), weighted)[0][0], loss, rtol=1e-6)


def test_a_normalizer_makes_losses_of_parts_add_up():
    model, batch = make_model(), make_batch()
    total = batch["decoder_loss_weights"].sum()
    loss = jit(lambda p, b: model.loss(p, b, normalizer=total)[0])
    parts = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(BATCH)]
    whole = value_and_grad()(variables(), batch)[0][0]
    np.testing.assert_allclose(sum(loss(variables(), p) for p in parts), whole, rtol=1e-5)


def test_a_batch_without_weight_has_loss_zero():
    batch = {**make_batch(), "decoder_loss_weights": np.zeros((BATCH, LENGTH), np.float32)}
    (loss, metrics), grad = value_and_grad()(variables(), batch)
    assert loss == 0 and metrics["accuracy"].compute() == 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_exact_match_counts_answers_that_are_right_as_a_whole():
    batch = make_batch()
    _, logits = log_probabilities(batch)
    best = logits.argmax(-1).astype(np.int32)
    targets = np.where(np.arange(LENGTH) < 6, (best + 1) % VOCAB, best)
    targets[1, 8] = (targets[1, 8] + 1) % VOCAB  # one wrong digit
    batch["decoder_target_tokens"] = targets
    batch["answer_start"] = np.array([6, 6, 6], np.int32)
    batch["decoder_loss_weights"] = np.ones((BATCH, LENGTH), np.float32)
    (_, metrics), _ = value_and_grad()(variables(), batch)
    np.testing.assert_allclose(metrics["exact_match"].compute(), 2 / 3, rtol=1e-6)
    batch["answer_start"] = np.array([5, 6, 9], np.int32)  # one answer too early
    (_, metrics), _ = value_and_grad()(variables(), batch)
    np.testing.assert_allclose(metrics["exact_match"].compute(), 1 / 3, rtol=1e-6)
    batch["decoder_loss_weights"][1, 8] = 0  # the wrong digit is not part of the answer
    (_, metrics), _ = value_and_grad()(variables(), batch)
    np.testing.assert_allclose(metrics["exact_match"].compute(), 2 / 3, rtol=1e-6)


def test_the_loss_goes_on_from_a_state():
    model, batch = make_model(), make_batch()
    run = jit(lambda p, b, s: model.loss(p, b, state=s, normalizer=1.0))
    parts = [{name: x[:, cut] for name, x in batch.items()} for cut in (slice(0, 8), slice(8, 11))]
    state = jit(lambda p: model.initial_state(p, BATCH))(variables())
    total = 0.0
    for part in parts:
        loss, _, state = run(variables(), part, state)
        total += loss
    whole, _, end = run(variables(), batch, None)
    np.testing.assert_allclose(total, whole, rtol=1e-5)
    np.testing.assert_allclose(state.memory, end.memory, atol=1e-5)
    np.testing.assert_array_equal(state.position, end.position)


def test_loss_chunk_must_be_positive():
    with pytest.raises(ValueError, match="DecoderModel.loss_chunk must be a whole number of at least 1"):
        make_model(loss_chunk=0)


# Random position offsets.


def test_offsets_are_drawn_only_where_nothing_was_read_and_asked_for():
    batch, rng = make_batch(), jax.random.key(1)
    with_offset = make_model(random_position_offset=True)
    run = jit(lambda p, b, r, s: with_offset.loss(p, b, r, s)[2])
    first = run(variables(), batch, rng, None)
    assert np.any(first.offset) and (np.asarray(first.offset) < 62_832).all()
    second = run(variables(), batch, jax.random.key(2), first.replace(position=first.position - 3))
    np.testing.assert_array_equal(second.offset, first.offset)  # mid-sequence: kept
    assert not np.any(run(variables(), batch, None, None).offset)
    assert not np.any(loss_call()(variables(), batch, rng)[2].offset)


# A value.


def test_initial_parameters_are_boxed_with_their_axes():
    fresh = make_model().abstract_params()
    boxed = jax.tree.leaves(fresh, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    assert type(fresh) is dict
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in boxed)


def test_a_model_is_never_changed():
    model = make_model()
    for field in dataclasses.fields(model):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(model, field.name, None)
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        model.config = CONFIG
    assert model == make_model() and model.config is CONFIG
    assert dataclasses.replace(model, z_loss=0.1) != model


# Scores and predictions.


def test_scores_are_sums_of_log_probabilities():
    model, batch = make_model(), make_batch()
    log_p, _ = log_probabilities(batch)
    scores = jit(model.score)(variables(), batch)
    assert scores.shape == (BATCH,) and scores.dtype == jnp.float32
    expected = (log_p * batch["decoder_loss_weights"]).sum(1)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def greedy(prompt, steps):
    """The oracle: the whole sequence read again for every new token."""
    tokens, out, score = list(prompt), [], 0.0
    for _ in range(steps):
        padded = np.zeros((1, 2 * LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward()(variables(), padded)[0, len(tokens) - 1], np.float64)
        out.append(int(logits.argmax()))
        score += logits.max() - np.log(np.exp(logits).sum())
        tokens.append(out[-1])
    return out, score


def test_predictions_are_greedy_for_prompts_of_different_lengths():
    tokens = make_batch(seed=1)["decoder_input_tokens"]
    tokens[:, 0] = 0
    sizes = [LENGTH - 7, 1, LENGTH]
    # Begin of text is marked too: see `predict`.
    causal = (np.arange(LENGTH) < np.array(sizes)[:, None]).astype(np.int32)
    batch = {"decoder_input_tokens": tokens, "decoder_causal_attention": causal}
    model = make_model()
    out, scores = jit(model.predict)(variables(), batch)
    assert out.shape == (BATCH, LENGTH) and out.dtype == jnp.int32
    for row, size in enumerate(sizes):
        room = LENGTH - size + 1
        expected, score = greedy(tokens[row, :size], room)
        np.testing.assert_array_equal(out[row, :room], expected)
        assert not np.any(out[row, room:])
        np.testing.assert_allclose(scores[row], score, rtol=1e-4, atol=1e-4)


def test_a_batch_without_marks_is_a_prompt_up_to_its_padding():
    tokens = make_batch(seed=2)["decoder_input_tokens"]
    tokens[:, 0] = 0
    tokens[1, 5:] = 0
    model = make_model()
    out, _ = jit(model.predict)(variables(), {"decoder_input_tokens": tokens})
    expected, _ = greedy(tokens[1, :5], LENGTH - 4)
    np.testing.assert_array_equal(out[1, : LENGTH - 4], expected)
    np.testing.assert_array_equal(out[0, :1], greedy(tokens[0], 1)[0])


def test_the_vocabularys_eos_ends_a_prediction_and_its_padding_follows():
    tokens = make_batch(seed=2)["decoder_input_tokens"][:1, :]
    tokens[0, 3:] = 0
    expected, _ = greedy(tokens[0, :3], LENGTH - 2)
    eos = expected[2]
    end = expected.index(eos) + 1
    batch = {"decoder_input_tokens": tokens}
    batch["decoder_causal_attention"] = (np.arange(LENGTH) < 3).astype(np.int32)[None]
    model = make_model(vocabulary=types.SimpleNamespace(bos_id=9, eos_id=eos, pad_id=VOCAB + 1))
    out, _ = jit(model.predict)(variables(), batch)
    assert out[0].tolist() == expected[:end] + [VOCAB + 1] * (LENGTH - end)


# Metrics.


def test_means_merge_reduce_and_compute():
    values, weights = np.arange(6.0), np.array([1, 0, 2, 1, 1, 0.5])
    whole = Mean.of(values, weights)
    np.testing.assert_allclose(whole.compute(), np.average(values, weights=weights))
    merged = Mean.of(values[:2], weights[:2]).merge(Mean.of(values[2:], weights[2:]))
    np.testing.assert_allclose(merged.compute(), whole.compute())
    np.testing.assert_allclose(Mean.empty().merge(whole).compute(), whole.compute())
    assert Mean.empty().compute() == 0
    means = [Mean.of(v, w) for v, w in zip(values, weights, strict=True)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *means)
    assert stacked.reduce().total.shape == ()
    np.testing.assert_allclose(stacked.reduce().compute(), whole.compute())
    np.testing.assert_allclose(Mean.of(np.array([True, False])).compute(), 0.5)
