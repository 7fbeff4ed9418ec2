"""The config.json of an export: the settings of famx in it, and how transformers finds the memory.

A decoder with a memory is a model of its own to transformers: of the type `famx`, defined by
`modeling_famx.py` next to the weights, which include the memory's parameters.

    {"model_type": "famx", "architectures": ["FamxForCausalLM"], "auto_map": {...},
     "base": {config.json of the decoder without its memory},
     "famx": {"version": ..., "format": 1, "step": 5000, "decoder": {fields of DecoderConfig}, ...}, ...}

A decoder without memory keeps the config.json of its architecture, to which `famx` is added.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from famx import __version__
from famx.base.errors import ConfigError
from famx.conversion.architectures import FAMILIES, SIZES
from famx.conversion.layout import Tensor
from famx.memories import Fam
from famx.models.description import check_description
from famx.modules import rope
from famx.modules.config import COMPUTATION_FIELDS, MEMORY_FIELDS, DecoderConfig
from famx.modules.memory import COLLECTION, of_memory
from famx.modules.memory import from_dict as memory_from_dict

CODE = pathlib.Path(__file__).parent / "exported" / "modeling_famx.py"
MODEL_CLASS = "FamxForCausalLM"
FORMAT = 1
_TYPE, _KEY = "famx", "famx"
_PREFIX = "model."  # of all tensors but the head
_IMPLEMENTED = {
    "length", "positions", "start_from", "update", "update_scale", "normalize", "first_residual", "bias",
}  # fmt: skip
_PASSED_ON = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype")


def check_implemented(config: DecoderConfig) -> None:
    """Check that `modeling_famx.py` implements the memory of a decoder, if it has one.

    Raises:
      ConfigError: it does not.
    """
    memory = config.memory
    what = None
    if memory.exists and memory.kind != Fam.kind:
        what = f"a memory of the kind {memory.kind!r}"
    elif memory.exists:
        fields = (field for field in dataclasses.fields(memory) if field.name not in _IMPLEMENTED)
        changed = [field.name for field in fields if getattr(memory, field.name) != field.default]
        what = f"Fam.{changed[0]}" if changed else None
    if what is not None:
        raise ConfigError(
            f"{CODE.name} does not implement {what}: add --nomemory to export the model without its"
            " memory."
        )


def full_config(
    hf: Mapping[str, Any], config: DecoderConfig, step: int, memory: list[Tensor]
) -> dict[str, Any]:
    """The config.json of an export.

    Args:
      hf: the config.json of the decoder without its memory.
      config: the decoder.
      step: number of training steps.
      memory: `memory_tensors` of the decoder.
    """
    note = {"version": __version__, "format": FORMAT, "step": step}
    fields = config.to_dict()
    note["decoder"] = {name: fields[name] for name in fields if name not in COMPUTATION_FIELDS}
    if not config.memory.exists:
        return {**hf, _KEY: note}
    note["norm_offset"] = int(FAMILIES[hf["architectures"][0]].gemma)  # norms multiply by 1 + weight
    shapes = lambda layer: {t.path[-1]: list(t.shape) for t in memory if t.layer == layer}
    note["model_parameters"], note["layer_parameters"] = shapes(None), shapes(0)
    note["frequencies"] = {
        kind: rope.frequencies_of(config, kind).tolist() for kind in config.rope_layers or ("global",)
    }
    return {
        "architectures": [MODEL_CLASS],
        "model_type": _TYPE,
        "auto_map": {
            "AutoConfig": f"{CODE.stem}.FamxConfig",
            "AutoModelForCausalLM": f"{CODE.stem}.{MODEL_CLASS}",
        },
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "tie_word_embeddings": config.tied_embeddings,
        **{name: hf[name] for name in _PASSED_ON if name in hf},
        _KEY: note,
        "base": dict(hf),
    }


def base_config(full: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the decoder without its memory, as an import reads it."""
    if full.get("model_type") == _TYPE:
        if not isinstance(full.get("base"), dict):
            raise ConfigError("config.json of an export of famx has no base: copy it again.")
        return full["base"]
    return {name: value for name, value in full.items() if name != _KEY}


def memory_fields(full: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """`MEMORY_FIELDS` of DecoderConfig from a config.json; empty if famx did not write it.

    Args:
      full: the content of the config.json.
      path: its path, for messages.

    Raises:
      ConfigError: they are damaged, or written in a format or with a memory unknown to this version.
    """
    if _KEY not in full:
        return {}
    try:
        note = full[_KEY]
        if note["format"] != FORMAT:
            raise ConfigError(
                f"{path} has format {note['format']}; this famx reads format {FORMAT}: update famx."
            )
        fields = {name: note["decoder"][name] for name in MEMORY_FIELDS}
        memory = dict(fields["memory"])
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: copy it again, or remove {_KEY!r} from it.") from error
    check_description(fields, path)
    try:
        return {**fields, "memory": memory_from_dict(memory)}
    except (ValueError, TypeError) as error:  # a kind of memory, or a field of it, that is not known here
        raise ConfigError(f"{path}: {error}") from error


def memory_tensors(shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> list[Tensor]:
    """Tensors of the memory's parameters, given the shapes of all parameters by path.

    `memory/prompt` is `model.memory.prompt`; `layers/memory/prefix` is `model.layers.<i>.memory.prefix`.
    """
    found = []
    for path, shape in shapes.items():
        if not of_memory("/".join(path)):
            continue
        if path[0] != "layers":
            found.append(Tensor(_PREFIX + ".".join(path), path, None, shape, shape))
            continue
        for layer in range(shape[0]):
            name = f"{_PREFIX}layers.{layer}.{'.'.join(path[1:])}"
            found.append(Tensor(name, path, layer, shape[1:], shape[1:]))
    return found


def is_memory_tensor(name: str) -> bool:
    """Whether a tensor holds a parameter of a memory."""
    return name.startswith(_PREFIX) and COLLECTION in name.split(".")
