"""How the memory of a pretrained model starts: prompts from text, and what is measured on it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import make_model, make_params
from trained import write_model_dir

from famx.base.errors import ConfigError
from famx.data.vocabularies import ByteVocabulary
from famx.memories import Fam, Infini
from famx.model_dir.loading import load_pretrained
from famx.models.memory_start import PLAIN_TEXT, MemoryStart
from famx.modules import Decoder, Memory

VOCAB = ByteVocabulary()
TABLE = np.random.default_rng(0).normal(size=(260, 16)).astype(np.float32)
CONFIG = make_model().config


def draw(start, shape, config=CONFIG, vocabulary=VOCAB):
    return start.draw_prompt(config, shape, 0, lambda: TABLE, vocabulary)


def test_a_prompt_from_a_text_has_the_embeddings_of_its_tokens():
    ids = VOCAB.encode(PLAIN_TEXT)
    prompt = draw(MemoryStart("text"), (5, 16))
    np.testing.assert_array_equal(prompt, TABLE[ids[:5]])
    assert prompt.dtype == np.float32
    scaled = draw(MemoryStart("text"), (5, 16), dataclasses.replace(CONFIG, scale_embeddings=True))
    np.testing.assert_array_equal(scaled, 4 * prompt)
    np.testing.assert_array_equal(draw(MemoryStart("text"), (3, 5, 16)), [prompt] * 3)


def test_a_short_text_begins_again_and_may_be_a_file(tmp_path):
    (tmp_path / "text").write_text("abc")
    prompt = draw(MemoryStart("text", str(tmp_path / "text")), (7, 16))
    np.testing.assert_array_equal(prompt, TABLE[VOCAB.encode("abcabca")])


def test_a_prompt_of_the_begin_of_text_has_equal_rows():
    class Begins(ByteVocabulary):
        bos_id = 7

    np.testing.assert_array_equal(draw(MemoryStart("bos"), (3, 16), vocabulary=Begins()), TABLE[[7] * 3])
    assert draw(MemoryStart("bos"), (2, 3, 16), vocabulary=Begins()).shape == (2, 3, 16)


def test_starts_that_cannot_be_end_in_a_sentence(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    no_begin = type("NoBegin", (ByteVocabulary,), {"bos_id": None})()
    for start, vocabulary, sentence in (
        (MemoryStart("text"), None, "no tokenizer to read it"),
        (MemoryStart("text", str(tmp_path / "nowhere")), VOCAB, "nowhere cannot be read"),
        (MemoryStart("text", str(tmp_path / "latin")), VOCAB, "latin cannot be read"),
        (MemoryStart("text", str(tmp_path / "empty")), VOCAB, "empty is empty"),
        (MemoryStart("bos"), None, "no begin-of-text token"),
        (MemoryStart("bos"), no_begin, "no begin-of-text token"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            draw(start, (2, 16), vocabulary=vocabulary)


def test_the_measured_rms_is_that_of_each_layers_input(tmp_path):
    """The input of the second layer is the output of a model that has the first one alone."""
    (tmp_path / "text").write_text("some words of a text")
    model = make_model(num_layers=2, rope_layers=("local", "global"), scale_embeddings=True)
    params = make_params(model.module)
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(2)]
    start = MemoryStart(text=str(tmp_path / "text"))
    found = start.measure_rms(model.config, VOCAB, lambda: np.asarray(params["embedding"]), layers)

    begin = [] if VOCAB.bos_id is None else [VOCAB.bos_id]
    ids = np.array([begin + VOCAB.encode("some words of a text")], np.int32)
    alone = dataclasses.replace(
        model.config, num_layers=1, rope_layers=("local",), memory=Memory(), block_size=ids.shape[1],
    )  # fmt: skip
    first = {**params, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    first.pop("memory")
    hidden = Decoder(alone).apply({"params": first}, ids, method="read")[0]
    inputs = params["embedding"][ids[0]] * math.sqrt(16), hidden[0]
    expected = [np.median(np.sqrt(np.mean(np.square(x), axis=-1))) for x in inputs]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_run_from_a_checkpoint_starts_its_memory_as_asked(tmp_path):
    stored = make_model()
    params = make_params(stored.module)
    base = write_model_dir(tmp_path, stored, params, VOCAB)
    model = make_model(memory=Fam(2, normalize="measured", bias="zero"))

    kept, notes = load_pretrained(base, model)
    np.testing.assert_array_equal(kept["memory"]["prompt"], params["memory"]["prompt"])
    rms = np.asarray(kept["layers"]["memory"]["rms"])
    assert rms.shape == (1,) and rms > 0 and rms != 1
    assert "bias" not in kept["layers"]["memory"]  # that of a new model
    assert notes == [
        "The memory's parameters, layers/memory/bias, layers/memory/rms, are initialised: the checkpoint"
        " has none that fit."
    ]

    started, _ = load_pretrained(base, model, MemoryStart("text"))
    ids = VOCAB.encode(PLAIN_TEXT)[:2]
    np.testing.assert_array_equal(started["memory"]["prompt"], params["embedding"][jnp.array(ids)])

    with pytest.raises(ConfigError, match="cannot start as 'text': the memory 'infini' has none"):
        load_pretrained(base, make_model(memory=Infini()), MemoryStart("text"))
    other, notes = load_pretrained(base, make_model(memory=Infini()))
    assert not [path for path in flatten_dict(other, sep="/") if "memory" in path]
    assert notes == ["The memory's parameters are initialised: the checkpoint has none that fit."]
