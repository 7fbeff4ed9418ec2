"""Import of a pretrained model into a MODEL_DIR: weights, vocabulary, configuration and gin file."""

import dataclasses
import functools
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from famx.base.errors import ConfigError
from famx.base.files import removed_if_unused, write_json, write_text
from famx.base.text import some
from famx.conversion import families
from famx.conversion.gin_file import model_gin
from famx.conversion.sources import CONFIG, SIDE_FILES
from famx.conversion.tensor_source import READABLE, Source
from famx.conversion.vocabulary import fitting_vocabulary
from famx.conversion.with_memory import is_memory_tensor, memory_tensors
from famx.conversion.writer import LeafPath, LeafShape, Pieces, leaf_shapes, write_checkpoint
from famx.data.vocabularies import save_vocabulary
from famx.data.vocabularies.tokenizer_files import FileVocabulary
from famx.memories import Fam
from famx.model_dir.checkpointer import check_model_dir
from famx.model_dir.identity import check_same_model
from famx.models.memory_start import MemoryStart
from famx.modules import Decoder, DecoderConfig
from famx.modules.memory import is_prompt, of_memory

# The memory of an import that names none. Of those that learnt with every seed it changes least what a
# model says before any training (docs/pretrained.md); `Fam()` is the paper's.
MEMORY = Fam(first_residual="ordinary")
_MARK = ".importing"  # file in a directory whose import is in progress or was interrupted


@dataclasses.dataclass(frozen=True)
class Plan:
    """An import that was checked but not yet written.

    Attributes:
      source: the pretrained model.
      config: config of the decoder that it becomes.
      tensors: the tensors to read and their places in the parameter tree.
      leaves: the arrays of the checkpoint.
      vocabulary: the model's vocabulary, or None.
      memory: the memory's parameters by path, as saved by an export; empty: they are drawn.
      notes: what the user should know, one sentence each.
    """

    source: Source
    config: DecoderConfig
    tensors: Sequence[families.Tensor]
    leaves: Mapping[LeafPath, LeafShape]
    vocabulary: FileVocabulary | None
    memory: Mapping[str, np.ndarray]
    notes: Sequence[str]

    @property
    def num_bytes(self) -> int:
        """Size of all arrays, uncompressed."""
        return sum(leaf.num_bytes for leaf in self.leaves.values())

    @property
    def num_parameters(self) -> int:
        """Number of elements of all arrays."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves.values())


def plan_import(
    source: Source,
    fields: Mapping[str, object] | None = None,
    mesh: Mapping[str, int] | None = None,
    tokenizer: str | os.PathLike | None = None,
    pad_id: int | None = None,
) -> Plan:
    """Check a source against the model that its config describes; reads no tensor but the memory's.

    The export of a famx model brings the settings and parameters of its memory; `fields` override the
    settings. Any other model gets `MEMORY`.

    Args:
      source: the pretrained model.
      fields: fields of DecoderConfig for memory and computation.
      mesh: sizes of the mesh axes that the arrays are chunked for.
      tokenizer: tokenizer file that replaces the source's.
      pad_id: padding id that replaces the tokenizer's; the first id beyond the model's adds a row of
        zeros.

    Raises:
      ConfigError: the architecture is not supported, tensors are missing, unexpected or of a wrong shape
        or type, or the vocabulary does not fit.
    """
    fields = {"memory": MEMORY, **source.memory_fields, **(fields or {})}
    config = families.decoder_config(source.config, **fields)
    tensors = families.tensors(source.config, config)
    check_tensors(source, tensors)
    vocabulary, notes = None, families.notes(source.config, config)
    file = tokenizer or source.tokenizer
    if file is not None:
        vocabulary = fitting_vocabulary(file, config.vocab_size, pad_id, source.end_ids)
        if vocabulary.vocab_size > config.vocab_size:
            config = dataclasses.replace(config, vocab_size=vocabulary.vocab_size)
    elif pad_id is not None:
        raise ConfigError(f"{source.name} has no tokenizer for --pad_id to apply to: add --tokenizer.")
    else:
        notes.append("There is no tokenizer: to read and write text, import with --tokenizer=FILE.")
    leaves = leaf_shapes(config, mesh)
    memory = _read_memory(source, leaves)
    if not memory and any(map(is_memory_tensor, source.tensors)):
        notes.append("The memory's parameters of the export are left out: they are for another memory.")
    return Plan(source, config, tensors, leaves, vocabulary, memory, notes)


def write_model(
    plan: Plan,
    directory: str | os.PathLike,
    start: MemoryStart = MemoryStart(),
    seed: int = 0,
    on_bytes: Callable[[int], None] | None = None,
) -> pathlib.Path:
    """Write a planned import; the checkpoint comes last, so that a partial import is no valid model.

    Args:
      plan: the import.
      directory: destination: missing, empty, or left by an interrupted import, whose files are removed.
      start: how the memory's parameters start. Without a `prompt` they are those of the plan, if it has
        some, or the prompt is of the begin-of-text token, if the vocabulary has one.
      seed: seed of the draw.
      on_bytes: called after each chunk with its size in bytes.

    Returns:
      The absolute path of the directory.

    Raises:
      ConfigError: the directory contains something else, the disk is too small, or the memory cannot
        start like that.
      OSError: the directory cannot be written.
    """
    directory = check_destination(directory)
    clear(directory)
    with removed_if_unused(directory):
        check_model_dir(directory, plan.num_bytes)
        pieces = _pieces(plan, start, seed)
        (directory / _MARK).touch()
    check_same_model(directory, plan.config.to_dict())
    write_text(directory / "model.gin", model_gin(plan.config, plan.source.name))
    if plan.vocabulary is not None:
        save_vocabulary(plan.vocabulary, directory)
    _keep_side_files(plan.source, directory / "source")
    write_checkpoint(directory, plan.leaves, pieces, on_bytes)
    (directory / _MARK).unlink()
    return directory


# --------------------------------------------------------------------------- tensors


def check_tensors(source: Source, tensors: Sequence[families.Tensor]) -> None:
    """Check that the source has exactly these tensors.

    Raises:
      ConfigError: it does not; the sentence names those that are missing, unexpected or of a wrong shape
        or type.
    """
    names_in_source = _by_standard_name(source)
    wanted = {tensor.name: tensor for tensor in tensors}
    both = [
        (tensor, source.tensors[names_in_source[name]])
        for name, tensor in wanted.items()
        if name in names_in_source
    ]
    problems = {
        "lacks": [name for name in wanted if name not in names_in_source],
        "has, beyond the model,": [
            name
            for name in names_in_source
            if name not in wanted and not is_memory_tensor(name)
            and not families.ignored(source.config, name)
        ],
        "has in another shape": [
            f"{tensor.name} ({_shape(info.shape)}, not {_shape(tensor.shape)})"
            for tensor, info in both
            if info.shape != tensor.shape
        ],
        "has in a type that is not read": [
            f"{tensor.name} ({info.dtype})" for tensor, info in both if info.dtype not in READABLE
        ],
    }
    faults = [f"{what} {len(names)}: {some(names)}" for what, names in problems.items() if names]
    if faults:
        raise ConfigError(
            f"The tensors of {source.name} are not those that its config.json asks for; it"
            f" {'; it '.join(faults)}."
        )


def _by_standard_name(source: Source) -> dict[str, str]:
    return {families.standard_name(name): name for name in source.tensors}


def _read_memory(
    source: Source, leaves: Mapping[LeafPath, LeafShape]
) -> dict[str, np.ndarray]:
    """The memory's parameters by path, as the source has them; empty if they do not fit the leaves."""
    wanted = memory_tensors({path: leaf.shape for path, leaf in leaves.items()})
    shapes = {name: info.shape for name, info in source.tensors.items() if is_memory_tensor(name)}
    if shapes != {tensor.name: tensor.shape for tensor in wanted}:
        return {}
    arrays: dict[str, list] = {}
    for tensor in wanted:
        arrays.setdefault("/".join(tensor.path), []).append(source.read(tensor.name))
    whole = lambda path, parts: np.stack(parts) if path.startswith("layers/") else np.array(parts[0])
    return {path: whole(path, parts) for path, parts in arrays.items()}


def _pieces(plan: Plan, start: MemoryStart, seed: int) -> dict[LeafPath, Pieces]:
    name_in_source = _by_standard_name(plan.source)
    read = lambda name: plan.source.read(name_in_source[name])
    rows = plan.config.vocab_size

    def make(tensor: families.Tensor) -> np.ndarray:
        array = tensor.to_ours(read(tensor.name))
        if tensor.path == ("embedding",) and array.shape[0] < rows:
            return np.pad(array, [(0, rows - array.shape[0]), (0, 0)])
        if tensor.path == ("head",) and array.shape[1] < rows:
            return np.pad(array, [(0, 0), (0, rows - array.shape[1])])
        return array

    pieces: dict[LeafPath, list] = {}
    for tensor in sorted(plan.tensors, key=lambda tensor: tensor.layer or 0):
        pieces.setdefault(tensor.path, []).append((tensor.layer, functools.partial(make, tensor)))
    memory = dict(plan.memory)
    if not memory or start.prompt is not None:
        memory = draw_memory(plan, start, seed, make)
    for path, array in memory.items():
        pieces[tuple(path.split("/"))] = [(None, lambda array=array: array)]
    return pieces


def draw_memory(
    plan: Plan, start: MemoryStart, seed: int, make: Callable[[families.Tensor], np.ndarray]
) -> dict[str, np.ndarray]:
    """Make the memory's parameters, by path: as `start` says, the others as in a new model.

    Args:
      plan: the import.
      start: how prompts and measured parameters start.
      seed: seed of all draws.
      make: reads a tensor in our layout.

    Raises:
      ConfigError: the memory has no prompt that could start so, or the vocabulary cannot make it.
    """
    leaves = {"/".join(path): leaf.shape for path, leaf in plan.leaves.items()}
    shapes = {path: shape for path, shape in leaves.items() if of_memory(path)}
    has_prompt = any(map(is_prompt, shapes))
    if start.prompt is None and has_prompt and getattr(plan.vocabulary, "bos_id", None) is not None:
        start = dataclasses.replace(start, prompt="bos")
    if start.prompt not in (None, "normal") and not has_prompt:
        kind = plan.config.memory.kind
        raise ConfigError(f"--prompt={start.prompt}: the memory {kind!r} has no prompt.")
    of_embedding = next(tensor for tensor in plan.tensors if tensor.path == ("embedding",))
    embedding = functools.partial(make, of_embedding)
    layers = lambda: (_layer(plan, i, make) for i in range(plan.config.num_layers))
    drawn = start.parameters(plan.config, shapes, seed, embedding, plan.vocabulary, layers)
    rest = shapes.keys() - drawn.keys()
    if rest:
        # Under jit the compiler drops all other parameters, so the size of the model does not matter.
        @jax.jit
        def make(key):
            tokens = jnp.zeros((1, plan.config.block_size), jnp.int32)
            params = nn.unbox(Decoder(plan.config).init(key, tokens)["params"])
            return {path: flatten_dict(params, sep="/")[path] for path in rest}

        drawn |= {path: np.asarray(x, np.float32) for path, x in make(jax.random.key(seed)).items()}
    return drawn


def _layer(plan: Plan, index: int, make: Callable[[families.Tensor], np.ndarray]) -> dict:
    """The parameters of one layer, without those of the memory."""
    tensors = (tensor for tensor in plan.tensors if tensor.layer == index)
    return unflatten_dict({tensor.path[1:]: make(tensor) for tensor in tensors})


# --------------------------------------------------------------------------- the directory


def check_destination(directory: str | os.PathLike) -> pathlib.Path:
    """The absolute path of a destination that is missing, empty, or left by an interrupted import.

    Raises:
      ConfigError: it is none of these.
    """
    directory = pathlib.Path(directory).expanduser().absolute()
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file: choose another --to.")
    names = sorted(os.listdir(directory)) if directory.exists() else []
    if names and _MARK not in names:
        raise ConfigError(
            f"{directory} is not empty, it holds {some(names)}: choose another --to, or remove it."
        )
    return directory


def clear(directory: pathlib.Path) -> None:
    """Remove the files of an interrupted import; other files stay."""
    if not (directory / _MARK).exists():
        return
    shutil.rmtree(directory / "source", ignore_errors=True)
    for path in directory.glob("checkpoint_0*"):
        shutil.rmtree(path)
    for name in ("model.json", "model.gin", "vocabulary.json", "tokenizer.json", "tokenizer.model"):
        (directory / name).unlink(missing_ok=True)


def _keep_side_files(source: Source, folder: pathlib.Path) -> None:
    """Copy the small files of the source for a later export, with the `config.json` of its base."""
    folder.mkdir(exist_ok=True)
    origin = getattr(source, "directory", None)
    for name in SIDE_FILES if source.memory_fields else (CONFIG, *SIDE_FILES):
        if origin is not None and (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    if not (folder / CONFIG).exists():
        write_json(folder / CONFIG, source.config)


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
