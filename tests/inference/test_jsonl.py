"""JSON lines: errors name the line, and an output file survives a kill at any byte."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from famx.base.errors import ConfigError
from famx.inference.jsonl import ResumableLines, read_objects

SETTINGS = {"mode": "predict", "stop_tokens": (1, 2)}
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


def write(path, objects, settings=SETTINGS):
    with ResumableLines(path) as output:
        assert output.open(settings) == 0
        output.write(objects)
        output.finish()


def stop(path, data=b'{"a": 1}\n{"a": 2}\n', settings=SETTINGS):
    """Leave the files of a run that was killed."""
    with ResumableLines(path) as output:
        output.open(settings)
    path.with_name("out.jsonl.partial").write_bytes(data)


@given(st.lists(st.dictionaries(st.text(), values), max_size=4), st.integers(0, 5))
def test_what_is_written_is_read(tmp_path_factory, objects, start):
    path = tmp_path_factory.mktemp("out") / "out.jsonl"
    write(path, objects)
    assert list(read_objects(path, start)) == list(enumerate(objects))[start:]


def test_byte_order_mark_and_empty_lines_at_the_end_are_no_lines(path):
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\n\n \n')
    assert list(read_objects(path)) == [(0, {"a": 1}), (1, {"a": 2})]


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b'{"a": 1}\n{"a": \n', "Line 2 of {} is broken JSON: Expecting value"),
        (b'{"a": 1}\n\n{"a": 2}\n', "Line 2 of {} is empty: remove it."),
        (b'{"a": 1}\n[1]\n', "Line 2 of {} is not a JSON object: write"),
        (b'{"a": "\xff"}\n', "Line 1 of {} is broken JSON: 'utf-8' codec"),
        (b'{"a": "\\ud800"}\n', "Line 1 of {} is broken JSON: 'utf-8' codec"),
        (b'{"a": ' + b"[" * 100_000, "Line 1 of {} is broken JSON: "),
    ],
)
def test_a_broken_line_is_named(path, data, sentence):
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        list(read_objects(path))
    assert str(caught.value).startswith(sentence.format(path))


def test_lines_before_the_start_are_not_parsed(path):
    path.write_bytes(b'broken\n{"a": 2}\n')
    assert list(read_objects(path, 1)) == [(1, {"a": 2})]


@given(st.lists(st.integers(0, 9), max_size=5), st.integers(0, 200))
def test_a_cut_at_any_byte_loses_no_complete_line(tmp_path_factory, numbers, cut):
    path = tmp_path_factory.mktemp("out") / "out.jsonl"
    data = b"".join(b'{"a": %d}\n' % n for n in numbers)[:cut]
    stop(path, data)
    with ResumableLines(path) as output:
        assert output.open(SETTINGS) == data.count(b"\n")
        output.write({"a": n} for n in numbers[data.count(b"\n") :])
        output.finish()
    assert [found["a"] for _, found in read_objects(path)] == numbers
    assert sorted(os.listdir(path.parent)) == ["out.jsonl", "out.jsonl.settings.json"]


def test_a_line_is_on_disk_when_write_returns(path):
    output = ResumableLines(path)
    output.open(SETTINGS)
    output.write([{"a": "ä"}])
    partial = path.with_name("out.jsonl.partial")
    assert partial.read_text() == '{"a": "ä"}\n' and not path.exists()


def test_finished_with_these_settings(path):
    write(path, [{}])
    assert ResumableLines(path).finished(SETTINGS)
    assert ResumableLines(path).finished({"mode": "predict"})  # the rest is not known yet
    assert not ResumableLines(path.with_name("other")).finished(SETTINGS)


@pytest.mark.parametrize("prepare", [write, stop])
def test_other_settings_are_refused_and_touch_nothing(path, prepare):
    prepare(path, [{}]) if prepare is write else prepare(path)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    found = path if prepare is write else f"{path}.partial"
    with pytest.raises(ConfigError) as caught:
        ResumableLines(path).open({**SETTINGS, "mode": "score"})
    assert str(caught.value) == (
        f"{found} was made with other settings, differing in mode ('predict' there, 'score' here):"
        f" choose another file, or remove {found} to start over."
    )
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial"])
def test_a_file_of_something_else_is_refused(path, name):
    found = path.with_name(name)
    found.write_text("mine")
    with pytest.raises(ConfigError, match=f"{found} exists, but not from a run like this one: choose"):
        ResumableLines(path).open(SETTINGS)
    assert found.read_text() == "mine"


def test_settings_alone_protect_nothing(path):
    stop(path)
    path.with_name("out.jsonl.partial").unlink()
    with ResumableLines(path) as output:
        output.open({"mode": "score"}, {"famx": "1"})
    noted = json.loads(path.with_name("out.jsonl.settings.json").read_text())
    assert noted == {"famx": "1", "settings": {"mode": "score"}}


def test_two_runs_at_once(path):
    with ResumableLines(path) as output:
        output.open(SETTINGS)
        with pytest.raises(ConfigError, match="Another run is writing .*partial: wait until it ends."):
            ResumableLines(path).open(SETTINGS)
    with ResumableLines(path) as output:
        assert output.open(SETTINGS) == 0


def test_a_full_disk_is_a_sentence_and_the_lines_before_stay(path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ResumableLines(path) as output:
        output.open(SETTINGS)
        output.write([{"a": 1}])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(ConfigError, match="cannot be written: No space left on device. Free"):
                output.write([{"a": 2}])
    with ResumableLines(path) as output:
        assert output.open(SETTINGS) >= 1


def test_a_folder_that_does_not_exist(tmp_path):
    for path in (tmp_path / "no" / "out.jsonl", tmp_path):
        with pytest.raises(ConfigError, match=f"{path} cannot be written: "):
            ResumableLines(path)
