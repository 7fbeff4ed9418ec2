"""PG-19 (Rae et al., 2019): books published before 1919, for language modelling.

Official files: `{train,validation,test}/<book id>.txt`; `metadata.csv`, with titles and dates, is not
used. Or Parquet or Arrow files with the columns `short_book_title` and `text`. A document is a book. The
TransformerFAM paper cuts books at 256k tokens (`max_tokens`) and reports next-token accuracy.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from famx.data.formats.texts import TextFolder, preprocess_text
from famx.data.storage import MappedRecords
from famx.data.storage import open_split as open_rows
from famx.data.tasks.examples import Records
from famx.data.tasks.text_task import TextTask, task_factories

PUBLISHED = "https://github.com/google-deepmind/pg19"


def open_split(folder: str, split: str) -> Records:
    """Open the books of `folder/{split}`, in the order of their numbers, or of the rows of a table."""
    books = os.path.join(folder, split)
    exists = os.path.isdir(books)
    names = [name for name in os.listdir(books) if name.endswith(".txt")] if exists else []
    if not names:
        try:
            rows = open_rows(folder, split, ("short_book_title", "text"))
            return MappedRecords(rows, _of_table)
        except FileNotFoundError as error:
            if exists:
                raise ValueError(f"There is no book (*.txt) in {books}; copy it again.") from error
            raise FileNotFoundError(None, "missing", os.path.join(books, "*.txt")) from error
    names.sort(key=lambda name: ([int(x) for x in re.findall(r"\d+", name)], name))
    return TextFolder([os.path.join(books, x) for x in names], [x[: -len(".txt")] for x in names])


def _of_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """A book as Hugging Face publishes it, which is named by its title."""
    return {"name": record["short_book_title"], "text": record["text"]}


def _of_tfds(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": str(int(record["book_id"][0])), "text": record["book_text"].decode()}


TASKS = task_factories([
    TextTask(
        name="pg19",
        kind="documents",
        open_split=open_split,
        preprocess=preprocess_text,
        folders=("pg19", "deepmind-gutenberg"),
        published=PUBLISHED,
        tfds="pg19",
        open_tfds=lambda records, split: MappedRecords(records, _of_tfds),
        counts={"train": 28602, "validation": 50, "test": 100},
    )
])  # fmt: skip
