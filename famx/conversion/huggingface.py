"""The config.json of a decoder, verified by converting it back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from famx.base.errors import ConfigError
from famx.conversion.architectures import (
    ACTIVATIONS,
    FAMILIES,
    SIZES,
    Family,
    text_config,
)
from famx.conversion.families import decoder_config
from famx.modules.config import COMPUTATION_FIELDS, MEMORY_FIELDS, DecoderConfig

# In order of preference: the first that can express a decoder is used.
_PREFERRED = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "GemmaForCausalLM", "Gemma2ForCausalLM", "SmolLM3ForCausalLM", "Gemma3ForCausalLM",
)  # fmt: skip


def huggingface_config(config: DecoderConfig, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Make the config.json of a decoder.

    It describes the weights; the fields of memory and computation are not in it. Without a source, the
    described model attends to all tokens before, except for a Mistral, whose sliding window can equal
    `window_mask`.

    Args:
      config: the decoder.
      source: the config.json that the decoder was imported from. Its text part is used unchanged, apart
        from `vocab_size`, if it still describes the decoder.

    Raises:
      ConfigError: no supported architecture can express the decoder; the sentence says how the closest
        one differs.
    """
    if source is not None:
        hf = text_config(source) | {"vocab_size": config.vocab_size}
        if not _differing(config, hf):
            return hf
    exact = "MistralForCausalLM" if config.window_mask and not config.memory.exists else None
    closest = None
    for name in sorted(_PREFERRED, key=lambda name: name != exact):
        hf = _write(name, FAMILIES[name], config)
        differing = _differing(config, hf)
        if not differing:
            return hf
        if closest is None or len(differing) < len(closest[1]):
            closest = name, differing
    name, differing = closest
    raise ConfigError(
        "No supported architecture of transformers can express this decoder; closest is"
        f" {name}, which has {' and '.join(differing)}."
    )


def _differing(config: DecoderConfig, hf: Mapping[str, Any]) -> list[str]:
    """Differences between the decoder of `hf` and `config`: 'name = value in hf, not value in config'."""
    same = {name: getattr(config, name) for name in (*MEMORY_FIELDS, *COMPUTATION_FIELDS)}
    try:
        other = decoder_config(hf, **same)
    except ConfigError as error:
        return [str(error)]
    differing = [
        f"{field.name} = {getattr(other, field.name)!r}, not {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if _meaning(config, field.name) != _meaning(other, field.name)
    ]
    # Only these classes of transformers reject such sizes.
    odd = config.embed_dim % config.num_heads != 0
    if odd and hf.get("model_type") in ("llama", "gemma2", "gemma3_text"):
        differing.append(
            f"embed_dim a multiple of num_heads, not {config.embed_dim} of {config.num_heads}"
        )
    return differing


def _meaning(config: DecoderConfig, name: str) -> Any:
    """The value of a field in a normal form that is equal for equivalent decoders."""
    kinds = config.rope_layers or ("global",) * config.num_layers
    if name == "rope_layers":
        return kinds
    if name == "local_rope_base" and "local" not in kinds:
        return None
    return getattr(config, name)


def _write(name: str, family: Family, config: DecoderConfig) -> dict[str, Any]:
    """The config.json of the decoder in one architecture, readable by transformers 4 and 5."""
    c = config
    window = (c.memory_segments + 1) * c.block_size
    if c.rope_scaling is not None and c.rope_scaling.original_length:
        window = max(window, int(c.rope_scaling.original_length * c.rope_scaling.factor))
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.activation)
    hf = {
        "architectures": [name],
        "model_type": family.model_type,
        **{theirs: getattr(c, ours) for ours, theirs in SIZES.items()},
        **{theirs: getattr(c, ours) for ours, theirs in family.named.items()},
        "rms_norm_eps": c.norm_epsilon,
        "hidden_activation" if family.gemma else "hidden_act": activation,
        "tie_word_embeddings": c.tied_embeddings,
        "max_position_embeddings": window,
        "rope_theta": c.rope_base,
        "rope_scaling": _rope_scaling(c),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if family.model_type == "gemma":
        hf["hidden_act"] = activation
    if family.scaled_queries:
        hf["query_pre_attn_scalar"] = round(c.query_scale**-2)
    kinds = c.rope_layers or ("global",) * c.num_layers
    if family.model_type == "mistral":
        exact = c.window_mask and not c.memory.exists
        hf["sliding_window"] = c.memory_segments * c.block_size + 1 if exact else None
    if family.model_type in ("gemma2", "gemma3_text"):
        types = {"local": "sliding_attention"}
        hf["layer_types"] = [types.get(kind, "full_attention") for kind in kinds]
        hf["sliding_window"] = window
    if family.model_type == "gemma3_text":
        hf["rope_local_base_freq"] = c.local_rope_base
    if family.model_type == "smollm3":
        hf["no_rope_layers"] = [int(kind != "none") for kind in kinds]
    return hf


def _rope_scaling(config: DecoderConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.original_length is None:
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_length,
    }
