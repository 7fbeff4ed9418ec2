"""The decoder that a config.json describes, and where it differs from the original.

Sliding window attention of the original is replaced by block sliding window attention.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from famx.base.errors import ConfigError
from famx.conversion.architectures import (
    ACTIVATIONS,
    MULTIMODAL,
    SIZES,
    SUPPORTED,
    Family,
    architecture,
    open_config,
    text_config,
)
from famx.conversion.layout import Tensor, ignored, standard_name, tensors
from famx.modules.config import DecoderConfig, RopeScaling

__all__ = [
    "SUPPORTED", "Tensor", "decoder_config", "ignored", "notes", "standard_name",
    "tensors", "text_config",
]  # fmt: skip


def decoder_config(hf: Mapping[str, Any], **memory) -> DecoderConfig:
    """The decoder that a config.json describes.

    Args:
      hf: the content of config.json, as written by any version of transformers.
      **memory: fields of DecoderConfig that config.json does not have, or that override its values.

    Raises:
      ConfigError: the file requires something that is not implemented, such as its architecture or its
        scaling of positions, or sizes are inconsistent.
    """
    family, get = open_config(hf)
    fields = {ours: _size(theirs, get(theirs)) for ours, theirs in SIZES.items()}
    fields |= {ours: get(theirs) for ours, theirs in family.named.items() if get(theirs) is not None}
    fields |= family.fixed
    fields["norm_epsilon"] = get("rms_norm_eps")
    fields["tied_embeddings"] = bool(get("tie_word_embeddings"))
    fields["activation"] = _activation(family, get)
    if family.scaled_queries:
        fields["query_scale"] = 1.0 / math.sqrt(get("query_pre_attn_scalar"))
    fields |= _rope(family, get)
    known = {field.name for field in dataclasses.fields(DecoderConfig)}
    if unknown := sorted(memory.keys() - known):
        raise ConfigError(
            f"A decoder has no {', '.join(unknown)}; its fields are {', '.join(sorted(known))}."
        )
    try:
        return DecoderConfig(**{**fields, **memory})
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def notes(hf: Mapping[str, Any], config: DecoderConfig) -> list[str]:
    """Differences from the original that the user should know, one sentence each."""
    family, get = open_config(hf)
    lines = []
    past = config.memory_segments * config.block_size
    sees = past + (1 if config.window_mask else config.block_size)
    windowed = _windows(family, get)
    if windowed and sees > get("sliding_window"):
        window = get("sliding_window")
        lines.append(
            f"{windowed} of {config.num_layers} layers were trained to see {window} tokens and will"
            f" see up to {sees}, since the block window replaces their sliding window: the two models"
            f" agree on the first {window} tokens. Smaller blocks or fewer memory segments come closer."
        )
    length = get("max_position_embeddings")
    if length and sees > length:
        lines.append(
            f"Tokens will see up to {sees} tokens back, but the model was trained for {length}: use"
            " smaller blocks or fewer memory segments."
        )
    if family.gemma and config.param_dtype == "bfloat16":
        lines.append(
            "The scales of norms are stored in bfloat16 as 1 + weight, which rounds them by up to 0.4"
            " per cent; float32 parameters store them exactly."
        )
    if architecture(hf) == MULTIMODAL:
        lines.append("Only the text part is imported; the tensors of the vision tower are ignored.")
    return lines


def _size(name: str, value: Any) -> int | None:
    """Check a size of config.json; only key/value heads and head width may be missing."""
    if value is None and name in ("num_key_value_heads", "head_dim"):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json sets {name} to {value!r}; it must be a positive integer.")
    return value


def _activation(family: Family, get) -> str:
    if family.model_type == "gemma":  # config.json says gelu, but the model was trained with tanh
        return "gelu_tanh"
    name = get("hidden_activation" if family.gemma else "hidden_act") or get("hidden_act")
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"The activation {name!r} is not implemented; choices are {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


# --------------------------------------------------------------------------- rotary positions


def _rope(family: Family, get) -> dict[str, Any]:
    """The fields `rope_base`, `rope_scaling`, `local_rope_base` and `rope_layers`."""
    per_kind = get("rope_parameters") or {}
    kinds = {kind for kind in ("full_attention", "sliding_attention") if per_kind.get(kind)}
    if kinds and family.model_type != "gemma3_text":
        raise ConfigError("rope_parameters by layer type are supported only for Gemma 3.")
    # transformers 4 writes rope_theta and rope_scaling, 5 puts both into rope_parameters.
    spread = get("rope_scaling") or (per_kind if not kinds else {})
    parameters = {"rope_theta": get("rope_theta")} | _set(spread) | _set(per_kind.get("full_attention"))
    fields = {
        "rope_base": float(parameters["rope_theta"]),
        "rope_scaling": _rope_scaling(parameters, get),
    }
    layers = None
    if family.model_type == "gemma3_text":
        local = {"rope_theta": get("rope_local_base_freq")} | _set(per_kind.get("sliding_attention"))
        if _rope_scaling(local, get):
            raise ConfigError("Scaled rotary positions in sliding window layers are not implemented.")
        fields["local_rope_base"] = float(local["rope_theta"])
        layers = ["local" if kind == "sliding_attention" else "global" for kind in _layer_types(get)]
    elif family.model_type == "smollm3":
        interval, count = get("no_rope_layer_interval"), get("num_hidden_layers")
        rotated = get("no_rope_layers") or [(i + 1) % interval for i in range(count)]
        layers = ["global" if rotates else "none" for rotates in rotated[:count]]
    if layers and set(layers) != {"global"}:
        fields["rope_layers"] = tuple(layers)
    return fields


def _set(fields: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in (fields or {}).items() if value is not None}


def _rope_scaling(parameters: Mapping[str, Any], get) -> RopeScaling | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    partial = parameters.get("partial_rotary_factor") or get("partial_rotary_factor")
    if partial not in (None, 1):
        raise ConfigError(
            f"The model rotates only a part of each head (partial_rotary_factor {partial}), which is"
            " not implemented."
        )
    try:
        if kind == "default":
            return None
        if kind == "linear":
            return RopeScaling(float(parameters["factor"]))
        if kind == "llama3":
            low, high = (float(parameters[f"{name}_freq_factor"]) for name in ("low", "high"))
            if not low < high:
                raise ConfigError(
                    f"config.json has low_freq_factor {low:g} and high_freq_factor {high:g}: the first"
                    " must be less."
                )
            return RopeScaling(
                float(parameters["factor"]),
                low,
                high,
                get("original_max_position_embeddings")
                or parameters.get("original_max_position_embeddings")
                or get("max_position_embeddings"),
            )
    except KeyError as error:
        raise ConfigError(f"The {kind} scaling of rotary positions has no {error}.") from error
    raise ConfigError(
        f"The scaling of rotary positions {kind!r} is not implemented; choices are default, linear and"
        " llama3."
    )


def _layer_types(get) -> list[str]:
    """The kind of each layer of Gemma 2 or 3: `sliding_attention` or `full_attention`."""
    pattern = get("_sliding_window_pattern") or get("sliding_window_pattern") or 2
    kinds = ("full_attention", "sliding_attention")
    return get("layer_types") or [kinds[(i + 1) % pattern != 0] for i in range(get("num_hidden_layers"))]


def _windows(family: Family, get) -> int:
    """Number of layers of the original with a sliding window."""
    layers = get("num_hidden_layers")
    if get("sliding_window") is None:
        return 0
    if family.model_type == "mistral":
        return layers
    if family.model_type in ("gemma2", "gemma3_text"):
        return _layer_types(get).count("sliding_attention")
    if not get("use_sliding_window"):
        return 0
    if types := get("layer_types"):
        return types.count("sliding_attention")
    if family.model_type == "smollm3":
        return (_rope(family, get).get("rope_layers") or ()).count("none")
    return max(layers - get("max_window_layers"), 0)
