"""Directories of trained models, written as a training run writes them."""

import os
import pathlib

import jax.numpy as jnp
import optax

from famx.data.vocabularies import Vocabulary, save_vocabulary
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.identity import check_same_model
from famx.models import DecoderModel
from famx.training.step import TrainState


def write_model_dir(
    directory: str | os.PathLike,
    model: DecoderModel,
    params,
    vocabulary: Vocabulary | None,
    step: int = 1,
) -> str:
    """Writes model.json, vocabulary.json (unless None) and checkpoint_<step>; returns `directory`."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    check_same_model(directory, model.describe())
    if vocabulary is not None:
        save_vocabulary(vocabulary, directory)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = TrainState(jnp.int32(step), params, optimizer.init(params))
    data = {"feed": {"step": step}, "pending": []}
    with Checkpointer(directory, keep=None, async_=False) as checkpointer:
        checkpointer.save(step, state.to_checkpoint(), data, force=True)
    return str(directory)
