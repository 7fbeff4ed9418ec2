"""Texts and records in a store such as gs://, here one of a local directory."""

import json
import sys

import numpy as np
import pytest

from famx.base.errors import BadData, ConfigError
from famx.base.installation import PARTS
from famx.data import JsonlRecords, TextFiles, get
from famx.data.storage import places, unchanged
from famx.data.storage.paths import matching_files
from famx.data.tasks.identity import identity

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder that gs:// shows; `requests` of its file system counts what is read."""
    folder = tmp_path / "store"
    (folder / "bucket").mkdir(parents=True)

    class Store(fsspec.AbstractFileSystem):
        protocol = "gs"
        cachable = False
        requests = 0

        def ls(self, path, detail=True, **kwargs):
            place = folder / self._strip_protocol(path)
            found = [place] if place.is_file() else sorted(place.iterdir())
            rows = []
            for item in found:
                stat, kind = item.stat(), "directory" if item.is_dir() else "file"
                name = item.relative_to(folder).as_posix()
                rows.append({"name": name, "size": stat.st_size, "type": kind, "mtime": stat.st_mtime_ns})
            return rows if detail else [row["name"] for row in rows]

        def _open(self, path, mode="rb", **kwargs):
            type(self).requests += 1
            assert mode == "rb"
            return open(folder / path, mode)

    fsspec.register_implementation("gs", Store, clobber=True)
    places._file_system.cache_clear()
    monkeypatch.setattr(unchanged, "_PERIOD", 0.0)
    yield folder / "bucket"
    places._file_system.cache_clear()
    sys.modules["fsspec.registry"]._registry.pop("gs")


def test_texts_are_those_of_the_same_local_files(store):
    for i in range(6):
        (store / f"{i}.txt").write_text(f"text {i}, é " * (i + 1))
    (store / "deep").mkdir()
    (store / "deep" / "6.txt").write_text("below")
    for split in ("train", "validation"):
        local = TextFiles(f"{store}/**/*.txt", split=split)
        remote = TextFiles("gs://bucket/**/*.txt", split=split)
        assert [p.removeprefix("gs://bucket") for p in remote.paths] == [
            p.removeprefix(str(store)) for p in local.paths
        ]
        assert [row.tolist() for row in remote] == [row.tolist() for row in local]
    assert identity(remote) == identity(local)
    assert len(TextFiles(["gs://bucket/1.txt", "gs://bucket/2.txt"], validation_fraction=0.0)) == 2


def test_a_single_text_is_cut_at_the_same_place(store):
    (store / "a.txt").write_text("0123456789é" * 40)
    for split in ("train", "validation"):
        (local,), (remote,) = (
            TextFiles(path, split=split) for path in (f"{store}/a.txt", "gs://bucket/a.txt")
        )
        np.testing.assert_array_equal(local, remote)


def test_json_lines(store):
    rows = [{"text": f"row {i} é", "n": i} for i in range(9)]
    (store / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:5]) + "\n\n")
    (store / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[5:]))
    records = JsonlRecords("gs://bucket/*.jsonl")
    assert [records[i] for i in range(len(records))] == rows
    assert records.where(6) == "Line 2 of gs://bucket/b.jsonl"
    task = get("own_records", files="gs://bucket/*.jsonl")
    local = get("own_records", files=f"{store}/*.jsonl")
    assert [task[i][0].tolist() for i in range(len(task))] == [
        local[i][0].tolist() for i in range(len(local))
    ]


def test_an_object_that_changes_or_goes_is_noticed(store, monkeypatch):
    for name in ("a.txt", "b.txt", "c.txt"):
        (store / name).write_text("some text")
    texts = TextFiles("gs://bucket/*.txt", validation_fraction=0.0)
    assert len(texts[0]) == 9
    (store / "a.txt").write_text("some other text")
    (store / "b.txt").unlink()
    with pytest.raises(BadData, match="gs://bucket/a.txt was replaced or changed after the run began"):
        texts[0]
    with pytest.raises(BadData, match="gs://bucket/b.txt was there when the run began and is gone"):
        texts[1]
    monkeypatch.setattr(unchanged, "_PERIOD", 60.0)  # a look is a request: not at each document
    texts = TextFiles("gs://bucket/*.txt", validation_fraction=0.0)
    monkeypatch.setattr(places, "stamp", None)
    assert len(texts[1]) == 9


def test_what_cannot_be_read_is_a_sentence(store, monkeypatch):
    (store / "a.parquet").write_bytes(b"PAR1")
    (store / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="No file matches 'gs://bucket/x.txt'"):
        matching_files("gs://bucket/x.txt")
    with pytest.raises(ValueError, match="'gs://bucket' is a directory; name its files"):
        matching_files("gs://bucket")
    with pytest.raises(ConfigError, match="a.parquet is a table, and tables are read from mounted"):
        get("own_records", files="gs://bucket/a.parquet")
    with pytest.raises(ConfigError, match="nosuch:// cannot be read: fsspec knows no such store"):
        matching_files("nosuch://bucket/a.txt")
    texts = TextFiles("gs://bucket/a.txt")

    def refused(*args, **kwargs):
        raise RuntimeError("403: no\naccess")

    monkeypatch.setattr(type(places._file_system("gs")), "_open", refused)
    with pytest.raises(BadData, match="^gs://bucket/a.txt cannot be read: 403: no access$"):
        texts[0]


def test_a_store_without_its_package_says_what_to_install(monkeypatch):
    places._file_system.cache_clear()

    def missing(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ConfigError) as caught:
        matching_files("gs://bucket/a.txt")
    assert str(caught.value) == (
        "gs:// cannot be read: Please install gcsfs to access Google Storage."
        " Run pip install 'famx[gcs]'."
    )
    places._file_system.cache_clear()
    assert "gcs" in PARTS
