"""Tiny models of every family: config.json, weights drawn from a seed, and the logits of transformers.

    python tests/reference_models.py

records the logits of `transformers` in `recorded_logits.npz`. Weights are not stored: each tensor is
drawn from its name, so that both sides make the same ones from the names and shapes they know.
"""

import pathlib
import zlib

import numpy as np

RECORDED = pathlib.Path(__file__).with_name("recorded_logits.npz")
TOKENS = np.random.default_rng(0).integers(0, 23, (1, 25))  # three blocks of 8 and a token
WINDOW = 17  # of the Mistral with a sliding window

_SIZES = {
    "vocab_size": 24,  # as wide as the model and its feed-forward: no transpose shows in shapes
    "hidden_size": 24,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_NARROW = {**_SIZES, "intermediate_size": 20, "head_dim": 8}
_MULTI_QUERY = {**_NARROW, "num_key_value_heads": 1}


def _model(name, model_type, sizes, **fields):
    return {"architectures": [name], "model_type": model_type, **sizes, **fields}


def _llama(sizes, **fields):
    return _model("LlamaForCausalLM", "llama", sizes, **fields)


_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_SMOLLM3 = ("SmolLM3ForCausalLM", "smollm3")
_GEMMA2 = {"query_pre_attn_scalar": 12, "sliding_window": 64, "num_key_value_heads": 2}
CONFIGS = {
    "llama": _llama(_SIZES, tie_word_embeddings=False),
    "llama_biased": _llama(
        _MULTI_QUERY, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-3
    ),
    "llama_linear": _llama(_SIZES, rope_scaling={"type": "linear", "factor": 4.0}),
    "llama3": _llama(_NARROW, rope_theta=50.0, rope_scaling=_LLAMA3, hidden_act="gelu"),
    "smollm2": _llama({**_SIZES, "vocab_size": 23}, rope_theta=1e5, tie_word_embeddings=True),
    "mistral": _model("MistralForCausalLM", "mistral", _NARROW, sliding_window=None),
    "mistral_window": _model("MistralForCausalLM", "mistral", _NARROW, sliding_window=WINDOW),
    "qwen2": _model("Qwen2ForCausalLM", "qwen2", _SIZES, tie_word_embeddings=True),
    "qwen3": _model("Qwen3ForCausalLM", "qwen3", _NARROW, rope_theta=1e6),
    "qwen3_biased": _model("Qwen3ForCausalLM", "qwen3", _MULTI_QUERY, attention_bias=True),
    "gemma": _model("GemmaForCausalLM", "gemma", _MULTI_QUERY, hidden_act="gelu"),
    "gemma2": _model(
        "Gemma2ForCausalLM", "gemma2", _NARROW, **_GEMMA2, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": _model(
        "Gemma3ForCausalLM", "gemma3_text", _NARROW, **_GEMMA2, rope_local_base_freq=30.0,
        rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 8.0}, sliding_window_pattern=3,
    ),
    "smollm3": _model(*_SMOLLM3, _SIZES, no_rope_layers=[1, 0, 1], pad_token_id=None),
    "smollm3_biased": _model(
        *_SMOLLM3, _NARROW, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
        no_rope_layer_interval=2, pad_token_id=None,
    ),
}  # fmt: skip


def draw(name: str, shape, gemma: bool) -> np.ndarray:
    """Draw the tensor of a name. Scales and biases are random too, and attention is sharp."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if "norm" in name:
        x = 0.3 * x + (not gemma)
    elif name.endswith("bias"):
        x = 0.3 * x
    elif "embed" not in name:
        x = x * (2 if "q_proj" in name else 1) / np.sqrt(shape[-1])
    return x.astype(np.float32)


def is_gemma(hf) -> bool:
    return hf["model_type"].startswith("gemma")


def torch_model(hf):
    """The model in `transformers`, float32, with the drawn weights."""
    import torch
    import transformers

    fields = {key: value for key, value in hf.items() if key != "architectures"}
    config = transformers.AutoConfig.for_model(**fields)
    model = getattr(transformers, hf["architectures"][0])._from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw(name, parameter.shape, is_gemma(hf))))
    return model.eval()


def torch_logits(model, tokens) -> np.ndarray:
    """Logits `[B, L, V]` of tokens `[B, L]`, all at once."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens))).logits.numpy()


if __name__ == "__main__":
    logits = {name: torch_logits(torch_model(hf), TOKENS)[0] for name, hf in CONFIGS.items()}
    np.savez_compressed(RECORDED, **logits)
