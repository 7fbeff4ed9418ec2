"""GGUF files read as Hugging Face sources: names, layouts, values, config.json, errors."""

import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf")

from famx.base.errors import ConfigError  # noqa: E402
from famx.conversion import gguf_source as module  # noqa: E402
from famx.conversion.families import decoder_config, tensors  # noqa: E402
from famx.conversion.gguf_source import ARCHITECTURES, TYPES, GgufSource  # noqa: E402
from famx.conversion.sources import open_source  # noqa: E402
from famx.conversion.tensor_source import TensorInfo  # noqa: E402
from famx.modules import DecoderConfig  # noqa: E402
from famx.modules.config import RopeScaling  # noqa: E402
from famx.modules.rope import frequencies  # noqa: E402

Type = gguf.GGMLQuantizationType
SIZES = dict(
    vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
)  # fmt: skip
KEYS = {
    "context_length": 512, "embedding_length": 32, "feed_forward_length": 64, "block_count": 6,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
    "attention.value_length": 16, "rope.dimension_count": 16,
    "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
# Beside the sizes: (what the file says, what config.json says).
OWN = {
    "llama": ({"rope.freq_base": 1e5}, {"rope_theta": 1e5}),
    "qwen2": ({"rope.freq_base": 1e6}, {"rope_theta": 1e6}),
    "qwen3": ({"rope.freq_base": 1e6}, {"rope_theta": 1e6}),
    "smollm3": ({"rope.freq_base": 5e6}, {"rope_theta": 5e6}),
    "gemma": ({}, {"hidden_act": "gelu"}),
    "gemma2": (
        {"attention.sliding_window": 64, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 9.0},
        {"sliding_window": 64, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 9.0,
         "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        {"attention.sliding_window": 64, "rope.freq_base": 1e6, "rope.scaling.type": "linear",
         "rope.scaling.factor": 8.0},
        {"sliding_window": 64, "query_pre_attn_scalar": 16,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}  # fmt: skip


def write(path, architecture, arrays, keys=(), types=()):
    """A GGUF file; `types` holds the type of arrays that are bytes already."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in {**KEYS, **dict(keys)}.items():
        key = key if "split" in key or "tokenizer" in key else f"{architecture}.{key}"
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    types = dict(types)
    for name, array in arrays.items():
        writer.add_tensor(name, array, raw_dtype=types.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config_json(architecture, **more):
    name, kind = ARCHITECTURES[architecture]
    hf = {"architectures": [name], "model_type": kind, "rms_norm_eps": 1e-5, **SIZES, **more}
    return {**hf, "tie_word_embeddings": architecture in ("gemma", "gemma2", "gemma3")}


def state_dict(hf):
    """Random weights of a model of Hugging Face's."""
    rng = np.random.default_rng(0)
    draw = lambda tensor: rng.normal(size=tensor.shape).astype(np.float32)
    return {tensor.name: draw(tensor) for tensor in tensors(hf, decoder_config(hf))}


def their_name(architecture, name):
    """llama.cpp's name by its own table."""
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    return gguf.get_tensor_name_map(arch, 6).get_name(name, (".weight", ".bias"))


def small(path, keys=(), arrays=(), types=(), architecture="llama"):
    """The smallest file that can be opened."""
    arrays = {"token_embd.weight": np.zeros((40, 32), np.float32), **dict(arrays)}
    return write(path, architecture, arrays, keys, types)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_says_what_the_directory_said(tmp_path, architecture):
    """Names by llama.cpp's own table; order of queries and keys is another test's."""
    keys, more = OWN[architecture]
    hf = config_json(architecture, **more)
    weights = state_dict(hf)
    plus = lambda name: architecture.startswith("gemma") and name.endswith("norm.weight")
    arrays = {their_name(architecture, name): w + plus(name) for name, w in weights.items()}
    source = open_source(write(tmp_path / "a model.gguf", architecture, arrays, keys))
    assert isinstance(source, GgufSource) and source.name == "a model"
    assert source.tokenizer == tmp_path / "a model.gguf"
    assert decoder_config(source.config) == decoder_config(hf)
    assert source.tensors == {k: TensorInfo(v.shape, "float32") for k, v in weights.items()}
    for name, expected in weights.items():
        found = source.read(name)
        assert found.dtype == np.float32
        if "q_proj" in name or "k_proj" in name:
            found, expected = np.sort(found, axis=0), np.sort(expected, axis=0)
        if plus(name):
            np.testing.assert_allclose(found, expected, atol=1e-6)
        else:
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("architecture", ["llama", "smollm3", "qwen2", "qwen3", "gemma"])
def test_scores_are_those_of_the_files_own_rotation(tmp_path, architecture):
    """llama.cpp rotates neighbours in files of Llama, halves in others; Hugging Face halves always."""
    rng = np.random.default_rng(1)
    arrays = {f"blk.0.attn_{p}.weight": rng.normal(size=(16 * n, 32)) for p, n in (("q", 4), ("k", 2))}
    if architecture in ("llama", "qwen2"):
        arrays |= {f"blk.0.attn_{p}.bias": rng.normal(size=16 * n) for p, n in (("q", 4), ("k", 2))}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    source = GgufSource(small(tmp_path / "m.gguf", arrays=arrays, architecture=architecture))
    x = rng.normal(size=(5, 32))
    turn = np.exp(1j * np.arange(5)[:, None, None] * frequencies(16, 1e4))

    def neighbours(heads):
        return (heads[..., 0::2] + 1j * heads[..., 1::2]) * turn

    def halves(heads):
        return (heads[..., :8] + 1j * heads[..., 8:]) * turn

    def scores(read, rotate):
        q, k = (rotate((x @ read(f"{p}.weight").T + read(f"{p}.bias")).reshape(5, -1, 16)) for p in "qk")
        return np.einsum("qhd,khd->hqk", q, np.repeat(k, 2, axis=1).conj()).real

    theirs = neighbours if architecture in ("llama", "smollm3") else halves
    name = lambda name: f"model.layers.0.self_attn.{name[0]}_proj{name[1:]}"
    expected = scores(lambda name: arrays.get(f"blk.0.attn_{name}", 0), theirs)
    found = scores(lambda n: source.read(name(n)) if name(n) in source.tensors else 0, halves)
    np.testing.assert_allclose(found, expected, atol=1e-4)


# Steps between values of a block of 32, as parts of its largest magnitude.
STEPS = {"F32": 0, "F16": 2**-10, "BF16": 2**-7, "Q8_0": 1 / 127, "Q5_1": 2 / 31, "Q5_0": 1 / 16,
         "Q4_1": 2 / 15, "Q4_0": 1 / 8}  # fmt: skip


@pytest.mark.parametrize("kind", STEPS)
def test_values_are_within_a_step_of_their_type(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(module, "_PIECE", 200)  # rows of queries in several pieces
    x = np.random.default_rng(2).normal(size=(64, 32)).astype(np.float32)
    data = gguf.quantize(x, Type[kind])
    arrays, types = {"blk.0.attn_q.weight": data}, {"blk.0.attn_q.weight": Type[kind]}
    name = "model.layers.0.self_attn.q_proj.weight"
    source = GgufSource(small(tmp_path / "m.gguf", arrays=arrays, types=types))
    found = source.read(name)
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert found.dtype.name == source.tensors[name].dtype == dtype
    x = x.reshape(4, 8, 2, 32).swapaxes(1, 2).reshape(64, 32)
    error = np.abs(found.astype(np.float32) - x)
    assert np.all(error <= STEPS[kind] * np.abs(x).max(axis=1, keepdims=True) * 1.01)


def six_bits(block):
    """llama.cpp's Q6_K: 256 values of 6 bits, a scale for each 16, and one of all."""
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    scale = float(block[208:].view(np.float16)[0])
    values = []
    for i in range(256):
        half, part, j = i // 128, i % 128 // 32, i % 32
        nibble = low[64 * half + 32 * (part % 2) + j] >> (4 if part > 1 else 0) & 15
        top = high[32 * half + j] >> (2 * part) & 3
        values.append(scale * int(scales[i // 16]) * (int(nibble | top << 4) - 32))
    return values


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.endswith("_K")])
def test_k_quants_are_read(tmp_path, kind):
    rng, size = np.random.default_rng(3), gguf.GGML_QUANT_SIZES[Type[kind]][1]
    blocks = rng.integers(0, 256, (6, size), dtype=np.uint8)
    scale = np.array([0.5], np.float16).view(np.uint8)
    # Where the half-precision numbers lie, which must be finite.
    for place in {"Q2_K": (-4, -2), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (-2,)):
        blocks[:, place : place + 2 or None] = scale
    name = "blk.0.ffn_down.weight"
    path = small(tmp_path / "m.gguf", (), {name: blocks.reshape(3, -1)}, {name: Type[kind]})
    found = GgufSource(path).read("model.layers.0.mlp.down_proj.weight")
    assert found.shape == (3, 512) and found.dtype == np.float32 and np.ptp(found) > 1
    if kind == "Q6_K":
        np.testing.assert_array_equal(found.reshape(6, 256), [six_bits(block) for block in blocks])
    else:
        np.testing.assert_array_equal(found, gguf.dequantize(blocks.reshape(3, -1), Type[kind]))


def test_little_more_than_the_tensor_is_in_memory(tmp_path):
    data = np.zeros((4096, 1024 // 32 * 18), np.uint8)
    types = {"token_embd.weight": Type.Q4_0}
    source = GgufSource(small(tmp_path / "m.gguf", (), {"token_embd.weight": data}, types))
    tracemalloc.start()
    array = source.read("model.embed_tokens.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.nbytes == 4 * 4096 * 1024 and peak < 1.5 * array.nbytes


def test_norms_of_gemma_lose_their_one_in_float32(tmp_path):
    for kind in ("F32", "F16"):
        dtype = np.dtype({"F32": "float32", "F16": "float16"}[kind])
        weight = np.random.default_rng(4).uniform(-0.4, 5, 32).astype(dtype)
        arrays = {"output_norm.weight": (weight + dtype.type(1)).astype(dtype)}
        source = GgufSource(small(tmp_path / "m.gguf", arrays=arrays, architecture="gemma2"))
        found = source.read("model.norm.weight")
        assert found.dtype == np.float32 and source.tensors["model.norm.weight"].dtype == "float32"
        np.testing.assert_array_equal(found + 1, arrays["output_norm.weight"].astype(np.float32))


# ---------------------------------------------------------------- config.json


def read_config(tmp_path, keys=(), arrays=(), architecture="llama"):
    return GgufSource(small(tmp_path / "m.gguf", keys, arrays, (), architecture)).config


@pytest.mark.parametrize("factor, base, width", [(8.0, 5e5, 128), (32.0, 5e5, 64)])
def test_llama_3_scaling_is_recognised(tmp_path, factor, base, width):
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)
    divisors = frequencies(width, base) / frequencies(width, base, scaling)
    arrays = {"rope_freqs.weight": divisors.astype(np.float32)}
    keys = {"rope.freq_base": base, "attention.key_length": width, "attention.value_length": width,
            "rope.dimension_count": width}  # fmt: skip
    source = GgufSource(small(tmp_path / "m.gguf", keys, arrays))
    assert decoder_config(source.config).rope_scaling == scaling
    assert list(source.tensors) == ["model.embed_tokens.weight"]
    arrays = {"rope_freqs.weight": np.ones(width // 2, np.float32)}
    assert "rope_scaling" not in read_config(tmp_path, keys, arrays)


def test_another_scaling_by_frequency_is_refused(tmp_path):
    arrays = {"rope_freqs.weight": np.linspace(1, 4, 8, dtype=np.float32)}
    with pytest.raises(ConfigError, match=r"\(rope_freqs.weight\) in another way than Llama 3"):
        read_config(tmp_path, arrays=arrays)


def test_scaling_by_name_is_left_to_the_architecture(tmp_path):
    config = read_config(tmp_path, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert decoder_config(config).rope_scaling == RopeScaling(4.0)
    config = read_config(tmp_path, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0})
    with pytest.raises(ConfigError, match="yarn"):
        decoder_config(config)
    assert read_config(tmp_path, {"rope.scaling.type": "none"}).get("rope_scaling") is None


FACTOR, OLDER, KIND = "rope.scaling.factor", "rope.scale_linear", "rope.scaling.type"


@pytest.mark.parametrize(
    "keys, factor",
    [
        ({FACTOR: 4.0}, 4.0),  # linear is the default type, as in llama.cpp
        ({OLDER: 4.0}, 4.0),
        ({OLDER: 2.0, FACTOR: 4.0}, 4.0),
        ({OLDER: 4.0, KIND: "linear"}, 4.0),
        ({OLDER: 0.0}, None),
        ({FACTOR: 1.0}, None),
        ({FACTOR: 4.0, KIND: "none"}, None),
        ({OLDER: 4.0, "rope.scaling.original_context_length": 512, "rope.scaling.finetuned": 1}, 4.0),
        ({"rope.dimension_sections": 0}, None),
    ],
)
def test_linear_scaling_under_every_key(tmp_path, keys, factor):
    config = read_config(tmp_path, keys)
    wanted = None if factor is None else RopeScaling(factor)
    assert decoder_config(config).rope_scaling == wanted


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"rope.dimension_sections": [8, 4, 4, 0]}, "sets llama.rope.dimension_sections to"),
        ({"rope.scaling.yarn_beta_fast": 32.0}, "sets llama.rope.scaling.yarn_beta_fast to 32.0"),
        ({"rope.scaling.attn_factor": 2.0}, "sets llama.rope.scaling.attn_factor to 2.0"),
        ({"rope.a_key_of_tomorrow": 3}, "sets llama.rope.a_key_of_tomorrow to 3, which is not underst"),
        ({FACTOR: "4"}, "rope.scaling.factor is '4': it should be a valid number"),
        ({FACTOR: float("nan")}, "rope.scaling.factor is nan"),
    ],
)
def test_keys_about_positions_that_are_not_understood_are_named(tmp_path, keys, sentence):
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path, keys)
    assert sentence in str(caught.value)


def test_positions_are_not_scaled_twice(tmp_path):
    arrays = {"rope_freqs.weight": np.linspace(1, 4, 8, dtype=np.float32)}
    with pytest.raises(ConfigError, match="scales its rotary positions twice"):
        read_config(tmp_path, {FACTOR: 4.0}, arrays)


def test_partial_rotation_is_left_to_the_architecture(tmp_path):
    with pytest.raises(ConfigError, match="rotates only a part of each head"):
        decoder_config(read_config(tmp_path, {"rope.dimension_count": 8}))


def test_special_ids_and_windows_and_heads(tmp_path):
    keys = {f"tokenizer.ggml.{role}_token_id": i for i, role in enumerate(("bos", "eos", "padding"))}
    config = read_config(tmp_path, keys)
    assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [0, 1, 2]
    assert config["tie_word_embeddings"] and not config["attention_bias"]
    config = read_config(tmp_path, {"attention.sliding_window": 128})
    assert config["architectures"] == ["MistralForCausalLM"] and config["sliding_window"] == 128
    head = {"output.weight": np.zeros((40, 32), np.float32)}
    assert not read_config(tmp_path, arrays=head)["tie_word_embeddings"]
    keys = {"attention.head_count_kv": [2] * 6, "attention.key_length": None,
            "attention.value_length": None, "rope.dimension_count": None}  # fmt: skip
    config = decoder_config(read_config(tmp_path, keys))
    assert (config.num_kv_heads, config.head_dim, config.norm_epsilon) == (2, 8, 1e-5)


def test_gemma_of_27_billion_scales_queries_by_the_width(tmp_path):
    scalar = lambda *args: read_config(tmp_path, *args)["query_pre_attn_scalar"]
    for architecture, layers in (("gemma2", 46), ("gemma3", 62)):
        assert scalar({"block_count": layers}, (), architecture) == 32 // 4
        assert scalar({"block_count": layers - 1}, (), architecture) == 16


def test_local_layers_of_gemma_3(tmp_path):
    window = {"attention.sliding_window": 64}
    rotated = lambda keys: decoder_config(read_config(tmp_path, keys, (), "gemma3")).rope_layers
    assert rotated(window) == ("local",) * 5 + ("global",)
    assert rotated({**window, "attention.sliding_window_pattern": 3}) == ("local", "local", "global") * 2
    named = [True, False, False, True, True, False]
    expected = tuple("local" if slides else "global" for slides in named)
    assert rotated({**window, "attention.sliding_window_pattern": named}) == expected
    assert rotated({}) is None
    config = decoder_config(read_config(tmp_path, {**window, "rope.freq_base_swa": 5e3}, (), "gemma3"))
    assert config.local_rope_base == 5e3


def test_models_agree_whichever_way_they_came(tmp_path):
    """A config of every architecture names itself as the families do."""
    for architecture, (name, _) in ARCHITECTURES.items():
        config = read_config(tmp_path, architecture=architecture)
        assert config["architectures"] == [name]
        assert isinstance(decoder_config(config), DecoderConfig)


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"split.count": 3}, "is one of 3 parts of a model; join them first with llama.cpp's"),
        ({"expert_count": 8}, "is a mixture of experts, which is not supported."),
        ({"block_count": None}, "lacks llama.block_count; take another file."),
        ({"attention.head_count": [4, 2]}, "has a number for each layer instead of a single one for"),
        ({"attention.value_length": 8}, "keys and values differ in width: not supported."),
    ],
)
def test_models_that_are_not_supported(tmp_path, keys, sentence):
    with pytest.raises(ConfigError) as error:
        GgufSource(small(tmp_path / "m.gguf", keys))
    assert sentence in str(error.value)


def test_types_and_architectures_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    name, kind = "blk.0.ffn_down.weight", Type.IQ4_NL
    data = np.zeros((2, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    with pytest.raises(ConfigError, match=f"{name} of '.*' is of type IQ4_NL; the types F32, F16, BF16,"):
        GgufSource(small(path, (), {name: data}, {name: kind}))
    data = gguf.quantize(np.zeros(32, np.float32), Type.Q8_0)
    with pytest.raises(ConfigError, match="output_norm.weight of '.*' is of type Q8_0"):
        GgufSource(small(path, (), {"output_norm.weight": data}, {"output_norm.weight": Type.Q8_0}))
    with pytest.raises(ConfigError, match="architecture 'falcon'; of GGUF files, those of llama, qwen2,"):
        GgufSource(small(path, architecture="falcon"))
    with pytest.raises(ConfigError, match="has no token_embd.weight, so it holds no model"):
        GgufSource(write(path, "llama", {"output.weight": np.zeros((4, 4), np.float32)}))
    data = bytearray(small(path).read_bytes())
    place = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    data[place : place + 4] = b"\xff\0\0\0"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="holds tensors of an unknown type .* of type Q8_0, or a newer"):
        GgufSource(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = small(tmp_path_factory.mktemp("gguf") / "m.gguf", {"tokenizer.ggml.bos_token_id": 1})
    return path, path.read_bytes()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_file_that_was_cut_is_one_sentence(whole, data):
    path, content = whole
    cut = path.with_name("cut.gguf")
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ConfigError, match="cut.gguf' is not a whole GGUF file .*; fetch it again"):
        GgufSource(cut)


def test_text_that_is_none_is_one_sentence(whole):
    path, content = whole
    damaged = path.with_name("damaged.gguf")
    damaged.write_bytes(content.replace(b"llama", b"ll\xffma", 1))
    with pytest.raises(ConfigError, match="at 'general.architecture', a text is not UTF-8.; fetch it"):
        GgufSource(damaged)


def test_no_file_and_no_package(tmp_path, monkeypatch, whole):
    with pytest.raises(ConfigError, match="no.gguf' cannot be read: No such file"):
        GgufSource(tmp_path / "no.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="GGUF files need the package 'gguf'"):
        GgufSource(whole[0])
