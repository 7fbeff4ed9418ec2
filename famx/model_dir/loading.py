"""A trained model from its directory: what reading, writing, answering and evaluating begin with."""

import dataclasses
import hashlib
import json
import pathlib
import re
import warnings
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from famx import mesh as partitioning
from famx.base.errors import ConfigError
from famx.data.vocabularies import load_vocabulary
from famx.lora import adapter_memory, combine, load_adapter, merged
from famx.lora.adapters import ADAPTERS, SCALE
from famx.model_dir.checkpoints import Checkpointer, differing_fields, read_model_config
from famx.models import DecoderModel
from famx.modules import Decoder, DecoderConfig
from famx.modules.config import COMPUTATION_FIELDS, MEMORY_FIELDS

_SAMPLES = 1024  # values of each parameter that its fingerprint covers


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model with its weights.

    Attributes:
      model: the definition, its vocabulary included.
      params: the decoder's parameters, on the device.
      step: training steps that they have seen.
      directory: of the checkpoint.
    """

    model: DecoderModel
    params: Any
    step: int
    directory: pathlib.Path


def load_model(
    checkpoint: str, model: DecoderModel | None = None, adapter: str | None = None
) -> TrainedModel:
    """Loads weights and vocabulary, and the model itself unless it is given.

    Adapters, those of the checkpoint and those of the file, are merged into the weights.

    Args:
      checkpoint: a `MODEL_DIR`, whose newest checkpoint is taken, or one `MODEL_DIR/checkpoint_<step>`.
      model: what the checkpoint must hold; None: what the directory says that it holds.
      adapter: directory of a saved adapter for this model (`famx.lora.save_adapter`), or None.

    Raises:
      ConfigError: there is no such checkpoint, it holds another model, its vocabulary is damaged, or
        the adapter does not fit it.
    """
    directory, step = split_checkpoint(checkpoint)
    with Checkpointer(directory, read_only=True) as checkpointer:
        step = checkpointer.find(step)
        model = check_model(directory, model)
        step, params = restore_params(checkpointer, model, step)
    trained = TrainedModel(model, params, step, directory / f"checkpoint_{step}")
    return trained if adapter is None else _with_adapter(trained, adapter)


def _with_adapter(trained: TrainedModel, adapter: str) -> TrainedModel:
    """The model with the adapters merged, and with the memory that they were trained with."""
    config, memory = trained.model.config, adapter_memory(adapter)
    unknown = ", ".join(sorted(set(memory) - set(MEMORY_FIELDS)))
    if unknown:
        raise ConfigError(f"The adapter {adapter} has a memory of another version of famx: {unknown}.")
    model = DecoderModel(
        Decoder(dataclasses.replace(config, **memory)), trained.model.vocabulary
    )
    base = {name: leaf for name, leaf in trained.params.items() if name != "fam"}
    abstract = nn.unbox(model.abstract_params())
    adapters, lora = load_adapter(adapter, abstract, weights_fingerprint(trained.params))
    if "fam" in abstract and "fam" not in adapters:
        base["fam"] = trained.params.get("fam")
        if base["fam"] is None or base["fam"].shape != abstract["fam"].shape:
            raise ConfigError(f"The adapter {adapter} has no memory prompt, and the base none that fits.")
    params = jax.jit(lambda tree: merged(tree, lora))(combine(base, adapters))
    return dataclasses.replace(trained, model=model, params=params)


def split_checkpoint(checkpoint: str) -> tuple[pathlib.Path, int | None]:
    """`(MODEL_DIR, step)` of a path to either; the step is None for a `MODEL_DIR`.

    Raises:
      ConfigError: there is no such directory.
    """
    path = pathlib.Path(checkpoint).expanduser().absolute()
    found = re.fullmatch(r"checkpoint_(\d+)", path.name)
    directory, step = (path.parent, int(found[1])) if found else (path, None)
    if not directory.is_dir():
        raise ConfigError(f"There is no checkpoint {checkpoint}: {directory} is not a directory.")
    return directory, step


def check_model(directory: pathlib.Path, model: DecoderModel | None = None) -> DecoderModel:
    """The model of a `MODEL_DIR` with its vocabulary, after a comparison with `model` if given."""
    # The backend that computed attention there may not exist here.
    fields = {**read_model_config(directory), "attention_backend": "auto"}
    try:
        noted = DecoderModel.from_description(fields)
    except (TypeError, ValueError) as error:  # a field or a registered update that is not known here
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{directory} holds a model that is not known here: {error}") from error
    model = dataclasses.replace(noted if model is None else model, lora=noted.lora)
    differing = differing_fields(noted.describe(), model.describe())
    if differing:
        raise ConfigError(
            f"{directory} holds another model, differing in {differing}: give the model that was"
            " trained, or leave it out, and the checkpoint's own is taken."
        )
    if model.vocabulary is None and (directory / "vocabulary.json").exists():
        model = dataclasses.replace(model, vocabulary=load_vocabulary(directory))
    return model


def restore_params(checkpointer: Checkpointer, model: DecoderModel, step: int | None = None):
    """`(step, params)` of a checkpoint (None: the newest), placed on the mesh of `make_mesh()`.

    The parameters are those that `model.module` reads with, adapters and int8 kernels merged; their
    dtypes are the checkpoint's.
    """
    step = checkpointer.find(step)
    boxed = model.abstract_params()
    mesh, rules = partitioning.make_mesh(), partitioning.rules()
    shardings = flatten_dict(partitioning.logical_to_sharding(boxed, mesh, rules))
    stored = {path[1:]: x for path, x in checkpointer.leaves(step).items() if path[0] == "target"}
    wanted = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, stored.get(path, leaf).dtype, sharding=shardings[path]
        )
        for path, leaf in flatten_dict(nn.unbox(boxed)).items()
    }
    whole = NamedSharding(mesh, PartitionSpec())
    for path in stored.keys() - wanted.keys():
        if path[-1] == SCALE:
            wanted[path] = jax.ShapeDtypeStruct(stored[path].shape, stored[path].dtype, sharding=whole)
    tree, _, step = checkpointer.restore(step, {"target": unflatten_dict(wanted)}, partial=True)
    params = tree["target"]
    if any(path[-1] in (*ADAPTERS, SCALE) for path in wanted):
        with warnings.catch_warnings():  # what is merged leaves no array to reuse
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            params = jax.jit(model.merged, donate_argnums=0)(params)
    return step, params


def load_pretrained(checkpoint: str, model: DecoderModel) -> tuple[dict[str, Any], list[str]]:
    """Parameters for `model` from the checkpoint of one that differs in its memory at most.

    The memory's prompt is left out where the checkpoint has none, or one of another length.

    Args:
      checkpoint: a `MODEL_DIR` (its newest checkpoint) or one `MODEL_DIR/checkpoint_<step>`.
      model: what is to begin from it.

    Returns:
      The tree, placed as `restore_params` places it, and sentences that say what is left out.

    Raises:
      ConfigError: there is no such checkpoint, or the models differ in more.
    """
    trained = load_model(checkpoint)
    there, here = trained.model.config, model.config
    plain = lambda config: {k: v for k, v in config.to_dict().items() if k not in MEMORY_FIELDS}
    differing = differing_fields(plain(there), plain(here))
    if differing:
        raise ConfigError(
            f"INITIAL_CHECKPOINT_PATH {checkpoint} holds another model, differing in {differing}: give"
            f" --gin_file={trained.directory.parent}/model.gin if it is there, or set these fields."
        )
    params, notes = dict(trained.params), []
    prompt = lambda config: (config.fam_length, config.fam_start)
    if "fam" in params and prompt(there) != prompt(here):
        del params["fam"]
    if here.fam_length and "fam" not in params:
        notes.append("The memory's prompt begins anew: the checkpoint has none of this length.")
    return params, notes


def model_fingerprint(config: DecoderConfig, params) -> str:
    """Hex digest that tells models apart: by what changes their numbers, and by their weights.

    Of each parameter evenly spaced values are taken, so that a large model costs no more.
    """
    fields = {k: v for k, v in config.to_dict().items() if k not in COMPUTATION_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    return _digest(digest, params)


def weights_fingerprint(params) -> str:
    """Hex digest that tells weights apart, whatever memory reads with them; see `model_fingerprint`."""
    return _digest(hashlib.sha256(), {name: leaf for name, leaf in params.items() if name != "fam"})


def _digest(digest, params) -> str:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        flat = leaf.reshape(-1)
        sample = np.asarray(flat[:: -(-flat.size // _SAMPLES)])
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {sample.dtype}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()
