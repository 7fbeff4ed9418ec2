"""Table of the supported architectures, and access to a config.json with their defaults.

Names are those of Hugging Face's `transformers`. A field that a `config.json` omits has the default of
the architecture's configuration class there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from famx.base.errors import ConfigError
from famx.conversion.config_file import check_config, is_on

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
}
SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
}
_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_SOFTCAPS = {
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
}
_DEFAULTS = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10_000.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
      model_type: the architecture's `model_type` in a config.json.
      defaults: values of config.json fields that the file omits.
      named: fields of DecoderConfig other than `SIZES`, and the config.json fields that set them.
      fixed: fields of DecoderConfig with the same value for all models of the architecture.
    """

    model_type: str
    defaults: Mapping[str, Any]
    named: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def gemma(self) -> bool:
        """Whether norms multiply by `1 + weight` and the activation is named `hidden_activation`."""
        return self.model_type.startswith("gemma")

    @property
    def scaled_queries(self) -> bool:
        """Whether config.json sets the scale of queries (`query_pre_attn_scalar`)."""
        return "query_pre_attn_scalar" in self.defaults


_GEMMA = {
    "vocab_size": 256_000, "head_dim": 256, "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
}  # fmt: skip
_GEMMA2 = _GEMMA | {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}  # fmt: skip
FAMILIES = {
    "LlamaForCausalLM": Family(
        "llama",
        {"vocab_size": 32_000, "intermediate_size": 11_008, "max_position_embeddings": 2048},
        {**_ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
    ),
    "MistralForCausalLM": Family(
        "mistral",
        {
            "vocab_size": 32_000, "intermediate_size": 14_336, "num_key_value_heads": 8,
            "sliding_window": 4096, "max_position_embeddings": 131_072,
        },
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        {
            "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32,
            "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32_768,
        },
        fixed={"qkv_bias": True},
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {
            "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32,
            "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28,
            "max_position_embeddings": 32_768,
        },
        _ATTENTION_BIAS,
        {"qk_norm": True},
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        {
            "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008,
            "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
            "tie_word_embeddings": True, "rope_theta": 2_000_000.0, "no_rope_layer_interval": 4,
            "max_position_embeddings": 32_768,
        },
        {**_ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
    ),
    "GemmaForCausalLM": Family(
        "gemma",
        _GEMMA | {
            "hidden_size": 3072, "intermediate_size": 24_576, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 16,
        },
        _ATTENTION_BIAS,
        {"scale_embeddings": True},
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        _GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _ATTENTION_BIAS | _SOFTCAPS,
        {"scale_embeddings": True, "post_norms": True},
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        _GEMMA2 | {
            "vocab_size": 262_208, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6, "max_position_embeddings": 131_072,
        },
        _ATTENTION_BIAS | {"logit_softcap": "final_logit_softcapping"},
        {"scale_embeddings": True, "post_norms": True, "qk_norm": True},
    ),
}  # fmt: skip
MULTIMODAL = "Gemma3ForConditionalGeneration"
SUPPORTED = (*FAMILIES, MULTIMODAL)


def text_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model: the text part of a multimodal one, otherwise a copy.

    Raises:
      ConfigError: the architecture is not supported.
    """
    if architecture(hf) != MULTIMODAL:
        return dict(hf)
    inner = hf.get("text_config") or {}
    if not isinstance(inner, Mapping):
        raise ConfigError("config.json is not valid: text_config should be an object.")
    outer = {key: hf[key] for key in hf if key in _OUTER_KEYS}
    text = {**inner, **outer}
    return {**text, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}


_OUTER_KEYS = (
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype",
    "quantization_config", "transformers_version",
)  # fmt: skip


def architecture(hf: Mapping[str, Any]) -> str:
    """The name of a supported architecture, from `architectures` or `model_type`.

    Raises:
      ConfigError: there is none, or it is not supported.
    """
    known = "supported are " + ", ".join(SUPPORTED)
    types = {family.model_type: name for name, family in FAMILIES.items()} | {"gemma3": MULTIMODAL}
    kind = hf.get("model_type")
    names = hf.get("architectures") or [types.get(kind, kind) if isinstance(kind, str) else None]
    if not isinstance(names, list) or not isinstance(names[0], str) or not names[0]:
        raise ConfigError(f"config.json names no architecture; {known}.")
    if names[0] not in SUPPORTED:
        raise ConfigError(f"The architecture {names[0]} is not supported; {known}.")
    return names[0]


def open_config(hf: Mapping[str, Any]) -> tuple[Family, Callable[[str], Any]]:
    """The architecture of a config.json, and `get(key)`: the value in the file, or else the default.

    Raises:
      ConfigError: the architecture is not supported, a field has a type or a size that no model has, the
        weights are quantized, or attention is not causal.
    """
    hf = text_config(hf)
    check_config(hf)
    family = FAMILIES[architecture(hf)]
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(
            f"The weights are quantized ({method}), which is not supported: use the model in bfloat16,"
            " float16 or float32, or a GGUF file."
        )
    if hf.get("use_bidirectional_attention"):
        raise ConfigError("The model attends in both directions, which a decoder cannot.")
    for key, of in _OF_ONE_FAMILY.items():
        if is_on(hf.get(key)) and family.model_type != of:
            raise ConfigError(f"config.json sets {key}, which {family.model_type} does not have.")
    defaults = _DEFAULTS | family.defaults

    def get(key: str) -> Any:
        value = hf.get(key)
        return defaults.get(key) if key not in hf or value is None and key in _NEVER_NULL else value

    return family, get


# Fields for which null means that the file leaves them out; of others it switches something off.
_NEVER_NULL = (
    *("rms_norm_eps", "hidden_act", "tie_word_embeddings", "rope_theta", "rope_local_base_freq"),
    *("query_pre_attn_scalar", "no_rope_layer_interval", "max_window_layers"),
)
_OF_ONE_FAMILY = {
    "rope_local_base_freq": "gemma3_text",
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval"), "smollm3"),
}
