"""Your JSON-lines files as a task: whole texts, or inputs and targets.

    from __gin__ import dynamic_registration
    from famx import modules
    include "gin_configs/runs/pretrain.gin"
    include "gin_configs/models/tiny.gin"
    MIXTURE_OR_TASK_NAME = "own_jsonl"
    TASK_FEATURE_LENGTHS = {"targets": 1024}
    STATE_PASSING = "continuous"
    modules.DecoderConfig.vocab_size = 259
    TASK_OPTIONS = {"files": "/data/*.jsonl", "max_tokens": 8192}

Give MODEL_DIR, BATCH_SIZE and TRAIN_STEPS on the command line. A line of the files is `{"text": ...}`,
or `{"inputs": ..., "targets": ...}`, where targets may be a list of references; only the targets have a
loss.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from famx.data.formats.texts import Part
from famx.data.metrics import accuracy, rouge, token_f1
from famx.data.storage.records import JsonlRecords
from famx.data.tasks.examples import Example
from famx.data.tasks.text_task import TextTask
from famx.data.vocabularies import Vocabulary


def own_jsonl(
    files: str | Sequence[str],
    text: str = "text",
    inputs: str = "inputs",
    targets: str = "targets",
    validation_files: str | Sequence[str] | None = None,
    validation_fraction: float = 0.05,
    seed: int = 0,
    name: str = "own_jsonl",
    vocabulary: str | Vocabulary = "bytes",
    **options: Any,
) -> TextTask:
    """Make the task of JSON-lines files; the columns of the first record decide its kind.

    Args:
      files: paths or glob patterns of the records for training.
      text, inputs, targets: names of the columns; either `text` or the other two must exist.
      validation_files: paths or glob patterns of the records for validation; None: a part of `files`.
      validation_fraction: approximate share of `files` that is then held out for validation, chosen by
        record number, so that it does not change when records are appended.
      seed: selects which records are held out.
      name: name for messages.
      vocabulary: see `famx.data.vocabularies.as_vocabulary`.
      **options: other settings of the task, such as `max_tokens` and `metrics`.

    Raises:
      ConfigError: an option is out of range.
      ValueError: no file matches, there is no record, a line is broken (the message names file and
        line), a column is missing, or validation_fraction is out of range.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}; it must be at least 0 and below 1."
        )
    first = JsonlRecords(files)[0]
    has_text = text in first
    columns = (text,) if has_text else (inputs, targets)
    if not has_text and (inputs not in first or targets not in first):
        raise ValueError(
            f"The records have neither a column '{text}' nor both '{inputs}' and '{targets}'; their "
            f"columns are {', '.join(first) or 'none'}. Give the names of the columns."
        )

    def open_split(folder: str, split: str) -> Sequence[Mapping[str, Any]]:
        if split == "validation" and validation_files is not None:
            return JsonlRecords(validation_files, columns)
        records = JsonlRecords(files, columns)
        if validation_files is not None:
            return records
        numbers = [str(i) for i in range(len(records))]
        return Part(records, numbers, split, validation_fraction, seed)

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

    task = dict(metrics=(rouge, token_f1, accuracy), published="by you") | options
    return TextTask(
        name=name,
        kind="documents" if has_text else "generation",
        open_split=open_split,
        preprocess=preprocess,
        splits=("train", "validation"),
        folders=("/",),
        vocabulary=vocabulary,
        **task,
    )


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"Column '{column}' contains {str(value)[:50]!r}, which is not text; write it as a string."
        )
    return value


TASKS = {"own_jsonl": own_jsonl}
