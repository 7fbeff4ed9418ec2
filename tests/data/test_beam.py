"""Preparation and caches written by the workers of Apache Beam: the same bytes as by one process."""

import importlib.util
import json
import os
import pathlib
import sys

import pytest

import famx.data
from famx.base.errors import ConfigError
from famx.data.beam import _call, map_on_workers
from famx.data.storage import write_tfrecords
from famx.data.tools.prepare import prepare

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="needs the extra beam (apache-beam)"
)
PROCESSES = "--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing"
THREADS = "--direct_num_workers=3 --direct_running_mode=multi_threading"
SIZES = {"train": 37, "validation": 5, "test": 1}


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    """Worker processes import famx and the test modules as this process does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.delenv("FAMX_DATA_DIR", raising=False)


def process_and_square(number):
    return [os.getpid(), number**2]


def bad_third(number):
    if number == 3:
        raise ValueError("Record 3 is broken; copy it again.")
    return number


def write_qasper(folder):
    """Rows of SCROLLS, two of them for each question of the train split."""
    (folder / "qasper").mkdir(parents=True)
    for split, size in SIZES.items():
        rows = [{"id": f"{i // 2 if split == 'train' else i}", "pid": f"{i}", "input": f"Frage {i} ü🙂",
                 "output": f"الله {i}"} for i in range(size)]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "qasper" / f"{split}.jsonl").write_text(text)
    return str(folder)


def contents(folder):
    files = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ------------------------------------------------------------------- calls


@needs_beam
def test_calls_are_divided_among_processes_and_return_in_order(tmp_path):
    results = map_on_workers(process_and_square, 7, str(tmp_path), PROCESSES)
    assert [square for _, square in results] == [i**2 for i in range(7)]
    processes = {process for process, _ in results}
    assert len(processes) == 2 and os.getpid() not in processes
    assert not list(tmp_path.iterdir()), "nothing is left"


@needs_beam
def test_a_mistake_on_a_worker_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="^Record 3 is broken; copy it again.$"):
        map_on_workers(bad_third, 5, str(tmp_path), THREADS)


@needs_beam
@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--direct_num_worker=2", "--beam_options: Apache Beam has no flag --direct_num_worker. Did you "
                                  "mean --direct_num_workers?"),
        ("--direct_num_workers=two", "--beam_options: argument --direct_num_workers: invalid int value"),
        ("--runner='Direct", "--beam_options cannot be read: No closing quotation"),
        ("DirectRunner", "--beam_options: Apache Beam has no flag DirectRunner."),
    ],
)  # fmt: skip
def test_flags_that_beam_does_not_have(tmp_path, options, sentence):
    with pytest.raises(ConfigError) as error:
        map_on_workers(bad_third, 0, str(tmp_path), options)
    assert str(error.value).startswith(sentence)


def test_a_worker_that_does_not_see_the_folder():
    line = json.loads(_call(bad_third, "/none/.beam.partial", 0))
    assert line["number"] == 0
    assert "does not see /none; all workers of the pipeline must share" in line["error"]


def test_without_beam(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    source, out = write_qasper(tmp_path / "in"), str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"need the package 'apache_beam', .* install 'famx\[beam\]'"):
        prepare("scrolls_qasper", source, out, True, beam_options="")


# ------------------------------------------------------------------- the commands


@needs_beam
def test_prepared_files_are_the_same_bytes(tmp_path):
    source = write_qasper(tmp_path / "in")
    settings = dict(allow_partial=True, num_shards=3)
    counts = prepare("scrolls_qasper", source, str(tmp_path / "one"), message=str, **settings)
    messages = []
    (tmp_path / "two" / "scrolls_qasper").mkdir(parents=True)  # of another number of files and examples
    write_tfrecords(tmp_path / "two" / "scrolls_qasper" / "train.tfrecord", [{"id": "1"}], 5)
    for _ in range(2):
        found = prepare("scrolls_qasper", source, str(tmp_path / "two"), message=messages.append,
                        beam_options=PROCESSES, **settings)  # fmt: skip
        assert found == counts == {"scrolls_qasper": {"train": 37, "validation": 5, "test": 1}}
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "two")) == 3 * 3 + 1
    assert sum("exist already" in text for text in messages) == 3, "the second run writes nothing"
    os.remove(tmp_path / "two" / "scrolls_qasper" / "train.tfrecord-00001-of-00003")
    settings["beam_options"] = THREADS
    prepare("scrolls_qasper", source, str(tmp_path / "two"), message=str, **settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@needs_beam
def test_a_mixture_is_one_pipeline(tmp_path, monkeypatch):
    for language in ("welsh", "thai"):
        for split in ("train", "val", "test"):
            row = {"id": split, "url": "", "title": "", "summary": language, "text": "x"}
            path = tmp_path / "in" / f"{language}_{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text((json.dumps(row) + "\n") * 3)
    from famx.data.tools import prepare as module

    pipelines = []
    real = module.map_on_workers
    counted = lambda function, count, *more: pipelines.append(count) or real(function, count, *more)
    monkeypatch.setattr(module, "map_on_workers", counted)
    task = famx.data.get("xlsum", languages=["welsh", "thai"])
    for name, options in (("one", None), ("two", THREADS)):
        prepare(task, str(tmp_path / "in"), str(tmp_path / name), True, 2, str, options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and pipelines == [2 * 3 * 2]


@needs_beam
def test_caches_are_the_same_bytes(tmp_path):
    pytest.importorskip("seqio")
    from famx.data.seqio_cache import cache_by_name

    options = {"data_dir": write_qasper(tmp_path / "in")}
    counts = cache_by_name("scrolls_qasper", str(tmp_path / "one"), options, num_shards=3)
    settings = dict(num_shards=3, beam_options=PROCESSES)
    assert cache_by_name("scrolls_qasper", str(tmp_path / "two"), options, **settings) == counts
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == expected and "scrolls_qasper/COMPLETED" in expected
    folder = tmp_path / "two" / "scrolls_qasper"
    for name in ("train.tfrecord-00001-of-00003", "info.train.json", "stats.train.json", "COMPLETED"):
        os.remove(folder / name)  # as an interrupted command leaves it
    kept = folder / "train.tfrecord-00000-of-00003"
    before = kept.stat().st_mtime_ns
    cache_by_name("scrolls_qasper", str(tmp_path / "two"), options, num_shards=3, beam_options=THREADS)
    assert contents(tmp_path / "two") == expected and kept.stat().st_mtime_ns == before


@needs_beam
def test_generated_examples_are_cached_on_workers(tmp_path):
    pytest.importorskip("seqio")
    from famx.data.seqio_cache import cache_by_name

    made = dict(options={"digits": 2}, length=64, examples=5, num_shards=2)
    for name, options in (("one", None), ("two", THREADS)):
        cache_by_name("passkey_words", str(tmp_path / name), beam_options=options, **made)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert "passkey_words_64/stats.train.json" in contents(tmp_path / "two")
