"""The state that a new run begins with: initial values, or those of a checkpoint and a saved adapter."""

from collections.abc import Callable

import jax
from flax.traverse_util import flatten_dict

from famx.base.waiting import Announced
from famx.lora import check_base, combine
from famx.model_dir.identity import weights_fingerprint
from famx.model_dir.loading import TrainedModel, load_pretrained
from famx.training.run import Run
from famx.training.saving import RunWriter
from famx.training.session import OpenData
from famx.training.step import TrainState


def new_state(
    run: Run, data: OpenData, initialize: Callable, writer: RunWriter | None, notes: list[str]
) -> TrainState:
    """The initial state of a run.

    Args:
      run: a run that is `ready`.
      data: its data.
      initialize: the function that `famx.training.step.make_initializer` makes.
      writer: notes the checkpoint that the run begins from; None notes nothing.
      notes: list to which sentences about what was not taken from that checkpoint are added.

    Raises:
      ConfigError: the checkpoint or the adapter does not fit.
    """
    pretrained, loaded = {}, None
    if run.initial_checkpoint_path is not None:
        pretrained, load_notes = load_pretrained(
            run.initial_checkpoint_path, run.model, run.memory_start, run.random_seed,
            flatten_dict(data.adapter, sep="/"),
        )  # fmt: skip
        notes += load_notes
        if writer is not None:
            writer.note_base(run.initial_checkpoint_path, data.initial_dir, pretrained)
        if run.initial_adapter is not None:
            check_base(run.initial_adapter, weights_fingerprint(pretrained))
            pretrained = combine(pretrained, data.adapter)
        trained = TrainedModel(run.model, pretrained, 0, data.initial_dir)
        loaded = run.state_passing.load(trained)
    initialize = Announced(initialize, "the model's first values")
    return initialize(jax.random.key(run.random_seed), pretrained, loaded)
