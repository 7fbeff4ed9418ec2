"""NarrativeQA (Kocisky et al., 2018) over full stories: questions about books and film scripts.

Official files: `documents.csv`, `qaps.csv` and the stories `tmp/<document_id>.content`, which the data
set's script `download_stories.sh` fetches: books as plain text, film scripts as HTML. `summaries.csv` is
not used. Or Parquet or Arrow files with the columns `document`, `question` and `answers`, as on Hugging
Face. (SCROLLS' version of the task is `scrolls_narrative_qa`.)

Inputs are the question, a blank line, the story and a blank line; the two answers are the references.
The story is the text between the words `story_start` and `story_end` of `documents.csv`, if they occur.
The TransformerFAM paper cuts examples at 256k tokens: `max_tokens`.
"""

import csv
import functools
import html.parser
import os
import re
from collections.abc import Mapping
from typing import Any

from famx.data.formats.texts import EmptySplit
from famx.data.metrics import rouge, token_f1
from famx.data.storage import MappedRecords
from famx.data.storage import open_split as open_rows
from famx.data.tasks.examples import Example, Records
from famx.data.tasks.text_task import TextTask, task_factories

PUBLISHED = "https://github.com/google-deepmind/narrativeqa"
_HTML = re.compile(r"<(?:html|!doctype|head|body|pre)\b", re.IGNORECASE)
_BLOCKS = {"br", "p", "div", "tr", "li", "table", "h1", "h2", "h3", "h4", "hr"}


def open_split(folder: str, split: str) -> Records:
    """Open the questions of a split, from the official files or from a table."""
    try:
        return NarrativeQaRecords(folder, split)
    except FileNotFoundError as error:
        try:
            rows = open_rows(folder, split, ("document", "question", "answers"))
            return MappedRecords(rows, _of_table)
        except FileNotFoundError:
            raise error from None


def _of_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """A question as Hugging Face publishes it, with its whole story."""
    document = record["document"]
    return {
        "document_id": document["id"],
        "question": record["question"]["text"],
        "answers": [answer["text"] for answer in record["answers"]],
        "story": _between(document["text"], document.get("start") or "", document.get("end") or ""),
    }


class NarrativeQaRecords:
    """Questions of a split; a story is read when one of its questions is accessed.

    Questions whose story is missing are skipped; `missing` names the files.
    """

    def __init__(self, folder: str, split: str):
        set_name = "valid" if split == "validation" else split
        self.folder = folder
        documents = _read_csv(
            os.path.join(folder, "documents.csv"), ("document_id", "set", "story_start", "story_end"))
        self._marks = {id: (start, end) for id, part, start, end in documents if part == set_name}
        stories = {id for id in self._marks if os.path.isfile(self._path(id))}
        self.missing = sorted(self._path(id) for id in set(self._marks) - stories)
        rows = _read_csv(
            os.path.join(folder, "qaps.csv"), ("document_id", "set", "question", "answer1", "answer2"))
        self._rows = [row for row in rows if row[1] == set_name and row[0] in stories]
        self.num_rows = len(self._rows)
        for row in rows:
            if row[1] == set_name and row[0] not in self._marks:
                raise ValueError(f"documents.csv in {folder} has no document {row[0]} of qaps.csv.")
        if not self._rows:
            raise EmptySplit(
                f"There is no question of the {split} split with a story in {folder}; run "
                "download_stories.sh there."
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"Record {i} is not one of {len(self)} records.")
        id, _, question, *answers = self._rows[i]
        story = _story(self._path(id), *self._marks[id])
        return {"document_id": id, "question": question, "answers": answers, "story": story}

    def _path(self, id: str) -> str:
        return os.path.join(self.folder, "tmp", f"{id}.content")


def _read_csv(path: str, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    if not os.path.isfile(path):
        raise FileNotFoundError(None, "missing", path)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for column in columns:
            if column not in (reader.fieldnames or ()):
                raise ValueError(
                    f"{path} has no column '{column}'; its columns are "
                    f"{', '.join(reader.fieldnames or ['none'])}."
                )
        rows = []
        for row in reader:
            values = tuple(row[column] for column in columns)
            if None in values:
                raise ValueError(f"Line {reader.line_num} of {path} is cut off; copy the file again.")
            rows.append(values)
        return rows


@functools.lru_cache(maxsize=2)  # the questions of a story follow each other
def _story(path: str, start: str, end: str) -> str:
    with open(path, "rb") as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    return _between(text, start, end)


def _between(text: str, start: str, end: str) -> str:
    """The story in a file's text, from the words `start` to the words `end`."""
    if _HTML.search(text[:4096]):
        text = _text_of_html(text)
    text = text.replace("\r\n", "\n")
    first = next((place.start() for place in _places(text, start)), 0)
    last = max((place.end() for place in _places(text, end)), default=len(text))
    return text[first : max(first, last)].strip()


def _places(text: str, words: str):
    """Find the words with any white space between them: in `documents.csv` they are tokenized."""
    pattern = r"\s*".join(re.escape(word) for word in words.split())
    return re.finditer(pattern, text) if pattern else iter(())


class _TextOfHtml(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.pieces, self.hidden = [], 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in ("script", "style")
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag):
        self.hidden = max(0, self.hidden - (tag in ("script", "style")))

    def handle_data(self, data):
        if not self.hidden:
            self.pieces.append(data)


def _text_of_html(text: str) -> str:
    parser = _TextOfHtml()
    parser.feed(text)
    parser.close()
    return "".join(parser.pieces)


def preprocess(record: Mapping[str, Any]) -> Example:
    """Make an example of a record; empty and repeated answers are not references."""
    references = list(dict.fromkeys(answer for answer in record["answers"] if answer.strip()))
    return {
        "id": record["document_id"],
        "inputs": f"{record['question']}\n\n{record['story']}\n\n",
        "targets": references[0] if references else "",
        "references": references,
    }


TASKS = task_factories([
    TextTask(
        name="narrative_qa",
        kind="generation",
        open_split=open_split,
        preprocess=preprocess,
        metrics=(rouge, token_f1),
        folders=("narrative_qa", "narrativeqa", "narrativeqa-master"),
        published=PUBLISHED,
        counts={"train": 32747, "validation": 3461, "test": 10557},
    )
])  # fmt: skip
