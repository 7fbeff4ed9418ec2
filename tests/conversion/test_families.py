"""Decoders from config.json, unsupported configs, and the place of each tensor."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.linen import unbox
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference_models import CONFIGS

from famx.base.errors import ConfigError
from famx.conversion import families
from famx.memories import Fam
from famx.modules import Decoder, Memory, RopeScaling

LLAMA = CONFIGS["llama"]
NO_MEMORY = {"block_size": 8, "memory_segments": 3, "memory": Memory()}


# ------------------------------------------------------------------ config.json


def test_the_config_of_llama_3_of_transformers_4():
    hf = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "mlp_bias": False,
        "max_position_embeddings": 131072, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
    }  # fmt: skip
    config = families.decoder_config(hf, memory=Fam(16))
    assert (config.num_layers, config.embed_dim, config.mlp_dim) == (16, 2048, 8192)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 64)
    assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert (config.rope_base, config.norm_epsilon, config.memory_columns) == (5e5, 1e-5, 16)
    assert config.tied_embeddings and not config.qkv_bias and config.rope_layers is None


def test_the_text_part_of_a_multimodal_gemma_fills_its_gaps_from_the_class():
    hf = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "eos_token_id": [1, 106], "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152},
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }  # fmt: skip
    config = families.decoder_config(hf)
    assert (config.vocab_size, config.num_heads, config.num_kv_heads) == (262_208, 8, 4)
    assert (config.head_dim, config.query_scale, config.rope_base) == (256, 1 / 16, 1e6)
    assert config.rope_scaling == RopeScaling(8.0) and config.local_rope_base == 1e4
    assert config.rope_layers[:6] == ("local",) * 5 + ("global",) and len(config.rope_layers) == 34
    assert config.qk_norm and config.post_norms and config.scale_embeddings and config.tied_embeddings
    text = families.text_config(hf)
    assert text["architectures"] == ["Gemma3ForCausalLM"] and text["eos_token_id"] == [1, 106]


def test_the_architecture_may_follow_from_the_model_type():
    hf = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert families.decoder_config(hf) == families.decoder_config(LLAMA)


@pytest.mark.parametrize("name", [n for n in families.SUPPORTED if n != "Gemma3ForConditionalGeneration"])
def test_what_a_config_leaves_out_is_what_the_class_of_transformers_says(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    rewritten = getattr(transformers, name).config_class().to_dict()
    config = families.decoder_config({"architectures": [name]})
    assert families.decoder_config(rewritten | {"architectures": [name]}) == config
    few = {"architectures": [name], "hidden_size": 128, "num_attention_heads": 32, "num_hidden_layers": 5}
    sizes = {key: value for key, value in few.items() if key != "architectures"}
    rewritten = getattr(transformers, name).config_class(**sizes).to_dict()
    assert families.decoder_config(rewritten | few) == families.decoder_config(few)


def test_fields_of_the_memory_and_the_computation_are_the_callers():
    config = families.decoder_config(LLAMA, block_size=32, param_dtype="bfloat16", memory=Fam(3))
    assert (config.block_size, config.param_dtype, config.memory_columns) == (32, "bfloat16", 3)


REFUSED = {
    "architecture BertModel is not supported; supported are LlamaForCausalLM, Mistral": {
        "architectures": ["BertModel"]
    },
    "architecture mamba is not supported": {"architectures": None, "model_type": "mamba"},
    "names no architecture": {"architectures": None, "model_type": None},
    "quantized (gptq)": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "'yarn' is not implemented; choices are default, linear and llama3": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0}
    },
    "'dynamic' is not implemented": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "'longrope' is not implemented": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
    "linear scaling of rotary positions has no 'factor'": {"rope_scaling": {"type": "linear"}},
    "sets rope_scaling.factor to 4.0, which is not understood by rotary positions of the type 'defau": {
        "rope_scaling": {"factor": 4.0}
    },
    "sets rope_scaling.attention_factor to 2.0": {
        "rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 2.0}
    },
    "sets rope_parameters.mrope_section to [1, 2]": {
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}
    },
    "of two types, 'linear' and 'llama3'": {"rope_scaling": {"rope_type": "linear", "type": "llama3"}},
    "sets rotary_pct to 0.25, which is not understood": {"rotary_pct": 0.25},
    "sets rope_interleaved to True": {"rope_interleaved": True},
    "sets no_rope_layers, which llama does not have": {"no_rope_layers": [1, 0, 1]},
    "num_hidden_layers is 1099511627776": {"num_hidden_layers": 2**40},
    "vocab_size is 2147483648": {"vocab_size": 2**31},
    "rope_theta is -1.0: it should be greater than 0": {"rope_theta": -1.0},
    "eos_token_id.1 is 'x'": {"eos_token_id": [1, "x"]},
    "tie_word_embeddings is 1: it should be a valid boolean": {"tie_word_embeddings": 1},
    "must be less": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
        }
    },
    "partial_rotary_factor 0.5": {"partial_rotary_factor": 0.5},
    "partial_rotary_factor 0.25": {"rope_parameters": {"partial_rotary_factor": 0.25}},
    "activation 'xielu' is not implemented; choices are silu": {"hidden_act": "xielu"},
    "attends in both directions": {"use_bidirectional_attention": True},
    "hidden_size is '24'": {"hidden_size": "24"},
    "num_hidden_layers is 0": {"num_hidden_layers": 0},
    "num_heads 4 is not a multiple of num_kv_heads 3": {"num_key_value_heads": 3},
    "by layer type are supported only for Gemma 3": {
        "rope_parameters": {"full_attention": {"rope_theta": 1e4}}
    },
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_not_implemented_is_refused_in_a_sentence(sentence):
    with pytest.raises(ConfigError) as raised:
        families.decoder_config(LLAMA | REFUSED[sentence])
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_what_is_switched_off_is_not_refused():
    off = {"rope_interleaved": False, "rotary_pct": None, "mrope_section": [], "rope_scaling": None,
           "no_rope_layers": None, "partial_rotary_factor": 1.0, "sliding_window": None}  # fmt: skip
    assert families.decoder_config(LLAMA | off) == families.decoder_config(LLAMA)
    twice = {"type": "linear", "rope_type": "linear", "factor": 2, "attention_factor": None}
    assert families.decoder_config(LLAMA | {"rope_scaling": twice}).rope_scaling == RopeScaling(2.0)


def test_scaled_positions_in_sliding_layers_are_refused():
    rope = {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    with pytest.raises(ConfigError, match="sliding window layers are not implemented"):
        families.decoder_config(CONFIGS["gemma3"] | {"rope_parameters": rope})


def test_fields_that_a_decoder_lacks_and_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="A decoder has no blocksize; its fields are .*block_size"):
        families.decoder_config(LLAMA, blocksize=3)
    with pytest.raises(ConfigError, match="Fam.length 9 exceeds block_size 8"):
        families.decoder_config(LLAMA, block_size=8, memory=Fam(9))


# ------------------------------------------------------------------ notes


def notes(name, **memory):
    config = families.decoder_config(CONFIGS[name], **{**NO_MEMORY, **memory})
    return " ".join(families.notes(CONFIGS[name], config))


def test_a_window_that_is_exceeded_is_noted():
    assert "3 of 3 layers were trained to see 17 tokens and will see up to 32" in notes("mistral_window")
    assert notes("mistral_window", window_mask=True, memory_segments=2) == ""
    assert notes("mistral_window", memory_segments=1) == ""
    assert notes("mistral") == "" and notes("llama") == ""


def test_gemmas_count_their_sliding_layers():
    assert "2 of 3 layers were trained to see 64 tokens" in notes("gemma2", memory_segments=8)
    assert "2 of 3 layers were trained to see 64 tokens" in notes("gemma3", memory_segments=8)


@pytest.mark.parametrize(("model_type", "windowed"), [("qwen2", 2), ("qwen3", 2), ("smollm3", 1)])
def test_a_window_counts_where_the_model_uses_it(model_type, windowed):
    hf = CONFIGS[model_type] | {"sliding_window": 8, "max_window_layers": 1}
    config = families.decoder_config(hf, **NO_MEMORY)
    assert families.notes(hf, config) == []
    found = families.notes(hf | {"use_sliding_window": True}, config)
    assert found[0].startswith(f"{windowed} of 3 layers were trained to see 8 tokens")


def test_more_tokens_than_the_model_was_made_for_are_noted():
    assert "trained for 64" in notes("llama", memory_segments=8)


def test_norms_of_gemma_in_bfloat16_are_noted():
    assert "1 + weight" in notes("gemma", param_dtype="bfloat16")
    assert notes("llama", param_dtype="bfloat16") == ""


# ------------------------------------------------------------------ tensors


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_tensors_fill_every_leaf_of_the_decoder_once(name):
    config = families.decoder_config(CONFIGS[name], **NO_MEMORY)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    leaves = {path: leaf.shape for path, leaf in flatten_dict(unbox(shapes)["params"]).items()}
    found = {}
    for tensor in families.tensors(CONFIGS[name], config):
        array = np.empty(tensor.shape, np.float32)
        assert tensor.to_ours(array).shape == tensor.our_shape
        found.setdefault(tensor.path, []).append((tensor.layer, tensor.our_shape))
    assert found.keys() == leaves.keys()
    for path, parts in found.items():
        layers = [layer for layer, _ in parts]
        assert layers == ([None] if path[0] != "layers" else list(range(config.num_layers)))
        stacked = parts[0][1] if layers == [None] else (len(parts), *parts[0][1])
        assert leaves[path] == stacked


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["llama_biased", "gemma3"])
def test_there_and_back_is_the_identity_and_keeps_the_dtype(name, dtype):
    config = families.decoder_config(CONFIGS[name], **NO_MEMORY)
    rng = np.random.default_rng(0)
    for tensor in families.tensors(CONFIGS[name], config):
        array = rng.standard_normal(tensor.shape).astype(dtype)
        ours = tensor.to_ours(array)
        assert ours.dtype == (np.float32 if tensor.one_plus else dtype)
        tolerance = 3e-7 if tensor.one_plus else 0  # of 1 + weight in float32
        back = tensor.to_theirs(ours).astype(dtype)
        np.testing.assert_allclose(back.astype(float), array.astype(float), 0, tolerance)


@given(hnp.arrays(np.float32, 8, elements=st.floats(-100, 100, width=32)), st.booleans())
def test_a_norm_that_is_added_to_one_comes_back_bit_for_bit(weight, half):
    norm = families.Tensor("norm.weight", ("final_norm", "scale"), None, (8,), (8,), one_plus=True)
    dtype = ml_dtypes.bfloat16 if half else np.float32
    ours = norm.to_ours(weight.astype(dtype))
    again = norm.to_ours(norm.to_theirs(ours).astype(dtype))
    assert ours.tobytes() == again.tobytes()


def test_heads_and_halves_stay_together():
    config = families.decoder_config(CONFIGS["mistral"], **NO_MEMORY)
    query = next(t for t in families.tensors(CONFIGS["mistral"], config) if "q_proj" in t.name)
    weight = np.arange(np.prod(query.shape)).reshape(query.shape)  # [H * Dh, D]
    kernel = query.to_ours(weight)
    for head in range(4):
        for d in range(8):
            np.testing.assert_array_equal(kernel[:, head, d], weight[head * 8 + d])


def test_names_of_the_text_part_are_found_in_old_and_new_multimodal_checkpoints():
    standard = "model.layers.0.mlp.up_proj.weight"
    for prefix in ("language_model.model.", "model.language_model."):
        assert families.standard_name(prefix + standard.removeprefix("model.")) == standard
    assert families.standard_name("language_model.lm_head.weight") == "lm_head.weight"
    assert families.standard_name(standard) == standard


def test_what_is_ignored_and_what_is_not():
    tied, untied = LLAMA | {"tie_word_embeddings": True}, LLAMA
    assert families.ignored(tied, "lm_head.weight") and not families.ignored(untied, "lm_head.weight")
    assert families.ignored(untied, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not families.ignored(untied, "model.layers.0.self_attn.q_proj.bias")
    assert not families.ignored(untied, "vision_tower.x")
    multimodal = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}}
    for name in ("vision_tower.vision_model.x", "model.vision_tower.x", "multi_modal_projector.x"):
        assert families.ignored(multimodal, name)
