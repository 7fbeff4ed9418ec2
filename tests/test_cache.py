"""`python -m famx.cache`: SeqIO reads from the cache what it reads without it, in the same order."""

import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

import famx.data  # noqa: E402
from famx.base import gin_utils  # noqa: E402
from famx.base.command_line import json_object  # noqa: E402
from famx.base.errors import ConfigError  # noqa: E402
from famx.data.formats import flan  # noqa: E402, F401, a mixture
from famx.data.seqio import register_tasks, register_text_task  # noqa: E402
from famx.data.seqio_cache import (  # noqa: E402
    cache,
    check_cached_vocabulary,
    seqio_task,
    shard_of,
)
from famx.data.tasks import registry  # noqa: E402
from famx.data.vocabularies import ByT5Vocabulary  # noqa: E402

SIZES = {"train": 37, "validation": 3}


def write_qasper(folder, sizes=SIZES):
    (folder / "qasper").mkdir(parents=True)
    for split, size in sizes.items():
        rows = [{"id": str(i), "pid": str(i), "input": f"Frage {i} ü🙂", "output": f"الله {i}"}
                for i in range(size)]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "qasper" / f"{split}.jsonl").write_text(text)
    return str(folder)


register_tasks()


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Remove cache directories and tasks after each test."""
    tasks, mixtures = set(seqio.TaskRegistry.names()), set(seqio.MixtureRegistry.names())
    directories = list(seqio.get_global_cache_dirs())
    monkeypatch.delenv("FAMX_DATA_DIR", raising=False)
    yield
    seqio.set_global_cache_dirs(directories)
    for providers, before in ((seqio.TaskRegistry, tasks), (seqio.MixtureRegistry, mixtures)):
        for name in set(providers.names()) - before:
            providers.remove(name)


def read(name, split, cached, **options):
    task = seqio.get_mixture_or_task(name)
    dataset = task.get_dataset(None, split, use_cached=cached, shuffle=False, **options)
    return [{k: np.asarray(v).tolist() for k, v in x.items()} for x in dataset.as_numpy_iterator()]


@pytest.mark.parametrize("decoder_only", [False, True])
def test_seqio_reads_the_same_examples_with_and_without_the_cache(tmp_path, decoder_only):
    options = {"data_dir": write_qasper(tmp_path / "data")}
    task = seqio_task("scrolls_qasper", options, decoder_only)
    messages = []
    found = cache(task, str(tmp_path / "cache"), num_shards=3, message=messages.append)
    assert found == {"scrolls_qasper": SIZES} and "37 examples." in messages[0]
    folder = tmp_path / "cache" / "scrolls_qasper"
    assert sorted(os.listdir(folder)) == sorted([
        "COMPLETED",
        *(["vocabulary.json"] if decoder_only else []),
        *(f"{x}.{split}.json" for x in ("begun", "info", "stats") for split in SIZES),
        *(f"{split}.tfrecord-{k:05d}-of-00003" for split in SIZES for k in range(3)),
    ])  # fmt: skip
    seqio.add_global_cache_dirs([str(tmp_path / "cache")])
    for split in SIZES:
        cached = read("scrolls_qasper", split, True)
        assert cached == read("scrolls_qasper", split, False)
        assert len(cached) == SIZES[split]
        both = [read("scrolls_qasper", split, True, shard_info=seqio.ShardInfo(s, 3)) for s in range(3)]
        key = lambda x: x["targets"]
        assert sorted(sum(both, []), key=key) == sorted(cached, key=key)
    stats = task.get_cached_stats("train")
    assert stats["examples"] == 37
    if decoder_only:
        texts = [x["inputs"] + x["targets"] for x in famx.data.get(
            "scrolls_qasper", **options).examples("train")]  # fmt: skip
        lengths = [len(text.encode()) for text in texts]
        assert (stats["targets_tokens"], stats["targets_max_tokens"]) == (sum(lengths), max(lengths))


@given(st.integers(1, 3000), st.integers(1, 70))
def test_every_example_has_a_file_and_files_are_filled_evenly(size, num_shards):
    files = shard_of(np.arange(size), size, num_shards)
    assert files.min() >= 0 and files.max() < num_shards
    runs = np.ceil(np.ceil(size / 16) / num_shards)
    assert np.bincount(files).max() <= 16 * runs


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("size", "num_shards"), [(700, 20), (560, 35), (50, 20), (700, 7)])
def test_the_order_of_the_split_is_kept_for_any_number_of_files(size, num_shards, tmp_path):
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.range(size).map(
            lambda i: {"targets": tf.cast(i[None], tf.int32)}),
        splits=["train"], num_input_examples={"train": size},
    )  # fmt: skip
    feature = seqio.Feature(seqio.PassThroughVocabulary(size), add_eos=False)
    task = seqio.TaskRegistry.add(
        "numbers", source=source, preprocessors=[seqio.CacheDatasetPlaceholder()],
        output_features={"targets": feature},
    )  # fmt: skip
    assert cache(task, str(tmp_path), num_shards=num_shards, message=str) == {"numbers": {"train": size}}
    seqio.add_global_cache_dirs([str(tmp_path)])
    assert [x["targets"] for x in read("numbers", "train", True)] == [[i] for i in range(size)]


def test_ids_of_another_vocabulary_are_noticed(tmp_path):
    options = {"data_dir": write_qasper(tmp_path / "data")}
    cache(seqio_task("scrolls_qasper", options, True), str(tmp_path / "cache"), message=str)
    seqio.add_global_cache_dirs([str(tmp_path / "cache")])
    check_cached_vocabulary(seqio_task("scrolls_qasper", options, True))
    other = seqio_task("scrolls_qasper", {**options, "vocabulary": ByT5Vocabulary()}, True)
    with pytest.raises(ConfigError, match="ids of another vocabulary than that of 'scrolls_qasper'"):
        check_cached_vocabulary(other)
    shutil.rmtree(tmp_path / "cache")
    cache(other, str(tmp_path / "cache"), message=str)
    check_cached_vocabulary(other)


def test_an_interrupted_command_keeps_what_is_complete(tmp_path, monkeypatch):
    task = seqio_task("scrolls_qasper", {"data_dir": write_qasper(tmp_path / "data")})
    out, folder = str(tmp_path / "cache"), tmp_path / "cache" / "scrolls_qasper"
    real, calls = seqio.dict_to_tfexample, []

    def dies(example):
        calls.append(example)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(example)

    monkeypatch.setattr(seqio, "dict_to_tfexample", dies)
    with pytest.raises(KeyboardInterrupt):
        cache(task, out, ["train"], num_shards=3, message=str)
    assert not (folder / "COMPLETED").exists() and not (folder / "info.train.json").exists()
    first = folder / "train.tfrecord-00000-of-00003"
    assert first.exists() and not (folder / "train.tfrecord-00001-of-00003").exists()
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(seqio, "dict_to_tfexample", real)
    cache(task, out, ["train"], num_shards=3, message=str)
    assert first.stat().st_mtime_ns == before and (folder / "COMPLETED").exists()
    assert not any(name.startswith(".") for name in os.listdir(folder))
    seqio.add_global_cache_dirs([out])
    assert read("scrolls_qasper", "train", True) == read("scrolls_qasper", "train", False)
    messages = []
    assert cache(task, out, ["train"], 3, messages.append)["scrolls_qasper"] == {"train": 37}
    assert "37 examples exist already" in messages[0]


def test_other_data_or_settings_in_the_same_place_end_it(tmp_path):
    task = seqio_task("scrolls_qasper", {"data_dir": write_qasper(tmp_path / "data")})
    out = str(tmp_path / "cache")
    cache(task, out, num_shards=2, message=str)
    with pytest.raises(ConfigError, match=r"cache of the train split .* \(num shards: was 2\); choose"):
        cache(task, out, num_shards=3, message=str)
    seqio.TaskRegistry.remove("scrolls_qasper")
    more = {"data_dir": write_qasper(tmp_path / "more", {"train": 38})}
    with pytest.raises(ConfigError, match=r"\(sources: was 37\)"):
        cache(seqio_task("scrolls_qasper", more), out, num_shards=2, message=str)
    seqio.TaskRegistry.remove("scrolls_qasper")
    same = {"data_dir": str(tmp_path / "data")}
    with pytest.raises(ConfigError, match=r"\(first example: was"):
        cache(seqio_task("scrolls_qasper", same, True), out, num_shards=2, message=str)


def test_a_mixture_caches_all_its_tasks(tmp_path):
    folder = tmp_path / "data" / "flan"
    for name in ("flan", "t0", "niv2", "cot", "dialog"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.jsonl").write_text(json.dumps({"inputs": name, "targets": "x"}))
    mixture = seqio_task("flan", {"data_dir": str(tmp_path / "data")})
    found = cache(mixture, str(tmp_path / "cache"), num_shards=1, message=str)
    assert found == {f"flan_{x}": {"train": 1} for x in ("flan2021", "t0", "niv2", "cot", "dialog")}


@pytest.mark.parametrize(
    "name, options, length, examples",
    [("own_text", {}, None, None), ("ruler_niah_single_1", {"vocabulary": "bytes"}, 1024, 5)],
)
def test_texts_and_made_examples_are_cached_with_their_weights(tmp_path, name, options, length, examples):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"Text {i} " * (i + 1))
    if name == "own_text":
        options = {"files": str(tmp_path / "*.txt"), "validation_fraction": 0.2}
    task = seqio_task(name, options, length=length, examples=examples)
    try:
        cache(task, str(tmp_path / "cache"), num_shards=2, message=str)
        read = lambda cached: [
            (row["targets"].tolist(), row["loss_weights"].tolist())
            for row in task.get_dataset(
                None, "validation", shuffle=False, use_cached=cached
            ).as_numpy_iterator()
        ]
        seqio.set_global_cache_dirs([str(tmp_path / "cache")])
        assert read(True) == read(False) and len(read(True)) >= 3
        tokens, weights = read(True)[0]
        assert len(tokens) == len(weights) == (length or len(tokens)) and sum(weights) > 0
    finally:
        seqio.set_global_cache_dirs([])
        seqio.TaskRegistry.remove(task.name)


def test_the_same_made_task_can_be_cached_with_another_number_of_examples():
    for examples in (2, 3):
        task = seqio_task("passkey_words", {"digits": 2}, length=128, examples=examples)
        assert task.num_input_examples("train") == examples


def test_bad_input_gets_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="The nearest name is 'scrolls_qasper'"):
        seqio_task("scrols_qasper")
    with pytest.raises(ConfigError, match="'passkey_bytes' generates .*: add --length and --examples"):
        seqio_task("passkey_bytes", {"digits": 3}, length=512)
    with pytest.raises(ConfigError, match="has no option 'colour'"):
        seqio_task("scrolls_qasper", {"colour": 1})
    made = types.SimpleNamespace(vocab=None, min_length=1, example=print, batch=print)
    for task, sentence in ((made, "SimpleNamespace is not a dataclass with a field split"),
                           ([[3]], "has no option 'split'")):  # fmt: skip
        monkeypatch.setitem(registry._FACTORIES, "mine", lambda task=task: task)
        with pytest.raises(ConfigError, match=f"'mine' cannot be cached: .*{sentence}"):
            seqio_task("mine", length=8, examples=2)
    monkeypatch.setitem(registry._FACTORIES, "mine", lambda split="train": [[3]])
    with pytest.raises(ConfigError, match="'mine' cannot be cached: its documents have no"):
        seqio_task("mine")
    with pytest.raises(ConfigError, match="qasper/train.jsonl, which is not there. Published: https://www"):
        seqio_task("scrolls_qasper", {"data_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match="takes no options, but got {'digits': 3}"):
        seqio.TaskRegistry.add(
            "foreign", source=seqio.TaskRegistry.get("pg19").source, output_features={}
        )
        seqio_task("foreign", {"digits": 3})
    seqio.TaskRegistry.remove("foreign")
    seqio.TaskRegistry.remove("scrolls_qasper")
    with pytest.raises(ConfigError, match="'passkey_words' cannot be cached: its examples are generated"):
        cache(seqio.TaskRegistry.get("passkey_words"), str(tmp_path))
    task = register_text_task(
        famx.data.get("scrolls_qasper", data_dir=write_qasper(tmp_path / "data")))
    with pytest.raises(ConfigError, match="has no split 'test' here; it has train, validation"):
        cache(task, str(tmp_path), ["test"])
    with pytest.raises(ConfigError, match="num_shards must be a whole number of at least 1, not 0"):
        cache(task, str(tmp_path), num_shards=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/scrolls_qasper cannot be written to"):
        cache(task, str(tmp_path / "file"))
    for text, sentence in (("{", "--task_options is not JSON"), ("[1]", "must be a JSON object")):
        with pytest.raises(ConfigError, match=sentence):
            json_object(text, "task_options")


@pytest.mark.slow
def test_the_command(tmp_path):
    data = write_qasper(tmp_path / "data")
    run = lambda *arguments: subprocess.run(
        [sys.executable, "-m", "famx.cache", *arguments], cwd=gin_utils.gin_root(), capture_output=True,
        text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    result = run("--task=scrolls_qasper", f"--output_dir={tmp_path / 'cache'}", "--split=validation",
                 f"--task_options={json.dumps({'data_dir': data})}", "--num_shards=2")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "validation.tfrecord: 3 examples." in result.stdout
    assert (tmp_path / "cache" / "scrolls_qasper" / "COMPLETED").exists()
    result = run("--task=scrolls_qasper")
    assert result.returncode == 2 and "famx: error: --output_dir is missing" in result.stderr
