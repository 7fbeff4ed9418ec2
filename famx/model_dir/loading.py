"""Loads a trained model, or its weights alone, from its directory."""

import dataclasses
import pathlib
import warnings
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from famx.base.distributed import on_host
from famx.base.errors import ConfigError
from famx.base.text import some
from famx.base.values import SettingError
from famx.base.waiting import waiting
from famx.data.vocabularies import load_vocabulary
from famx.lora import adapter_memory, check_continued, combine, load_adapter, merged
from famx.lora.adapters import ADAPTERS, SCALE
from famx.mesh import logical_to_sharding, make_mesh, make_rules, without_boxes
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.identity import (
    differing_fields,
    read_model_config,
    split_checkpoint,
    split_memory,
    weights_fingerprint,
)
from famx.models import DecoderModel
from famx.models.description import check_description
from famx.models.memory_start import MemoryStart
from famx.modules import Decoder, DecoderConfig
from famx.modules.config import MEMORY_FIELDS
from famx.modules.memory import is_measured, is_prompt


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model with its weights.

    Attributes:
      model: the definition, with its vocabulary.
      params: the decoder's parameters, placed on the mesh of `make_mesh()`.
      step: number of training steps before the checkpoint.
      directory: directory of the checkpoint.
    """

    model: DecoderModel
    params: Any
    step: int
    directory: pathlib.Path


def load_model(
    checkpoint: str, model: DecoderModel | None = None, adapter: str | None = None
) -> TrainedModel:
    """Load weights and vocabulary, and the model definition unless it is given.

    Adapters of the checkpoint, and those of `adapter`, are merged into the weights.

    Args:
      checkpoint: a `MODEL_DIR`, whose newest checkpoint is loaded, or one `MODEL_DIR/checkpoint_<step>`.
      model: definition that the checkpoint must hold; None: the one in the directory's model.json.
      adapter: directory of a saved adapter for this model (`famx.lora.save_adapter`), or None.

    Raises:
      ConfigError: the checkpoint does not exist or holds another model, its vocabulary is damaged, or
        the adapter does not fit it.
    """
    directory, step = split_checkpoint(checkpoint)
    with Checkpointer(directory, read_only=True) as checkpointer:
        step = checkpointer.find(step)
        model = check_model(directory, model)
        step, params = restore_params(checkpointer, model, step)
    trained = TrainedModel(model, params, step, directory / f"checkpoint_{step}")
    return trained if adapter is None else with_adapter(trained, adapter)


def with_adapter(trained: TrainedModel, adapter: str) -> TrainedModel:
    """The model with a saved adapter merged into its weights, and the memory that it was trained with.

    Raises:
      ConfigError: there is no such adapter, or it does not fit.
    """
    model = model_of_adapter(trained.model, adapter)
    base, prompt = split_memory(trained.params)
    abstract = without_boxes(model.abstract_params())
    adapters, lora = load_adapter(adapter, abstract, weights_fingerprint(trained.params))
    wanted = split_memory(abstract)[1]
    if flatten_dict(split_memory(adapters)[1]).keys() != flatten_dict(wanted).keys():
        if not _same_shapes(prompt, wanted):
            raise ConfigError(
                f"The adapter {adapter} has no parameters of its memory, and the base none that fit."
            )
        base = combine(base, prompt)
    params = jax.jit(lambda tree: merged(tree, lora))(combine(base, adapters))
    return dataclasses.replace(trained, model=model, params=params)


def model_of_adapter(model: DecoderModel, adapter: str) -> DecoderModel:
    """`model` with the memory that a saved adapter was trained with, and without adapters of its own.

    Raises:
      ConfigError: there is no such adapter, or its memory is not known here.
    """
    memory = adapter_memory(adapter)
    unknown = ", ".join(sorted(set(memory) - set(MEMORY_FIELDS)))
    if unknown:
        raise ConfigError(f"The adapter {adapter} has a memory of another version of famx: {unknown}.")
    check_description(memory, f"The memory of the adapter {adapter}")
    try:
        config = model.config.with_fields(memory)
    except (TypeError, ValueError) as error:  # a kind of memory, or a field of it, that is not known here
        raise ConfigError(f"The adapter {adapter} cannot be used: {error}") from error
    return DecoderModel(Decoder(config), model.vocabulary)


def check_model(directory: pathlib.Path, model: DecoderModel | None = None) -> DecoderModel:
    """The model of a `MODEL_DIR` with its vocabulary, after a comparison with `model` if given."""
    # The attention backend of the training may not exist on this machine.
    fields = {**read_model_config(directory), "attention_backend": "auto"}
    try:
        stored = DecoderModel.from_description(fields)
    except (TypeError, ValueError) as error:  # a field, or a kind of memory, that is not known here
        if isinstance(error, ConfigError) and not isinstance(error, SettingError):
            raise
        raise ConfigError(f"{directory} holds a model that is not known here: {error}") from error
    model = dataclasses.replace(stored if model is None else model, lora=stored.lora)
    differing = differing_fields(stored.describe(), model.describe())
    if differing:
        raise ConfigError(
            f"{directory} holds another model, differing in {differing}: give the model that was"
            " trained, or none, to use the model of the checkpoint."
        )
    if model.vocabulary is None and (directory / "vocabulary.json").exists():
        model = dataclasses.replace(model, vocabulary=load_vocabulary(directory))
    return model


def restore_params(checkpointer: Checkpointer, model: DecoderModel, step: int | None = None):
    """Restore the parameters of a checkpoint, placed on the mesh of `make_mesh()`.

    Args:
      checkpointer: checkpoints of a `MODEL_DIR`.
      model: definition whose parameters they are.
      step: step of the checkpoint; None: the newest.

    Returns:
      `(step, params)`: parameters that `model.module` can apply, with adapters and int8 kernels merged,
      in the dtypes of the checkpoint.
    """
    step = checkpointer.find(step)
    boxed = model.abstract_params()
    mesh, rules = make_mesh(), make_rules()
    shardings = flatten_dict(logical_to_sharding(boxed, mesh, rules))
    stored = {path[1:]: x for path, x in checkpointer.leaves(step).items() if path[0] == "target"}
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, stored.get(path, leaf).dtype, sharding=shardings[path])
        for path, leaf in flatten_dict(without_boxes(boxed)).items()
    }
    replicated = NamedSharding(mesh, PartitionSpec())
    for path in stored.keys() - wanted.keys():
        if path[-1] == SCALE:
            leaf = stored[path]
            wanted[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)
    with waiting("Loading the weights", str(checkpointer.model_dir)):
        tree, _, step = checkpointer.restore(step, {"target": unflatten_dict(wanted)}, partial=True)
    params = tree["target"]
    if any(path[-1] in (*ADAPTERS, SCALE) for path in wanted):
        with warnings.catch_warnings():  # merging leaves donated arrays without an output to reuse them
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            params = jax.jit(model.merged, donate_argnums=0)(params)
    return step, params


def load_initial_adapter(
    adapter: str, model: DecoderModel, start: MemoryStart = MemoryStart()
) -> dict[str, Any]:
    """Parameters of a saved adapter for a new run of `model`, whose adapters begin with them.

    Args:
      adapter: directory of the adapter.
      model: definition of the run, with adapters.
      start: how the memory starts.

    Returns:
      The adapters, the parameters of the memory and the norms that were trained, numpy float32. Call
      `famx.lora.check_base` once the base is loaded.

    Raises:
      ConfigError: there is no such adapter, it is damaged or does not fit, or `start` would replace the
        prompt that it has.
    """
    check_continued(adapter, model.lora)
    abstract = without_boxes(model.abstract_params())
    adapters, _ = load_adapter(adapter, abstract)
    paths = lambda tree: {p for p in flatten_dict(tree, sep="/") if p.endswith(ADAPTERS)}
    differing = sorted(paths(adapters) ^ paths(abstract))
    if differing:
        raise ConfigError(
            f"The adapter {adapter} and the run's adapters are not of the same projections, one of them"
            f" lacks {some(differing)}: set Lora.targets to those of the adapter."
        )
    if start.prompt is not None and any(map(is_prompt, flatten_dict(adapters, sep="/"))):
        raise ConfigError(
            f"PROMPT={start.prompt!r} would replace the prompt of the adapter {adapter}: leave it out."
        )
    return adapters


def load_pretrained(
    checkpoint: str,
    model: DecoderModel,
    start: MemoryStart = MemoryStart(),
    seed: int = 0,
    known: Collection[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Parameters for a new run of `model`, from a checkpoint that may differ in its memory.

    Parameters of the memory are left out if the checkpoint has none of their kind and shapes, and
    `start` makes none of them.

    Args:
      checkpoint: a `MODEL_DIR` (its newest checkpoint) or one `MODEL_DIR/checkpoint_<step>`.
      model: definition of the run.
      start: how prompts start, and measured parameters that the checkpoint does not have.
      seed: seed of the draw of prompts.
      known: paths of the memory's parameters that the run has from elsewhere; they are left out.

    Returns:
      The parameters, placed as by `restore_params`, and sentences for the user about omitted ones.

    Raises:
      ConfigError: the checkpoint does not exist, the models differ in other fields, or the memory cannot
        start like that.
    """
    trained = load_model(checkpoint)
    stored, config = trained.model.config, model.config
    plain = lambda config: {k: v for k, v in config.to_dict().items() if k not in MEMORY_FIELDS}
    differing = differing_fields(plain(stored), plain(config))
    if differing:
        raise ConfigError(
            f"INITIAL_CHECKPOINT_PATH {checkpoint} holds another model, differing in {differing}: give"
            f" --gin_file={trained.directory.parent}/model.gin if it exists, or set these fields."
        )
    rest, memory = split_memory(trained.params)
    memory = flatten_dict(memory, sep="/") if stored.memory.kind == config.memory.kind else {}
    wanted = flatten_dict(split_memory(without_boxes(model.abstract_params()))[1], sep="/")
    wanted = {path: x for path, x in wanted.items() if path not in known}
    memory = {path: x for path, x in memory.items() if path in wanted and x.shape == wanted[path].shape}
    made, notes = _started(trained, config, wanted, memory, start, seed), []
    missing = sorted(wanted.keys() - memory.keys())
    if missing:
        which = f", {some(missing)}," if memory else ""
        notes.append(f"The memory's parameters{which} are initialised: the checkpoint has none that fit.")
    return combine(rest, unflatten_dict(memory | made, sep="/")), notes


def _started(
    trained: TrainedModel, config: DecoderConfig, wanted, memory, start: MemoryStart, seed: int
) -> dict[str, np.ndarray]:
    """What `start` makes of the parameters `wanted` of a memory, by path; `memory` is there already."""
    params = trained.params
    table, vocabulary = _Rows(params["embedding"]), trained.model.vocabulary
    if start.prompt is not None and not any(map(is_prompt, wanted)):
        kind = config.memory.kind
        raise ConfigError(f"The prompt cannot start as {start.prompt!r}: the memory {kind!r} has none.")
    starts = lambda path: is_measured(path) and path not in memory or is_prompt(path) and start.prompt
    shapes = {path: leaf.shape for path, leaf in wanted.items() if starts(path)}
    of_layer = lambda i: jax.tree.map(lambda x: on_host(x[i]), split_memory(params)[0]["layers"])
    layers = lambda: map(of_layer, range(config.num_layers))
    return start.parameters(config, shapes, seed, lambda: table, vocabulary, layers)


class _Rows:
    """Rows of a table that may be sharded over processes, by their indices."""

    def __init__(self, table):
        self._table = table

    def __len__(self):
        return len(self._table)

    def __getitem__(self, rows):
        return on_host(self._table[rows])


def _same_shapes(a, b) -> bool:
    shapes = lambda tree: jax.tree.map(lambda leaf: tuple(leaf.shape), tree)
    return shapes(a) == shapes(b)
