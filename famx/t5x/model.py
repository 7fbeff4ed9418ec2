"""`DecoderModel` with what t5x alone asks of a model."""

import pathlib
from collections.abc import Mapping
from typing import Any

import flax.core
import jax
import seqio
from absl import logging
from flax.linen.partitioning import AxisMetadata
from flax.traverse_util import flatten_dict, unflatten_dict
from t5x import utils
from t5x.optimizers import OptimizerDef

from famx.base.errors import ConfigError
from famx.data.seqio import as_seqio_vocabulary, from_seqio_vocabulary
from famx.data.vocabularies import save_vocabulary
from famx.data.vocabularies.base import Vocabulary
from famx.model_dir.checkpointer import check_model_dir
from famx.model_dir.identity import check_same_model, split_checkpoint
from famx.model_dir.loading import check_model, load_pretrained
from famx.models import MEMORY_COLLECTION, DecoderModel
from famx.t5x.data import seqio_task
from famx.t5x.optimizers import OptaxOptimizer
from famx.training import state_passing
from famx.training.trainable import Trainable

_MEMORY_AXES = {"memory": ("layers", "fam", "embed"), "updates": (), "steps": ()}


class T5xModel(DecoderModel):
    """A model as t5x drives it.

    Args:
      model: what our engine trains too; None: what `checkpoint` holds.
      mixture_or_task_name: the data, whose vocabulary is the model's unless it has one.
      task_options: of a task of `famx.data`.
      optimizer: an optax transformation or an optimizer of t5x's; None to evaluate and infer.
      model_dir: where training saves; model and vocabulary are noted there, as our engine does.
      state_passing_mode: none or random; see `famx.training.state_passing`.
      random_state: settings of random state passing.
      random_seed: parameters start as in our engine; None: t5x draws them.
      checkpoint: a `MODEL_DIR`, or one `checkpoint_<step>` in it: what is evaluated, or begun from.
      trainable: what learns, see `famx.training.trainable`.
      frozen_dtype: None; t5x cannot train with narrow weights.

    Raises:
      ConfigError: with one sentence, if the settings do not fit.
    """

    def __init__(
        self,
        model: DecoderModel | None = None,
        mixture_or_task_name: str | None = None,
        task_options: Mapping[str, Any] | None = None,
        optimizer: Any = None,
        model_dir: str | None = None,
        state_passing_mode: str = "none",
        random_state: state_passing.RandomState | None = None,
        random_seed: int | None = None,
        checkpoint: str | None = None,
        trainable: str = "all",
        frozen_dtype: str | None = None,
    ):
        if model is None and checkpoint is None:
            raise ConfigError("MODEL is not set: add a model file such as gin_configs/models/tiny.gin.")
        if model is None or (checkpoint is not None and optimizer is None):
            model = check_model(split_checkpoint(checkpoint)[0], model)
        self.__dict__.update(vars(model))
        if state_passing_mode not in ("none", "random"):
            raise ConfigError(
                f"Under t5x STATE_PASSING is 'none' or 'random', not {state_passing_mode!r}:"
                " t5x carries no states from row to row. Train with famx.train for the others."
            )
        self.random_state = None
        if state_passing_mode == "random" and self.config.fam_length:
            self.random_state = random_state or state_passing.RandomState()
        if frozen_dtype is not None:
            raise ConfigError("Under t5x FROZEN_DTYPE is None: t5x differentiates every parameter.")
        self.random_seed, self.trainable = random_seed, Trainable(trainable)
        self.optimizer_def = optimizer
        if optimizer is not None:
            if trainable != "lora":
                self.lora = None
            self.trainable.check(self.abstract_params())
            if not isinstance(optimizer, OptimizerDef):
                self.optimizer_def = OptaxOptimizer(optimizer, self.trainable)
        if mixture_or_task_name is not None:
            self._set_vocabulary(seqio_task(mixture_or_task_name, task_options, checkpoint))
        if model_dir is not None:
            self._note(check_model_dir(model_dir))

    def _set_vocabulary(self, task_name: str) -> None:
        """Takes the task's vocabulary where the model has none; t5x wants one of SeqIO's kind."""
        vocabulary = seqio.get_mixture_or_task(task_name).output_features["targets"].vocabulary
        if vocabulary.vocab_size > self.config.vocab_size:
            raise ConfigError(
                f"The task's vocabulary has {vocabulary.vocab_size} tokens, the model's only"
                f" {self.config.vocab_size}: raise DecoderConfig.vocab_size."
            )
        own = self.output_vocabulary
        own = as_seqio_vocabulary(own) if isinstance(own, Vocabulary) else own
        if own not in (None, vocabulary):
            raise ConfigError(
                f"The vocabulary of the task {task_name} is not that of the model: give it to the task"
                " with TASK_OPTIONS, or take a task for that vocabulary."
            )
        self.input_vocabulary = self.output_vocabulary = vocabulary

    def _note(self, directory: pathlib.Path) -> None:
        check_same_model(directory, self.describe())
        vocabulary = self.output_vocabulary and from_seqio_vocabulary(self.output_vocabulary)
        if vocabulary is not None and jax.process_index() == 0:
            save_vocabulary(vocabulary, directory)

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        """Fresh variables without boxes; their logical axes are in `params_axes`, as t5x wants them."""
        if self.random_seed is not None:
            rng = jax.random.key(self.random_seed)
        variables = super().get_initial_variables(rng, input_shapes, input_types)
        boxed = flatten_dict(flax.core.unfreeze(variables["params"]))
        axes = {(*path[:-1], f"{path[-1]}_axes"): AxisMetadata(box.names) for path, box in boxed.items()}
        params = {path: box.value for path, box in boxed.items()}
        made = {"params": unflatten_dict(params), "params_axes": unflatten_dict(axes)}
        if MEMORY_COLLECTION in variables:
            made[MEMORY_COLLECTION] = variables[MEMORY_COLLECTION]
            made[f"{MEMORY_COLLECTION}_axes"] = {
                f"{name}_axes": AxisMetadata(names) for name, names in _MEMORY_AXES.items()
            }
        return flax.core.freeze(made)

    def loss_fn(self, params, batch, dropout_rng, flax_mutables=None):
        """As `DecoderModel.loss_fn`, without gradients for what does not learn."""
        if self.trainable.name != "all":
            flat = flatten_dict(flax.core.unfreeze(params), sep="/")
            for path in flat:
                if not self.trainable.learns(path):
                    flat[path] = jax.lax.stop_gradient(flat[path])
            params = unflatten_dict(flat, sep="/")
        return super().loss_fn(params, batch, dropout_rng, flax_mutables)


class Initializer(utils.TrainStateInitializer):
    """t5x's, but a run that begins takes its parameters from a checkpoint, as our engine does.

    The model may differ from the one there in its memory; steps and optimizer begin anew.
    """

    def __init__(self, *args, initial_checkpoint_path: str, **kwargs):
        """
        Args:
          initial_checkpoint_path: a `MODEL_DIR`, or one `MODEL_DIR/checkpoint_<step>`.
          *args, **kwargs: t5x's.
        """
        super().__init__(*args, **kwargs)
        self._initial, self._model = initial_checkpoint_path, kwargs["init_fn"].__self__

    def from_scratch(self, init_rng):
        """A fresh state whose parameters are those of the initial checkpoint."""
        state = super().from_scratch(init_rng)
        pretrained, notes = load_pretrained(self._initial, self._model)
        for note in notes:
            logging.info(note)
        place = lambda old, new: jax.device_put(new.astype(old.dtype), old.sharding)
        flat = flatten_dict(flax.core.unfreeze(state.params))
        taken = {path: place(flat[path], new) for path, new in flatten_dict(pretrained).items()}
        return state.replace_params(flax.core.freeze(unflatten_dict({**flat, **taken})))
