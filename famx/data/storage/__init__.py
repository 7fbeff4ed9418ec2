"""Files of text and of records, read by number without loading them whole."""

from famx.data.storage.opening import dataset_splits, open_records, open_split
from famx.data.storage.paths import matching_files, stdlib_text_files, validation_names
from famx.data.storage.records import (
    JsonlRecords,
    MappedRecords,
    RecordDocuments,
    TFRecordRecords,
    write_tfrecord_file,
    write_tfrecords,
)
from famx.data.storage.shards import complete_shards, shard_paths, tfds_shards
from famx.data.storage.tables import TableRecords
from famx.data.storage.text_files import TextFiles

__all__ = [
    "JsonlRecords",
    "MappedRecords",
    "RecordDocuments",
    "TableRecords",
    "TFRecordRecords",
    "TextFiles",
    "complete_shards",
    "dataset_splits",
    "matching_files",
    "open_records",
    "open_split",
    "shard_paths",
    "stdlib_text_files",
    "tfds_shards",
    "validation_names",
    "write_tfrecord_file",
    "write_tfrecords",
]
