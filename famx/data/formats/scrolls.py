"""SCROLLS (Shaham et al., 2022): seven tasks over long English texts.

Official files: `<task>/{train,validation,test}.jsonl`, each line with `id`, `pid`, `input` and
`output`, or Parquet or Arrow files with these columns: one row for each answer to a question. In the
train split every row is an example, so that all answers are learnt. In the other splits rows with the
same `id` are one example with several references, as in SCROLLS' evaluator; the test split has no
outputs.

| task | kind | metrics, the first as in the TransformerFAM paper |
|---|---|---|
| scrolls_qasper, scrolls_narrative_qa | generation | ROUGE-L; F1 of SCROLLS |
| scrolls_quality | rank | accuracy of the four choices; exact match of SCROLLS |
| scrolls_contract_nli | generation | exact match of SCROLLS |
| scrolls_gov_report, scrolls_summ_screen_fd, scrolls_qmsum | generation | ROUGE of SCROLLS |

The inputs of an example are the official input (a question, if any, comes before the text) and a blank
line.
"""

import os
import re
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from famx.data.metrics import rouge, text_exact_match, token_f1
from famx.data.storage import MappedRecords
from famx.data.storage import open_split as open_rows
from famx.data.tasks.examples import Example, Records
from famx.data.tasks.text_task import TextTask, task_factories

PUBLISHED = "https://www.scrolls-benchmark.com"
_COLUMNS = ("id", "pid", "input", "output")
# The choices as SCROLLS writes them, each on a line; a choice may refer to another, "(B) not (A)".
_CHOICES = re.compile(
    r"^ *\(A\)(.*?)^ *\(B\)(.*?)^ *\(C\)(.*?)^ *\(D\)(.*?)(?:\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


class GroupedRecords:
    """Rows with the same `id` as one record with a list `outputs`, in the order of their first rows."""

    def __init__(self, rows: Records):
        self.rows, self.num_rows = rows, len(rows)
        groups: dict[str, int] = {}
        owner = array("q", (groups.setdefault(row["id"], len(groups)) for row in _each(rows)))
        owners = np.frombuffer(owner, np.int64)
        self._rows = np.argsort(owners, kind="stable")
        self._starts = np.searchsorted(owners[self._rows], np.arange(len(groups) + 1))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"Record {i} is not one of {len(self)} records.")
        rows = [self.rows[int(j)] for j in self._rows[self._starts[i] : self._starts[i + 1]]]
        return {**rows[0], "outputs": [row["output"] for row in rows if row["output"] is not None]}


def _each(rows: Records):
    return (rows[i] for i in range(len(rows)))


def _records(rows: Records, split: str) -> MappedRecords | GroupedRecords:
    return MappedRecords(rows, _with_outputs) if split == "train" else GroupedRecords(rows)


def open_split(folder: str, split: str) -> MappedRecords | GroupedRecords:
    """Open the examples of a split of `folder`; to group its rows they are read once."""
    return _records(open_rows(folder, split, _COLUMNS), split)


def _with_outputs(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as published, with a list `outputs` of its one output."""
    return {**row, "outputs": [] if row["output"] is None else [row["output"]]}


def _of_tfds(record: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A row as TensorFlow Datasets stores it: texts as bytes, a missing output as an empty one."""
    row: dict[str, Any] = {name: record[name].decode() for name in _COLUMNS}
    return row | {"output": None} if split == "test" and not row["output"] else row


def _open_tfds(records: Records, split: str) -> MappedRecords | GroupedRecords:
    return _records(MappedRecords(records, lambda record: _of_tfds(record, split)), split)


def preprocess(record: Mapping[str, Any]) -> Example:
    """Make an example of a record with its `outputs`."""
    outputs = record["outputs"]
    return {
        "id": record["id"],
        "inputs": f"{record['input']}\n\n",
        "targets": outputs[0] if outputs else "",
        "references": outputs,
    }


def preprocess_quality(record: Mapping[str, Any]) -> Example:
    """Like `preprocess`, with the choices (A) to (D) that are between question and text.

    Raises:
      ValueError: the input does not have four choices, or an output is none of them.
    """
    match = _CHOICES.search(record["input"].replace("\r\n", "\n"))
    if match is None:
        raise ValueError(
            f"The QuALITY question '{record['id']}' does not have the four choices (A) to (D) before its "
            "text; use SCROLLS' own files."
        )
    choices = [" ".join(choice.split()) for choice in match.groups()]
    outputs = [" ".join(output.split()) for output in record["outputs"]]
    for output in outputs:
        if output not in choices:
            raise ValueError(
                f"The answer '{output}' of the QuALITY question '{record['id']}' is none of its "
                f"choices {choices}; use SCROLLS' own files."
            )
    answer = sorted({choices.index(output) for output in outputs})
    return {**preprocess(record), "choices": choices, "answer": answer}


_MEMBERS = {  # name: metrics, rows of train, validation and test
    "qasper": ((rouge, token_f1), (2567, 1726, 1399)),
    "narrative_qa": ((rouge, token_f1), (55003, 5878, 10306)),
    "quality": ((text_exact_match,), (2523, 2086, 2128)),
    "contract_nli": ((text_exact_match,), (7191, 1037, 2091)),
    "gov_report": ((rouge,), (17457, 972, 973)),
    "summ_screen_fd": ((rouge,), (3673, 338, 337)),
    "qmsum": ((rouge,), (1257, 272, 281)),
}

TASKS = task_factories(
    TextTask(
        name=f"scrolls_{name}",
        kind="rank" if name == "quality" else "generation",
        open_split=open_split,
        preprocess=preprocess_quality if name == "quality" else preprocess,
        metrics=metrics,
        folders=(os.path.join("scrolls", name), name),
        published=PUBLISHED,
        tfds=f"scrolls/{name}",
        open_tfds=_open_tfds,
        counts=dict(zip(("train", "validation", "test"), counts)),
    )
    for name, (metrics, counts) in _MEMBERS.items()
)
