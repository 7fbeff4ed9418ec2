"""Makes a MODEL_DIR out of a pretrained model: a Hugging Face directory, or a GGUF file.

    python -m famx.convert --from ~/models/SmolLM2-135M-Instruct --to /tmp/famx/smollm2
    python -m famx.convert --from model.gguf --to /tmp/famx/model --param_dtype=bfloat16 --memory=none

The weights are those of the original; the memory is new: its prompt is drawn, and learns by
finetuning. What is needed besides weights lies in the directory too: the vocabulary, and a
`model.gin` for training. Tensors are copied one at a time, so the model need not fit in memory.
"""

import ast
import dataclasses
from collections.abc import Mapping, Sequence

from absl import flags

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.gin_checks import nearest
from famx.base.progress import ByteProgress
from famx.base.signals import exit_on_interrupt
from famx.base.text import byte_size
from famx.conversion.importing import PROMPT_STARTS, Plan, check_destination, plan_import, write_model
from famx.conversion.sources import open_source
from famx.modules import DecoderConfig
from famx.modules.config import COMPUTATION_FIELDS, MEMORY_FIELDS
from famx.modules.memory import Memory
from famx.modules.memory import from_dict as memory_from_dict

_FIELDS = (*MEMORY_FIELDS, *COMPUTATION_FIELDS)  # what an import may choose
_OWN_FLAGS = ("block_size", "memory_segments", "param_dtype", "dtype")


def define_flags() -> None:
    flags.DEFINE_string("from", None, "A directory with config.json and safetensors, or a GGUF file.")
    flags.DEFINE_string("to", None, "The MODEL_DIR to write; it must be new or empty.")
    flags.DEFINE_integer("block_size", None, "S, tokens of a block; 1024.")
    flags.DEFINE_integer("memory_segments", None, "M, past blocks that are kept; 3.")
    flags.DEFINE_string("memory", None, "Memory: a kind and its fields, such as fam:length=64 (the "
                        "default), fam:length=32,update=gated, or none.")  # fmt: skip
    flags.DEFINE_enum("param_dtype", None, ["float32", "bfloat16"], "Of the weights; float32.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the computation; float32.")
    flags.DEFINE_multi_string("set", [], f"FIELD=VALUE, a field of {', '.join(_FIELDS)}; repeat it.")
    flags.DEFINE_enum("prompt", None, PROMPT_STARTS, "The memory before training: drawn numbers, or "
                      "embeddings of drawn tokens. Default: that of an export, or numbers.")  # fmt: skip
    flags.DEFINE_integer("seed", 0, "Of that draw.", lower_bound=0)
    flags.DEFINE_string("tokenizer", None, "A tokenizer file in place of the model's own.")
    flags.DEFINE_integer("pad_id", None, "The id of padding, where the tokenizer has none.")
    flags.DEFINE_string("mesh", "", "The mesh that will read it, as in fsdp=8,tensor=2: the arrays are "
                        "stored so that each device reads its own part.")  # fmt: skip


def main():
    values = flags.FLAGS
    if not values["from"].value:
        raise ConfigError("There is nothing to import: add --from=DIRECTORY or --from=FILE.gguf.")
    if not values.to:
        raise ConfigError("There is nowhere to write to: add --to=DIRECTORY.")
    given = {name: values[name].value for name in _OWN_FLAGS if values[name].value is not None}
    if values.memory is not None:
        given["memory"] = read_memory(values.memory)
    fields = read_fields(values.set) | given
    mesh = read_mesh(values.mesh)
    with exit_on_interrupt("Stopped; the same command begins anew."):
        convert(
            values["from"].value, values.to, fields, mesh, values.tokenizer, values.pad_id,
            values.prompt, values.seed,
        )  # fmt: skip


def convert(
    path: str,
    directory: str,
    fields: Mapping[str, object] | None = None,
    mesh: Mapping[str, int] | None = None,
    tokenizer: str | None = None,
    pad_id: int | None = None,
    prompt_start: str | None = None,
    seed: int = 0,
) -> Plan:
    """Imports the model at `path` into `directory`, and prints what came of it.

    Args:
      path: see `open_source`.
      directory: see `write_model`.
      fields: of DecoderConfig, those of the memory and the computation.
      mesh, tokenizer, pad_id: see `plan_import`.
      prompt_start, seed: see `write_model`.

    Raises:
      ConfigError: anything that is not as it should be, before anything is written; or writing failed.
    """
    check_destination(directory)
    with ByteProgress("checksum", keep_bar=False) as progress:
        source = open_source(path, progress.show)
    plan = plan_import(source, fields, mesh, tokenizer, pad_id)
    print(describe(plan), flush=True)
    try:
        with ByteProgress("import", plan.num_bytes, last_line=True) as progress:
            directory = write_model(plan, directory, prompt_start, seed, progress.add)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written: {error.strerror or error}. The same command begins anew."
        ) from error
    print(next_steps(plan, directory), flush=True)
    return plan


def read_fields(settings: Sequence[str]) -> dict[str, object]:
    """`FIELD=VALUE`s as fields of DecoderConfig.

    Raises:
      ConfigError: there is no such field, it belongs to the pretrained model, or the value is of
        another type.
    """
    known = {field.name: field.default for field in dataclasses.fields(DecoderConfig)}
    fields = {}
    for setting in settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not text:
            raise ConfigError(f"--set={setting} sets nothing: write it as --set=FIELD=VALUE.")
        if name == "memory":
            raise ConfigError(f"--set={setting}: the memory has a flag of its own, --memory=KIND.")
        if name not in _FIELDS:
            what = "belongs to the pretrained model" if name in known else "is no field of a decoder"
            raise ConfigError(f"--set={setting}: {name} {what}.{nearest(name, _FIELDS)}")
        value = _literal(text)
        wanted = float if isinstance(known[name], float) else type(known[name])
        if isinstance(value, int) and wanted is float and not isinstance(value, bool):
            value = float(value)
        if known[name] is None:  # blocks_per_chunk
            wanted = (int, type(None))
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ConfigError(f"--set={setting}: {name} is like {known[name]!r}, not {value!r}.")
        fields[name] = value
    return fields


def read_memory(text: str) -> Memory:
    """`fam`, or `fam:length=64,update=gated`, as a memory; ConfigError where there is no such memory."""
    kind, _, settings = text.partition(":")
    fields: dict[str, object] = {"kind": kind.strip()}
    for setting in filter(None, settings.split(",")):
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise ConfigError(f"--memory={text}: {setting} sets nothing, write it as FIELD=VALUE.")
        fields[name] = _literal(value)
    try:
        return memory_from_dict(fields)
    except ValueError as error:
        raise ConfigError(f"--memory={text}: {error}") from error


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_mesh(text: str) -> dict[str, int]:
    """`fsdp=8,tensor=2` as sizes by axis; ConfigError where it cannot be read."""
    sizes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if not size.strip().isdecimal():
            raise ConfigError(f"--mesh={text} is not understood: write it as --mesh=fsdp=8,tensor=2.")
        sizes[name.strip()] = int(size)
    return sizes


# --------------------------------------------------------------------------- reports


def describe(plan: Plan) -> str:
    """What will be written, and what should be known about it."""
    c = plan.config
    memory = f"memory {c.memory.kind}" if c.memory.exists else "no memory (BSWA)"
    if c.memory_columns:
        memory += f" of {c.memory_columns}"
    lines = [
        f"{plan.source.name}: {plan.num_parameters:,} parameters, {byte_size(plan.num_bytes)} in"
        f" {c.param_dtype}; blocks of {c.block_size}, {c.memory_segments} past blocks, {memory}."
    ]
    if plan.vocabulary is not None:
        v = plan.vocabulary
        lines.append(f"Vocabulary: {v.vocab_size:,} ids ({v.kind}), pad {v.pad_id}, end {v.eos_id}.")
    return "\n".join([*lines, *(f"Note: {note}" for note in plan.notes)])


def next_steps(plan: Plan, directory) -> str:
    """Commands to go on with."""
    lines = [f"Written: {directory}. Next:"]
    if plan.vocabulary is not None:
        lines.append(f"  python -m famx.chat --checkpoint {directory}")
    lines.append(
        "  python -m famx.train --gin_file=gin_configs/runs/finetune.gin"
        f" --gin_file={directory}/model.gin \\\n"
        f"      --gin.INITIAL_CHECKPOINT_PATH=\"'{directory}'\" ..."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    gin_utils.run(main, gin_flags=False)
