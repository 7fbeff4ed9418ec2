"""Batches of rows from documents: continuous lanes, packed rows, prefetching."""

from famx.data.rows.batches import check_shards, decoder_batch, draw_padding, padded
from famx.data.rows.documents import CountedDocuments, Documents, tokens_and_weights
from famx.data.rows.lanes import ContinuousLanes
from famx.data.rows.packing import PackedRows
from famx.data.rows.prefetching import Prefetch

__all__ = [
    "ContinuousLanes",
    "CountedDocuments",
    "Documents",
    "PackedRows",
    "Prefetch",
    "check_shards",
    "decoder_batch",
    "draw_padding",
    "padded",
    "tokens_and_weights",
]
