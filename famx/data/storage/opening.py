"""Records of a file or data set in whatever format it is: JSON lines, Parquet, Arrow.

A data set is a directory as Hugging Face publishes or saves them:

* `save_to_disk` of a `Dataset` (with `state.json`), or of a `DatasetDict` (with a folder for each split),
* files whose names give their split, such as `data/train-00000-of-00005.parquet`, `train.parquet`,
  `train/0000.parquet` or `default/train/0000.parquet`.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import Any, Protocol

from famx.base.errors import ConfigError
from famx.data.storage import places
from famx.data.storage.paths import matching_files
from famx.data.storage.records import JsonlRecords
from famx.data.storage.tables import ARROW, PARQUET, TableRecords

JSONL = (".jsonl", ".ndjson")
_SPLIT_OF_WORD = {
    word: split
    for split, words in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing", "eval", "evaluation"),
    }.items()
    for word in words
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


class Rows(Protocol):
    """Records by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> dict[str, Any]: ...


def open_records(
    paths: str | os.PathLike | Sequence[str | os.PathLike], fields: Sequence[str] | None = None
) -> Rows:
    """Open records of JSON lines, Parquet or Arrow files; the endings of the names tell which.

    Files of other endings are read as JSON lines.

    Args:
      paths: path or glob pattern, or several; files are read in sorted order.
      fields: columns to read, which the records must have; None: all columns.

    Raises:
      ConfigError: the package pyarrow is missing, or tables are to be read from a store.
      ValueError: as `JsonlRecords` and `TableRecords`, or the files have several formats.
    """
    patterns = [paths] if isinstance(paths, str | os.PathLike) else paths
    files = matching_files([os.fspath(path) for path in patterns])
    tables = [path for path in files if path.endswith(PARQUET + ARROW)]
    if tables and len(tables) < len(files):
        other = next(path for path in files if path not in tables)
        raise ValueError(f"{tables[0]} and {other} have different formats; name files of one format.")
    if tables and places.is_remote(tables[0]):
        raise ConfigError(
            f"{tables[0]} is a table, and tables are read from mounted file systems only: mount the"
            " store, or give JSON lines."
        )
    return TableRecords(files, fields) if tables else JsonlRecords(files, fields)


def open_split(folder: str, split: str, fields: Sequence[str] | None = None) -> Rows:
    """Open the records of a split: `FOLDER/SPLIT.jsonl`, or Parquet or Arrow files in the folder.

    Raises:
      FileNotFoundError: there is neither.
      ConfigError, ValueError: as `open_records`.
    """
    path = os.path.join(folder, f"{split}.jsonl")
    files = [path] if os.path.isfile(path) else dataset_splits(folder).get(split, [])
    if not files or (files != [path] and files[0].endswith(JSONL)):
        raise FileNotFoundError(None, "missing", path)
    return open_records(files, fields)


def dataset_splits(folder: str) -> dict[str, list[str]]:
    """Paths of the files of each split of a data set, sorted; {} if the folder is none.

    Usual names of splits, such as `valid` and `dev`, become "train", "validation" or "test"; others are
    kept. Files that name no split are those of "train".

    Raises:
      ValueError: a list of files in the folder is broken.
    """
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        names = _read_json(os.path.join(folder, "dataset_dict.json"), "splits")
        return {_split_name(name): _saved_files(os.path.join(folder, name)) for name in names}
    if os.path.isfile(os.path.join(folder, "state.json")):
        return {"train": _saved_files(folder)}
    for endings in (PARQUET, ARROW, JSONL):
        splits: dict[str, list[str]] = {}
        for place, split in _places(folder):
            for name in sorted(os.listdir(place)):
                if name.endswith(endings) and not name.startswith(("cache-", ".")):
                    path = os.path.abspath(os.path.join(place, name))
                    splits.setdefault(_split_of_file(name) or split or "train", []).append(path)
        if splits:
            return splits
    return {}


def _places(folder: str) -> list[tuple[str, str | None]]:
    """Folders of a data set that may hold files, and the split that a folder's name gives."""
    places = []
    for place in (folder, os.path.join(folder, "data"), os.path.join(folder, "default")):
        if os.path.isdir(place):
            places.append((place, None))
            inner = sorted(x.name for x in os.scandir(place) if x.is_dir())
            places += [
                (os.path.join(place, name), _SPLIT_OF_WORD[name.lower()])
                for name in inner if name.lower() in _SPLIT_OF_WORD
            ]  # fmt: skip
    return places


def _split_of_file(name: str) -> str | None:
    """The split that the name of a file gives."""
    stem = name.rpartition(".")[0]
    shard = _SHARD.fullmatch(stem)
    if shard:  # train, train_sft or, in the cache of `datasets`, NAME-train
        return _split_name(shard[1].rpartition("-")[2])
    words = re.split(r"[\W\d_]+", stem.lower())
    return next((_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD), None)


def _split_name(name: str) -> str:
    return _SPLIT_OF_WORD.get(name.lower(), name)


def _saved_files(folder: str) -> list[str]:
    """The files of a saved `Dataset`; its folder may also hold caches, which are not part of it."""
    files = _read_json(os.path.join(folder, "state.json"), "_data_files")
    return [os.path.abspath(os.path.join(folder, file["filename"])) for file in files]


def _read_json(path: str, key: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)[key]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{path} is not what `datasets` writes: it has no list '{key}'; save the data set again."
        ) from error
