"""SeqIO around our data: vocabularies, PassKey tasks, and the feature converter of FAM decoders.

The only module of `famx.data` that needs SeqIO and TensorFlow. Importing it registers the tasks
`passkey_words` and `passkey_bytes`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from famx.data.passkey import PasskeyTask
from famx.data.vocabularies import ByteVocabulary, WordVocabulary

TRAIN_EXAMPLES = 2**31 - 1
VALIDATION_EXAMPLES = 256
_SPLITS = {"train": "train", "validation": "eval"}  # SeqIO's split -> PasskeyTask.split


class _SeqioVocabulary(seqio.Vocabulary):
    """One of our vocabularies with SeqIO's interface."""

    def __init__(self, vocabulary: ByteVocabulary | WordVocabulary):
        super().__init__()
        self._vocabulary = vocabulary

    bos_id = property(lambda self: self._vocabulary.bos_id)
    eos_id = property(lambda self: self._vocabulary.eos_id)
    unk_id = property(lambda self: self._vocabulary.unk_id)
    _base_vocab_size = property(lambda self: self._vocabulary.vocab_size)

    def _encode(self, s: str) -> Sequence[int]:
        return self._vocabulary.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self._vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes | np.ndarray) -> np.ndarray:  # an array when run eagerly
            text = text.item() if isinstance(text, np.ndarray) else text
            return np.array(self._vocabulary.encode(text.decode("utf-8")), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows: np.ndarray) -> np.ndarray:
            flat = rows.reshape(-1, rows.shape[-1])
            texts = [self._vocabulary.decode(row).encode("utf-8") for row in flat]
            return np.array(texts, object).reshape(rows.shape[:-1])

        text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        text.set_shape(ids.shape[:-1])
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SeqioVocabulary) and self._vocabulary == other._vocabulary

    def __hash__(self) -> int:
        return hash(self._vocabulary)


def as_seqio_vocabulary(vocabulary: ByteVocabulary | WordVocabulary) -> seqio.Vocabulary:
    """`vocabulary` as a `seqio.Vocabulary`; the ids stay the same."""
    return _SeqioVocabulary(vocabulary)


class _IndexSource(seqio.DataSource):
    """Yields the numbers 0, 1, ...; examples are made from them, so they need no shuffling."""

    def __init__(self, num_input_examples: Mapping[str, int]):
        super().__init__(
            splits=tuple(num_input_examples),
            num_input_examples=num_input_examples,
            caching_permitted=False,
            performs_internal_shuffling=True,
        )

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def get_dataset(
        self, split="train", shuffle=True, seed=None, shard_info=None, **unused
    ) -> tf.data.Dataset:
        dataset = tf.data.Dataset.range(self.num_input_examples(split))
        if shard_info:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        is_train = split == "train"
        return dataset.map(lambda index: {"index": index, "is_train": is_train})


def register_passkey(name: str, task: PasskeyTask, validation_examples: int = VALIDATION_EXAMPLES):
    """Register `task` with SeqIO: features `targets` int32 and `loss_weights` float32, both [L].

    L is `sequence_length["targets"]`. Split `train` counts on without end, `validation` draws from
    the task's `eval` streams; example i is the task's example i whatever seed SeqIO is given (the
    seed is the task's own), and shard s of n holds the examples s, s + n, s + 2 n, ...

    Args:
      name: name of the task in SeqIO's registry.
      task: the examples; its own `split` does not matter.
      validation_examples: number of examples of the validation split.

    Returns:
      the `seqio.Task`.
    """
    tasks = [dataclasses.replace(task, split=split) for split in _SPLITS.values()]

    def make_examples(dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None):
        if not sequence_length or not sequence_length.get("targets"):
            raise ValueError(
                f"Task '{name}' makes rows of the length asked for; give the length of 'targets'."
            )
        length = sequence_length["targets"]

        def example(index: np.ndarray, is_train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            row = tasks[0 if is_train else 1].example(int(index), length)
            return row["tokens"], row["weights"]

        def convert(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            tokens, weights = tf.numpy_function(
                example,
                [features["index"], features["is_train"]],
                (tf.int32, tf.float32),
                stateful=False,
            )
            tokens.set_shape([length])
            weights.set_shape([length])
            return {"targets": tokens, "loss_weights": weights}

        return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    return seqio.TaskRegistry.add(
        name,
        source=_IndexSource({"train": TRAIN_EXAMPLES, "validation": validation_examples}),
        preprocessors=[make_examples],
        output_features={
            "targets": seqio.Feature(as_seqio_vocabulary(task.vocab), add_eos=False),
            "loss_weights": seqio.Feature(
                seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.float32
            ),
        },
        shuffle_buffer_size=None,
    )


class FamFeatureConverter(seqio.FeatureConverter):
    """Decoder-only features with float loss weights.

    Takes `targets` int32 [n] and, where the task has them, `loss_weights` float32 [n] (else 1 on
    every token that is not padding), n up to the length of `targets`. Makes, each [length]:
    decoder_input_tokens int32 (the targets one step later, bos in front), decoder_target_tokens
    int32 and decoder_loss_weights float32. Only the length of `targets` must be given.
    """

    TASK_FEATURES = {"targets": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)}
    MODEL_FEATURES = {
        "decoder_input_tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "decoder_target_tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "decoder_loss_weights": seqio.FeatureConverter.FeatureSpec(dtype=tf.float32),
    }
    PACKING_FEATURE_DTYPES = {}

    def __init__(
        self, pack: bool = False, use_custom_packing_ops: bool = False, bos_id: int = 1, **kwargs
    ):
        """
        Args:
          pack: must be False.
          use_custom_packing_ops: without meaning, since nothing is packed.
          bos_id: first input token of every row.
          **kwargs: handed to `seqio.FeatureConverter`.

        Raises:
          ValueError: packing was asked for.
        """
        if pack:
            raise ValueError(
                "FamFeatureConverter does not pack: SeqIO's packing would round the float loss "
                "weights to whole numbers. Set packing to False (in t5x: pack = False)."
            )
        super().__init__(
            pack=False, use_custom_packing_ops=use_custom_packing_ops, bos_id=bos_id, **kwargs
        )

    def __call__(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]):
        return super().__call__(ds, self._target_lengths(task_feature_lengths))

    def _target_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        lengths = dict(task_feature_lengths)
        if lengths.pop("loss_weights", lengths.get("targets")) != lengths.get("targets"):
            raise ValueError("The lengths of 'targets' and 'loss_weights' must be the same.")
        return lengths

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]):
        length = task_feature_lengths["targets"]

        def convert(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            targets = features["targets"]
            weights = features.get("loss_weights")
            if weights is None:
                weights = tf.cast(targets != 0, tf.float32)
            targets, weights = (_trim_and_pad(x, length) for x in (targets, weights))
            return {
                "decoder_input_tokens": tf.concat([[self.bos_id], targets[:-1]], axis=0),
                "decoder_target_tokens": targets,
                "decoder_loss_weights": weights,
            }

        return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        """Every feature is as long as `targets`."""
        length = self._target_lengths(task_feature_lengths)["targets"]
        return {name: length for name in self.MODEL_FEATURES}


def _trim_and_pad(x: tf.Tensor, length: int) -> tf.Tensor:
    x = x[:length]
    x = tf.pad(x, [[0, length - tf.shape(x)[0]]])
    x.set_shape([length])
    return x


register_passkey("passkey_words", PasskeyTask(vocabulary="words"))
register_passkey("passkey_bytes", PasskeyTask(vocabulary="bytes"))
