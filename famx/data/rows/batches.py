"""Batches for a decoder: examples of one length, and their division among hosts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from famx.base.features import Feature, with_features
from famx.data.vocabularies import Vocabulary


def check_shards(batch_size: int, shard_index: int, num_shards: int) -> None:
    """Raise ValueError unless the batch divides evenly and the shard is one of `num_shards`."""
    if num_shards < 1 or not 0 <= shard_index < num_shards:
        raise ValueError(f"Shard {shard_index} is not one of {num_shards} shards.")
    if batch_size < 1 or batch_size % num_shards:
        raise ValueError(
            f"A batch of {batch_size} rows cannot be divided evenly among {num_shards} shards; "
            "choose a batch size that is a multiple of the number of hosts."
        )


def decoder_batch(
    examples: Sequence[Mapping[str, Any]],
    vocabulary: Vocabulary,
    answer_width: int | None = None,
    features: Sequence[Feature] = (),
    values: int = 0,
) -> dict[str, np.ndarray]:
    """Stack examples of one length into a batch for a decoder.

    Args:
      examples: each with `tokens` int32 `[L]` and `weights` float32 `[L]`, and, if it has them,
        `starts` (where its parts begin, each after a bos; without it, one part begins at 0), and
        `answer_start` int (where the answer begins, which ends the row but for its padding). With
        features and values, see `famx.base.features.with_features`.
      vocabulary: has the ids of bos and padding.
      answer_width: number of tokens that every answer fits in; None leaves `answer` out.
      features: what is read besides tokens, or in their place.
      values: number of values that are predicted at each position.

    Returns:
      `decoder_input_tokens` int32 `[B, L]`: the targets shifted by one, with bos at the starts;
      `decoder_target_tokens` int32 `[B, L]`; `decoder_loss_weights` float32 `[B, L]`; with
      `answer_width`, `answer` int32 `[B, answer_width]`, padded at the end; if the examples have it,
      `answer_start` int32 `[B]`; `decoder_input_<name>` of each feature; with `values`,
      `decoder_target_values` float32 `[B, L, values]` and `decoder_value_weights` float32 `[B, L]`.

    Raises:
      ValueError: there is no example, or a feature or value of one has another shape.
    """
    if not examples:
        raise ValueError("A batch needs at least one index.")
    targets = np.stack([example["tokens"] for example in examples])
    inputs = np.roll(targets, 1, axis=1)
    for row, example in zip(inputs, examples):
        row[example.get("starts", [0])] = vocabulary.bos_id
    batch = dict(
        decoder_input_tokens=inputs,
        decoder_target_tokens=targets,
        decoder_loss_weights=np.stack([example["weights"] for example in examples]),
    )
    batch = with_features(batch, examples, features, values)
    if "answer_start" not in examples[0]:
        return batch
    starts = [example["answer_start"] for example in examples]
    if answer_width is not None:
        batch["answer"] = np.full((len(examples), answer_width), vocabulary.pad_id, np.int32)
        for row, target, start in zip(batch["answer"], targets, starts):
            found = target[start : start + answer_width]  # padding may follow
            row[: len(found)] = found
    return {**batch, "answer_start": np.array(starts, np.int32)}


def draw_padding(most: int, room: int, seed: Sequence[int]) -> int:
    """A number of padding positions, drawn from 0 to `most`, or to `room` if that is less."""
    most = min(most, room)
    return int(np.random.default_rng(seed).integers(most + 1)) if most > 0 else 0


def padded(example: dict[str, Any], count: int, pad_id: int) -> dict[str, Any]:
    """An example with `count` positions of padding after its last one, all zeros but for the tokens."""
    if not count:
        return example
    fill = lambda x, value=0: np.pad(x, [(0, count)] + [(0, 0)] * (x.ndim - 1), constant_values=value)
    given = ("weights", "values", "value_weights")
    made: dict[str, Any] = {name: fill(example[name]) for name in given if name in example}
    made["tokens"] = fill(example["tokens"], pad_id)
    if "features" in example:
        made["features"] = {name: fill(x) for name, x in example["features"].items()}
    return {**example, **made}
