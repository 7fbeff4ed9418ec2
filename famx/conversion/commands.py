"""Commands of `famx.convert` and `famx.export`: parsing of settings, import and export, reports."""

import ast
import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence

from famx.base.errors import ConfigError
from famx.base.files import as_path
from famx.base.gin_checks import nearest
from famx.base.progress import ByteProgress, Progress
from famx.base.text import byte_size
from famx.base.values import check_arguments
from famx.conversion import exporting
from famx.conversion.importing import Plan, check_destination, plan_import, write_model
from famx.conversion.sources import open_source
from famx.lora import adapter_directory
from famx.model_dir.identity import split_checkpoint
from famx.model_dir.loading import check_model, load_model
from famx.models.inputs import check_reads_text
from famx.models.memory_start import MemoryStart
from famx.modules import DecoderConfig
from famx.modules.config import COMPUTATION_FIELDS, MEMORY_FIELDS
from famx.modules.memory import Memory
from famx.modules.memory import from_dict as memory_from_dict

_FIELDS = (*MEMORY_FIELDS, *COMPUTATION_FIELDS)  # fields that an import may set
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def convert(
    path: str,
    directory: str,
    fields: Mapping[str, object] | None = None,
    mesh: Mapping[str, int] | None = None,
    tokenizer: str | None = None,
    pad_id: int | None = None,
    start: MemoryStart = MemoryStart(),
    seed: int = 0,
) -> Plan:
    """Imports a pretrained model, and prints what was imported and what to do next.

    Args:
      path: model to import, see `open_source`.
      directory: `MODEL_DIR` to write, see `write_model`.
      fields: fields of DecoderConfig for the memory and the computation.
      mesh, tokenizer, pad_id: see `plan_import`.
      start, seed: see `write_model`.

    Returns:
      The import that was carried out.

    Raises:
      ConfigError: the model or a setting is not valid (raised before anything is written), or writing
        failed.
    """
    check_destination(directory)
    with ByteProgress("checksum", keep_bar=False) as progress:
        source = open_source(path, progress.show)
    plan = plan_import(source, fields, mesh, tokenizer, pad_id)
    print(describe(plan), flush=True)
    try:
        with ByteProgress("import", plan.num_bytes, last_line=True) as progress:
            directory = write_model(plan, directory, start, seed, progress.add)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written: {error.strerror or error}. The same command starts over."
        ) from error
    print(next_steps(plan, directory), flush=True)
    return plan


def export_checkpoint(
    checkpoint: str,
    directory: str,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    source: str | None = None,
    adapter: str | None = None,
    memory: bool = True,
) -> None:
    """Exports a checkpoint for transformers, and prints what was written.

    Args:
      checkpoint: `MODEL_DIR` or `MODEL_DIR/checkpoint_<step>`.
      directory: directory to write; missing or empty.
      dtype: weight dtype of the files; None: that of training.
      max_shard_size: maximum size of a weight file, see `parse_size`.
      source: directory with config.json and tokenizer of the original model, see `exporting.export`.
      adapter: saved adapter to merge, see `famx.model_dir.loading.load_model`.
      memory: whether the memory is written, see `exporting.export`.

    Raises:
      ConfigError: the checkpoint or a setting is not valid; known before the weights are read where
        possible.
    """
    size = parse_size(max_shard_size)
    exporting.check_destination(directory)
    if source and not (as_path(source).expanduser() / "config.json").is_file():
        raise ConfigError(f"There is no config.json in --source {source}.")
    check_reads_text(check_model(split_checkpoint(checkpoint)[0]), "Exports", alone=True)
    trained = load_model(checkpoint, adapter=adapter)
    run = adapter and adapter_directory(adapter).absolute().parent  # MODEL_DIR/adapter
    with Progress("export", unit="B", keep_bar=False) as progress:
        done = exporting.export(
            trained, directory, dtype, size, source, progress.add, memory, run
        )
    files = f"{len(done.files)} files" if len(done.files) > 1 else done.files[0]
    print(
        f"{done.directory}: {done.architecture}, step {trained.step}, {done.num_bytes:,} bytes in {files}"
    )
    for note in done.notes:
        print(f"Note: {note}")


# --------------------------------------------------------------------------- settings


def read_fields(settings: Sequence[str], memory: str | None = None) -> dict[str, object]:
    """Parses settings into fields of DecoderConfig.

    Args:
      settings: texts `FIELD=VALUE`.
      memory: the field `memory`, see `read_memory`; None: not among the fields.

    Raises:
      ConfigError: a field does not exist or belongs to the pretrained model, or a value has the wrong
        type.
    """
    known = {field.name: field.default for field in dataclasses.fields(DecoderConfig)}
    fields: dict[str, object] = {} if memory is None else {"memory": read_memory(memory)}
    for setting in settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not text:
            raise ConfigError(f"--set={setting} sets nothing: write it as --set=FIELD=VALUE.")
        if name == "memory":
            raise ConfigError(f"--set={setting}: the memory has a flag of its own, --memory=KIND.")
        if name not in _FIELDS:
            what = "belongs to the pretrained model" if name in known else "is no field of a decoder"
            raise ConfigError(f"--set={setting}: {name} {what}.{nearest(name, _FIELDS)}")
        fields[name] = _literal(text)
        _check_type(f"--set={setting}", name, fields[name], known[name])
    return fields


def read_memory(text: str) -> Memory:
    """Parses a memory such as `fam` or `fam:length=64,update=gated`.

    Raises:
      ConfigError: there is no such kind of memory, or it has no such field.
    """
    kind, _, settings = text.partition(":")
    fields: dict[str, object] = {"kind": kind.strip()}
    for setting in filter(None, re.split(r",(?![^(]*\))", settings)):  # but for commas within ( )
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise ConfigError(f"--memory={text}: {setting} sets nothing, write it as FIELD=VALUE.")
        fields[name] = _literal(value)
    try:
        memory = memory_from_dict(fields)
        check_arguments(type(memory), fields)  # a class of one's own may not be `checked`
    except ValueError as error:
        raise ConfigError(f"--memory={text}: {error}") from error
    return memory


def _check_type(setting: str, name: str, value: object, default: object) -> None:
    """Raises ConfigError unless `value` has the type of `default`; None stands for an optional int."""
    wanted = {float: (int, float), type(None): (int, type(None))}.get(type(default), type(default))
    if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
        example = "4 or None" if default is None else repr(default)
        raise ConfigError(f"{setting}: {name} takes a value such as {example}, not {value!r}.")


def _literal(text: str) -> object:
    """Value of a Python literal, or the text itself if it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_mesh(text: str) -> dict[str, int]:
    """Parses a mesh such as `fsdp=8,tensor=2` into sizes by axis; ConfigError if it cannot be parsed."""
    sizes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if not size.strip().isdecimal():
            raise ConfigError(f"--mesh={text} is not understood: write it as --mesh=fsdp=8,tensor=2.")
        sizes[name.strip()] = int(size)
    return sizes


def parse_size(text: str) -> int:
    """Parses a size such as "5GB" or "500 MB" into bytes; ConfigError if it cannot be parsed."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip(), re.IGNORECASE)
    unit = ((match and match[2]) or "").upper()
    size = int(float(match[1]) * _UNITS.get(unit, 1)) if match else 0
    if size < 1:
        raise ConfigError(f"--max_shard_size {text} is not a size: write for example 5GB or 500MB.")
    return size


# --------------------------------------------------------------------------- reports


def describe(plan: Plan) -> str:
    """Text about an import: sizes, vocabulary, and notes for the user."""
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
    """Commands that use the imported model."""
    lines = [f"Written: {directory}. Next:"]
    if plan.vocabulary is not None:
        lines.append(f"  famx chat --checkpoint {shlex.quote(str(directory))}")
    model, path = shlex.quote(f"{directory}/model.gin"), shlex.quote(str(directory))
    lines.append(f"  famx train finetune {model} --gin.INITIAL_CHECKPOINT_PATH={path} ...")
    return "\n".join(lines)
