"""Your records as a task: whole texts, or inputs and targets, in JSON lines, Parquet or Arrow files.

    from __gin__ import dynamic_registration
    from famx import modules
    include "gin_configs/runs/pretrain.gin"
    include "gin_configs/models/tiny.gin"
    MIXTURE_OR_TASK_NAME = "own_records"
    TASK_FEATURE_LENGTHS = {"targets": 1024}
    STATE_PASSING = "continuous"
    modules.DecoderConfig.vocab_size = 259
    TASK_OPTIONS = {"files": "/data/*.jsonl", "max_tokens": 8192}

Give MODEL_DIR, BATCH_SIZE and TRAIN_STEPS on the command line. A record is `{"text": ...}`, or
`{"inputs": ..., "targets": ...}`, where targets may be a list of references; only the targets have a
loss. `files` may also be the directory of a Hugging Face data set. `own_chat` reads conversations.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from famx.base.ranges import Name, Paths, Seed, ShareBelowOne
from famx.base.values import checked
from famx.data.formats.texts import Part
from famx.data.metrics import accuracy, rouge, token_f1
from famx.data.storage import dataset_splits, open_records
from famx.data.storage.paths import listed, matching_files
from famx.data.storage.tables import ARROW, PARQUET
from famx.data.tasks.examples import Example, Records
from famx.data.tasks.text_task import TextTask
from famx.data.vocabularies import AnyVocabulary, Vocabulary


@checked
def own_records(
    files: Paths,
    text: Name = "text",
    inputs: Name = "inputs",
    targets: Name = "targets",
    validation_files: Paths | None = None,
    validation_fraction: ShareBelowOne = 0.05,
    seed: Seed = 0,
    name: Name = "own_records",
    vocabulary: AnyVocabulary = "bytes",
    **options: Any,
) -> TextTask:
    """Make the task of your records; the columns of the first record decide its kind.

    Args:
      files, validation_files, validation_fraction, seed: see `OwnSplits`.
      text, inputs, targets: names of the columns; either `text` or the other two must exist.
      name: name for messages.
      vocabulary: see `famx.data.vocabularies.as_vocabulary`.
      **options: other settings of the task, such as `max_tokens` and `metrics`.

    Raises:
      ConfigError: an option is out of range, or a package is missing.
      ValueError: no file matches, there is no record, a line is broken (the message names file and
        line), or a column is missing.
    """
    splits = OwnSplits(files, validation_files, validation_fraction, seed)
    first = splits.first()
    has_text = text in first
    columns = (text,) if has_text else (inputs, targets)
    if not has_text and (inputs not in first or targets not in first):
        raise ValueError(
            f"The records have neither a column '{text}' nor both '{inputs}' and '{targets}'; their "
            f"columns are {listed(first)}. Give the names of the columns."
        )

    def preprocess(record: Mapping[str, Any]) -> Example:
        if has_text:
            return {"inputs": "", "targets": _string(record[text], text), "references": []}
        answers = record[targets]
        answers = [_string(x, targets) for x in (answers if isinstance(answers, list) else [answers])]
        return {
            "inputs": _string(record[inputs], inputs),
            "targets": answers[0] if answers else "",
            "references": answers,
        }

    task = dict(metrics=(rouge, token_f1, accuracy)) | options
    return splits.task(
        name, columns, preprocess, "documents" if has_text else "generation", vocabulary, **task)


@checked
class OwnSplits:
    """The splits of a user's files: "train" and "validation".

    Args:
      files: paths or glob patterns of the records for training, or the directory of a data set (see
        `famx.data.storage.opening`), of which the split "train", or the only one, is taken.
      validation_files: the same for validation, of which the split "validation" or the only one is taken;
        None: the split "validation" of the directory, else a part of `files`.
      validation_fraction: approximate share of `files` that is then held out for validation, chosen by
        record number, so that it does not change when records are appended.
      seed: selects which records are held out.

    Raises:
      ValueError: no file matches, or a directory has no records or not this split.
    """

    def __init__(
        self,
        files: Paths,
        validation_files: Paths | None = None,
        validation_fraction: ShareBelowOne = 0.05,
        seed: Seed = 0,
    ):
        self.fraction, self.seed = validation_fraction, seed
        self.files = {"train": _files_of(files, "train")}
        if validation_files is not None:
            self.files["validation"] = _files_of(validation_files, "validation")
        elif isinstance(files, str | os.PathLike) and os.path.isdir(os.path.expanduser(files)):
            splits = dataset_splits(os.path.expanduser(files))
            if "validation" in splits and splits["validation"] != self.files["train"]:
                self.files["validation"] = splits["validation"]

    @property
    def are_tables(self) -> bool:
        """True if the files are Parquet or Arrow files, whose columns are known."""
        return self.files["train"][0].endswith(PARQUET + ARROW)

    def first(self) -> Mapping[str, Any]:
        """The first record for training, with all columns."""
        return open_records(self.files["train"])[0]

    def open(self, columns: Sequence[str] | None, split: str) -> Records:
        """Open the records of a split; see `famx.data.storage.open_records`."""
        if split in self.files and "validation" in self.files:
            return open_records(self.files[split], columns)
        records = open_records(self.files["train"], columns)
        numbers = [str(i) for i in range(len(records))]
        return Part(records, numbers, split, self.fraction, self.seed)

    def task(
        self,
        name: str,
        columns: Sequence[str] | None,
        preprocess: Callable[[Mapping[str, Any]], Example],
        kind: str,
        vocabulary: str | Vocabulary,
        **options: Any,
    ) -> TextTask:
        """The task of these splits; see `TextTask`."""
        return TextTask(
            name=name,
            kind=kind,
            open_split=lambda folder, split: self.open(columns, split),
            preprocess=preprocess,
            splits=("train", "validation"),
            folders=("/",),
            vocabulary=vocabulary,
            **(dict(published="by you") | options),
        )


def _files_of(files: str | Sequence[str], split: str) -> list[str]:
    """Paths of the files, or of a split of the directory, that `files` names."""
    folder = os.path.expanduser(files) if isinstance(files, str | os.PathLike) else ""
    if not os.path.isdir(folder):
        return matching_files(files)
    splits = dataset_splits(folder)
    if not splits:
        raise ValueError(
            f"{folder} holds no Parquet, Arrow or JSON lines files, nor does a folder 'data' in it; name "
            "the files, or the directory of one data set."
        )
    if split in splits or len(splits) == 1:
        return splits.get(split) or next(iter(splits.values()))
    raise ValueError(
        f"The data set in {folder} has no split '{split}'; its splits are {listed(splits)}. Name files, "
        f"such as {next(iter(splits.values()))[0]}."
    )


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"Column '{column}' contains {str(value)[:50]!r}, which is not text; write it as a string."
        )
    return value


TASKS = {"own_records": own_records}
