"""A gin file that binds a decoder, for `--gin_file` after that of a run."""

import dataclasses
import textwrap

from famx.modules import DecoderConfig, RopeScaling


def model_gin(config: DecoderConfig, name: str) -> str:
    """A gin file of the model: every field that is not the default."""
    lines = [
        f"# The model that was imported from {' '.join(name.split())}.",
        "from __gin__ import dynamic_registration\n",
        "from famx import models",
        "from famx import modules\n",
        "MODEL = @models.DecoderModel()",
        "models.DecoderModel.module = @modules.Decoder()",
        "modules.Decoder.config = @modules.DecoderConfig()",
    ]
    lines += _bindings(config)
    if config.rope_scaling is not None:
        lines += _bindings(config.rope_scaling)
    return "\n".join(lines) + "\n"


def _bindings(values: DecoderConfig | RopeScaling) -> list[str]:
    lines = [f"\nmodules.{type(values).__name__}:"]
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if value == field.default:
            continue
        text = "@modules.RopeScaling()" if isinstance(value, RopeScaling) else repr(value)
        lines += textwrap.wrap(f"  {field.name} = {text}", 100, subsequent_indent=" " * 6)
    return lines
