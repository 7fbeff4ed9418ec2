"""Fields of Hugging Face's config.json and generation_config.json that an import reads, with limits.

A limit is far above any model that exists. It bounds what an import loops over and allocates, so that a
damaged or hostile file is refused at once.
"""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from famx.base.errors import ConfigError
from famx.base.untrusted import Fields, Name, parsed, shown

MOST_LAYERS = 10_000
MOST_WIDTH = 1 << 20
MOST_TOKENS = 1 << 22  # of a vocabulary; also the largest id
_MOST_POSITIONS = 1 << 40

Id = Annotated[int, Field(ge=-1, lt=MOST_TOKENS)]  # -1: there is none
Ids = Id | Annotated[list[Id], Field(max_length=256)] | None
Count = Annotated[int, Field(ge=1, le=MOST_WIDTH)] | None
Positive = Annotated[float, Field(gt=0, lt=1e30)] | None
Positions = Annotated[int, Field(ge=1, le=_MOST_POSITIONS)] | None
_PerLayer = Annotated[int, Field(ge=0, le=MOST_LAYERS)] | None
_LayerType = Literal["full_attention", "sliding_attention"]


class Rope(Fields):
    """The rotary positions of all layers, or of those of one kind."""

    rope_type: Name | None = None
    type: Name | None = None
    rope_theta: Positive = None
    factor: Positive = None
    low_freq_factor: Positive = None
    high_freq_factor: Positive = None
    original_max_position_embeddings: Positions = None
    partial_rotary_factor: Positive = None


class ConfigFile(Fields):
    """What an import reads of a config.json; other fields are ignored."""

    architectures: Annotated[list[Name], Field(min_length=1, max_length=16)] | None = None
    model_type: Name | None = None
    vocab_size: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    hidden_size: Count = None
    intermediate_size: Annotated[int, Field(ge=1, le=16 * MOST_WIDTH)] | None = None
    num_hidden_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)] | None = None
    num_attention_heads: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    num_key_value_heads: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    head_dim: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    max_position_embeddings: Positions = None
    original_max_position_embeddings: Positions = None
    sliding_window: Positions = None
    use_sliding_window: bool | None = None
    max_window_layers: _PerLayer = None
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] | None = None
    hidden_act: Name | None = None
    hidden_activation: Name | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    attn_logit_softcapping: Positive = None
    final_logit_softcapping: Positive = None
    query_pre_attn_scalar: Positive = None
    rope_theta: Positive = None
    rope_local_base_freq: Positive = None
    partial_rotary_factor: Positive = None
    rope_scaling: Rope | None = None
    layer_types: Annotated[list[_LayerType], Field(max_length=MOST_LAYERS)] | None = None
    no_rope_layers: Annotated[list[Literal[0, 1]], Field(max_length=MOST_LAYERS)] | None = None
    no_rope_layer_interval: Annotated[int, Field(ge=1, le=MOST_LAYERS)] | None = None
    sliding_window_pattern: Annotated[int, Field(ge=1, le=MOST_LAYERS)] | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    use_bidirectional_attention: bool | Name | None = None
    bos_token_id: Ids = None
    eos_token_id: Ids = None
    pad_token_id: Ids = None


class _GenerationFile(Fields):
    eos_token_id: Ids = None


_KINDS_OF_LAYERS = ("full_attention", "sliding_attention")
_KNOWN_ROPE = {
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("rope_local_base_freq", "no_rope_layers", "no_rope_layer_interval"),
}


def check_config(hf: Mapping[str, Any], name: str | os.PathLike = "config.json") -> None:
    """Check the types and sizes of a config.json, and that all of its rotary positions are understood.

    Args:
      hf: the content.
      name: its path, for sentences.

    Raises:
      ConfigError: names the first field that is not valid, or a field about rotary positions that is not
        known: ignored, it would make another model of the same weights.
    """
    hf = {key: value for key, value in hf.items() if isinstance(key, str)}
    fields = parsed(ConfigFile, hf, name)
    if "_sliding_window_pattern" in hf:
        pattern = {"sliding_window_pattern": hf["_sliding_window_pattern"]}
        parsed(ConfigFile, pattern, name)
    layers = fields.num_hidden_layers
    for key in ("layer_types", "no_rope_layers"):
        given = getattr(fields, key)
        if given is not None and layers is not None and 0 < len(given) < layers:
            raise ConfigError(f"{name} is not valid: {key} lists {len(given)} of {layers} layers.")
    for key, value in hf.items():
        if re.search("rope|rotary", key) and key not in _KNOWN_ROPE and is_on(value):
            raise ConfigError(_unknown_rope(name, key, value))
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope(hf.get(key), name, key)


def _check_rope(given: Any, name: str | os.PathLike, key: str) -> None:
    """Check an entry about rotary positions, which may have an entry for each kind of layer."""
    if given is None:
        return
    if not isinstance(given, dict):
        raise ConfigError(f"{name} is not valid: {key} is {shown(given)}: it should be an object.")
    per_kind = [kind for kind in _KINDS_OF_LAYERS if kind in given]
    for kind in per_kind:
        _check_rope(given[kind], name, f"{key}.{kind}")
    rest = {k: value for k, value in given.items() if k not in per_kind}
    try:
        rope = parsed(Rope, rest, name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("valid: ", f"valid: {key}.", 1)) from error
    if rope.type is not None and rope.rope_type is not None and rope.type != rope.rope_type:
        raise ConfigError(
            f"{name} is not valid: {key} is of two types, {shown(rope.rope_type)} and {shown(rope.type)}."
        )
    kind = rope.rope_type or rope.type or "default"
    used = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }.get(kind)
    if used is None:
        return  # a type that is refused by its name
    used |= {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for k, value in rest.items():
        # `original_max_position_embeddings` only says what training used, and 1 scales nothing.
        harmless = k == "original_max_position_embeddings" or (k == "factor" and value == 1)
        if k not in used and not harmless and is_on(value):
            raise ConfigError(_unknown_rope(name, f"{key}.{k}", value, kind))


def _unknown_rope(name: str | os.PathLike, key: str, value: Any, kind: str | None = None) -> str:
    of_kind = f" by rotary positions of the type {kind!r}" if kind else ""
    understood = f"which is not understood{of_kind}: the model would differ."
    return f"{name} sets {key} to {shown(value)}, {understood}"


def is_on(value: Any) -> bool:
    """Whether a value switches something on: not null, false, empty or zero."""
    return not (value is None or value is False or value in ("", 0) or value == [] or value == {})


def ids_of(value: int | list[int] | None) -> tuple[int, ...]:
    """The ids of a field of type `Ids`, which may hold none, one or several."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(i for i in ids if i >= 0))


def generation_end_ids(content: Mapping[str, Any], name: str | os.PathLike) -> tuple[int, ...]:
    """The ids that end a text according to a generation_config.json.

    Raises:
      ConfigError: `eos_token_id` is neither an id nor a list of ids.
    """
    return ids_of(parsed(_GenerationFile, content, name).eos_token_id)
