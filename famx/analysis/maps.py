"""Attention maps of a text: probabilities for selected blocks, layers and heads, and a summary of all.

`AttentionReader` makes them. The columns of the tokens' maps are laid out as in the model,
`[N memory | M * S past, oldest first | S own block]`, those of the memory's maps as
`[N memory | S own block]`.
"""

import dataclasses
import io
import json
import os
from collections.abc import Sequence

import numpy as np

from famx.analysis.pictures import NO_TOKEN, Picture, make_picture
from famx.analysis.records import FIELDS, BlockRecords
from famx.base.files import write_bytes

_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class AttentionSummary:
    """Statistics of the attention in every block, including those whose maps were not kept.

    `T` is the number of blocks read and `U` the number of completed ones, to which the memory attended; 0
    if it does not attend (`Memory.attends`). Only the last block can be incomplete. Values are averaged
    over the tokens that were read of a block.
    Shares are fractions of attention, entropies are in nats. Floating-point arrays are float32, or
    float64 if the model computes in it.

    Attributes:
      first_block: index of the first block read.
      counts: number of tokens read of each block, int32 `[T]`.
      on_memory: share of the tokens' attention on the memory, `[T, layers, H]`.
      on_past: share of the tokens' attention on past blocks, `[T, layers, H]`.
      on_block: share of the tokens' attention on their own block, `[T, layers, H]`. The three shares
        add up to 1.
      entropy: entropy of the tokens' attention, `[T, layers, H]`.
      read: attention of the tokens on each memory token, averaged over heads, `[T, layers, N]`.
      memory_on_memory: share of the memory's attention on itself rather than on the block that it
        compresses, averaged over memory tokens, `[U, layers, H]`.
      memory_entropy: entropy of the memory's attention, averaged over memory tokens, `[U, layers, H]`.
      written: share of each memory token's attention on the block, averaged over heads,
        `[U, layers, N]`.
      place: mean slot of that attention within the block, `[U, layers, N]`.
      source_slots: the `top` slots of the block that each memory token attends to most, averaged over
        heads, strongest first, int32 `[U, layers, N, top]`.
      source_ids: token ids in these slots, int32 `[U, layers, N, top]`; `NO_TOKEN` for tokens that were
        read before the first block of these maps.
      source_weights: attention on these slots, `[U, layers, N, top]`.
    """

    first_block: int
    counts: np.ndarray
    on_memory: np.ndarray
    on_past: np.ndarray
    on_block: np.ndarray
    entropy: np.ndarray
    read: np.ndarray
    memory_on_memory: np.ndarray
    memory_entropy: np.ndarray
    written: np.ndarray
    place: np.ndarray
    source_slots: np.ndarray
    source_ids: np.ndarray
    source_weights: np.ndarray

    @property
    def blocks(self) -> range:
        """Indices of the blocks read."""
        return range(self.first_block, self.first_block + len(self.counts))

    @property
    def updates(self) -> int:
        """Number of blocks to which the memory attended in an update, `U`."""
        return len(self.written)

    def mean(self, name: str) -> np.ndarray | None:
        """Mean of a field over all tokens, or over all updates for a field of the memory.

        Returns:
          An array `[layers, ...]`, or None if the memory attended to no block.
        """
        values = getattr(self, name)
        if not len(values):
            return None
        return np.average(values, axis=0, weights=self.counts if name in _OF_TOKENS else None)

    def to_dict(self) -> dict:
        """Means per layer and head and per block and layer, as JSON values rounded to 6 digits."""
        listed = lambda values: None if values is None else np.round(values, 6).tolist()
        names = (*_OF_TOKENS, "memory_on_memory", "memory_entropy", "written", "place")
        per_head = [name for name in names if name not in ("read", "written", "place")]
        return {
            "blocks": len(self.counts),
            "first_block": self.first_block,
            "tokens": int(self.counts.sum()),
            "updates": self.updates,
            "mean": {name: listed(self.mean(name)) for name in names},
            "by_block": {name: listed(getattr(self, name).mean(axis=-1)) for name in per_head},
        }


_OF_TOKENS = ("on_memory", "on_past", "on_block", "entropy", "read")


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Attention probabilities of the kept blocks, layers and heads, and a summary of all.

    Attributes:
      block_size, memory_segments, memory_columns, window_mask: `S`, `M`, `N` and the mask of the model.
      blocks: indices of the kept blocks, ascending.
      layers: indices of the kept layers.
      heads: indices of the kept heads.
      slots: first slot that was read of each kept block, and the one after the last, int32
        `[blocks, 2]`.
      ids: token ids of the past blocks and the block itself, int32 `[blocks, (M + 1) * S]`; `NO_TOKEN`
        in empty slots, and for tokens that were read before the first block of these maps.
      tokens: attention of the block's tokens, `[blocks, layers, heads, S, N + M * S + S]`. Rows add up
        to 1; those of slots that were not read are 0.
      memory: attention of the memory while it compresses the block, `[blocks, layers, heads, N, N + S]`;
        0 for an incomplete block, which does not update the memory. No rows if the memory does not
        attend.
      rollout: rollout of each token through all layers within its block (`famx.analysis.tracing`),
        `[blocks, S, layers * N + M * S + S]`, over the memory's tokens of all layers, past blocks and
        the block itself. Rows add up to 1; those of slots that were not read are 0.
      texts: text of each token id that occurs in `ids`, the summary or the records.
      summary: statistics of all blocks, layers and heads.
      records: tokens, predictions and memory updates of these blocks and of the newest ones.
    """

    block_size: int
    memory_segments: int
    memory_columns: int
    window_mask: bool
    blocks: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    slots: np.ndarray
    ids: np.ndarray
    tokens: np.ndarray
    memory: np.ndarray
    rollout: np.ndarray
    texts: dict[int, str]
    summary: AttentionSummary
    records: BlockRecords

    def text(self, token: int) -> str:
        """Text of a token id; a middle dot for `NO_TOKEN`."""
        return "·" if token == NO_TOKEN else self.texts.get(int(token), str(token))

    def index(self, layer: int | None = None, head: int | None = None, block: int | None = None):
        """Array indices `(block, layer, head)` of a kept block, layer and head; None stays None.

        Raises:
          ValueError: one of them was not kept.
        """
        indices = []
        for name, value in (("block", block), ("layer", layer), ("head", head)):
            available = getattr(self, f"{name}s")
            if value is not None and value not in available:
                listed = ", ".join(map(str, available)) or "none"
                raise ValueError(f"There is no map of {name} {value}; kept {name}s: {listed}.")
            indices.append(None if value is None else available.index(value))
        return tuple(indices)

    def completed(self, block: int) -> bool:
        """Whether a kept block was read to its end, so that it updated the memory."""
        return bool(self.slots[self.index(block=block)[0], 1] == self.block_size)

    def as_picture(
        self, layer: int, head: int | None = None, blocks: int | Sequence[int] | None = None
    ) -> Picture:
        """Arranges the map of one layer and head as in the paper's Fig. 11.

        Args:
          layer: a kept layer.
          head: a kept head; None averages over the kept heads.
          blocks: one or several kept blocks; None takes all. Their past blocks appear as keys only.

        Raises:
          ValueError: the layer, the head or a block was not kept, or there is no block.
        """
        return make_picture(self, layer, head, blocks)

    def sources(self, layer: int, block: int) -> list[list[tuple[int, str, float]]]:
        """The tokens of a block that each memory token attended to most, averaged over heads.

        Args:
          layer: any layer, kept or not.
          block: any completed block, kept or not.

        Returns:
          For each memory token a list of `(slot, text, attention)`, strongest first.

        Raises:
          ValueError: the layer does not exist, or the memory did not attend to the block.
        """
        summary = self.summary
        layers = summary.on_memory.shape[1]
        if not 0 <= layer < layers:
            raise ValueError(f"There is no layer {layer}: the model has layers 0 to {layers - 1}.")
        update = block - summary.first_block
        if not 0 <= update < summary.updates:
            raise ValueError(f"The memory did not attend to block {block}, so there are no sources.")
        parts = summary.source_slots, summary.source_ids, summary.source_weights
        return [
            [(int(slot), self.text(token), float(weight)) for slot, token, weight in zip(*sources)]
            for sources in zip(*(part[update, layer] for part in parts))
        ]

    # Files.

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything to one npz file, atomically.

        Raises:
          OSError: the file cannot be written.
        """
        sizes = ("block_size", "memory_segments", "memory_columns", "window_mask")
        about = {name: getattr(self, name) for name in (*sizes, "blocks", "layers", "heads")}
        about |= {"format": _FORMAT, "texts": self.texts, "first_block": self.summary.first_block}
        about["recorded"] = self.records.blocks
        arrays = {name: getattr(self, name) for name in ("slots", "ids", "tokens", "memory", "rollout")}
        arrays |= {f"records_{name}": getattr(self.records, name) for name in FIELDS}
        for field in dataclasses.fields(AttentionSummary)[1:]:
            arrays[f"summary_{field.name}"] = getattr(self.summary, field.name)
        data = io.BytesIO()
        np.savez_compressed(data, about=np.array(json.dumps(about)), **arrays)
        write_bytes(path, data.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "AttentionMaps":
        """Reads a file written by `save`.

        Raises:
          OSError: the file cannot be read.
          ValueError: the file does not hold attention maps of this format.
        """
        wrong = f"{path} does not hold attention maps of this version: write it with AttentionMaps.save."
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            about = json.loads(str(arrays.pop("about")))
            if about.pop("format") != _FORMAT:
                raise ValueError(wrong)
            names = [field.name for field in dataclasses.fields(AttentionSummary)[1:]]
            summary = {name: arrays.pop(f"summary_{name}") for name in names}
            summary = AttentionSummary(about.pop("first_block"), **summary)
            records = {name: arrays.pop(f"records_{name}") for name in FIELDS}
            records = BlockRecords(tuple(about.pop("recorded")), **records)
            for name in ("blocks", "layers", "heads"):
                about[name] = tuple(about[name])
            about["texts"] = {int(token): text for token, text in about["texts"].items()}
            return cls(**about, **arrays, summary=summary, records=records)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(wrong) from error
