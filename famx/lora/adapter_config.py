"""`adapter_config.json` of PEFT: which of its settings are understood, and what switches the others off.

PEFT gains settings with every version, and many of them change what the adapter computes, or which base
model it belongs to (PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base when they initialise). So this
is a list of what is allowed: a key that is not on it must be off.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from famx.base.errors import ConfigError
from famx.base.files import as_path
from famx.base.untrusted import Fields, Name, parsed, read_object, shown

CONFIG = "adapter_config.json"
MEMORY = "famx_memory"  # key of the fields of DecoderConfig that famx saves
MOST_RANK = 1 << 14
_Names = Annotated[list[Name], Field(max_length=10_000)]


class AdapterConfig(Fields):
    """The settings that are understood, with their values for plain LoRA."""

    r: Annotated[int, Field(ge=1, le=MOST_RANK)]
    lora_alpha: Annotated[float, Field(gt=-1e9, lt=1e9)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = 0.0
    use_rslora: bool | None = False
    peft_type: Literal["LORA"] = "LORA"
    task_type: Literal["CAUSAL_LM"] | None = None
    bias: Literal["none"] | None = None
    # How the adapters started. Those that are not listed change the base model, too.
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal"] | None = True
    # Where there are adapters; the tensors say it as well.
    target_modules: Name | _Names | None = None
    exclude_modules: Name | _Names | None = None
    famx_memory: dict[str, Any] | None = None


# Settings that change nothing while those that they belong to are off, and notes for readers.
_WITHOUT_EFFECT = {
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    *("megatron_core", "qalora_group_size", "eva_config"),
}


def read_adapter_config(path: str | os.PathLike) -> AdapterConfig:
    """The settings of the adapter in a directory.

    Raises:
      FileNotFoundError: there is no `adapter_config.json`.
      ConfigError: it is damaged, or a setting is switched on that is not understood; names it.
    """
    file = as_path(path) / CONFIG
    if not file.exists():
        raise FileNotFoundError(file)
    content = read_object(file)
    _refuse_unknown(content, path)
    return parsed(AdapterConfig, content, file)


def _refuse_unknown(content: Mapping[str, Any], path: str | os.PathLike) -> None:
    only = "only LoRA with a single rank, without biases and without other trained modules"
    for name, value in content.items():
        if name in _WITHOUT_EFFECT or is_off(value):
            continue
        known = name in AdapterConfig.model_fields
        if known and name in ("r", "lora_alpha", "lora_dropout", MEMORY):
            continue  # numbers, whose values the model checks
        if known:
            try:
                parsed(AdapterConfig, {"r": 1, "lora_alpha": 1, name: value}, CONFIG)
                continue
            except ConfigError:
                pass
        raise ConfigError(
            f"The adapter {path} has {shown(name)[1:-1]} {shown(value)} in {CONFIG}: {only}, can be"
            " loaded."
        )


def is_off(value: Any) -> bool:
    """Whether a setting with this value is switched off: null, false or empty."""
    return value is None or value is False or value in ("", [], {})
