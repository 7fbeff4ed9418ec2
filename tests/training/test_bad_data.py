"""Data that cannot be used: named before the run or where it is read, with nothing lost."""

import json
import os
import pathlib

import numpy as np
import pytest
from tiny import make_run

from famx.base.errors import BadData, BadRecord, ConfigError
from famx.data.tasks import checking
from famx.training import loop
from famx.training.run import Data, Every
from famx.training.run_log import read_metrics

GOOD = [json.dumps({"text": f"Document {i} of some. " * 2}) for i in range(20)]
BAD = {
    "null": '{"text": null}',
    "number": '{"text": 12.5}',
    "missing": '{"content": "x"}',
    "broken": '{"text": "cut off',
    "list": '["text"]',
}


def write(path, bad=None):
    """Twenty records, one to a line; a bad one is line 8."""
    lines = GOOD if bad is None else [*GOOD[:7], BAD[bad], *GOOD[7:]]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def run(directory, path, task="own_records", steps=9, options=None, allow=(), **changes):
    settings = dict(
        model_dir=str(directory), task=task, steps=steps, lengths={"targets": 32}, batch_size=2,
        options={"files": str(path), "validation_fraction": 0.0, **(options or {})}, every=Every(log=1),
    )  # fmt: skip
    return loop.train(make_run(**{**settings, **changes}), allow)


@pytest.fixture
def unchecked(monkeypatch):
    """As if the data were too large to look at before the run."""
    monkeypatch.setattr(checking, "_SECONDS", -1.0)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_record_is_named_before_the_first_step(tmp_path, bad):
    path = write(tmp_path / "x.jsonl", bad)
    with pytest.raises(BadRecord, match=f"Line 8 of {path}.*on_bad_record") as caught:
        run(tmp_path / "run", path)
    assert str(caught.value).count("Line 8") == 1
    assert not (tmp_path / "run").exists()


def with_data(tmp_path, **changes):
    return run(tmp_path / "run", tmp_path / "x.jsonl", **changes)


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", ["null", "broken"])
def test_a_bad_record_in_a_run_ends_it_after_a_checkpoint(tmp_path, bad):
    path = write(tmp_path / "x.jsonl", bad)
    with pytest.raises(BadRecord, match=rf"Line 8 of {path}.* saved at step \d") as caught:
        with_data(tmp_path, steps=40)
    step = int(str(caught.value).partition("saved at step ")[2].partition(".")[0])
    assert 0 < step < 40 and (tmp_path / "run" / f"checkpoint_{step}").is_dir()
    with pytest.raises(BadRecord, match=f"saved at step {step}"):  # the same, not a step further
        with_data(tmp_path, steps=40)
    # From here it continues without the record, or with the mended file if that is allowed.
    scalars = run(tmp_path / "run", path, steps=step + 2, on_bad_record="skip")
    assert np.isfinite(scalars["loss"]) and scalars["bad_records"] == 1
    write(path)
    with pytest.raises(ConfigError, match="data.files.x.jsonl was '.*' and is now"):
        with_data(tmp_path, steps=40)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_skipping_is_counted_and_resumes_exactly(tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", "null")
    settings = dict(on_bad_record="skip", steps=40)
    run(tmp_path / "whole", path, **settings)
    said = capsys.readouterr().err
    assert "1 bad record skipped so far; the last: Line 8" in said and "2 bad records" in said
    for steps in (13, 27, 40):  # the records are read about twice
        run(tmp_path / "parts", path, **{**settings, "steps": steps})
    whole, parts = (
        [(line["step"], line["loss"], line.get("bad_records")) for line in read_metrics(str(folder))]
        for folder in (tmp_path / "whole", tmp_path / "parts")
    )
    assert whole == parts and whole[-1][2] >= 2


def test_bad_records_that_are_skipped_are_said_before(tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", "number")
    run(tmp_path / "run", path, steps=1, on_bad_record="skip")
    assert f"1 bad records will be skipped; the first: Line 8 of {path}" in capsys.readouterr().err


def test_skipping_needs_documents_and_a_known_word(tmp_path):
    with pytest.raises(ConfigError, match="leaves out documents, and the task has none"):
        loop.train(make_run(model_dir=str(tmp_path / "run"), on_bad_record="skip"))
    with pytest.raises(ConfigError, match="must be one of 'stop', 'skip', not 'ignore'"):
        Data("passkey", {"targets": 32}, 2, on_bad_record="ignore")


# ---------------------------------------------------------------- files that change during a run


class Changing:
    """An evaluation that changes a file after some steps."""

    def __init__(self, change, step=3):
        self.change, self.step = change, step

    def __call__(self, model, params, step):
        if step == self.step:
            self.change()
        return {}


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().replace(b"Document", b"DOCUMENT"))
    os.replace(other, path)


CHANGES = {
    "has become shorter": cut,
    "was replaced or changed": replace,
    "is gone: put it back": pathlib.Path.unlink,
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "task, sentence", [("own_records", "has become shorter"), *(("own_text", x) for x in CHANGES)]
)
def test_a_file_that_changes_during_a_run_is_named(tmp_path, task, sentence):
    path = write(tmp_path / "x.jsonl")
    original = path.read_bytes()
    if task == "own_text":
        for i in range(20):
            (tmp_path / f"{i}.txt").write_text(f"{i} is the number of this document. " * 2)
        path, files = tmp_path / "7.txt", tmp_path / "*.txt"
        original = path.read_bytes()
    else:
        files = path
    evaluation = Changing(lambda: CHANGES[sentence](path))
    every = Every(log=1, evaluation=1)
    settings = dict(task=task, steps=60, every=every)
    with pytest.raises(BadData, match=f"{path} .*{sentence}.* saved at step") as caught:
        run(tmp_path / "run", files, evaluation=evaluation, **settings)
    step = int(str(caught.value).partition("saved at step ")[2].partition(".")[0])
    assert step >= 3 and (tmp_path / "run" / f"checkpoint_{step}").is_dir()
    path.write_bytes(original)  # put back, it continues
    run(tmp_path / "run", files, **{**settings, "steps": step + 1})


def test_data_is_compared_when_a_run_resumes(tmp_path):
    path = write(tmp_path / "x.jsonl")
    run(tmp_path / "run", path, steps=1)
    written = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]["data"]
    assert written["documents"] == 20 and written["bytes"] == path.stat().st_size
    assert list(written["files"]) == ["x.jsonl"]
    moved = tmp_path / "elsewhere" / "x.jsonl"
    moved.parent.mkdir()
    os.replace(path, moved)
    run(tmp_path / "run", moved, steps=2)  # the same file in another place
    text = moved.read_text()
    moved.write_text(text.replace("Document 3", "Dokument 3"))
    with pytest.raises(ConfigError, match=r"data.files.x.jsonl was '\d+ bytes, \w+' and is now"):
        run(tmp_path / "run", moved, steps=3)
    run(tmp_path / "run", moved, steps=3, allow=("data",))


# ---------------------------------------------------------------- encodings and sizes

LATIN = "Grüße aus Köln. " * 4


@pytest.mark.parametrize(
    "data, sentence",
    [
        (LATIN.encode("utf-16"), "b.txt is encoded in UTF-16, not in UTF-8: convert it"),
        (LATIN.encode("utf-32"), "b.txt is encoded in UTF-32"),
        (LATIN.encode("latin-1"), "b.txt is not UTF-8 at byte 2: convert it"),
        (LATIN.encode("utf-16-le"), "b.txt is not UTF-8 at byte 4: .*bytes of zero"),
    ],
)
def test_texts_that_are_not_utf8_are_refused_by_name(tmp_path, data, sentence):
    for name in "acd":
        (tmp_path / f"{name}.txt").write_text("A plain text. " * 4)
    (tmp_path / "b.txt").write_bytes(data)
    with pytest.raises(BadRecord, match=sentence):
        run(tmp_path / "run", tmp_path / "*.txt", "own_text", options={"validation_fraction": 0.0})


def test_records_that_are_not_utf8_are_refused_by_name(tmp_path):
    path = write(tmp_path / "x.jsonl")
    path.write_bytes(path.read_text().encode("utf-16"))
    with pytest.raises(ConfigError, match=f"{path} is encoded in UTF-16"):
        with_data(tmp_path)


def test_a_huge_document_is_refused_by_name(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("A plain text. " * 4)
    with open(tmp_path / "c.txt", "wb") as file:
        file.truncate(2**40)  # a sparse file
    with pytest.raises(BadRecord, match=r"c.txt has 1.10 TB, and a document of at most 2.1 GB"):
        run(tmp_path / "run", tmp_path / "*.txt", "own_text", options={"validation_fraction": 0.0})
