"""The gin file of an imported model, for `--gin_file` after that of a run."""

import dataclasses
import textwrap

from famx.modules import DecoderConfig, Memory, RopeScaling


def model_gin(config: DecoderConfig, name: str) -> str:
    """Text of a gin file that binds every field that differs from its default."""
    memory = type(config.memory)
    package, _, module = memory.__module__.rpartition(".")
    imports = ["from famx import models", "from famx import modules"]
    if config.memory.exists:
        imports.insert(0, f"from {package} import {module}" if package else f"import {module}")
    lines = [
        f"# The model that was imported from {' '.join(name.split())}.",
        "from __gin__ import dynamic_registration\n",
        *imports,
        "\nMODEL = @models.DecoderModel()",
        "models.DecoderModel.module = @modules.Decoder()",
        "modules.Decoder.config = @modules.DecoderConfig()",
    ]
    lines += _bindings("modules.DecoderConfig", config)
    if config.memory.exists:
        lines += _bindings(f"{module}.{memory.__qualname__}", config.memory)
    if config.rope_scaling is not None:
        lines += _bindings("modules.RopeScaling", config.rope_scaling)
    return "\n".join(lines) + "\n"


def _bindings(target: str, values: DecoderConfig | Memory | RopeScaling) -> list[str]:
    lines = [f"\n{target}:"]
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if value == field.default:
            continue
        text = repr(value)
        if isinstance(value, RopeScaling):
            text = "@modules.RopeScaling()"
        elif isinstance(value, Memory):
            text = f"@{type(value).__module__.rpartition('.')[2]}.{type(value).__qualname__}()"
        lines += textwrap.wrap(f"  {field.name} = {text}", 100, subsequent_indent=" " * 6)
    return lines if len(lines) > 1 else []
