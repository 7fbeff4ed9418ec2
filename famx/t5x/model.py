"""A `DecoderModel` with the interface of t5x's models."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import seqio
from absl import logging
from flax.linen.partitioning import AxisMetadata
from flax.traverse_util import flatten_dict, unflatten_dict
from t5x import utils
from t5x.optimizers import OptimizerDef

from famx.base.errors import ConfigError
from famx.data.seqio import FamFeatureConverter, begin_id, from_seqio_vocabulary
from famx.data.vocabularies import load_vocabulary, save_vocabulary
from famx.data.vocabularies.base import Vocabulary
from famx.decoding import Sampling
from famx.model_dir.checkpointer import check_model_dir
from famx.model_dir.identity import check_same_model, split_checkpoint
from famx.model_dir.loading import check_model, load_pretrained
from famx.models import Batch, DecoderModel
from famx.models.inputs import check_reads_text
from famx.t5x.data import seqio_task
from famx.t5x.metrics import as_t5x
from famx.t5x.optimizers import OptaxOptimizer, with_factor_rules
from famx.training.feeds import check_bos
from famx.training.state_passing import MUTABLES, RANDOM, Fresh, Random, StatePassing
from famx.training.trainable import Trainable


class T5xModel:
    """A model with the interface of t5x's models.

    Args:
      model: the model, as `famx.train` takes it; None: the model of `checkpoint`.
      mixture_or_task_name: the data; a model without a vocabulary takes that of the data.
      task_options: options of a task of `famx.data`.
      optimizer: an optax transformation or a t5x optimizer; None to evaluate and infer.
      model_dir: directory where training saves; model and vocabulary are written to it, as by
        `famx.train`.
      state_passing: `Fresh` or `Random`, see `famx.training.state_passing`.
      random_seed: seed of the initial parameters, with which they are those of `famx.train`; None: t5x
        draws them.
      checkpoint: a `MODEL_DIR`, or one `checkpoint_<step>` in it, to evaluate or to start from.
      trainable: which parameters are trained, without `frozen_dtype`: t5x differentiates every parameter.
      stages: stages of the run; must be empty.
      task_module: a module to import first, which registers tasks with SeqIO.
      sampling: how `predict` selects tokens; None: always the likeliest.
      num_decodes: number of continuations that are drawn of each prompt.
      return_all_decodes: whether a prediction has them all, the likeliest last, or the likeliest alone.

    Attributes:
      model: the `DecoderModel`; one that is trained has adapters only if `trainable` names "lora".
      input_vocabulary, output_vocabulary: SeqIO's vocabulary of the task, or the model's.
      optimizer_def: the optimizer for t5x.

    Raises:
      ConfigError: the settings do not fit together.
    """

    def __init__(
        self,
        model: DecoderModel | None = None,
        mixture_or_task_name: str | None = None,
        task_options: Mapping[str, Any] | None = None,
        optimizer: Any = None,
        model_dir: str | None = None,
        state_passing: StatePassing = Fresh(),
        random_seed: int | None = None,
        checkpoint: str | None = None,
        trainable: Trainable = Trainable(),
        stages: Sequence[Mapping[str, Any]] = (),
        task_module: str | None = None,
        sampling: Sampling | None = None,
        num_decodes: int = 1,
        return_all_decodes: bool = False,
    ):
        if model is None and checkpoint is None:
            raise ConfigError("MODEL is not set: add a model file such as gin_configs/models/tiny.gin.")
        if model is None or (checkpoint is not None and optimizer is None):
            model = check_model(split_checkpoint(checkpoint)[0], model)
        check_reads_text(model, "Runs under t5x", alone=True)
        if not isinstance(state_passing, (Fresh, Random)):
            raise ConfigError(
                f"Under t5x STATE_PASSING is 'none' or 'random', which {type(state_passing).__name__} is"
                " not: t5x carries no states from row to row. Train with famx.train for the others."
            )
        if stages:
            raise ConfigError("Under t5x STAGES is (): t5x has no stages. Train with famx.train instead.")
        if trainable.frozen_dtype is not None:
            raise ConfigError("Under t5x FROZEN_DTYPE is None: t5x differentiates every parameter.")
        if num_decodes > 1 and (sampling is None or sampling.temperature == 0):
            raise ConfigError(
                f"NUM_DECODES is {num_decodes}, but without a temperature all continuations are the same:"
                " set SAMPLING to @decoding.Sampling() and Sampling.temperature."
            )
        self.sampling, self.num_decodes = sampling, num_decodes
        self.return_all_decodes = return_all_decodes
        self.state_passing, self.random_seed, self.trainable = state_passing, random_seed, trainable
        self.optimizer_def = with_factor_rules(optimizer)
        if optimizer is not None:
            if not trainable.has_adapters:
                model = dataclasses.replace(model, lora=None)
            trainable.check(model.abstract_params())
            if not isinstance(optimizer, OptimizerDef):
                self.optimizer_def = OptaxOptimizer(optimizer, trainable)
        self.model = model
        self.input_vocabulary = self.output_vocabulary = model.vocabulary
        self._saved, self._begin = _known(model.vocabulary), getattr(model.vocabulary, "bos_id", 1)
        if mixture_or_task_name is not None:
            name = seqio_task(mixture_or_task_name, task_options, checkpoint, task_module)
            self._set_vocabulary(name, checkpoint)
        if model_dir is not None:
            self._note(check_model_dir(model_dir))

    def _set_vocabulary(self, task_name: str, checkpoint: str | None) -> None:
        """Sets SeqIO's vocabulary of the task, which must equal the model's and the checkpoint's."""
        vocabulary = seqio.get_mixture_or_task(task_name).output_features["targets"].vocabulary
        given = self.model.vocabulary
        if given is None and checkpoint is not None:
            given = check_model(split_checkpoint(checkpoint)[0]).vocabulary
        saved = from_seqio_vocabulary(vocabulary, _known(given))
        needed = max(vocabulary.vocab_size, 0 if saved is None else saved.vocab_size)
        if needed > (size := self.model.config.vocab_size):
            raise ConfigError(
                f"The task's vocabulary has {needed} tokens, the model's only"
                f" {size}: raise DecoderConfig.vocab_size."
            )
        if saved is None:
            logging.warning(
                "%s can neither be saved nor compared with a checkpoint's.", type(vocabulary).__name__
            )
            other = isinstance(given, seqio.Vocabulary) and given != vocabulary
        else:
            other = given is not None and _known(given) != saved
        if other:
            raise ConfigError(
                f"The vocabulary of the task {task_name} is not that of the model: give it to the task"
                " with TASK_OPTIONS, or take a task for that vocabulary."
            )
        self._saved, self._begin = saved, check_bos(begin_id(vocabulary), task_name)
        self.model = dataclasses.replace(self.model, vocabulary=vocabulary)
        self.input_vocabulary = self.output_vocabulary = vocabulary

    def _note(self, directory: pathlib.Path) -> None:
        check_same_model(directory, self.model.describe())
        if self._saved is None:
            return
        if (directory / "vocabulary.json").exists() and load_vocabulary(directory) != self._saved:
            raise ConfigError(
                f"MODEL_DIR {directory} holds a model with another vocabulary than the task's: choose"
                " another MODEL_DIR or a task for that vocabulary."
            )
        if jax.process_index() == 0:
            save_vocabulary(self._saved, directory)

    @property
    def FEATURE_CONVERTER_CLS(self):  # noqa: N802, t5x's name
        """SeqIO's feature converter for this model."""
        return functools.partial(
            FamFeatureConverter, bos_id=self._begin, pad_id=self.model.pad_id
        )

    @property
    def module(self):
        """The decoder, for t5x's table of parameters."""
        return self.model.module

    @property
    def config(self):
        """Sizes and options of the decoder."""
        return self.model.config

    # Variables.

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        """Initial variables without boxes; their logical axes are in `params_axes`, as t5x expects."""
        del input_shapes, input_types  # no parameter depends on them
        if self.random_seed is not None:
            rng = jax.random.key(self.random_seed)
        boxed = flatten_dict(self.model.init_params(rng))
        axes = {(*path[:-1], f"{path[-1]}_axes"): AxisMetadata(box.names) for path, box in boxed.items()}
        params = unflatten_dict({path: box.value for path, box in boxed.items()})
        made = {"params": params, "params_axes": unflatten_dict(axes)}
        if self._keeps_memory:
            made |= self.state_passing.initial(self.model, params)[MUTABLES]
            made[f"{RANDOM}_axes"] = self._kept_axes(made[RANDOM])
        return flax.core.freeze(made)

    @property
    def _keeps_memory(self) -> bool:
        return isinstance(self.state_passing, Random) and self.model.config.memory.exists

    def _kept_axes(self, kept):
        """Logical axes of the arrays that random state passing keeps, each under `<name>_axes`."""
        axes, memory = self.model.config.memory.axes(), kept["memory"]
        names = {"memory": jax.tree.map(lambda _, names: ("layers", *names), memory, axes)}
        names |= {"updates": (), "steps": ()}
        flat = flatten_dict({name: names[name] for name in kept})
        return unflatten_dict(
            {(*path[:-1], f"{path[-1]}_axes"): AxisMetadata(x) for path, x in flat.items()}
        )

    # Training.

    def loss_fn(self, params, batch: Batch, dropout_rng, flax_mutables=None):
        """t5x's training loss, without gradients for frozen parameters.

        With `flax_mutables` of random state passing, examples may start from the memory in them; without
        a random key they do not, and the memory is not updated.

        Returns:
          `(loss, metrics)`, or `(loss, (metrics, flax_mutables))` if `flax_mutables` is given.
        """
        if self.trainable.name != "all":
            flat = flatten_dict(flax.core.unfreeze(params), sep="/")
            for path in flat:
                if not self.trainable.learns(path):
                    flat[path] = jax.lax.stop_gradient(flat[path])
            params = unflatten_dict(flat, sep="/")
        state = self.model.initial_state(params, batch["decoder_input_tokens"].shape[0])
        passing = self.state_passing if self._keeps_memory and flax_mutables else Fresh()
        kept = {MUTABLES: flax_mutables}
        if dropout_rng is not None:
            state, dropout_rng = passing.start(kept, state, None, dropout_rng)
        loss, metrics, end = self.model.loss(params, batch, dropout_rng, state)
        if flax_mutables is None:
            return loss, as_t5x(metrics, batch["decoder_input_tokens"])
        end = None if dropout_rng is None else passing.end(kept, end)
        if end is not None:
            flax_mutables = flax_mutables.copy(flax.core.freeze(end[MUTABLES]))
        return loss, (as_t5x(metrics, batch["decoder_input_tokens"]), flax_mutables)

    def eval_fn(self, params, batch: Batch, flax_mutables=None):
        """`(loss, metrics)` from the start of each example, without any training technique."""
        del flax_mutables
        loss, metrics, _ = self.model.loss(params, batch)
        return loss, as_t5x(metrics, batch["decoder_input_tokens"])

    # Inference.

    def score_batch(self, params, batch: Batch, return_intermediates=False, flax_mutables=None):
        """Log-likelihood of the weighted targets, float32 `[B]`."""
        del flax_mutables
        if return_intermediates:
            raise ValueError("Intermediates are not kept while scoring; use capture_intermediates.")
        return self.model.score(params, batch)

    def predict_batch(self, params, batch: Batch, rng=None, flax_mutables=None):
        """The tokens of `predict_batch_with_aux`."""
        return self.predict_batch_with_aux(params, batch, rng, flax_mutables)[0]

    def predict_batch_with_aux(self, params, batch: Batch, rng=None, flax_mutables=None):
        """Continuations of the prompts: see `DecoderModel.predict`.

        Returns:
          The likeliest of the `n = num_decodes` that are drawn, int32 `[B, L]`, and `{"scores": float32
          [B]}`; with `return_all_decodes` all, `[B, n, L]` and `[B, n]`, the likeliest last.
        """
        del flax_mutables
        tokens, scores = self.model.predict(params, batch, self.sampling, rng, self.num_decodes)
        scores = scores.reshape(-1, self.num_decodes)
        tokens = tokens.reshape(*scores.shape, -1)
        order = jnp.argsort(scores, axis=1)
        tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
        scores = jnp.take_along_axis(scores, order, axis=1)
        if not self.return_all_decodes:
            tokens, scores = tokens[:, -1], scores[:, -1]
        return tokens, {"scores": scores}


def _known(vocabulary: Any) -> Vocabulary | None:
    """A vocabulary of famx or SeqIO as famx's; None if famx has none for it."""
    if isinstance(vocabulary, seqio.Vocabulary):
        return from_seqio_vocabulary(vocabulary)
    return vocabulary if isinstance(vocabulary, Vocabulary) else None


class Initializer(utils.TrainStateInitializer):
    """t5x's initializer, but a new run takes its parameters from a checkpoint, as with `famx.train`.

    The model may differ from the checkpoint's in its memory; step and optimizer state start at zero.
    """

    def __init__(self, *args, initial_checkpoint_path: str, **kwargs):
        """
        Args:
          initial_checkpoint_path: a `MODEL_DIR`, or one `MODEL_DIR/checkpoint_<step>`.
          *args, **kwargs: those of t5x's initializer.
        """
        super().__init__(*args, **kwargs)
        self._initial, self._model = initial_checkpoint_path, kwargs["init_fn"].__self__.model

    def from_scratch(self, init_rng):
        """An initial state with the parameters of the initial checkpoint."""
        state = super().from_scratch(init_rng)
        pretrained, notes = load_pretrained(self._initial, self._model)
        for note in notes:
            logging.info(note)
        place = lambda old, new: jax.device_put(new.astype(old.dtype), old.sharding)
        flat = flatten_dict(flax.core.unfreeze(state.params))
        taken = {path: place(flat[path], new) for path, new in flatten_dict(pretrained).items()}
        return state.replace_params(flax.core.freeze(unflatten_dict({**flat, **taken})))
