"""Attention maps of a text: exact probabilities of chosen blocks, layers and heads, figures of all.

`AttentionReader` makes them. Column layout of the tokens' maps is the model's:
`[N memory | M * S past, oldest first | S own block]`; of the memory's maps `[N memory | S own block]`.
"""

import dataclasses
import io
import json
import os
from collections.abc import Sequence

import numpy as np

from famx.analysis.pictures import NO_TOKEN, Picture, make_picture
from famx.base.files import write_bytes

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class AttentionSummary:
    """What every block did, whether its maps were kept or not: a few figures per block.

    Means over tokens are over the tokens that were read of the block. The memory's figures exist for
    the `U` blocks that were completed, the first ones: the last may be incomplete. Masses are shares
    of attention, entropies are in nats. All are float32 at least.

    Attributes:
      first_block: index in its sequence of the first block read.
      counts: tokens read of each block, int32 `[T]`.
      on_memory, on_past, on_block: share of the tokens' attention that goes to the memory, to past
        blocks and to their own block, `[T, layers, H]`; they add up to 1.
      entropy: of the tokens' attention, `[T, layers, H]`.
      read: attention of the tokens to each memory token, mean over heads, `[T, layers, N]`.
      memory_on_memory: share of the memory's attention that goes to the memory and not to the block
        that it compresses, mean over memory tokens, `[U, layers, H]`.
      memory_entropy: of the memory's attention, likewise.
      written: share of each memory token's attention that goes to the block, mean over heads,
        `[U, layers, N]`.
      place: mean slot in the block of that attention, `[U, layers, N]`.
      source_slots: the slots of the block that each memory token attends to most, mean over heads,
        strongest first, int32 `[U, layers, N, top]`.
      source_ids: ids of the tokens in these slots, int32; `NO_TOKEN` where they were read before.
      source_weights: their attention.
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
        """Blocks that were completed, `U`; 0 without memory."""
        return len(self.written)

    def mean(self, name: str) -> np.ndarray | None:
        """A figure's mean over tokens (the memory's: over updates), `[layers, ...]`; None without any."""
        values = getattr(self, name)
        if not len(values):
            return None
        return np.average(values, axis=0, weights=self.counts if name in _OF_TOKENS else None)

    def to_dict(self) -> dict:
        """Means per layer and head, and per block and layer, as JSON can hold them."""
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
    """The maps of the kept blocks, layers and heads, and the summary of all.

    Attributes:
      block_size, memory_segments, memory_columns, window_mask: `S`, `M`, `N` and the mask of the model.
      blocks: which were kept, by their index in the sequence, ascending.
      layers, heads: which were kept.
      slots: of each kept block the first slot that was read and the one behind the last, int32
        `[blocks, 2]`.
      ids: tokens in the slots of the past and the own blocks, int32 `[blocks, (M + 1) * S]`;
        `NO_TOKEN` where there is none, or one that was read before.
      tokens: probabilities of block tokens `[blocks, layers, heads, S, N + M * S + S]`; rows of slots
        that were not read are 0, all others add up to 1.
      memory: probabilities of the memory's queries while it compresses the block `[blocks, layers,
        heads, N, N + S]`; 0 for an incomplete block, by which the memory is not updated.
      texts: of the token ids that occur in `ids` and in the summary.
      summary: of all blocks, all layers and all heads.
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
    texts: dict[int, str]
    summary: AttentionSummary

    def text(self, token: int) -> str:
        """Text of a token id, a middle dot for `NO_TOKEN`."""
        return "·" if token == NO_TOKEN else self.texts.get(int(token), str(token))

    def index(self, layer: int | None = None, head: int | None = None, block: int | None = None):
        """`(block, layer, head)`: where these stand in the arrays; None stays None.

        Raises:
          ValueError: one of them was not kept.
        """
        found = []
        for name, value in (("block", block), ("layer", layer), ("head", head)):
            kept = getattr(self, f"{name}s")
            if value is not None and value not in kept:
                listed = ", ".join(map(str, kept)) or "none"
                raise ValueError(f"There is no map of {name} {value}: kept are {listed}.")
            found.append(None if value is None else kept.index(value))
        return tuple(found)

    def completed(self, block: int) -> bool:
        """Whether a kept block was full in the end, and the memory updated by it."""
        return bool(self.slots[self.index(block=block)[0], 1] == self.block_size)

    def as_picture(
        self, layer: int, head: int | None = None, blocks: int | Sequence[int] | None = None
    ) -> Picture:
        """One layer's and head's map of one or several blocks (Fig. 11 of the paper).

        Args:
          layer: a kept one.
          head: a kept one; None: mean over the kept heads.
          blocks: kept ones; None: all of them. Past blocks stand before them as keys alone.

        Raises:
          ValueError: something was not kept.
        """
        return make_picture(self, layer, head, blocks)

    def sources(self, layer: int, block: int) -> list[list[tuple[int, str, float]]]:
        """What each memory token compressed: `(slot, text, attention)`, strongest first, mean over heads.

        Args:
          layer: any, kept or not.
          block: any completed one, kept or not.

        Raises:
          ValueError: there is no such layer, or the memory was not updated by the block.
        """
        summary = self.summary
        layers = summary.on_memory.shape[1]
        if not 0 <= layer < layers:
            raise ValueError(f"There is no layer {layer}: the model has {layers}.")
        update = block - summary.first_block
        if not 0 <= update < summary.updates:
            raise ValueError(f"The memory was not updated by block {block}, so it has no sources there.")
        parts = summary.source_slots, summary.source_ids, summary.source_weights
        return [
            [(int(slot), self.text(token), float(weight)) for slot, token, weight in zip(*found)]
            for found in zip(*(part[update, layer] for part in parts))
        ]

    # Files.

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything to one npz file, which appears whole or not at all."""
        sizes = ("block_size", "memory_segments", "memory_columns", "window_mask")
        about = {name: getattr(self, name) for name in (*sizes, "blocks", "layers", "heads")}
        about |= {"format": _FORMAT, "texts": self.texts, "first_block": self.summary.first_block}
        arrays = {name: getattr(self, name) for name in ("slots", "ids", "tokens", "memory")}
        for field in dataclasses.fields(AttentionSummary)[1:]:
            arrays[f"summary_{field.name}"] = getattr(self.summary, field.name)
        data = io.BytesIO()
        np.savez_compressed(data, about=np.array(json.dumps(about)), **arrays)
        write_bytes(path, data.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "AttentionMaps":
        """What `save` wrote.

        Raises:
          OSError: the file cannot be read.
          ValueError: it holds no attention maps of this format.
        """
        wrong = f"{path} holds no attention maps that can be read here: make it with AttentionMaps.save."
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            about = json.loads(str(arrays.pop("about")))
            if about.pop("format") != _FORMAT:
                raise ValueError(wrong)
            names = [field.name for field in dataclasses.fields(AttentionSummary)[1:]]
            summary = {name: arrays.pop(f"summary_{name}") for name in names}
            summary = AttentionSummary(about.pop("first_block"), **summary)
            for name in ("blocks", "layers", "heads"):
                about[name] = tuple(about[name])
            about["texts"] = {int(token): text for token, text in about["texts"].items()}
            return cls(**about, **arrays, summary=summary)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(wrong) from error
