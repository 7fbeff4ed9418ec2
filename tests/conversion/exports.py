"""Imported models with drawn weights, for tests of the export."""

import json

import numpy as np
from flax.traverse_util import unflatten_dict
from reference_models import CONFIGS, draw, is_gemma

from famx.conversion import families
from famx.conversion.writer import leaf_shapes
from famx.memories import Fam
from famx.model_dir.loading import TrainedModel
from famx.models import DecoderModel
from famx.modules import Decoder
from famx.modules.memory import of_memory

MEMORY = {"block_size": 8, "memory_segments": 3, "memory": Fam(2, positions="float")}


def tree(hf, config, read):
    """Parameters from the tensors that `read(name)` returns."""
    leaves = {}
    for tensor in families.tensors(hf, config):
        leaves.setdefault(tensor.path, []).append(tensor.to_ours(read(tensor.name)))
    stack = lambda path, arrays: np.stack(arrays) if path[0] == "layers" else arrays[0]
    return unflatten_dict({path: stack(path, arrays) for path, arrays in leaves.items()})


def imported(name, tmp_path, dtype=np.float32, vocabulary=None, **memory):
    """An imported model with drawn weights and its `source/`."""
    hf = CONFIGS[name]
    config = families.decoder_config(hf, **{**MEMORY, **memory})
    shapes = {tensor.name: tensor.shape for tensor in families.tensors(hf, config)}
    read = lambda name: draw(name, shapes[name], is_gemma(hf)).astype(dtype)
    params = tree(hf, config, read)
    rng = np.random.default_rng(0)
    for path, leaf in leaf_shapes(config).items():
        if of_memory("/".join(path)):
            array = rng.standard_normal(leaf.shape).astype(np.float32)
            places = params
            for name in path[:-1]:
                places = places.setdefault(name, {})
            places[path[-1]] = np.abs(array) + 0.5 if path[-1] == "rms" else array
    source = tmp_path / "model" / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(hf))
    model = DecoderModel(Decoder(config), vocabulary)
    return TrainedModel(model, params, 7, source.parent / "checkpoint_7")
