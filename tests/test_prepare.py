"""`python -m famx.prepare`: official downloads become the records that the tasks read."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

import famx.data
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.data.formats.xlsum import xlsum
from famx.data.tools.prepare import prepare

COUNTS = {"train": 3, "validation": 2, "test": 1}


def rows(split, k=0):
    answer = None if split == "test" else f"answer 🙂 {k}"
    sizes = COUNTS[split]
    return [{"id": str(i), "pid": f"{i}_0", "input": f"Q {i}?\n\nسؤال", "output": answer}
            for i in range(sizes)]  # fmt: skip


def write_scrolls(folder, name="qasper", splits=COUNTS):
    (folder / name).mkdir(parents=True)
    for split in splits:
        text = "".join(json.dumps(row) + "\r\n" for row in rows(split))
        (folder / name / f"{split}.jsonl").write_bytes(text.encode())
    return folder / name


@pytest.fixture
def task(monkeypatch):
    monkeypatch.delenv("FAMX_DATA_DIR", raising=False)
    return dataclasses.replace(famx.data.get("scrolls_qasper"), counts=COUNTS)


def read(task, data_dir):
    task = dataclasses.replace(task, data_dir=str(data_dir))
    return {split: list(task.examples(split)) for split in task.splits}


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for place, _, names in os.walk(folder):
            for name in names:
                full = os.path.join(place, name)
                archive.write(full, os.path.relpath(full, folder.parent))
    return path


def test_folders_and_archives_give_the_examples_of_the_official_files(task, tmp_path):
    official = write_scrolls(tmp_path / "download")
    expected = read(dataclasses.replace(task, folders=(str(official),)), tmp_path / "nothing")
    (tmp_path / "archives").mkdir()
    archive = zipped(official, tmp_path / "archives" / "qasper.zip")
    zipped(official, tmp_path / "archives" / "quality.zip")
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as tar:
        tar.add(official, "deep/qasper")
    for i, source in enumerate(
        (official, official.parent, archive, tmp_path / "archives", tmp_path / "all.tar.gz")
    ):
        out = tmp_path / f"out{i}"
        messages = []
        found = prepare(task, str(source), str(out), num_shards=1 + i % 2, message=messages.append)
        assert found == {"scrolls_qasper": COUNTS}
        assert sorted(os.listdir(out)) == ["scrolls_qasper"]  # nothing else is left
        got = read(task, out)
        for split in COUNTS:
            order = lambda x: x["id"]
            assert sorted(got[split], key=order) == sorted(expected[split], key=order)
        assert not any("quality" in text for text in messages)
        manifest = json.loads((out / "scrolls_qasper" / "prepared.json").read_text())
        assert manifest == {"task": "scrolls_qasper", "examples": COUNTS}


def test_it_goes_on_where_it_was_interrupted(task, tmp_path, monkeypatch):
    official = write_scrolls(tmp_path / "download")
    archive = zipped(official, tmp_path / "qasper.zip")
    out = tmp_path / "out"
    real = task.preprocess
    calls = []

    def dies(record):
        calls.append(record["id"])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(record)

    with pytest.raises(KeyboardInterrupt):
        prepare(dataclasses.replace(task, preprocess=dies), str(archive), str(out), message=str)
    folder = out / "scrolls_qasper"
    assert sorted(os.listdir(folder)) == ["train.tfrecord-00000-of-00001"]
    (folder / ".validation.tfrecord.partial").mkdir()
    before = os.stat(folder / "train.tfrecord-00000-of-00001").st_mtime_ns
    messages = []
    prepare(task, str(archive), str(out), message=messages.append)
    assert os.stat(folder / "train.tfrecord-00000-of-00001").st_mtime_ns == before
    assert len(os.listdir(folder)) == 4 and os.listdir(out) == ["scrolls_qasper"]
    assert "3 examples exist already" in messages[1]  # nothing was unpacked again
    assert [len(x) for x in read(task, out).values()] == [3, 2, 1]


def test_other_counts_and_missing_files_end_it_unless_asked_for(task, tmp_path):
    official = write_scrolls(tmp_path / "download", splits=["train", "validation"])
    task = dataclasses.replace(task, counts={**COUNTS, "train": 4})
    with pytest.raises(ConfigError) as error:
        prepare(task, str(official), str(tmp_path / "out"))
    for part in ("does not contain all of 'scrolls_qasper': the train split of 'scrolls_qasper' has 3 "
                 "rows instead of 4; ", "qasper/test.jsonl is missing", "published at https://www.scrolls",
                 "add --allow_partial"):  # fmt: skip
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()
    messages = []
    found = prepare(task, str(official), str(tmp_path / "out"), True, message=messages.append)
    assert found == {"scrolls_qasper": {"train": 3, "validation": 2}}
    assert any("has 3 rows instead of 4" in text for text in messages)


def test_broken_files_end_it_even_then(task, tmp_path):
    official = write_scrolls(tmp_path / "download")
    (official / "train.jsonl").write_text('{"id": "a"\n')
    with pytest.raises(ValueError, match="Line 1 of .*train.jsonl is broken JSON"):
        prepare(task, str(official), str(tmp_path / "out"), True)
    (official / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="no record in .*train.jsonl"):
        prepare(task, str(official), str(tmp_path / "out"), True)


def test_all_languages_of_a_mixture_from_their_archives(tmp_path):
    row = {"id": "a", "url": "u", "title": "t", "summary": "s", "text": "x"}
    (tmp_path / "download").mkdir()
    for language in ("welsh", "thai"):
        with tarfile.open(tmp_path / "download" / f"{language}_XLSum_v2.0.tar.bz2", "w:bz2") as tar:
            for split in ("train", "val", "test"):
                file = tmp_path / f"{language}_{split}.jsonl"
                file.write_text(json.dumps(row))
                tar.add(file, file.name)
                file.unlink()
    (tmp_path / "download" / "other.zip").write_bytes(b"no archive")
    source, out = str(tmp_path / "download"), str(tmp_path / "out")
    both = xlsum(["welsh", "thai"])
    with pytest.raises(ConfigError, match="'xlsum': the train split of 'xlsum_welsh' has 1 rows"):
        prepare(both, source, out)
    found = prepare(both, source, out, True, message=str)
    sizes = {"train": 1, "validation": 1, "test": 1}
    assert found == {"xlsum_welsh": sizes, "xlsum_thai": sizes}
    assert sorted(os.listdir(out)) == ["xlsum_thai", "xlsum_welsh"]
    assert len(xlsum(["welsh", "thai"], data_dir=out).examples("validation")) == 2
    with pytest.raises(ConfigError, match="'xlsum_amharic' has no split .*amharic_train.jsonl is.* more"):
        prepare("xlsum", source, str(tmp_path / "all"))


def test_bad_input_gets_a_sentence(task, tmp_path, monkeypatch):
    place = str(tmp_path)
    with pytest.raises(ConfigError, match="The nearest name is 'scrolls_qasper'"):
        prepare("scrols_qasper", place, place)
    with pytest.raises(ConfigError, match="needs no preparation"):
        prepare("passkey_words", place, place)
    with pytest.raises(ConfigError, match="'gpt3_gen' is a suite; prepare its tasks one by one: gpt3"):
        prepare("gpt3_gen", place, place)
    with pytest.raises(ConfigError, match="none does not exist"):
        prepare(task, str(tmp_path / "none"), place)
    with pytest.raises(ConfigError, match="give --data_dir or set FAMX_DATA_DIR"):
        prepare(task, place)
    with pytest.raises(ConfigError, match="num_shards must be a whole number of at least 1, not 0"):
        prepare(task, place, place, num_shards=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="data directory .*file/out cannot be made"):
        prepare(task, place, str(tmp_path / "file" / "out"))
    (tmp_path / "x.zip").write_bytes(b"not an archive")
    with pytest.raises(ConfigError, match="x.zip cannot be unpacked"):
        prepare(task, str(tmp_path / "x.zip"), place)
    with tarfile.open(tmp_path / "x.tar.xz", "w:xz") as tar:
        (tmp_path / "bytes").write_bytes(np.random.default_rng(0).bytes(1 << 18))
        tar.add(tmp_path / "bytes", "bytes")
    data = bytearray((tmp_path / "x.tar.xz").read_bytes())
    data[1 << 17 : (1 << 17) + 100] = bytes(100)
    (tmp_path / "x.tar.xz").write_bytes(data)
    with pytest.raises(ConfigError, match="x.tar.xz cannot be unpacked: .*; download it again"):
        prepare(task, str(tmp_path / "x.tar.xz"), place)

    def full(*_, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        prepare(task, str(tmp_path / "x.tar.xz"), place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="contain all of 'scrolls_qasper'.*train.jsonl is missing"):
        prepare(task, str(tmp_path / "empty"), place, True)


@pytest.mark.slow
def test_the_command_line(tmp_path):
    official = write_scrolls(tmp_path / "download")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "FAMX_DATA_DIR": str(tmp_path / "out")}

    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "famx.prepare", *args], cwd=gin_utils.gin_root(), env=env, text=True,
            capture_output=True,
        )  # fmt: skip

    result = run("--task", "scrolls_qasper", "--source", str(official))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "famx: error: " in result.stderr and "has 3 rows instead of 2567" in result.stderr
    result = run("--task=scrolls_qasper", f"--source={official}", "--allow_partial", "--num_shards=2")
    assert result.returncode == 0, result.stderr
    assert "3 examples" in result.stdout and not result.stderr  # progress bars are for terminals only
    assert len(os.listdir(tmp_path / "out" / "scrolls_qasper")) == 7
    for args, sentence in (
        (("--task=scrolls_qasper",), "--source is missing"),
        (("--task=scrolls_kasper", "--source=/"), "The nearest name is 'scrolls_qasper'"),
        (("x", "--task=a"), "Unknown argument x"),
    ):
        result = run(*args)
        assert (result.returncode, "Traceback" in result.stderr) == (2, False)
        assert sentence in result.stderr
