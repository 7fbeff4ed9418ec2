"""config.json of a decoder: round trips in every family, and decoders that none can express."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_models import CONFIGS

from famx.base.errors import ConfigError
from famx.conversion import families
from famx.conversion.huggingface import huggingface_config
from famx.modules import DecoderConfig, Memory, RopeScaling
from famx.modules.config import MEMORY_FIELDS

SIZES = {"vocab_size": 32, "num_layers": 3, "embed_dim": 24, "num_heads": 4}
SCALINGS = [None, RopeScaling(2.0), RopeScaling(8.0, 1.0, 4.0, 64)]


@given(
    st.fixed_dictionaries(
        {
            "num_kv_heads": st.sampled_from([1, 2, 4]),
            "head_dim": st.sampled_from([4, 6]),
            "mlp_dim": st.sampled_from([24, 50]),
            "norm_epsilon": st.sampled_from([1e-6, 1e-5]),
            "activation": st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "squared_relu"]),
            "tied_embeddings": st.booleans(),
            "rope_base": st.sampled_from([1e4, 5e5]),
            "rope_scaling": st.sampled_from(SCALINGS),
            "block_size": st.sampled_from([64, 100]),
        }
    ),
    st.sampled_from(
        [
            {},
            {"qkv_bias": True},
            {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
            {"qk_norm": True},
            {"rope_layers": ("global", "none", "global")},
            {"rope_layers": ("global",) * 3},
            {"scale_embeddings": True, "activation": "gelu_tanh"},
            {"scale_embeddings": True, "post_norms": True, "logit_softcap": 3.0},
            {"scale_embeddings": True, "post_norms": True, "attention_softcap": 5.0},
            {"scale_embeddings": True, "post_norms": True, "query_scale": 1 / 12**0.5, "qk_norm": True,
             "rope_layers": ("local", "local", "global"), "local_rope_base": 50.0},
        ]
    ),
)  # fmt: skip
def test_a_config_that_a_family_can_express_comes_back(common, own):
    config = DecoderConfig(**SIZES, **{**common, **own})
    hf = huggingface_config(config)
    json.dumps(hf)
    memory = {name: getattr(config, name) for name in MEMORY_FIELDS}
    again = families.decoder_config(hf, **memory)
    if config.rope_layers == ("global",) * 3:
        again = DecoderConfig.from_dict(again.to_dict() | {"rope_layers": config.rope_layers})
    assert again == config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parallel_block": True}, "LlamaForCausalLM, which has parallel_block = False, not True."),
        ({"norm": "layer"}, "which has norm = 'rms', not 'layer'"),
        ({"gated_mlp": False}, "which has gated_mlp = True, not False"),
        ({"output_bias": True}, "which has qkv_bias = True, not False"),
        ({"query_scale": 0.3}, "which has query_scale = .*, not 0.3"),
        ({"attention_softcap": 3.0, "qk_norm": True}, "which has attention_softcap = None, not 3.0"),
        (
            {"embed_dim": 22, "head_dim": 6, "scale_embeddings": True, "post_norms": True},
            "Gemma2ForCausalLM, which has embed_dim a multiple of num_heads, not 22 of 4",
        ),
    ],
)
def test_a_decoder_that_no_family_can_express_is_refused(changes, sentence):
    with pytest.raises(ConfigError, match=f"No supported architecture .*; closest is .*{sentence}"):
        huggingface_config(DecoderConfig(**{**SIZES, **changes}))


def test_the_source_is_taken_only_where_it_still_says_the_same_decoder():
    source = CONFIGS["qwen2"] | {"extra": 1, "pad_token_id": 3}
    config = families.decoder_config(source)
    assert huggingface_config(config, source) == source
    padded = families.decoder_config(source, vocab_size=25)
    assert huggingface_config(padded, source) == source | {"vocab_size": 25}
    other = families.decoder_config(source, norm_epsilon=1e-3)
    hf = huggingface_config(other, source)
    assert hf["rms_norm_eps"] == 1e-3 and "extra" not in hf and hf["model_type"] == "qwen2"


def test_of_a_multimodal_source_the_text_part_goes_out():
    text = {key: value for key, value in CONFIGS["gemma3"].items() if key != "architectures"}
    source = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    hf = huggingface_config(families.decoder_config(source), source)
    assert hf == CONFIGS["gemma3"]


def test_a_window_mask_without_memory_is_a_mistral_with_that_window():
    config = DecoderConfig(**SIZES, block_size=8, memory_segments=2, window_mask=True, memory=Memory())
    hf = huggingface_config(config)
    assert (hf["model_type"], hf["sliding_window"]) == ("mistral", 17)
    assert families.notes(hf, config) == []
