"""The model definition that an engine drives: loss, scores, predictions.

A batch is a mapping with `decoder_input_tokens` and `decoder_target_tokens`, int32 `[B, L]`, and
optionally `decoder_loss_weights` float32 `[B, L]` (default: 1 where the target is not padding),
`decoder_causal_attention` int32 `[B, L]` (1 on the prompt, for `predict`) and `answer_start` int32 `[B]`
(targets from that position on count together as one exact match). A model that reads features
(`DecoderConfig.frontend`) finds each as `decoder_input_<name>`, and one that predicts values
(`DecoderConfig.values`) finds `decoder_target_values` `[B, L, width]` and `decoder_value_weights`
`[B, L]`.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np

import famx.memories  # noqa: F401, registers the kinds of memory that model.json may name
from famx.base.features import VALUE_WEIGHTS, VALUES
from famx.base.ranges import Amount, OptionalObject, Positive
from famx.base.values import checked
from famx.decoding import Sampling, generate
from famx.lora import Lora, combine, intercept, merged
from famx.models.cross_entropy import cross_entropy
from famx.models.metrics import Mean
from famx.modules import Decoder, DecoderConfig, DecoderState
from famx.modules.memory import COLLECTION

Batch = Mapping[str, jax.Array]


@checked
@dataclasses.dataclass(frozen=True)
class DecoderModel:
    """A `Decoder` with its training objective. A value: change it with `dataclasses.replace`.

    Attributes:
      module: the decoder.
      vocabulary: what the mains encode and decode with; None for training on bare ids.
      random_position_offset: draw random position offsets (RPO), in training alone.
      z_loss: coefficient of the squared log-partition.
      loss_chunk: number of tokens whose logits exist at once in training; None: the whole batch.
      lora: low-rank adapters, leaves of the parameters next to the kernels; None: no adapters.
      context_shards: shards of the length that `loss` reads in parallel, see `Decoder.read`.

    Parameters, wherever a method takes them, may hold adapters and int8 kernels (`famx.lora`).
    """

    module: Decoder
    vocabulary: OptionalObject = None
    random_position_offset: bool = False
    z_loss: Amount = 0.0
    loss_chunk: Positive | None = None
    lora: Lora | None = None
    context_shards: Positive = 1

    @property
    def config(self) -> DecoderConfig:
        """Sizes and options of the decoder."""
        return self.module.config

    def describe(self) -> dict[str, Any]:
        """The model as values that JSON can hold; `from_description` inverts it."""
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
    def pad_id(self) -> int:
        """Padding id of the vocabulary; 0 without a vocabulary."""
        return getattr(self.vocabulary, "pad_id", 0)

    # Inputs.

    def inputs(self, batch: Batch):
        """What the decoder reads of a batch: tokens `[B, L]`, or a dict of features."""
        if self.config.frontend.is_tokens:
            return batch["decoder_input_tokens"]
        return {feature.name: batch[feature.key] for feature in self.config.frontend.features}

    def no_inputs(self, batch_size: int, length: int):
        """Inputs of this size, all zeros."""
        features = self.config.frontend.features
        return self.inputs({x.key: jnp.asarray(x.zeros(batch_size, length)) for x in features})

    # Parameters and states.

    def init_params(self, key) -> dict[str, Any]:
        """Fresh parameters, boxed with their logical axes; adapters are among them with `lora`."""
        tokens = self.no_inputs(1, self.config.block_size)
        params = flax.core.unfreeze(self.module.init(key, tokens)["params"])
        if self.lora is not None:
            params = combine(params, self.lora.init(jax.random.fold_in(key, 1), params))
        return params

    def abstract_params(self) -> dict[str, Any]:
        """`init_params` as boxed ShapeDtypeStructs; nothing is computed."""
        return jax.eval_shape(self.init_params, jax.random.key(0))

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
        """The training objective of a batch, from any state.

        Args:
          params: parameters, unboxed.
          batch: see the module.
          rng: for the random position offset and the adapters' dropout; None: neither.
          state: the state that each example continues from; None: before the first token.
          normalizer: what the weighted sum of losses is divided by; None: `weight` of it.
          aligned: a promise that every example of `state` is at a block boundary.

        Returns:
          `(loss, metrics, state)` with float32 scalar loss and the `DecoderState` after the batch.
        """
        tokens, rows = self.inputs(batch), batch["decoder_target_tokens"].shape[0]
        if state is None:
            state = self.initial_state(params, rows)
        if rng is not None and self.random_position_offset:
            offset = random_offset(rng, rows, self.config.rope_base)
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
        of_values = {}
        if self.config.values is not None:
            values = self.value_sums(params, hidden, batch)
            sums, weight = sums + values.total, weight + values.count
            of_values = {"value_loss": values}
        loss = sums / jnp.maximum(weight if normalizer is None else normalizer, 1e-9)
        metrics = {
            "loss": Mean(sums, weight),
            "accuracy": Mean.of(correct, weights),
            **of_values,
        }
        if "answer_start" in batch:
            ignored = jnp.arange(targets.shape[1]) < batch["answer_start"][:, None]
            metrics["exact_match"] = Mean.of(jnp.all(correct | ignored | (weights == 0), axis=1))
        of_layers = params["layers"].get(COLLECTION)
        for name, value in self.config.memory.figures(of_layers, state.memory).items():
            metrics[f"memory_{name}"] = Mean.of(jax.lax.stop_gradient(value))
        return loss, metrics, state

    def value_sums(self, params, hidden, batch: Batch) -> Mean:
        """The weighted loss of the values that are predicted from `hidden [B, L, D]`."""
        values = self.module.apply({"params": params}, hidden, method="values")
        losses = self.config.values.losses(values, batch[VALUES])
        return Mean.of(losses, batch[VALUE_WEIGHTS])

    def weight(self, batch: Batch):
        """Sum of the weights of all losses of a batch, a float32 scalar."""
        total = jnp.sum(loss_weights(batch, self.pad_id))
        return total if self.config.values is None else total + jnp.sum(batch[VALUE_WEIGHTS])

    # Inference.

    def score(self, params, batch: Batch):
        """Log-likelihood of the weighted targets, float32 `[B]`."""
        params = self.merged(params)
        logits, _ = self.module.apply({"params": params}, self.inputs(batch))
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        targets = batch["decoder_target_tokens"]
        picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(picked * loss_weights(batch, self.pad_id), axis=1)

    def predict(
        self, params, batch: Batch, sampling: Sampling | None = None, rng=None, num_decodes: int = 1
    ):
        """Continuations of the prompts and their log-likelihood.

        The prompt is where `decoder_causal_attention` is 1, begin of text included; the last of these
        positions predicts the first target. In a batch without that feature the whole row, up to its
        padding, is the prompt. The vocabulary's `end_ids` end a continuation; the one that does is part
        of it.

        Args:
          params: parameters.
          batch: see the module.
          sampling: how tokens are selected; its `stop_tokens` come to those of the vocabulary. None:
            always the likeliest.
          rng: random key, needed only if the temperature is not 0.
          num_decodes: number of continuations `n` of each prompt, which is read once.

        Returns:
          int32 `[B * n, L]`, those of an example one after the other; of each the first new token first,
          padding after the end or where the row has no more room; and the log-likelihoods, float32
          `[B * n]`.
        """
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

        stops = getattr(self.vocabulary, "end_ids", None)
        if stops is None:  # a vocabulary of SeqIO, or none
            eos_id = getattr(self.vocabulary, "eos_id", None)
            stops = () if eos_id is None else (eos_id,)
        sampling, room = sampling or Sampling(length), length - size + 1
        room = jnp.minimum(room, sampling.max_new_tokens)
        stops = (*sampling.stop_tokens, *stops)
        sampling = dataclasses.replace(sampling, max_new_tokens=length, stop_tokens=stops)
        if num_decodes > 1:
            of = np.repeat(np.arange(len(room)), num_decodes)
            logits, room, state = logits[of], room[of], state.take(of)
        draws = rng is not None and sampling.temperature > 0
        keys = jax.random.split(rng, len(room)) if draws else None
        out = generate(self.module, params, logits, state, sampling, keys, room)
        written = jnp.arange(length) < out.lengths[:, None]
        tokens = jnp.where(written, out.tokens, self.pad_id)
        return tokens, out.log_likelihood


def random_offset(rng, batch_size: int, rope_base: float):
    """Random position offsets (RPO), int32 `[B]`: `U(0, 2 pi base)`, or 0 half of the time."""
    size, coin = jax.random.split(rng)
    offset = jax.random.uniform(size, (batch_size,), maxval=2 * np.pi * rope_base)
    return jnp.where(jax.random.bernoulli(coin, 0.5, (batch_size,)), offset, 0).astype(jnp.int32)


def loss_weights(batch: Batch, pad_id: int = 0):
    """Float32 `[B, L]`, of numpy if the batch is: its own weights, or 1 where a target is not padding."""
    weights = batch.get("decoder_loss_weights")
    if weights is None:
        weights = batch["decoder_target_tokens"] != pad_id
    return weights.astype(jnp.float32)
