"""The attention page: one HTML file with its data, that needs neither a network nor a server.

Its code is in `famx/analysis/page/`: `page.html`, `page.css`, `data.js` (decoding and traces) and
`view.js`. Each map is stored by rows, one for each query, compressed: of every row the keys of largest
weight, all of them if they fit. `docs/attention_maps.md` says what the page shows.
"""

import base64
import html
import importlib.resources
import json
import re
import zlib

import numpy as np

from famx.analysis.maps import AttentionMaps
from famx.analysis.pictures import NO_TOKEN
from famx.analysis.records import BlockRecords
from famx.base.errors import ConfigError
from famx.base.palette import MEMORY, OWN, PAST, UNSEEN

_MAX_WEIGHTS = 2_500_000  # number of weights of all maps
_MAX_TRACED = 1_000_000  # number of weights of all rollouts and updates
_MAX_TOKENS = 16_384  # number of tokens of the text
_FEWEST = 4  # smallest number of keys per query that is still a map
_ROOTS, _WEIGHTS = 255, 65535  # scales: maps hold square roots in a byte, the rest weights in two


def attention_page(maps: AttentionMaps, title: str = "Attention maps") -> str:
    """Renders the text, its predictions, and all kept blocks, layers and heads as an HTML page.

    Args:
      maps: the maps.
      title: heading of the page.

    Raises:
      ConfigError: no block was kept, or too many queries for a page.
    """
    if not maps.blocks:
        raise ConfigError("There is nothing to show: no block was kept.")
    heads = [*maps.heads, *(["mean"] if len(maps.heads) > 1 else [])]
    rows = maps.memory.shape[3] + maps.block_size
    queries = len(maps.blocks) * len(maps.layers) * len(heads) * rows
    keys = min(maps.tokens.shape[-1], _MAX_WEIGHTS // queries)
    if keys < min(_FEWEST, maps.tokens.shape[-1]):
        raise ConfigError(
            f"The page would hold {queries:,} queries, more than the limit of"
            f" {_MAX_WEIGHTS // _FEWEST:,}: keep fewer blocks, layers or heads."
        )
    values = {}
    for i, block in enumerate(maps.blocks):
        for j, layer in enumerate(maps.layers):
            for head in heads:
                values[f"{block}/{layer}/{head}"] = _map_rows(maps, i, j, head, keys)

    shown = _shown(maps)
    chosen = [maps.records.blocks.index(block) for block in shown]
    pick = lambda name: getattr(maps.records, name)[chosen]
    updates, rollout = pick("updates"), maps.rollout
    traced = updates.shape[0] * updates.shape[1] * updates.shape[2] + rollout.shape[0] * rollout.shape[1]
    followed = max(_FEWEST, _MAX_TRACED // max(traced, 1))
    texts, position = [], {NO_TOKEN: 0}  # position: place of the text of a token id, from 1
    for token in np.unique(np.concatenate([pick("ids"), pick("predicted"), _past_ids(maps)])).tolist():
        if token != NO_TOKEN:
            texts.append(maps.text(token))
            position[token] = len(texts)
    places = np.vectorize(position.get, otypes=[np.uint32])
    data = {
        "size": maps.block_size,
        "segments": maps.memory_segments,
        "columns": maps.memory_columns,
        "rows": maps.memory.shape[3],
        "windowMask": bool(maps.window_mask),
        "modelLayers": int(maps.summary.on_memory.shape[1]),
        "tokens": int(maps.summary.counts.sum()),
        "lastBlock": int(maps.summary.blocks[-1]),
        "firstBlock": maps.summary.first_block,
        "layers": maps.layers,
        "heads": heads,
        "kept": maps.blocks,
        "blocks": shown,
        "slots": pick("slots").tolist(),
        "texts": texts,
        "ids": _packed(places(pick("ids"))),
        "past": {block: _packed(places(ids)) for block, ids in zip(maps.blocks, maps.ids)},
        "predicted": _packed(places(pick("predicted"))),
        "rank": _packed(pick("rank").astype(np.uint32)),
        "probability": _packed(_coded(pick("probability"), _WEIGHTS)),
        "nextProbability": _packed(_coded(pick("next_probability"), _WEIGHTS)),
        "shares": _packed(_coded(pick("shares"), _WEIGHTS)),
        "maps": values,
        "rollout": {block: _rows(of, followed, _WEIGHTS) for block, of in zip(maps.blocks, rollout)},
        "updates": [_rows(of.reshape(-1, of.shape[-1]), followed, _WEIGHTS) for of in updates],
        "colors": {"memory": MEMORY, "past": PAST, "own": OWN, "unseen": UNSEEN},
    }
    # A "</script>" in a token's text would end the script element that holds the data.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(title), "DATA": text}
    parts |= {name: _file(file) for name, file in _FILES.items()}
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], _file("page.html"))


_FILES = {"STYLE": "page.css", "CODE": "data.js", "VIEW": "view.js"}


def _file(name: str) -> str:
    return importlib.resources.files("famx.analysis").joinpath("page", name).read_text(encoding="utf-8")


def _shown(maps: AttentionMaps) -> list[int]:
    """The blocks on the page: those whose maps are kept, and the newest ones for which there is room."""
    records: BlockRecords = maps.records
    room = max(1, _MAX_TOKENS // maps.block_size - len(maps.blocks))
    return sorted({*maps.blocks, *records.blocks[-room:]})


def _past_ids(maps: AttentionMaps) -> np.ndarray:
    return maps.ids.reshape(-1, maps.block_size)


def _map_rows(maps: AttentionMaps, block: int, layer: int, head: int | str, keys: int) -> dict:
    """Rows of one map: the memory's queries, then the tokens'; columns as in `AttentionMaps.tokens`."""
    of_memory, of_tokens = (
        x.mean(axis=0) if head == "mean" else x[maps.heads.index(head)]
        for x in (maps.memory[block, layer], maps.tokens[block, layer])
    )
    n, past = maps.memory_columns, maps.memory_segments * maps.block_size
    gap = np.zeros((len(of_memory), past), of_memory.dtype)
    of_memory = np.concatenate([of_memory[:, :n], gap, of_memory[:, n:]], axis=1)
    return _rows(np.concatenate([of_memory, of_tokens]), keys, _ROOTS)


def _rows(values: np.ndarray, keys: int, scale: int) -> dict:
    """Packs rows of weights `[rows, columns]`, of each the `keys` largest.

    Returns:
      `rows`, `columns`, `keys` per row, their `codes` `[rows, keys]` and, if some were left out,
      `steps`: the distance of each key from the one before it, of the first from 0.
    """
    rows, columns = values.shape
    keys = min(keys, columns)
    packed = {"rows": rows, "columns": columns, "keys": keys, "scale": scale}
    if keys < columns:
        kept = np.sort(np.argpartition(values, columns - keys, axis=-1)[:, columns - keys :], axis=-1)
        values = np.take_along_axis(values, kept, axis=-1)
        packed["steps"] = _packed(np.diff(kept, axis=-1, prepend=0).astype(np.uint32))
    weights = np.sqrt(values) if scale == _ROOTS else values
    return packed | {"codes": _packed(_coded(weights, scale))}


def _coded(values: np.ndarray, scale: int) -> np.ndarray:
    codes = np.round(np.clip(values, 0, 1) * scale)
    return codes.astype(np.uint8 if scale == _ROOTS else np.uint16)


def _packed(array: np.ndarray) -> str:
    """Unsigned integers as base64 of zlib's format: all first bytes, then all second ones, and so on."""
    size = array.dtype.itemsize
    planes = array.astype(array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).reshape(-1, size).T
    return base64.b64encode(zlib.compress(np.ascontiguousarray(planes).tobytes(), 9)).decode()
