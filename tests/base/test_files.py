"""Files and directories that appear complete or not at all."""

import errno
import json
import os
import resource

import pytest

from famx.base.errors import ConfigError
from famx.base.files import (
    check_writable,
    move_into_place,
    new_directory,
    replacing,
    scratch_directory,
    write_bytes,
    write_json,
    write_text,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_is_written_is_read_back(tmp_path):
    write_bytes(tmp_path / "a", b"\0\1")
    write_text(str(tmp_path / "b"), "Käse\n")
    write_json(tmp_path / "c", {"b": 1, "a": ["ä", "\udc80"]}, sort_keys=True)
    assert (tmp_path / "a").read_bytes() == b"\0\1"
    assert (tmp_path / "b").read_bytes() == "Käse\n".encode()
    text = (tmp_path / "c").read_bytes().decode()
    assert json.loads(text) == {"a": ["ä", "\udc80"], "b": 1}
    assert text.startswith('{\n  "a"') and "ä" in text and text.endswith("}\n")
    assert tree(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises((ConfigError, KeyboardInterrupt)) as caught:
            write_text(path, "new")
    if error is FULL:
        assert str(caught.value) == f"{path} cannot be written: No space left on device."
    assert path.read_text() == "old" and tree(tmp_path) == ["file"]


def test_a_file_that_does_not_fit_is_a_sentence(tmp_path):
    path = tmp_path / "file"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ConfigError, match="file cannot be written: File too large."):
            write_bytes(path, bytes(1000))
        with pytest.raises(ConfigError, match="file cannot be written: File too large."):
            with replacing(path) as temporary, temporary.open("wb") as file:
                file.write(bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_a_sentence(tmp_path):
    write_text(tmp_path / "file", "")
    for folder, why in (("missing", "No such file or directory"), ("file", "Not a directory")):
        with pytest.raises(ConfigError, match=f"{folder}/x cannot be written: {why}."):
            write_text(tmp_path / folder / "x", "")
    with pytest.raises(ConfigError, match="file/x cannot be written: "):
        with new_directory(tmp_path / "file" / "x"):
            pass
    with pytest.raises(OSError):
        check_writable(tmp_path / "file" / "x")
    check_writable(tmp_path / "made" / "here")
    assert tree(tmp_path) == ["file", "made", "made/here"]


def test_other_errors_of_the_context_stay_as_they_are(tmp_path):
    for make in (replacing, new_directory, scratch_directory):
        with pytest.raises(FileNotFoundError, match="/no/such/input"):
            with make(tmp_path / "x"):
                open("/no/such/input")
        with pytest.raises(KeyboardInterrupt):
            with make(tmp_path / "x"):
                raise KeyboardInterrupt
    assert tree(tmp_path) == []


def test_a_directory_appears_with_all_its_files(tmp_path):
    killed = tmp_path / "in" / ".out.partial"
    killed.mkdir(parents=True)
    write_text(killed / "half", "")
    with new_directory(tmp_path / "in" / "out") as new:
        write_text(new / "a", "1")
        (new / "sub").mkdir()
        write_text(new / "sub" / "b", "2")
        assert not (tmp_path / "in" / "out").exists()
    assert tree(tmp_path) == ["in", "in/out", "in/out/a", "in/out/sub", "in/out/sub/b"]
    with pytest.raises(ConfigError, match="out cannot be written: Directory not empty."):
        with new_directory(tmp_path / "in" / "out") as new:
            write_text(new / "a", "3")
    assert (tmp_path / "in" / "out" / "a").read_text() == "1"


def test_files_of_a_scratch_directory_move_together(tmp_path):
    with scratch_directory(tmp_path / "name") as scratch:
        for name in "ab":
            (scratch / name).write_text(name)
        move_into_place({scratch / name: tmp_path / f"final_{name}" for name in "ab"})
    assert tree(tmp_path) == ["final_a", "final_b"]


def test_a_new_file_has_the_usual_rights(tmp_path):
    write_text(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
