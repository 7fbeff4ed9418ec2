"""The contract of t5x's models: variables, losses with and without kept state, scores, predictions."""

import functools
import types

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from driving import make_optimizer  # skips without t5x

from clu.metrics import Metric  # isort: skip

from famx import t5x as famx_t5x
from famx.decoding import Sampling
from famx.memories import Fam
from famx.models import DecoderModel
from famx.modules import Decoder, DecoderConfig
from famx.training.state_passing import Random

pytestmark = pytest.mark.t5x
VOCAB, BATCH, LENGTH = 13, 3, 11
CONFIG = DecoderConfig(
    vocab_size=VOCAB, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12, block_size=4,
    memory_segments=1, memory=Fam(length=2),
)  # fmt: skip
PROMPT = np.broadcast_to(np.arange(LENGTH) < 3, (BATCH, LENGTH)).astype(np.int32)
SHAPES = {"decoder_input_tokens": (BATCH, LENGTH)}
ROUNDING = rounding.bound(rounding.of_decoder(CONFIG, LENGTH))  # between programs, of numbers around 1


def make_model(vocabulary=None, **options):
    return famx_t5x.T5xModel(DecoderModel(Decoder(CONFIG), vocabulary), **options)


@functools.cache
def params():
    made = jax.jit(lambda key: make_model().get_initial_variables(key, SHAPES)["params"])
    return jax.tree.map(lambda x: 2 * x, made(jax.random.key(3)))


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (BATCH, LENGTH + 1), dtype=np.int32)
    return {
        "decoder_input_tokens": tokens[:, :-1],
        "decoder_target_tokens": tokens[:, 1:],
        "decoder_loss_weights": rng.choice([0, 0.1, 1], (BATCH, LENGTH)).astype(np.float32),
    }


def test_initial_variables_come_from_a_bound_method_without_types():
    make = make_model(state_passing=Random()).get_initial_variables
    fresh = jax.eval_shape(lambda rng: make(rng, SHAPES), jax.random.key(0))
    names = {"params", "params_axes", "state_passing", "state_passing_axes"}
    assert isinstance(fresh, flax.core.FrozenDict) and set(fresh) == names
    shape = (CONFIG.num_layers, CONFIG.memory.columns, CONFIG.embed_dim)
    assert fresh["state_passing"]["memory"].shape == shape
    typed = jax.eval_shape(lambda rng: make(rng, SHAPES, {"decoder_input_tokens": jnp.int32}),
                           jax.random.key(0))  # fmt: skip
    assert jax.tree.structure(typed) == jax.tree.structure(fresh)
    plain = make_model().get_initial_variables(jax.random.key(0), SHAPES)
    assert set(plain) == {"params", "params_axes"}


def test_loss_fn_takes_three_and_four_arguments():
    model, batch = make_model(), make_batch()
    loss = jax.jit(model.model.loss)(params(), batch)[0]
    three, metrics = jax.jit(model.loss_fn)(params(), batch, jax.random.key(0))
    np.testing.assert_allclose(three, loss, rtol=ROUNDING)
    assert all(isinstance(metric, Metric) for metric in metrics.values())
    empty = flax.core.freeze({})
    four, (metrics, mutables) = jax.jit(model.loss_fn)(params(), batch, None, empty)
    np.testing.assert_allclose(four, loss, rtol=ROUNDING)
    assert mutables == empty and "loss" in metrics
    evaluated, metrics = jax.jit(model.eval_fn)(params(), batch, empty)
    np.testing.assert_allclose(evaluated, loss, rtol=ROUNDING)
    assert "accuracy" in metrics
    assert model.optimizer_def is None and model.input_vocabulary is model.output_vocabulary is None


def test_random_state_passing_keeps_the_first_examples_memory():
    model = make_model(state_passing=Random(probability=1.0))
    batch = make_batch()
    kept = model.get_initial_variables(jax.random.key(0), SHAPES)["state_passing"]
    mutables = flax.core.freeze({"state_passing": kept})
    run = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True))
    (loss, (_, after)), _ = run(params(), batch, jax.random.key(0), mutables)
    plain, _, end = jax.jit(model.model.loss)(params(), batch)
    np.testing.assert_allclose(loss, plain, rtol=ROUNDING)  # nothing kept yet: from the prompt
    assert isinstance(after, flax.core.FrozenDict)
    kept = after["state_passing"]
    np.testing.assert_allclose(kept["memory"], end.memory[:, 0], rtol=ROUNDING, atol=ROUNDING)
    assert kept["updates"] == LENGTH // CONFIG.block_size and kept["steps"] == 1
    assert jax.tree.structure(after) == jax.tree.structure(mutables)
    (other, (_, later)), _ = run(params(), batch, jax.random.key(0), after)
    assert abs(other - plain) > 1e-4  # every example starts from the kept memory
    assert later["state_passing"]["updates"] == 2 * (LENGTH // CONFIG.block_size)
    # Without randomness (t5x's evaluation) nothing is passed on.
    (loss, (_, same)), _ = run(params(), batch, None, after)
    np.testing.assert_allclose(loss, plain, rtol=ROUNDING)
    np.testing.assert_array_equal(same["state_passing"]["memory"], kept["memory"])


def test_scores_and_predictions_are_the_models():
    model, batch = make_model(), make_batch()
    scores = model.score_batch(params(), batch)
    np.testing.assert_array_equal(scores, model.model.score(params(), batch))
    with pytest.raises(ValueError, match="Intermediates"):
        model.score_batch(params(), batch, return_intermediates=True)
    tokens, log_p = model.model.predict(params(), batch)
    out, aux = model.predict_batch_with_aux(params(), batch)
    np.testing.assert_array_equal(out, tokens)
    np.testing.assert_array_equal(aux["scores"], log_p)
    np.testing.assert_array_equal(model.predict_batch(params(), batch), tokens)


def test_samples_of_a_prompt_are_drawn_apart_and_the_likeliest_is_taken():
    batch = make_batch() | {"decoder_causal_attention": PROMPT}
    key, sampling = jax.random.key(1), Sampling(temperature=2.0, max_new_tokens=4)
    several = make_model(sampling=sampling, num_decodes=3, return_all_decodes=True)
    tokens, aux = several.predict_batch_with_aux(params(), batch, key)
    assert tokens.shape == (BATCH, 3, LENGTH) and aux["scores"].shape == (BATCH, 3)
    assert np.all(np.diff(aux["scores"]) >= 0) and len(np.unique(tokens.reshape(-1, LENGTH), axis=0)) > 5
    assert np.all(tokens[..., 4:] == 0)
    one = make_model(sampling=sampling, num_decodes=3)
    best, score = one.predict_batch_with_aux(params(), batch, key)
    np.testing.assert_array_equal(best, tokens[:, -1])
    np.testing.assert_array_equal(score["scores"], aux["scores"][:, -1])
    # The score is the likelihood of the tokens after the prompt.
    row = np.concatenate([batch["decoder_input_tokens"][:, :3], best[:, :4]], axis=1)
    weights = np.arange(6) >= 2
    again = {
        "decoder_input_tokens": row[:, :-1],
        "decoder_target_tokens": row[:, 1:],
        "decoder_loss_weights": np.broadcast_to(weights, (BATCH, 6)).astype(np.float32),
    }
    expected = one.score_batch(params(), again)
    np.testing.assert_allclose(score["scores"], expected, rtol=1e-4)


def test_the_converter_begins_and_pads_as_the_vocabulary_does():
    vocabulary = types.SimpleNamespace(bos_id=9, eos_id=8, pad_id=7)
    converter = make_model(vocabulary).FEATURE_CONVERTER_CLS(pack=True)
    assert (converter.bos_id, converter.pad_id, converter.pack) == (9, 7, True)
    converter = make_model().FEATURE_CONVERTER_CLS(pack=False, use_custom_packing_ops=False)
    assert (converter.bos_id, converter.pad_id, converter.pack) == (1, 0, False)


def test_the_model_that_is_handed_in_stays_as_it_is():
    model = DecoderModel(Decoder(CONFIG))
    made = famx_t5x.T5xModel(model, optimizer=make_optimizer(), mixture_or_task_name=None)
    assert made.model == model and model.vocabulary is None
