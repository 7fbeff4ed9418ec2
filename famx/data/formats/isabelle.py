"""Isabelle: formal proofs of the Archive of Formal Proofs, for language modelling.

Official files: `thys/<entry>/**/*.thy`, the unpacked archive or a clone of it. A document is an entry:
its theories, each after those that it imports. Theories of other entries are not repeated. A hash of its
name decides whether an entry is for training, validation or testing. The TransformerFAM paper does not
say which 16 entries it took, so ours are different ones; it cuts documents at 256k tokens (`max_tokens`)
and reports next-token accuracy.
"""

import os
import re
from typing import Any

from famx.data.formats.texts import EmptySplit, preprocess_text
from famx.data.storage import validation_names
from famx.data.tasks.text_task import TextTask, task_factories

PUBLISHED = "https://www.isa-afp.org/download/"
FRACTION = 0.05  # approximate share of the entries for validation, and for testing
_COMMENT = re.compile(r"\(\*|\*\)")
_HEADER = re.compile(
    r"^\s*theory\s+\S+\s+(?:imports\s+(.*?)\s)??\s*(?:(?:keywords|abbrevs)\b.*?)?\bbegin\b",
    re.MULTILINE | re.DOTALL,
)
_SESSION = re.compile(r'^\s*session\s+"?([^\s"(=]+)', re.MULTILINE)
_NAME = re.compile(r'"([^"]*)"|‹([^›]*)›|\\<open>(.*?)\\<close>|([^\s"‹\\]+)')


class IsabelleRecords:
    """Entries of a split as records with `name` and `text`, each read at access."""

    def __init__(self, folder: str, split: str):
        root = folder if os.path.basename(folder) == "thys" else os.path.join(folder, "thys")
        entries = _entries(root)
        if not entries:
            raise FileNotFoundError(None, "missing", os.path.join(root, "ENTRY", "*.thy"))
        test = validation_names(entries, FRACTION, seed=1)
        rest = [name for name in entries if name not in test]
        validation = validation_names(rest, FRACTION, seed=2)
        places = {"test": test, "validation": validation, "train": set(rest) - validation}
        self.root, self.names = root, [name for name in entries if name in places[split]]
        if not self.names:
            raise EmptySplit(
                f"The {split} split of the {len(entries)} entries in {root} has none; add entries."
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"Entry {i} is not one of {len(self)} entries.")
        texts = {}
        for path in _theories(os.path.join(self.root, self.names[i])):
            with open(path, encoding="utf-8", errors="replace", newline="") as file:
                texts[path] = file.read()
        ordered = import_order(texts, _sessions(os.path.join(self.root, self.names[i])))
        return {"name": self.names[i], "text": "\n".join(texts[path] for path in ordered)}


def _entries(root: str) -> list[str]:
    if not os.path.isdir(root):
        return []
    folders = [x.name for x in os.scandir(root) if x.is_dir()]
    return sorted(name for name in folders if _theories(os.path.join(root, name)))


def _theories(folder: str) -> list[str]:
    paths = []
    for place, _, names in os.walk(folder):
        paths += [os.path.join(place, name) for name in names if name.endswith(".thy")]
    return sorted(paths)


def _sessions(folder: str) -> set[str]:
    """The sessions that an entry's ROOT files define."""
    sessions = set()
    for place, _, names in os.walk(folder):
        if "ROOT" in names:
            with open(os.path.join(place, "ROOT"), encoding="utf-8", errors="replace") as file:
                sessions.update(_SESSION.findall(_without_comments(file.read())))
    return sessions


def import_order(texts: dict[str, str], sessions: set[str] | None = None) -> list[str]:
    """Sort theories so that each comes after those that it imports, otherwise by path.

    Args:
      texts: maps the path of a theory to its text.
      sessions: the sessions of these theories, so that `HOL-Library.Tree` is not mistaken for a `Tree`
        among them. Empty or None: a name of any session may refer to them.

    Raises:
      ValueError: theories import each other in a circle.
    """
    by_name: dict[str, list[str]] = {}
    for path in sorted(texts):
        by_name.setdefault(os.path.splitext(os.path.basename(path))[0], []).append(path)

    def resolve(path: str, name: str) -> str | None:
        relative = os.path.normpath(os.path.join(os.path.dirname(path), f"{name}.thy"))
        if relative in texts:
            return relative
        session, dot, _ = name.rpartition(".")
        if sessions and dot and "/" not in name and session not in sessions:
            return None
        same = by_name.get(re.split(r"[/.]", name)[-1], [])
        return same[0] if same and same[0] != path else None

    order: list[str] = []
    done: set[str] = set()
    for first in sorted(texts):
        pending = [(first, iter(imports_of(texts[first])))]
        walked = [first]
        while pending and first not in done:
            path, names = pending[-1]
            for name in names:
                imported = resolve(path, name)
                if imported in walked:
                    circle = [*walked[walked.index(imported) :], imported]
                    names = " imports ".join(os.path.basename(x) for x in circle)
                    raise ValueError(f"Theories import each other in a circle: {names}.")
                if imported is not None and imported not in done:
                    pending.append((imported, iter(imports_of(texts[imported]))))
                    walked.append(imported)
                    break
            else:
                pending.pop()
                order.append(walked.pop())
                done.add(path)
    return order


def imports_of(text: str) -> list[str]:
    """The names that a theory imports, as they are written."""
    header = _HEADER.search(_without_comments(text))
    if header is None or header[1] is None:
        return []
    return ["".join(name) for name in _NAME.findall(header[1])]


def _without_comments(text: str) -> str:
    """Text without (* comments (* also nested *) *)."""
    pieces, depth, end = [], 0, 0
    for mark in _COMMENT.finditer(text):
        if not depth:
            pieces.append(text[end : mark.start()])
        depth = depth + 1 if mark[0] == "(*" else max(0, depth - 1)
        end = mark.end()
    return "".join([*pieces, "" if depth else text[end:]])


TASKS = task_factories([
    TextTask(
        name="isabelle",
        kind="documents",
        open_split=IsabelleRecords,
        preprocess=preprocess_text,
        folders=("isabelle", "afp", ""),
        published=PUBLISHED,
    )
])  # fmt: skip
