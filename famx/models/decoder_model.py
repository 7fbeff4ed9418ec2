"""The model definition that an engine drives: losses, predictions, scores.

One object serves our engine and t5x (whose contract it keeps without importing it). A batch is a
mapping with `decoder_input_tokens` and `decoder_target_tokens`, int32 `[B, L]`, and optionally
`decoder_loss_weights` float32 `[B, L]` (default: 1 where the target is not padding),
`decoder_causal_attention` int32 `[B, L]` (1 on the prompt, for `predict_batch`) and `answer_start`
int32 `[B]` (targets from there on count together as one exact match).
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import flax.core
import jax
import jax.numpy as jnp

import famx.memories  # noqa: F401, model.json names a memory by its kind
from famx.decoding import Sampling, generate
from famx.lora import Lora, combine, intercept, merged
from famx.models.cross_entropy import cross_entropy
from famx.models.metrics import Mean
from famx.modules import Decoder, DecoderConfig, DecoderState
from famx.modules.memory import COLLECTION
from famx.training import state_passing

Batch = Mapping[str, jax.Array]
MEMORY_COLLECTION = "state_passing"


class DecoderModel:
    """A `Decoder` with its training objective.

    Args:
      module: the decoder.
      vocabulary: what t5x and the mains decode with; None for training on bare ids.
      optimizer_def: t5x's optimizer, None elsewhere.
      random_state: how random state passing is done in `loss_fn`; None: not at all.
      random_position_offset: RPO, in training alone.
      z_loss: coefficient of the squared log-partition.
      loss_chunk: tokens of the batch whose logits exist at once in training; None: all of them.
      lora: low-rank adapters, leaves of the parameters beside the kernels; None: none.
      context_shards: shards of the length that `loss` reads side by side, see `Decoder.read`.

    Parameters, wherever they are asked for, may hold adapters and int8 kernels (`famx.lora`).
    """

    def __init__(
        self,
        module: Decoder,
        vocabulary: Any = None,
        optimizer_def: Any = None,
        random_state: state_passing.RandomState | None = None,
        random_position_offset: bool = False,
        z_loss: float = 0.0,
        loss_chunk: int | None = None,
        lora: Lora | None = None,
        context_shards: int = 1,
    ):
        if loss_chunk is not None and loss_chunk < 1:
            raise ValueError(f"loss_chunk must be at least 1, or None for no limit; got {loss_chunk}.")
        self.module = module
        self.config = module.config
        self.optimizer_def = optimizer_def
        self.input_vocabulary = self.output_vocabulary = vocabulary
        self.random_state = random_state
        self.random_position_offset = random_position_offset
        self.z_loss = z_loss
        self.loss_chunk = loss_chunk
        self.lora = lora
        self.context_shards = context_shards

    def describe(self) -> dict[str, Any]:
        """What the model is, as JSON can hold it; `from_description` makes it again."""
        described = json.loads(json.dumps(self.config.to_dict()))
        if self.lora is not None:
            described["lora"] = json.loads(json.dumps(dataclasses.asdict(self.lora)))
        return described

    @classmethod
    def from_description(cls, fields: Mapping[str, Any]) -> "DecoderModel":
        """The model that `describe` described, without a vocabulary."""
        fields = dict(fields)
        lora = fields.pop("lora", None)
        return cls(Decoder(DecoderConfig.from_dict(fields)), lora=lora and Lora(**lora))

    @property
    def FEATURE_CONVERTER_CLS(self):  # noqa: N802, t5x's name
        """SeqIO's feature converter for this model; t5x's name. Needs seqio."""
        from famx.data.seqio import FamFeatureConverter  # needs seqio, so only on demand

        bos_id = getattr(self.output_vocabulary, "bos_id", 1)
        return functools.partial(FamFeatureConverter, bos_id=bos_id, pad_id=self.pad_id)

    @property
    def pad_id(self) -> int:
        """The vocabulary's padding; 0 where there is no vocabulary."""
        return getattr(self.input_vocabulary, "pad_id", 0)

    # Variables.

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        """Fresh variables: `params` (boxed with their logical axes), and what state passing keeps.

        With `lora`, the adapters are among the parameters.
        """
        del input_types
        shape = (input_shapes["decoder_input_tokens"][0], self.config.block_size)
        variables = dict(self.module.init(rng, jnp.zeros(shape, jnp.int32)))
        if self.lora is not None:
            adapters = self.lora.init(jax.random.fold_in(rng, 1), variables["params"])
            variables["params"] = combine(variables["params"], adapters)
        if self.random_state is not None:
            variables[MEMORY_COLLECTION] = self.random_state.initial(self.config)
        return flax.core.freeze(variables)

    def abstract_params(self) -> dict[str, Any]:
        """The parameters as boxed ShapeDtypeStructs; nothing is computed."""
        shapes = {"decoder_input_tokens": (1, self.config.block_size)}
        init = lambda key: DecoderModel.get_initial_variables(self, key, shapes)["params"]
        return flax.core.unfreeze(jax.eval_shape(init, jax.random.key(0)))

    def initial_state(self, params, batch_size: int) -> DecoderState:
        """The decoder's state before the first token; a function of the parameters."""
        with intercept(self.lora):
            return self.module.apply({"params": params}, batch_size, method="initial_state")

    def merged(self, params):
        """The decoder's own parameters, adapters merged into them: what `self.module` reads with."""
        return merged(params, self.lora)

    # Training.

    def loss(
        self,
        params,
        batch: Batch,
        rng=None,
        state: DecoderState | None = None,
        normalizer=None,
        aligned: bool = True,
    ):
        """The training objective from any state on.

        Args:
          params: parameters, unboxed.
          batch: see the module.
          rng: for the random position offset and the adapters' dropout; None: neither.
          state: where each example goes on; None: from its start.
          normalizer: what the weighted sum of losses is divided by; None: the sum of the weights.
          aligned: a promise that every example of `state` stands at a block boundary.

        Returns:
          `(loss, metrics, state)` with float32 scalar loss and the `DecoderState` after the batch.
        """
        tokens = batch["decoder_input_tokens"]
        if state is None:
            state = self.initial_state(params, tokens.shape[0])
        if rng is not None and self.random_position_offset:
            offset = state_passing.random_offset(rng, tokens.shape[0], self.config.rope_base)
            state = state.replace(offset=jnp.where(state.position == 0, offset, state.offset))
        variables = {"params": params}
        dropout = None if rng is None else jax.random.fold_in(rng, 1)
        with intercept(self.lora, dropout):
            hidden, state = self.module.apply(
                variables, tokens, state=state, aligned=aligned, method="read",
                context_shards=self.context_shards,
            )  # fmt: skip
        targets, weights = batch["decoder_target_tokens"], loss_weights(batch, self.pad_id)
        sums, correct = cross_entropy(
            self.module, params, hidden, targets, weights, self.z_loss, self.loss_chunk
        )
        weight = jnp.sum(weights)
        loss = sums / jnp.maximum(weight if normalizer is None else normalizer, 1e-9)
        metrics = {
            "loss": Mean(sums, weight),
            "accuracy": Mean.of(correct, weights),
        }
        if "answer_start" in batch:
            before = jnp.arange(tokens.shape[1]) < batch["answer_start"][:, None]
            metrics["exact_match"] = Mean.of(jnp.all(correct | before, axis=1))
        of_layers = params["layers"].get(COLLECTION)
        for name, value in self.config.memory.figures(of_layers, state.memory).items():
            metrics[f"memory_{name}"] = Mean.of(jax.lax.stop_gradient(value))
        return loss, metrics, state

    def loss_fn(
        self, params, batch: Batch, dropout_rng, flax_mutables=None, normalizer=None, microbatch=None
    ):
        """t5x's training loss: with random state passing where there are `flax_mutables`.

        Our engine also gives what the sum of losses is divided by, and which part of its batch this
        is (int32 scalar): parts draw on their own, but for whether they begin from the kept memory.
        """
        own = lambda rng: rng if microbatch is None else jax.random.fold_in(rng, microbatch)
        if self.random_state is None or not flax_mutables:
            rng = None if dropout_rng is None else own(dropout_rng)
            loss, metrics, _ = self.loss(params, batch, rng, normalizer=normalizer)
            return (loss, metrics) if flax_mutables is None else (loss, (metrics, flax_mutables))
        state = self.initial_state(params, batch["decoder_input_tokens"].shape[0])
        if dropout_rng is None:
            loss, metrics, _ = self.loss(params, batch, None, state)
            return loss, (metrics, flax_mutables)
        coin, rng = jax.random.split(dropout_rng)
        kept = flax_mutables[MEMORY_COLLECTION]
        state = self.random_state.start(kept, state, coin)
        loss, metrics, state = self.loss(params, batch, own(rng), state, normalizer)
        kept = self.random_state.keep(kept, state)
        return loss, (metrics, flax_mutables.copy({MEMORY_COLLECTION: flax.core.freeze(kept)}))

    def eval_fn(self, params, batch: Batch, flax_mutables=None):
        """`(loss, metrics)` from the start of each example, without any training technique."""
        del flax_mutables
        return self.loss(params, batch)[:2]

    # Inference.

    def score_batch(self, params, batch: Batch, return_intermediates=False, flax_mutables=None):
        """Log-likelihood of the weighted targets, float32 `[B]`."""
        del flax_mutables
        if return_intermediates:
            raise ValueError("Intermediates are not kept while scoring; use capture_intermediates.")
        params = self.merged(params)
        logits, _ = self.module.apply({"params": params}, batch["decoder_input_tokens"])
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        targets = batch["decoder_target_tokens"]
        picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(picked * loss_weights(batch, self.pad_id), axis=1)

    def predict_batch(self, params, batch: Batch, rng=None, flax_mutables=None):
        """Greedy continuations of the prompts, int32 `[B, L]`: see `predict_batch_with_aux`."""
        return self.predict_batch_with_aux(params, batch, rng, flax_mutables)[0]

    def predict_batch_with_aux(self, params, batch: Batch, rng=None, flax_mutables=None):
        """Greedy continuations and their log-likelihood.

        The prompt is where `decoder_causal_attention` is 1, less its last place (in an input row,
        shifted by one, that place holds the prompt's last token and predicts the first target); a
        batch without that feature is a prompt as a whole up to its padding. The vocabulary's eos, if
        there is one, ends a continuation and belongs to it.

        Returns:
          int32 `[B, L]`, the first new token first, padding after the end or where the row has no
          more room; and `{"scores": float32 [B]}`.
        """
        del rng, flax_mutables
        tokens = batch["decoder_input_tokens"]
        length = tokens.shape[1]
        if "decoder_causal_attention" in batch:
            prompt = batch["decoder_causal_attention"] > 0
        else:
            prompt = (tokens != self.pad_id) | (jnp.arange(length) == 0)
        size = jnp.sum(prompt, axis=1, dtype=jnp.int32)
        params = self.merged(params)
        variables = {"params": params}
        valid = jnp.arange(length) < size[:, None]
        hidden, state = self.module.apply(variables, tokens, valid=valid, method="read")
        last = jnp.take_along_axis(hidden, (size - 1)[:, None, None], axis=1)
        logits = self.module.apply(variables, last, method="logits")[:, 0]

        eos_id = getattr(self.output_vocabulary, "eos_id", None)
        stops = () if eos_id is None else (eos_id,)
        sampling, room = Sampling(length, stop_tokens=stops), length - size + 1
        out = generate(self.module, params, logits, state, sampling, room=room)
        written = jnp.arange(length) < out.lengths[:, None]
        tokens = jnp.where(written, out.tokens, self.pad_id)
        return tokens, {"scores": out.log_likelihood}


def loss_weights(batch: Batch, pad_id: int = 0):
    """Float32 `[B, L]`: the batch's own weights, or 1 where a target is not padding."""
    weights = batch.get("decoder_loss_weights")
    if weights is None:
        weights = batch["decoder_target_tokens"] != pad_id
    return weights.astype(jnp.float32)
