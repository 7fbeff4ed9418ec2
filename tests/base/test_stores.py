"""Paths in a bucket: the methods of pathlib with the same results, and what the store adds to them."""

import errno
import pickle

import numpy as np
import pytest
from etils import epath

from famx.base.errors import ConfigError
from famx.base.files import (
    as_path,
    check_writable,
    copy_directory,
    local_copy,
    replacing,
    write_json,
    write_text,
)
from famx.base.store_errors import StoreError

NAMES = ("a", "b.txt", "d/a", "d/e/f", "d/e/g.txt", "d.txt", "de/x", "ä/ö")
RUN = "gs://bucket/run"


def view(root):
    """What can be seen below a directory, as names and contents."""
    relative = lambda paths: sorted(path.relative_to(root).as_posix() for path in paths)
    everything = [root / name for name in (*NAMES, "d", "d/e", "none", "d/none")]
    return {
        "content": {n: (root / n).read_text() for n in NAMES if (root / n).is_file()},
        "kinds": [(p.exists(), p.is_file(), p.is_dir()) for p in everything],
        "children": relative(root.iterdir()) if root.is_dir() else [],
        "globs": [relative(root.glob(x)) for x in ("*", "d*", "*/*", "d/e/*.txt", "none/*", "?")],
        "files": relative(p for p in root.rglob("*.txt") if p.is_file()),
    }


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_operations_is_as_on_a_disk(gcs, tmp_path, seed):
    rng, here, there = np.random.default_rng(seed), tmp_path / "run", as_path(RUN)
    here.mkdir()
    for number in range(20):
        name = NAMES[rng.integers(len(NAMES))]
        operation = rng.integers(4)
        for root in (here, there):
            path = root / name
            if operation < 2:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{number} ä")
            elif operation == 2 and path.exists():
                path.unlink()
            elif path.exists() and not (root / "moved").exists():
                path.rename(root / "moved")
        for folder in sorted(here.rglob("*"), reverse=True):  # a store has no empty directories
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        assert view(here) == view(there)


def test_the_parts_of_a_path(gcs):
    path = as_path(f"{RUN}/checkpoint_7")
    assert str(path) == f"{path}" == path.as_posix() == path.as_uri() == f"{RUN}/checkpoint_7"
    assert (path.bucket, path.key, path.name) == ("bucket", "run/checkpoint_7", "checkpoint_7")
    assert path.parent / "checkpoint_7" == path == path.absolute().expanduser().resolve()
    assert str(path.relative_to(RUN)) == "checkpoint_7" and path.with_name("x").key == "run/x"
    assert pickle.loads(pickle.dumps(path)) == path and hash(path) == hash(as_path(str(path)))
    assert type(epath.Path(str(path))) is type(path), "orbax has another class for it"
    assert str(as_path(f"{RUN}/")) == RUN and as_path(path) == path


def test_what_is_not_there_is_an_error_of_the_system(gcs):
    path = as_path(f"{RUN}/none")
    for call in (path.read_bytes, path.unlink, path.rmtree, path.stat, lambda: path.read_part(0, 4)):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert caught.value.errno == errno.ENOENT and str(caught.value.filename) == str(path)
    path.unlink(missing_ok=True)
    path.rmtree(missing_ok=True)


def test_parts_of_an_object_may_reach_beyond_its_end(gcs):
    path, content = as_path(f"{RUN}/x"), bytes(range(10))
    path.write_bytes(content)
    for start in range(12):
        for size in range(1, 13):
            assert path.read_part(start, size) == content[start : start + size]
    path.write_bytes(b"")
    assert path.is_file() and path.read_part(0, 4) == b"" == path.read_bytes()


def test_files_are_opened_as_on_a_disk(gcs):
    path = as_path(f"{RUN}/x")
    with path.open("w") as file:
        file.write("ä\nb")
        assert not path.exists()
    with path.open() as file:
        assert file.readlines() == ["ä\n", "b"]
    with pytest.raises(ZeroDivisionError), path.open("wb") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == "ä\nb".encode()
    with pytest.raises(OSError, match="'a'"):
        path.open("a")


def test_a_write_by_condition_is_done_once(gcs):
    path = as_path(f"{RUN}/lock")
    content, none = path.read_stamped()
    assert content is None
    first = path.write_if(b"1", none)
    assert first and path.write_if(b"2", none) is None and path.read_bytes() == b"1"
    second = path.write_if(b"2", first)
    assert second != first and path.write_if(None, first) is None and path.exists()
    assert path.read_stamped() == (b"2", second)
    assert path.write_if(None, second) and not path.exists()


def test_functions_of_files_write_to_the_store(gcs, tmp_path):
    target = as_path(RUN)
    write_text(f"{RUN}/t", "ä")
    write_json(target / "j", {"a": 1})
    with replacing(target / "r") as temporary:
        temporary.write_bytes(b"r")
        assert not (target / "r").exists()
    with pytest.raises(ZeroDivisionError), replacing(target / "never") as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert target.names() == ["j", "r", "t"]
    with local_copy(target / "t") as local:
        assert local.read_text() == "ä"
    copy_directory(target, tmp_path / "copy")
    copy_directory(tmp_path / "copy", f"{RUN}/back")
    assert (target / "back").names() == ["j", "r", "t"] and (target / "back" / "t").read_text() == "ä"
    check_writable(target)
    assert target.names() == ["back/j", "back/r", "back/t", "j", "r", "t"]


@pytest.mark.parametrize("status, words", [
    (401, "gcloud auth application-default login"), (403, "Storage Object User"), (400, "store answered"),
])  # fmt: skip
def test_a_store_that_refuses_is_a_sentence_and_never_an_empty_directory(gcs, status, words):
    path = as_path(RUN)
    path.joinpath("x").write_bytes(b"1")
    gcs.refuse = lambda *_: status
    calls = (path.exists, path.is_dir, path.names, path.check_access, (path / "x").read_bytes)
    writes = (lambda: path.check_access(write=True), lambda: (path / "x").write_bytes(b"2"))
    for call in (*calls, *writes):
        with pytest.raises(StoreError) as caught:
            call()
        assert words in str(caught.value) and str(caught.value).startswith(RUN)
        assert isinstance(caught.value, ConfigError) and isinstance(caught.value, OSError)
    with pytest.raises(ConfigError, match=f"^{RUN}/x cannot be written: ") as caught:
        write_text(path / "x", "2")
    assert words in str(caught.value)


def test_a_bucket_that_is_not_there(gcs):
    path = as_path("gs://another-bucket/run")
    with pytest.raises(StoreError, match="there is no such bucket"):
        path.check_access(write=True)
    assert not path.exists()


def test_a_store_that_does_not_answer_is_known_soon(monkeypatch):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match="there is no connection to the store: .*127.0.0.1"):
        as_path(RUN).check_access()


def test_a_listing_of_many_objects_is_whole(gcs):
    names = [f"n/{i:05}" for i in range(2500)]  # a page has 1,000
    for name in names:
        gcs.put("bucket", f"run/{name}", b"")
    gcs.put("bucket", "run0", b"")
    gcs.put("bucket", "run.txt", b"")
    assert as_path(RUN).names() == names and as_path(f"{RUN}/n").names() == [n[2:] for n in names]
