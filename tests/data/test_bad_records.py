"""Bad records and files that change: their place, and lanes that leave them out."""

import dataclasses
import json
import os

import numpy as np
import pytest

import famx.data
from famx.base.errors import BadData, BadRecord, ConfigError
from famx.data import ContinuousLanes, PackedRows
from famx.data.storage import JsonlRecords, TextFiles
from famx.data.storage.records import MappedRecords, where
from famx.data.storage.unchanged import Unchanged, check_mark, decoded
from famx.data.tasks.checking import check_documents
from famx.data.tasks.examples import Examples, check_example
from famx.data.tasks.identity import files_of, identity


def write(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


# ---------------------------------------------------------------- places


def test_records_tell_their_file_and_line(tmp_path):
    write(tmp_path / "a.jsonl", [{"x": 1}, "", {"x": 2}])
    write(tmp_path / "b.jsonl", [{"x": 3}])
    records = MappedRecords(JsonlRecords(str(tmp_path / "*.jsonl")), dict)
    assert [where(records, i) for i in range(3)] == [
        f"Line 1 of {tmp_path / 'a.jsonl'}",
        f"Line 3 of {tmp_path / 'a.jsonl'}",
        f"Line 1 of {tmp_path / 'b.jsonl'}",
    ]
    assert where([{}], 0) == "Record 0"


def test_rows_of_tables_tell_their_place(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    arrow = pytest.importorskip("pyarrow")
    for name, count in (("a", 5), ("b", 3)):
        table = arrow.table({"text": [f"{name}{i}" for i in range(count)]})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    records = famx.data.open_records(str(tmp_path / "*.parquet"))
    assert where(records, 4) == f"Row 4 of {tmp_path / 'a.parquet'}"
    assert where(records, 7) == f"Row 2 of {tmp_path / 'b.parquet'}"
    os.truncate(tmp_path / "b.parquet", 100)
    with pytest.raises(BadData, match="b.parquet has become shorter"):
        records[7]


@pytest.mark.parametrize("error", [KeyError("summary"), TypeError("no len"), AttributeError("split")])
def test_errors_of_a_record_name_its_line(tmp_path, error):
    def fail(record):
        raise error

    path = write(tmp_path / "a.jsonl", [{"x": 1}])
    with pytest.raises(BadRecord, match=f"Line 1 of {path}: {type(error).__name__}: "):
        Examples(JsonlRecords(str(path)), fail)[0]


@pytest.mark.parametrize(
    "example, sentence",
    [
        ({"inputs": 3}, "'inputs' must be a text, not 3"),
        ({"targets": None}, "'targets' must be a text, not None"),
        ({"references": "a"}, "'references' must be a list of texts, not 'a'"),
        ({"references": ["a", 1]}, "'references' must be a list of texts"),
        ({"choices": ["a"], "answer": [1]}, "'answer' must be a list of numbers of the 1 choices"),
        ({"choices": ["a"], "answer": 0}, "'answer' must be a list"),
        ({"choices": ["a", "b"], "answer": [True]}, "'answer' must be a list"),
        ({"choices": ["a", "b"], "answer": [1], "contexts": ["c"]}, "'contexts' must have one text"),
        ({"messages": ["hello"]}, "'messages' must be a list of messages"),
        ([], "an example must be a dict"),
    ],
)
def test_examples_of_wrong_types(example, sentence):
    with pytest.raises(BadRecord, match=sentence):
        check_example(example)


# ---------------------------------------------------------------- lanes


class Spoilt:
    """Documents of which some are bad."""

    def __init__(self, sizes, bad):
        self.sizes, self.bad = sizes, bad

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        if i in self.bad:
            raise BadRecord(f"Document {i} is bad.")
        return np.full(self.sizes[i], 10 + i, np.int32)


class Counted(Spoilt):
    """The same, with sizes that are known and a check."""

    def num_tokens(self, i):
        return self.sizes[i]

    def check(self, i):
        self[i]

    def where(self, i):
        return f"place {i}"


@pytest.mark.parametrize("kind", [Spoilt, Counted])
@pytest.mark.parametrize("lanes", [ContinuousLanes, PackedRows])
def test_lanes_leave_bad_documents_out(lanes, kind):
    documents = kind([5, 3, 7, 4, 2, 6], {1, 4})
    seen, made = set(), lanes(documents, 2, 4, skip_bad=True)
    for _ in range(40):
        seen |= set(next(made)["decoder_target_tokens"].ravel().tolist())
    assert seen - {0} == {10, 12, 13, 15}
    assert made.skipped >= 4 and made.last_skipped in ("Document 1 is bad.", "Document 4 is bad.")
    with pytest.raises(BadRecord, match="Document [14] is bad"):
        stops = lanes(documents, 2, 4)
        for _ in range(40):
            next(stops)


@pytest.mark.parametrize("shards", [1, 2])
def test_lanes_that_skip_resume_exactly_on_any_shards(shards):
    documents = Spoilt([5, 3, 7, 4, 2, 6], {1, 4})
    make = lambda i=0, count=1: PackedRows(documents, 2, 4, 0, i, count, skip_bad=True)
    whole = make()
    for _ in range(9):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    parts = [make(i, shards) for i in range(shards)]
    for part in parts:
        part.set_state(state)
        assert part.skipped == whole.skipped > 0
    for _ in range(20):
        rows = [next(part)["decoder_target_tokens"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(rows), next(whole)["decoder_target_tokens"])
        assert {part.skipped for part in parts} == {whole.skipped}


def test_nothing_but_bad_documents_ends():
    with pytest.raises(BadData, match="None of the 3 documents can be used. Document"):
        next(PackedRows(Spoilt([2, 2, 2], {0, 1, 2}), 1, 4, skip_bad=True))


def test_an_empty_document_is_named_by_its_place_and_can_be_skipped():
    with pytest.raises(BadRecord, match=r"Document 0 \(place 0\) is empty; leave empty documents out"):
        next(PackedRows(Counted([0], set()), 1, 4))
    made = PackedRows(Counted([0, 8], set()), 1, 4, skip_bad=True)
    assert {next(made)["decoder_target_tokens"][0, 0] for _ in range(6)} == {11}


def test_documents_are_checked_before_a_run():
    assert check_documents([np.ones(3)]) == []  # without a check
    with pytest.raises(BadRecord, match="Document 2 is bad"):
        check_documents(Counted([1, 1, 1, 1], {2, 3}))
    assert check_documents(Counted([1, 1, 1, 1], {2, 3}), skip_bad=True) == [
        "Document 2 is bad.", "Document 3 is bad.",
    ]  # fmt: skip


# ---------------------------------------------------------------- files and encodings


def test_changes_of_a_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345678")
    unchanged = Unchanged([str(path)])
    unchanged.check(str(path))
    assert unchanged.size(str(path)) == 8
    path.write_bytes(b"1234")
    with pytest.raises(BadData, match="x has become shorter, 4 bytes in place of 8: put it back"):
        unchanged.check(str(path))
    path.write_bytes(b"123456789")
    with pytest.raises(BadData, match="x was replaced or changed after the run began"):
        unchanged.check(str(path))
    path.unlink()
    with pytest.raises(BadData, match="x was there when the run began and is gone"):
        unchanged.check(str(path))


def test_utf8_is_decoded_in_parts_that_cut_characters():
    text = "Grüße 🎈 aus Köln"
    data = text.encode()
    for cut in range(len(data) + 1):
        first = decoded(data[:cut], "x", begins=True, ends=False)
        second = decoded(data[cut:], "x", begins=False, ends=True)
        assert text.startswith(first) and text.endswith(second)
        assert len(text) - len(first) - len(second) in (0, 1)  # a character that was cut
    assert decoded(b"\xef\xbb\xbfa", "x") == "a"
    with pytest.raises(BadRecord, match="x is not UTF-8 at byte 2"):
        decoded("Grüße".encode("latin-1"), "x")
    with pytest.raises(BadRecord, match="x is not UTF-8 at byte 1"):
        decoded(b"a\xc3", "x")  # cut off at the end of the file
    for encoding in ("utf-16", "utf-32"):
        with pytest.raises(BadRecord, match=f"encoded in {encoding.upper()}, not in UTF-8"):
            check_mark("x", text.encode(encoding))


def test_a_single_text_is_cut_without_broken_characters(tmp_path):
    (tmp_path / "x.txt").write_text("ü" * 200 + "🎈" * 50)
    for fraction in (0.1, 0.11, 0.12, 0.5, 0.7):
        for split in ("train", "validation"):
            TextFiles(str(tmp_path / "x.txt"), split=split, validation_fraction=fraction).check(0)


# ---------------------------------------------------------------- identity


def test_identity_of_files_is_their_names_sizes_and_content(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "in/b.txt"):
        (tmp_path / name).write_text(f"{name} " * 10)
    make = lambda folder: identity(TextFiles(str(folder / "**" / "*.txt"), validation_fraction=0.0))
    found = make(tmp_path)
    assert found["documents"] == 2 and list(found["files"]) == ["a.txt", "in/b.txt"]
    assert found["bytes"] == 60 + 90 and found["files"]["a.txt"].startswith("60 bytes, ")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("a.txt", "in"):
        os.rename(tmp_path / name, moved / name)
    assert make(moved) == found
    (moved / "a.txt").write_text("b.txt " * 10)
    assert make(moved) != found and make(moved)["bytes"] == found["bytes"]


def test_identity_of_many_files_is_a_sample(tmp_path):
    for i in range(100):
        (tmp_path / f"{i:03}.txt").write_text(f"number {i}")
    make = lambda: identity(TextFiles(str(tmp_path / "*.txt"), validation_fraction=0.0))
    found = make()
    assert found["number_of_files"] == 100 and len(found["files"]) == 64
    (tmp_path / "050.txt").write_text("number 050 and more")
    assert make()["names_and_sizes"] != found["names_and_sizes"]


def test_files_are_found_behind_tasks_and_mixtures(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(30)])
    task = famx.data.get("own_records", files=str(path))
    assert len(task) and files_of(task) == [str(path)]
    other = dataclasses.replace(task, name="other")
    mixture = famx.data.Mixture("both", (task, other))
    assert len(mixture) and files_of(mixture) == [str(path)]
    assert identity(famx.data.get("passkey_words")) == {}
    assert identity([np.ones(3, np.int32)] * 4) == {"documents": 4}


def test_flan_opens_its_files_to_tell_them():
    with pytest.raises(ConfigError, match="FAMX_DATA_DIR|data directory|is not there"):
        files_of(famx.data.get("flan_packed", data_dir="/nowhere"))
