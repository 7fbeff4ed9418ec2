"""SeqIO data sources that yield the indices of examples; the examples are made from them later."""

from collections.abc import Callable, Mapping, Sequence

import seqio
import tensorflow as tf


class MadeSource(seqio.DataSource):
    """Yields `index` 0, 1, ... and `is_train`. Made examples are independent, so nothing is shuffled."""

    def __init__(self, num_input_examples: Mapping[str, int]):
        super().__init__(
            splits=tuple(num_input_examples),
            num_input_examples=num_input_examples,
            caching_permitted=False,
            performs_internal_shuffling=True,
        )

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """True: shard `s` of `n` has the indices `s`, `s + n`, `s + 2 n`, ..."""
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        """One name, since indices are not read from files."""
        return [split]

    def get_dataset(
        self, split="train", shuffle=True, seed=None, shard_info=None, **unused
    ) -> tf.data.Dataset:
        """The indices of a split."""
        dataset = tf.data.Dataset.range(self.num_input_examples(split))
        if shard_info:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        is_train = split == "train"
        return dataset.map(lambda index: {"index": index, "is_train": is_train})


class DocumentSource(MadeSource):
    """Yields `index` and `split` of every document of a split, shuffled if SeqIO asks for it.

    Args:
      splits: names of the splits.
      size: number of documents of a split, called only when it is needed, since files may be missing.
    """

    def __init__(self, splits: Sequence[str], size: Callable[[str], int]):
        super().__init__(dict.fromkeys(splits, 0))
        self._caching_permitted = True
        self._size = size

    def num_input_examples(self, split: str) -> int:
        """Number of documents of a split."""
        return self._size(split)

    def get_dataset(
        self, split="train", shuffle=True, seed=None, shard_info=None, **unused
    ) -> tf.data.Dataset:
        """The indices of a split."""
        size = self.num_input_examples(split)
        dataset = tf.data.Dataset.range(size)
        if shard_info:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            dataset = dataset.shuffle(size, seed)
        return dataset.map(lambda index: {"index": index, "split": split})
