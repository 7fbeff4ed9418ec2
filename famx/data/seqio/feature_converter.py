"""The feature converter of FAM decoders."""

import copy
import functools
from collections.abc import Mapping

import seqio
import tensorflow as tf

from famx.data.seqio.packed_rows import pack_rows


class FamFeatureConverter(seqio.FeatureConverter):
    """Decoder-only features with float loss weights.

    Features of a task: `targets` int32 `[n]`; optionally `loss_weights` float32 `[n]` (default: 1 on
    every token that is not padding); optionally `inputs` int32 `[m]`, which precede the targets and
    have weight 0.

    Features of the model, each `[length]`:

      decoder_input_tokens int32: the targets shifted by one, with bos first
      decoder_target_tokens int32
      decoder_loss_weights float32
      decoder_causal_attention int32, if the task has inputs: 1 where bos and the inputs are read

    The length is that of `targets`, plus that of `inputs` if it is given.

    Without packing, every example is a row; if inputs leave no room for their targets, the start of the
    inputs is cut off. With packing, rows are filled with consecutive examples, each with bos first, and
    nothing masks one from the next; an example that does not fit continues in the next row. Only the last
    row of a finite dataset is padded, and decoder_causal_attention is left out. Tokens and weights are
    unchanged, and the iterator can be saved. SeqIO cuts examples to the given lengths before this
    converter, unless `seqio.get_dataset` is given `trim_output_features=False`.
    """

    TASK_FEATURES = {"targets": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)}
    MODEL_FEATURES = {
        "decoder_input_tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "decoder_target_tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "decoder_loss_weights": seqio.FeatureConverter.FeatureSpec(dtype=tf.float32),
    }
    PACKING_FEATURE_DTYPES = {}

    def __init__(
        self,
        pack: bool = False,
        use_custom_packing_ops: bool = False,
        bos_id: int = 1,
        pad_id: int = 0,
        **kwargs,
    ):
        """
        Args:
          pack: fill rows with several examples.
          use_custom_packing_ops: ignored; packing needs no custom ops here.
          bos_id: first input token of every example.
          pad_id: id after the last token of a row, with weight 0.
          **kwargs: passed to `seqio.FeatureConverter`.
        """
        self.pad_id = pad_id
        super().__init__(
            pack=pack, use_custom_packing_ops=use_custom_packing_ops, bos_id=bos_id, **kwargs
        )

    def __call__(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]):
        converter, lengths = self, self._target_lengths(task_feature_lengths)
        if "inputs" in ds.element_spec:
            join = functools.partial(self._join, length=lengths["targets"])
            ds = ds.map(join, num_parallel_calls=tf.data.AUTOTUNE)
            if not self.pack:
                converter = copy.copy(self)
                mark = {"decoder_causal_attention": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)}
                converter.MODEL_FEATURES = {**self.MODEL_FEATURES, **mark}
        return super(FamFeatureConverter, converter).__call__(ds, lengths)

    def _target_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        lengths = dict(task_feature_lengths)
        # SeqIO's evaluator passes the longest lengths of the data: never more than the targets'.
        if lengths.pop("loss_weights", 0) > lengths.get("targets", 0):
            raise ValueError("'loss_weights' must not be given more length than 'targets'.")
        if "inputs" in lengths:
            lengths["targets"] = lengths.get("targets", 0) + lengths.pop("inputs")
        return lengths

    def _join(self, features: Mapping[str, tf.Tensor], length: int) -> dict[str, tf.Tensor]:
        """Join inputs and targets into targets; the inputs get weight 0."""
        inputs, targets = features["inputs"], features["targets"]
        weights = self._weights(features)
        if not self.pack:
            room = length - tf.maximum(tf.shape(targets)[0], 1)  # predict at least one token
            inputs = inputs[tf.shape(inputs)[0] - tf.clip_by_value(room, 0, tf.shape(inputs)[0]) :]
        weightless = tf.zeros_like(inputs, tf.float32)
        return {
            "targets": tf.concat([inputs, targets], axis=0),
            "loss_weights": tf.concat([weightless, weights], axis=0),
            "num_inputs": tf.shape(inputs)[0],
        }

    def _weights(self, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        if "loss_weights" in features:
            return features["loss_weights"]
        return tf.cast(features["targets"] != self.pad_id, tf.float32)

    def _validate_dataset(self, ds, expected_features, expected_lengths, strict, error_label):
        """SeqIO's checks, but with lengths only if `strict`: examples may be longer than a row."""
        lengths = expected_lengths if strict else {}
        return super()._validate_dataset(ds, expected_features, lengths, strict, error_label)

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]):
        length = task_feature_lengths["targets"]
        if self.pack:
            return pack_rows(ds, length, self.bos_id, self.pad_id)

        def convert(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            targets = _trim_and_pad(features["targets"], length, self.pad_id)
            row = {
                "decoder_input_tokens": tf.concat([[self.bos_id], targets[:-1]], axis=0),
                "decoder_target_tokens": targets,
                "decoder_loss_weights": _trim_and_pad(self._weights(features), length, 0.0),
            }
            if "num_inputs" in features:
                prompt = tf.range(length) <= features["num_inputs"]
                row["decoder_causal_attention"] = tf.cast(prompt, tf.int32)
            return row

        return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        """The length of every feature: that of `targets`, plus that of `inputs` if it is given."""
        length = self._target_lengths(task_feature_lengths)["targets"]
        return {name: length for name in self.MODEL_FEATURES}


def _trim_and_pad(x: tf.Tensor, length: int, value) -> tf.Tensor:
    x = x[:length]
    x = tf.pad(x, [[0, length - tf.shape(x)[0]]], constant_values=tf.cast(value, x.dtype))
    x.set_shape([length])
    return x
