"""Packing of a SeqIO dataset: examples are joined into one stream, which is cut into rows."""

from collections.abc import Mapping

import tensorflow as tf

EXAMPLES_AT_ONCE = 64  # joined by one operation, which is faster than one by one

_FEATURES = {
    "decoder_input_tokens": tf.int32,
    "decoder_target_tokens": tf.int32,
    "decoder_loss_weights": tf.float32,
}


def pack_rows(ds: tf.data.Dataset, length: int, bos_id: int, pad_id: int) -> tf.data.Dataset:
    """Pack a dataset of examples into rows of `length` tokens; only the last row is padded.

    Args:
      ds: examples with `targets` int32 `[n]` and optionally `loss_weights` float32 `[n]` (without
        them, 1 on every token that is not padding).
      length: number of tokens of a row.
      bos_id: first input token of every example.
      pad_id: id after the last token of the last row.
    """
    task_features = [x for x in ("targets", "loss_weights") if x in ds.element_spec]
    empty = {k: tf.zeros([0], dtype) for k, dtype in _FEATURES.items()}
    end = tf.data.Dataset.from_tensors((empty, True))

    def cut(rest, element):
        """Cut the rest of the stream and what follows it into rows; return the new rest and the rows."""
        stream, is_last = element
        joined = {k: tf.concat([rest[k], stream[k]], axis=0) for k in rest}
        size = tf.shape(joined["decoder_target_tokens"])[0]
        padding = tf.where(is_last, -size % length, 0)
        used = (size + padding) // length * length
        fill = {k: 0 if v.dtype == tf.float32 else pad_id for k, v in joined.items()}
        joined = {
            k: tf.pad(v, [[0, padding]], constant_values=tf.cast(fill[k], v.dtype))
            for k, v in joined.items()
        }
        rows = {k: tf.reshape(v[:used], [-1, length]) for k, v in joined.items()}
        return {k: v[used:] for k, v in joined.items()}, rows

    ds = ds.map(lambda features: {x: features[x] for x in task_features})
    ds = ds.ragged_batch(EXAMPLES_AT_ONCE)
    ds = ds.map(lambda features: (_join(features, bos_id, pad_id), False)).concatenate(end)
    return ds.scan(empty, cut).unbatch()


def _join(features: Mapping[str, tf.Tensor], bos_id: int, pad_id: int) -> dict[str, tf.Tensor]:
    """A batch of examples as one stream of inputs, targets and weights."""
    if not isinstance(features["targets"], tf.RaggedTensor):  # all examples have the same static length
        features = {k: tf.RaggedTensor.from_tensor(v) for k, v in features.items()}
    examples, targets = features["targets"], features["targets"].flat_values
    starts = tf.boolean_mask(examples.row_starts(), examples.row_lengths() > 0)
    inputs = tf.concat([[bos_id], targets], axis=0)[:-1]
    inputs = tf.tensor_scatter_nd_update(inputs, starts[:, None], tf.fill(tf.shape(starts), bos_id))
    weights = features.get("loss_weights")
    if weights is None:
        weights = tf.cast(targets != pad_id, tf.float32)
    else:
        tf.debugging.assert_equal(
            weights.row_splits, examples.row_splits,
            "Every example needs as many loss_weights as targets.",
        )  # fmt: skip
        weights = weights.flat_values
    return {
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": weights,
    }
