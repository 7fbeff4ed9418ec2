"""`read_maps`: the maps of a text, by a model as a checkpoint holds it."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from lora.trees import adapters_of
from tiny import make_model, make_params
from trained import write_model_dir

from famx.analysis import AttentionReader, attention_maps, read_maps
from famx.analysis.attention_maps import token_text
from famx.base.errors import ConfigError
from famx.base.gin_utils import gin_root
from famx.data import ByteVocabulary
from famx.data.probes.passkey_text import passkey_words
from famx.lora import Lora, combine, merged
from famx.model_dir.loading import load_model
from famx.models import DecoderModel
from famx.modules.frontends import Vectors

MODEL = make_model(num_layers=2)
TEXT = "The grass is green.\n"
IDS = [ByteVocabulary.bos_id, *ByteVocabulary().encode(TEXT)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return load_model(write_model_dir(folder, MODEL, make_params(MODEL.module), ByteVocabulary()))


def test_maps_of_text_are_those_of_its_tokens_in_pieces(trained):
    whole, pieces = read_maps(trained, TEXT), read_maps(trained, [[], IDS[1:4], IDS[4:]])
    np.testing.assert_array_equal(whole.tokens, pieces.tokens)
    assert whole.summary.counts.sum() == len(IDS)


def test_adapters_of_a_checkpoint_take_part(trained, tmp_path):
    lora = Lora(rank=2, alpha=6.0)
    params = make_params(MODEL.module)
    tree = combine(params, adapters_of(params, lora))
    model = DecoderModel(MODEL.module, lora=lora)
    adapted = load_model(write_model_dir(tmp_path / "lora", model, tree, ByteVocabulary()))
    found = read_maps(adapted, TEXT)
    reader = AttentionReader(MODEL.module)
    np.testing.assert_allclose(found.tokens, reader.read(merged(tree, lora), [IDS]).tokens, atol=1e-5)
    assert np.abs(found.tokens - read_maps(trained, TEXT).tokens).max() > 0.05
    with pytest.raises(ValueError, match="There are adapters among the parameters: merge them"):
        reader.read(tree, [IDS])


def test_features_are_read_without_begin_of_text(tmp_path):
    model = make_model(frontend=Vectors("x", 3))
    params = nn.unbox(jax.jit(model.init_params)(jax.random.key(0)))
    trained = load_model(write_model_dir(tmp_path, model, params, ByteVocabulary()))
    x = np.random.default_rng(0).standard_normal((11, 3)).astype(np.float32)
    maps = read_maps(trained, [{"x": x[:0]}, {"x": x[:2]}, {"x": x[2:]}])
    assert maps.summary.counts.sum() == len(x)
    with pytest.raises(ConfigError, match="The model reads 'x' .3 float32., not text"):
        read_maps(trained, TEXT)


def test_all_blocks_of_a_long_text_are_refused_before_they_fill_the_memory(trained, monkeypatch):
    reader = AttentionReader(MODEL.module)
    monkeypatch.setattr(attention_maps, "_MAX_BYTES", reader.num_bytes(3))
    assert len(read_maps(trained, TEXT).blocks) == 3
    for text in (3 * TEXT, iter([IDS, IDS, IDS])):
        with pytest.raises(ConfigError, match="select fewer layers, heads or blocks"):
            read_maps(trained, text)
    assert read_maps(trained, 3 * TEXT, blocks=[-1]).blocks == (7,)


def test_a_model_without_a_vocabulary_is_told(tmp_path):
    bare = load_model(write_model_dir(tmp_path, MODEL, make_params(MODEL.module), None))
    with pytest.raises(ConfigError, match="The model has no vocabulary, so it cannot read a text"):
        read_maps(bare, TEXT)


def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch):
    text = (gin_root() / "docs" / "attention_maps.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    model = make_model(num_layers=2, num_heads=4)
    folder = write_model_dir(tmp_path / "model", model, make_params(model.module), ByteVocabulary())
    monkeypatch.chdir(tmp_path)
    exec(code.replace("/tmp/famx/passkey_tiny", folder), {})
    assert {"heads.png", "page.html", "maps.npz"} <= {path.name for path in tmp_path.iterdir()}
    for name in re.findall(r"\]\((.*?\.png)\)", text):
        assert (gin_root() / "docs" / name).is_file()


def test_tokens_are_told_so_that_people_can_read_them():
    words = passkey_words()
    told = lambda text: [token_text(words, token) for token in words.encode(text)]
    assert told("The pass key is 7.") == ["The", "pass", "key", "is", "7", "."]
    assert told("unheard") == ["<unk>"] and token_text(words, 10_000) == "<10000>"
    bytes_ = ByteVocabulary()
    told = [token_text(bytes_, token) for token in [0, 1, 2, *bytes_.encode("a \n\t\x00ä")]]
    assert told == ["<pad>", "<bos>", "<eos>", "a", "␣", "↵", "⇥", "<3>", "<198>", "<167>"]
