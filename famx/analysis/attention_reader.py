"""Attention maps: reads a text block by block and keeps the attention of selected blocks.

Layers keep the queries and keys of a block in the collection `attention_inputs`; these are small. The
probabilities are then computed from them by the model's own `attend` and `visible`, one layer at a time,
so that memory holds one layer's maps in addition to the selected ones.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from famx.analysis.maps import AttentionMaps, AttentionSummary
from famx.analysis.pictures import NO_TOKEN
from famx.analysis.records import FIELDS, BlockRecords, predict
from famx.analysis.tracing import rollout
from famx.base.features import TOKENS
from famx.decoding.streaming import check_ids, check_position
from famx.lora.adapters import ADAPTERS
from famx.modules import Decoder, DecoderState
from famx.modules.attention import attend, visible
from famx.modules.config import DecoderConfig
from famx.modules.layer import INPUTS

_MAX_RECORD_BYTES = 128 << 20  # size of the records of the newest blocks, besides those of kept blocks


@flax.struct.dataclass
class LayerInputs:
    """What the attention of one block is computed from, of all layers.

    Attributes:
      queries: queries of the block's tokens `[layers, S, H, Dh]`.
      keys: keys of the past blocks and of the block itself `[layers, M + 1, S, K, Dh]`.
      memory_queries: queries of the memory while it compresses the block, `[layers, N, H, Dh]`;
        `[layers, 0, H, Dh]` if the memory does not attend.
      memory_keys: keys that the memory gives the tokens, `[layers, N, K, Dh]`.
    """

    queries: jax.Array
    keys: jax.Array
    memory_queries: jax.Array
    memory_keys: jax.Array


def token_probabilities(config: DecoderConfig, inputs: LayerInputs, block):
    """Attention of the block's tokens, `[H, S, N + M * S + S]`; `inputs` of one layer."""
    c = config
    keys = inputs.keys.reshape(-1, *inputs.keys.shape[2:])
    keys = jnp.concatenate([inputs.memory_keys, keys])
    missing = jnp.maximum(c.memory_segments - block, 0)
    mask = visible(c, jnp.arange(c.block_size)[:, None], jnp.arange(len(keys)), missing)
    probabilities = attend(inputs.queries, keys, keys, mask, c)[1]
    return probabilities.reshape(c.num_heads, *mask.shape)


def memory_probabilities(config: DecoderConfig, inputs: LayerInputs):
    """Attention of the memory while it compresses the block, `[H, N, N + S]`; `inputs` of one layer."""
    c = config
    keys = jnp.concatenate([inputs.memory_keys, inputs.keys[-1]])
    if not len(inputs.memory_queries):
        return jnp.zeros((c.num_heads, 0, len(keys)), jnp.promote_types(c.dtype, jnp.float32))
    probabilities = attend(inputs.memory_queries, keys, keys, None, c)[1]
    return probabilities.reshape(c.num_heads, -1, len(keys))


class AttentionReader:
    """Attention maps of texts of any length, with one program for every block.

    Args:
      module: the decoder; its computation settings (chunks, remat) do not matter.
      top: number of source tokens that the summary lists for each memory token.
    """

    def __init__(self, module: Decoder, top: int = 4):
        self.config = c = dataclasses.replace(module.config, blocks_per_chunk=None, remat="none")
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}.")
        top = min(top, c.block_size)
        self._rows = c.memory_columns if c.memory.attends else 0  # number of memory tokens that attend
        decoder = Decoder(c)

        @functools.partial(jax.jit, static_argnames="aligned")
        def step(params, state, tokens, targets, count, aligned):
            valid = jnp.arange(len(targets))[None] < count
            (hidden, after), collections = decoder.apply(
                {"params": params}, tokens, state, valid, aligned, method="read", mutable=[INPUTS]
            )
            layers = collections[INPUTS]["layers"]
            if c.memory.through_depth and not (aligned and c.block_size == len(targets)):
                layers = jax.tree.map(lambda x: x[0], layers)  # the first chunk, one block, of several
            first = lambda name: layers[name][0][:, 0]  # of the only example; memory_queries: first block
            queries = jnp.zeros((c.num_layers, 0, c.num_heads, c.head_dim), c.dtype)
            if c.memory.attends:
                queries = first("memory_queries")[:, 0]
            inputs = LayerInputs(first("queries"), first("keys"), queries, first("memory_keys"))
            start = state.position[0] % c.block_size
            block = state.position[0] // c.block_size
            first_update = state.updates[0] == 0
            figures = lambda layer: _figures(c, layer, block, start, start + count, top, first_update)
            predictions = predict(decoder, params, hidden[0], targets)
            return after, inputs, jax.lax.map(figures, inputs), predictions

        @jax.jit
        def maps(inputs, layer, heads, block):
            inputs = jax.tree.map(lambda x: x[layer], inputs)
            return token_probabilities(c, inputs, block)[heads], memory_probabilities(c, inputs)[heads]

        @jax.jit
        def rolled(inputs, block):
            mean = lambda layer: token_probabilities(c, layer, block).mean(0)
            return rollout(jax.lax.map(mean, inputs), c.memory_columns)

        self._step, self._maps, self._rolled = step, maps, rolled
        self._initial = jax.jit(
            lambda params: decoder.apply({"params": params}, 1, method="initial_state")
        )

    def num_bytes(self, blocks: int, layers: int | None = None, heads: int | None = None) -> int:
        """Number of bytes of the maps and rollouts of these blocks, layers and heads (None: all)."""
        c = self.config
        window = (c.memory_segments + 1) * c.block_size
        cells = c.block_size * (c.memory_columns + window)
        cells += self._rows * (c.memory_columns + c.block_size)
        count = (c.num_layers if layers is None else layers) * (c.num_heads if heads is None else heads)
        rolled = c.block_size * (c.num_layers * c.memory_columns + window)
        return blocks * (count * cells + rolled) * self._itemsize

    @property
    def _itemsize(self) -> int:
        return jnp.promote_types(self.config.dtype, jnp.float32).itemsize

    @property
    def _newest(self) -> int:
        """Number of newest blocks whose records are held."""
        c = self.config
        floats = 2 * c.block_size + c.num_layers * self._rows * (c.memory_columns + c.block_size + 1)
        return max(1, _MAX_RECORD_BYTES // (12 * c.block_size + floats * self._itemsize))

    def read(
        self,
        params,
        pieces: Iterable[Sequence[int] | Mapping[str, Any]],
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        blocks: Sequence[int] | None = None,
        state: DecoderState | None = None,
        label: Callable[[int], str] = str,
    ) -> AttentionMaps:
        """Reads one text, or one sequence of what the model reads (`DecoderConfig.frontend`).

        Args:
          params: the decoder's parameters, adapters merged into them.
          pieces: the text's token ids, bos included, in pieces of any size: `[ids]`, or what an
            iterator yields; of a model with a frontend, dicts of its features, each `[n, ...]`. One
            block is held at a time.
          layers, heads: layers and heads whose maps are kept; None: all.
          blocks: blocks whose maps are kept, by index in the sequence; -1 is the last, -2 the one
            before. None: all, which grows with the text.
          state: state of one example to resume from; None: the start.
          label: text of a token id, for axes.

        Returns:
          The maps and the summary of all blocks. On the device nothing grows with the text; the
          summary grows by a few figures per block, and the records of the newest blocks up to 128 MiB.
          Positions that hold no token have the id `NO_TOKEN`, and where features are read, no token
          follows.

        Raises:
          ValueError: there is no token, one is not in the vocabulary, the pieces are not what the model
            reads, a layer, head or block does not exist, or there are adapters among the parameters.
        """
        c = self.config
        if any(path[-1] in ADAPTERS for path in flatten_dict(params)):
            raise ValueError(
                "There are adapters among the parameters: merge them first (famx.lora.merged)."
            )
        layers = _choice("layer", layers, c.num_layers)
        heads = _choice("head", heads, c.num_heads)
        if state is not None and state.batch_size != 1:
            raise ValueError(f"Maps are of one text, but the state has {state.batch_size} examples.")
        wanted = None if blocks is None else set(blocks)
        recent = collections.deque(maxlen=max((-b for b in wanted or () if b < 0), default=0))
        kept, counts, figures = {}, [], collections.defaultdict(list)
        newest = collections.deque(maxlen=self._newest)

        def keep(step):
            maps = [self._maps(step.inputs, layer, np.array(heads), step.index) for layer in layers]
            maps = (np.stack(list(map(np.asarray, part))) for part in zip(*maps))
            rolled = np.array(self._rolled(step.inputs, step.index))
            # Not the step, whose inputs are on the device.
            kept[step.index] = step.record, (step.slots, step.window, *maps, rolled)

        for step in self._steps(params, pieces, state):
            index, (start, end) = step.index, step.slots
            counts.append(end - start)
            for name, x in step.figures.items():
                figures[name].append(x)
            newest.append((index, step.record))
            if wanted is None or index in wanted:
                keep(step)
            recent.append(step)
        if not counts:
            raise ValueError("There is nothing to read: give at least one token.")
        stop, first = index + 1, index + 1 - len(counts)
        for step in recent:
            if step.index - stop in wanted and step.index not in kept:
                keep(step)
        for b in sorted(wanted or ()):
            if not first <= (b + stop if b < 0 else b) < stop:
                raise ValueError(f"There is no block {b}: the text has the blocks {first} to {index}.")

        summary = self._summary(first, counts, figures)
        records = _records(dict(newest) | {b: record for b, (record, _) in kept.items()})
        chosen = tuple(sorted(kept))
        size, past = c.block_size, c.memory_segments * c.block_size
        shapes = (
            (2,), (past + size,), (len(layers), len(heads), size, c.memory_columns + past + size),
            (len(layers), len(heads), self._rows, c.memory_columns + size),
            (size, c.num_layers * c.memory_columns + past + size),
        )  # fmt: skip
        slots, ids, tokens, memory, rolled = (
            np.array([kept[b][1][i] for b in chosen]).reshape(len(chosen), *shape)
            for i, shape in enumerate(shapes)
        )
        read = (np.arange(size) >= slots[:, :1]) & (np.arange(size) < slots[:, 1:])
        tokens = np.where(read[:, None, None, :, None], tokens, 0)
        rolled = np.where(read[:, :, None], rolled, 0)
        memory = np.where((slots[:, 1] == size)[:, None, None, None, None], memory, 0)
        seen = [ids, summary.source_ids, records.ids, records.predicted]
        seen = np.unique(np.concatenate([x.ravel() for x in seen])).astype(int).tolist()
        texts = {token: label(token) for token in seen if token != NO_TOKEN}
        return AttentionMaps(
            size, c.memory_segments, c.memory_columns, c.window_mask, chosen, layers, heads,
            slots.astype(np.int32), ids.astype(np.int32), tokens, memory, rolled, texts, summary, records,
        )  # fmt: skip

    def _steps(self, params, pieces, state) -> Iterator["_Step"]:
        """Reads block by block."""
        c = self.config
        state = self._initial(params) if state is None else state
        index, start = divmod(int(state.position[0]), c.block_size)
        window = np.full((c.memory_segments + 1, c.block_size), NO_TOKEN, np.int32)
        pieces = map(self._checked, pieces)
        for read, following in _with_next(_blocks(pieces, c.block_size, c.block_size - start)):
            count, ids = _length(read), _ids(read)
            end = start + count
            check_position(np.array([index * c.block_size + end], np.int64))
            window[-1, start:end] = ids
            # A single token would not be read as a chunk.
            width = max(c.block_size, 2)
            targets = np.full(width, NO_TOKEN, np.int32)
            if not isinstance(read, dict):
                targets[: count - 1] = ids[1:]
                if following is not None:
                    targets[count - 1] = following[0]
            padded = jax.tree.map(functools.partial(_padded, length=width), read)
            state, inputs, *results = self._step(
                params, state, padded, targets, count, aligned=start == 0
            )
            # Copies: a view would keep the device's array.
            figures, predictions = jax.tree.map(np.array, results)
            record = {"slots": np.array([start, end]), "ids": window[-1].copy()}
            for name, x in predictions.items():
                record[name] = np.full(c.block_size, NO_TOKEN if name == "predicted" else 0, x.dtype)
                record[name][start:end] = x[:count]
            complete = end == c.block_size
            for name in ("updates", "shares"):
                record[name] = figures.pop(name) * complete
            if self._rows and complete:
                figures["source_ids"] = window[-1][figures["source_slots"]]
            else:
                figures = {name: figures[name] for name in _OF_EVERY_BLOCK}
            yield _Step(index, (start, end), window.reshape(-1).copy(), inputs, figures, record)
            window = np.roll(window, -1, axis=0)
            window[-1] = NO_TOKEN
            index, start = index + 1, 0

    def _checked(self, piece):
        """A piece as an array of ids, or as a dict of the arrays that the model reads.

        Raises:
          ValueError: it is not what the model reads.
        """
        c, given = self.config, isinstance(piece, Mapping)
        if not c.frontend.accepts(given):
            raise ValueError(c.frontend.refusal(given))
        if not given:
            ids = np.asarray(piece, np.int64)
            check_ids(ids, c.vocab_size)
            return ids.astype(np.int32)
        if any(feature.name not in piece for feature in c.frontend.features):
            raise ValueError(c.frontend.refusal(False))
        count = len(piece[c.frontend.features[0].name])
        arrays = {x.name: x.check(piece[x.name], count) for x in c.frontend.features}
        check_ids(arrays.get(TOKENS.name), c.vocab_size)
        return arrays

    def _summary(self, first, counts, figures):
        """Summary of all blocks; arrays have length 0 if no block has that figure."""
        c = self.config
        shapes = {"written": (self._rows,), "place": (self._rows,), "read": (c.memory_columns,)}
        shapes |= dict.fromkeys(("source_slots", "source_ids", "source_weights"), (self._rows, 0))
        gathered = {}
        for field in dataclasses.fields(AttentionSummary)[2:]:
            is_int = field.name in ("source_slots", "source_ids")
            shape = (0, c.num_layers, *shapes.get(field.name, (c.num_heads,)))
            empty = np.zeros(shape, np.int32 if is_int else np.float32)
            gathered[field.name] = np.stack(figures[field.name]) if figures[field.name] else empty
        return AttentionSummary(first, np.array(counts, np.int32), **gathered)


_OF_EVERY_BLOCK = ("on_memory", "on_past", "on_block", "entropy", "read")


@dataclasses.dataclass(frozen=True)
class _Step:
    """One block that was read: its part of the summary in `figures`, of `BlockRecords` in `record`."""

    index: int
    slots: tuple[int, int]
    window: np.ndarray
    inputs: LayerInputs
    figures: dict[str, np.ndarray]
    record: dict[str, np.ndarray]


def _records(records: dict[int, dict[str, np.ndarray]]) -> BlockRecords:
    """Records by the index of their block, as arrays."""
    blocks = tuple(sorted(records))
    stacked = {name: np.stack([records[block][name] for block in blocks]) for name in FIELDS}
    whole = {name: stacked[name].astype(np.int32) for name in ("slots", "ids", "predicted", "rank")}
    return BlockRecords(blocks, **stacked | whole)


def _figures(config: DecoderConfig, inputs: LayerInputs, block, start, end, top, first_update):
    """A block's part of `AttentionSummary` without `source_ids`, and of `BlockRecords`.

    `inputs` are those of one layer; `first_update` says whether the memory was not updated before.
    """
    n, slots = config.memory_columns, jnp.arange(config.block_size)
    past = n + config.memory_segments * config.block_size
    p = token_probabilities(config, inputs, block)
    weight = ((slots >= start) & (slots < end)) / (end - start)
    mean = lambda x: jnp.einsum("hsx,s->hx", x, weight.astype(x.dtype))
    entropy = lambda x: jnp.sum(jax.scipy.special.entr(x), axis=-1)
    masses = mean(p)
    out = {
        "on_memory": masses[:, :n].sum(-1),
        "on_past": masses[:, n:past].sum(-1),
        "on_block": masses[:, past:].sum(-1),
        "entropy": mean(entropy(p)[..., None])[:, 0],
        "read": masses[:, :n].mean(0),
    }
    m = memory_probabilities(config, inputs)
    out["updates"], out["shares"] = m.mean(0), jnp.zeros(m.shape[1], m.dtype)
    if not config.memory.attends:
        return out
    sources = m[..., n:].mean(0)
    written = sources.sum(-1)
    weights, source_slots = jax.lax.top_k(sources, top)
    return out | {
        "shares": config.memory.attention_share(written, first_update),
        "memory_on_memory": m[..., :n].sum(-1).mean(-1),
        "memory_entropy": entropy(m).mean(-1),
        "written": written,
        "place": sources @ slots.astype(m.dtype) / jnp.maximum(written, jnp.finfo(m.dtype).tiny),
        "source_slots": source_slots.astype(jnp.int32),
        "source_weights": weights,
    }


def _length(read) -> int:
    """Number of positions of an array `[n, ...]`, or of a dict of these."""
    return len(jax.tree.leaves(read)[0])


def _ids(read):
    """Token ids of an array or a dict, int32 `[n]`; `NO_TOKEN` where no feature holds tokens."""
    if not isinstance(read, dict):
        return read
    return read.get(TOKENS.name, np.full(_length(read), NO_TOKEN, np.int32))


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    """`array` `[n, ...]` as a batch of one example, with zeros up to `length`: `[1, length, ...]`."""
    return np.pad(array, [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1))[None]


def _blocks(pieces: Iterable, size: int, first: int) -> Iterator:
    """The positions of `pieces`, which are arrays or dicts of arrays, in blocks of `first` and then of
    `size`, the last one shorter."""
    held, room = None, first
    for piece in pieces:
        held = piece if held is None else jax.tree.map(lambda *x: np.concatenate(x), held, piece)
        while _length(held) >= room:
            yield jax.tree.map(lambda x, end=room: x[:end], held)
            held, room = jax.tree.map(lambda x, end=room: x[end:], held), size
    if held is not None and _length(held):
        yield held


def _with_next(blocks: Iterator) -> Iterator[tuple[Any, Any]]:
    """Each of the blocks with the one after it; None after the last."""
    previous = None
    for block in blocks:
        if previous is not None:
            yield previous, block
        previous = block
    if previous is not None:
        yield previous, None


def _choice(name: str, chosen: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The indices `chosen` without repetition; None: all `count`."""
    chosen = range(count) if chosen is None else chosen
    if not len(chosen):
        raise ValueError(f"No {name} is selected: select at least one, or leave {name}s out for all.")
    for i in chosen:
        if not 0 <= i < count:
            raise ValueError(f"There is no {name} {i}: the model has {name}s 0 to {count - 1}.")
    return tuple(dict.fromkeys(int(i) for i in chosen))
