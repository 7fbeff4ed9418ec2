"""Endless training rows of a SeqIO task or mixture."""

import seqio

from famx.data.seqio.feature_converter import FamFeatureConverter


def training_rows(
    task, length: int, seed: int, shard: tuple[int, int], packed: bool, bos_id: int
):
    """A `tf.data.Dataset` of model features, shuffled by `seed`, repeated without end.

    Args:
      task: a SeqIO task or mixture.
      length: tokens per row.
      seed: seed of the order.
      shard: index of this shard and number of shards.
      packed: put several documents into a row.
      bos_id: token with which each row or document begins.
    """
    vocabulary = task.output_features["targets"].vocabulary
    return seqio.get_dataset(
        task.name,
        {"targets": length},
        dataset_split="train",
        shuffle=True,
        num_epochs=None,
        seed=seed,
        shard_info=seqio.ShardInfo(*shard),
        trim_output_features=not packed,
        feature_converter=FamFeatureConverter(pack=packed, bos_id=bos_id, pad_id=vocabulary.pad_id),
    )
