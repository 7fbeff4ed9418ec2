"""Records of Parquet and Arrow files: any row by its number, for every text task and for own data."""

import concurrent.futures
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pa = pytest.importorskip("pyarrow")
import pyarrow.feather as feather  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

import famx.data  # noqa: E402
from famx.base.errors import ConfigError  # noqa: E402
from famx.data import ByteVocabulary, ContinuousLanes, JsonlRecords, RecordDocuments  # noqa: E402
from famx.data.storage import dataset_splits, open_records, open_split, tables  # noqa: E402
from famx.data.storage.tables import TableRecords  # noqa: E402

ROWS = st.lists(
    st.fixed_dictionaries({
        "text": st.none() | st.text(max_size=20),
        "n": st.integers(-(2**63), 2**63 - 1),
        "turns": st.lists(st.fixed_dictionaries({"role": st.text(max_size=3), "x": st.floats(width=64)
                                                 .filter(lambda x: x == x)}), max_size=3),
    }),
    max_size=9,
)  # fmt: skip
SCHEMA = pa.schema([
    ("text", pa.string()), ("n", pa.int64()),
    ("turns", pa.list_(pa.struct([("role", pa.string()), ("x", pa.float64())]))),
])  # fmt: skip


def write_parquet(path, rows, schema=None, size=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=size)
    return str(path)


def write_stream(path, rows, schema=None, size=2):
    """As `datasets` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=size)
    return str(path)


def write_feather(path, rows, schema=None, size=2):
    feather.write_feather(pa.Table.from_pylist(rows, schema), str(path), chunksize=size)
    return str(path)


WRITERS = {"parquet": write_parquet, "arrow": write_stream, "feather": write_feather}


@pytest.mark.parametrize("ending", WRITERS)
def test_any_row_is_what_was_written(ending, tmp_path_factory):
    @settings(max_examples=25, deadline=None)
    @given(st.lists(ROWS, min_size=1, max_size=3), st.integers(1, 4))
    def check(files, size):
        folder = tmp_path_factory.mktemp("tables")
        for k, rows in enumerate(files):
            WRITERS[ending](folder / f"{k}.{ending}", rows, SCHEMA, size)
        expected = sum(files, [])
        if not expected:
            with pytest.raises(ValueError, match="There is no record in"):
                open_records(str(folder / "*"))
            return
        records = open_records(str(folder / "*"))
        assert isinstance(records, TableRecords) and len(records) == len(expected)
        order = np.random.default_rng(0).permutation(len(expected))
        assert [records[i] for i in order] == [expected[i] for i in order]
        only = TableRecords(str(folder / "*"), ["n"])
        assert [only[i] for i in range(len(only))] == [{"n": row["n"]} for row in expected]
        for i in (-1, len(records)):
            with pytest.raises(IndexError):
                records[i]

    check()


def numbered(count):
    return [{"text": f"Text {i}", "n": i} for i in range(count)]


def test_only_the_row_group_of_a_row_is_read_and_few_stay_in_memory(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", numbered(100), size=10)
    read = []
    real = tables._Parquet.read
    monkeypatch.setattr(
        tables._Parquet, "read", lambda self, k, names: read.append((k, names)) or real(self, k, names)
    )
    records = TableRecords(path, ["n"])
    assert not read, "opening a file reads no row"
    assert [records[i]["n"] for i in (55, 50, 59, 3)] == [55, 50, 59, 3]
    assert read == [(5, ["n"]), (0, ["n"])]
    monkeypatch.setattr(tables, "_KEPT_BYTES", 200)  # two groups of ten int64
    for i in (15, 25, 35):
        records[i]
    assert len(records._parts) == 2
    read.clear()
    assert records[25]["n"] == 25 and not read
    assert records[55]["n"] == 55 and read == [(5, ["n"])]


def test_arrow_files_are_mapped_not_loaded(tmp_path):
    rows = [{"text": "x" * 100_000} for _ in range(200)]  # 20 MB
    path = write_stream(tmp_path / "a.arrow", rows)
    before = pa.total_allocated_bytes()
    records = TableRecords(path)
    assert all(records[i]["text"] == rows[i]["text"] for i in (150, 3, 199))
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_OPEN_FILES", 2)
    for k in range(5):
        write_parquet(tmp_path / f"{k}.parquet", [{"n": k}])
    records = TableRecords(str(tmp_path / "*.parquet"))
    assert [records[i]["n"] for i in (4, 0, 3, 1, 2)] == [4, 0, 3, 1, 2]
    assert len(records._files) == 2


def test_threads_read_the_same(tmp_path):
    records = TableRecords(write_parquet(tmp_path / "a.parquet", numbered(300), size=7))
    order = np.random.default_rng(0).integers(0, 300, 2000).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [row["n"] for row in pool.map(records.__getitem__, order)] == order


def test_lanes_over_a_table_are_those_over_json_lines_and_resume_exactly(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"text": "".join(chr(97 + x) for x in rng.integers(0, 26, rng.integers(1, 40)))}
            for _ in range(23)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = JsonlRecords(tmp_path / "a.jsonl")
    for ending, write in WRITERS.items():
        table = TableRecords(write(tmp_path / f"a.{ending}", rows))
        lanes = lambda records, *shard: ContinuousLanes(
            RecordDocuments(records, "text", vocabulary=ByteVocabulary()), 4, 8, 7, *shard
        )
        ours, theirs, hosts = lanes(table), lanes(plain), [lanes(table, k, 2) for k in range(2)]
        for step in range(40):
            batch, parts = next(ours), [next(host) for host in hosts]
            for name, value in next(theirs).items():
                np.testing.assert_array_equal(batch[name], value)
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)
            if step == 17:
                assert ours.get_state() == theirs.get_state()
                later = lanes(TableRecords(table.paths), 1, 2)
                later.set_state(json.loads(json.dumps(theirs.get_state())))
                hosts[1] = later


def test_bad_files_get_a_sentence(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", numbered(4))
    with pytest.raises(ValueError, match="a.parquet has no column 'body'; its columns are text, n."):
        TableRecords(path, ["n", "body"])
    write_parquet(tmp_path / "b.parquet", [{"n": 1}])
    with pytest.raises(ValueError, match="b.parquet has no column 'text'; its columns are n."):
        TableRecords(str(tmp_path / "*.parquet"), ["text"])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="c.parquet cannot be read as a Parquet file .*; copy it again"):
        TableRecords(tmp_path / "c.parquet")
    write_stream(tmp_path / "d.arrow", numbered(400), size=100)
    (tmp_path / "e.arrow").write_bytes((tmp_path / "d.arrow").read_bytes()[:1500])
    with pytest.raises(ValueError, match="e.arrow cannot be read as a Arrow file"):
        TableRecords(tmp_path / "e.arrow")
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    with pytest.raises(ValueError, match="have different formats; name files of one format"):
        open_records(str(tmp_path / "a.*"))
    with pytest.raises(ValueError, match="a.parquet is a table, not a text; read its rows with the task"):
        famx.data.get("own_text", files=path)
    with pytest.raises(ValueError, match="is a directory; name its files, such as"):
        famx.data.get("own_text", files=str(tmp_path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"files need the package 'pyarrow',.* 'famx\[parquet\]'"):
        TableRecords(path)


# ------------------------------------------------------------------- directories


def write_saved(folder, count, first=0):
    """A directory as `Dataset.save_to_disk` writes it, with a cache, which is no part of it."""
    half = numbered(first + count)[first:]
    parts = {"data-00000-of-00002.arrow": half[::2], "data-00001-of-00002.arrow": half[1::2]}
    for name, rows in parts.items():
        write_stream(folder / name, rows)
    write_stream(folder / "cache-0123456789.arrow", numbered(1))
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in parts], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


def write_saved_dict(folder):
    write_saved(folder / "train", 6)
    write_saved(folder / "dev", 4, 6)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "dev"]}')


def found(folder):
    return {split: [path.removeprefix(f"{folder}/") for path in paths]
            for split, paths in dataset_splits(str(folder)).items()}  # fmt: skip


@pytest.mark.parametrize(
    "files, expected",
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
          "data/test-00000-of-00001.parquet"], {"train": 2, "test": 1}),
        (["train.parquet", "valid.parquet", "evaluation.parquet"],
         {"train": 1, "validation": 1, "test": 1}),
        (["default/train/0000.parquet", "default/train/0001.parquet", "default/validation/0000.parquet"],
         {"train": 2, "validation": 1}),
        (["dev/a.parquet", "training/b.parquet"], {"validation": 1, "train": 1}),
        (["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
         {"train_sft": 1, "test_sft": 1}),
        (["wiki-train-00000-of-00001.arrow", "wiki-test-00000-of-00001.arrow"], {"train": 1, "test": 1}),
        (["part.0.parquet", "part.1.parquet", "notes.txt"], {"train": 2}),
        (["train.jsonl", "x.parquet"], {"train": 1}),
        (["train.jsonl", "valid.ndjson"], {"train": 1, "validation": 1}),
        (["qasper/train/0.parquet"], {}),
    ],
)  # fmt: skip
def test_splits_by_the_names_of_files(tmp_path, files, expected):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    splits = found(tmp_path)
    assert {split: len(paths) for split, paths in splits.items()} == expected
    assert all(paths == sorted(paths) for paths in splits.values())


def test_saved_data_sets(tmp_path):
    write_saved(tmp_path / "one", 10)
    files = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert found(tmp_path / "one") == {"train": files}
    assert sorted(x["n"] for x in open_split(str(tmp_path / "one"), "train")) == list(range(10))
    write_saved_dict(tmp_path / "two")
    assert {x: len(y) for x, y in found(tmp_path / "two").items()} == {"train": 2, "validation": 2}
    assert len(open_split(str(tmp_path / "two"), "validation")) == 4
    with pytest.raises(FileNotFoundError):
        open_split(str(tmp_path / "two"), "test")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="state.json is not what `datasets` writes"):
        dataset_splits(str(tmp_path / "one"))


def test_what_the_datasets_library_writes(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets writes the directories")
    whole = datasets.Dataset.from_list(numbered(2500))
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    parts = whole.train_test_split(0.2, seed=0)
    parts.save_to_disk(tmp_path / "two")
    (tmp_path / "three" / "data").mkdir(parents=True)
    for split, part in parts.items():
        part.to_parquet(tmp_path / "three" / "data" / f"{split}-00000-of-00001.parquet")
    rows = open_split(str(tmp_path / "one"), "train")
    assert [rows[i] for i in (0, 999, 1000, 2499)] == [whole[i] for i in (0, 999, 1000, 2499)]
    for folder in ("two", "three"):
        for split in ("train", "test"):
            rows = open_split(str(tmp_path / folder), split)
            assert len(rows) == len(parts[split])
            assert [rows[i] for i in (7, 3)] == [parts[split][i] for i in (7, 3)]


# ------------------------------------------------------------------- tasks


def texts(task, split="train"):
    return [(x["inputs"], x["targets"]) for x in task.examples(split)]


def test_own_records_of_a_directory(tmp_path):
    write_saved_dict(tmp_path / "two")
    task = famx.data.get("own_records", files=str(tmp_path / "two"))
    split = {x: sorted(text for _, text in texts(task, x)) for x in ("train", "validation")}
    every = [f"Text {i}" for i in range(10)]
    assert split == {"train": every[:6], "validation": every[6:]}
    write_saved(tmp_path / "one", 40)
    task = famx.data.get("own_records", files=str(tmp_path / "one"), validation_fraction=0.2)
    both = [texts(task, split) for split in ("train", "validation")]
    assert sorted(sum(both, [])) == sorted(("", f"Text {i}") for i in range(40)) and len(both[1]) > 1
    tokens, weights = task[0]
    assert task.vocab.decode(tokens) == both[0][0][1] and weights.all()
    held = write_parquet(tmp_path / "held.parquet", [{"text": "held"}])
    task = famx.data.get("own_records", files=str(tmp_path / "two"), validation_files=held)
    assert texts(task, "validation") == [("", "held")]
    hub = tmp_path / "hub"
    write_parquet(hub / "data" / "train_sft-00000-of-00001.parquet", [{"q": "a ", "r": "b"}])
    only = famx.data.get("own_records", files=str(hub), inputs="q", targets="r", validation_files=held)
    assert texts(only) == [("a ", "b")], "the only split is that for training"
    write_parquet(hub / "data" / "test_sft-00000-of-00001.parquet", [{"q": "a ", "r": "b"}])
    with pytest.raises(ValueError, match="has no split 'train'; its splits are test_sft, train_sft. N"):
        famx.data.get("own_records", files=str(hub))
    with pytest.raises(ValueError, match="'inputs' and 'targets'; their columns are q, r. Give the"):
        famx.data.get("own_records", files=str(hub / "data" / "train*"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no Parquet, Arrow or JSON lines files"):
        famx.data.get("own_records", files=str(tmp_path / "none"))


def test_published_tables_are_the_official_files(tmp_path):
    row = {"id": "1", "pid": "1_0", "input": "Q", "output": "A"}
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"scrolls/qasper/{split}/0000.parquet", [row, {**row, "output": "B"}])
    write_parquet(tmp_path / "xlsum/welsh/data/train-00000-of-00001.parquet",
                  [{"id": "1", "url": "u", "title": "t", "summary": "S", "text": "T"}])  # fmt: skip
    write_parquet(tmp_path / "pg19/data/train-00000-of-00001.parquet",
                  [{"short_book_title": "A", "publication_date": 1900, "text": "Once"}])  # fmt: skip
    said = lambda *words: [{"text": word, "tokens": [word]} for word in words]
    document = {"id": "d", "kind": "movie", "start": "IN A", "end": "THE END",
                "text": "<html><pre>made 1999 IN  A house THE END credits</pre></html>"}  # fmt: skip
    write_parquet(tmp_path / "narrativeqa/data/validation-00000-of-00001.parquet",
                  [{"document": document, "question": {"text": "Who?"}, "answers": said("He", "Him")}]
                  )  # fmt: skip
    write_stream(tmp_path / "flan/cot/train.arrow", [{"inputs": "i", "targets": "t"}])
    write_parquet(tmp_path / "flan/all/train-00000-of-00001.parquet",
                  [{"inputs": "j", "targets": "u", "_task_source": "CoT"}])  # fmt: skip
    write_parquet(tmp_path / "gpt3/boolq/validation-00000-of-00001.parquet",
                  [{"question": "is it", "passage": "It is.", "label": 1, "idx": 0}])  # fmt: skip
    get = lambda name, **options: famx.data.get(name, data_dir=str(tmp_path), **options)
    assert texts(get("scrolls_qasper")) == [("Q\n\n", "A"), ("Q\n\n", "B")]
    assert get("scrolls_qasper").examples("train")[1]["references"] == ["B"]
    assert get("scrolls_qasper").examples("validation")[0]["references"] == ["A", "B"]
    assert texts(get("xlsum_welsh")) == [("T\n\n", "S")]
    assert texts(get("pg19")) == [("", "Once")] and get("pg19").examples("train")[0]["id"] == "A"
    story = get("narrative_qa").examples("validation")[0]
    assert story["inputs"] == "Who?\n\nIN  A house THE END\n\n" and story["references"] == ["He", "Him"]
    assert sorted(texts(get("flan_cot"))) == [("i ", "t"), ("j ", "u")]
    assert get("gpt3_boolq").examples("validation")[0]["answer"] == [1]
    write_parquet(tmp_path / "scrolls/quality/train.parquet", [{"id": "1", "question": "Q"}])
    with pytest.raises(ValueError, match="has no column 'pid'; its columns are id, question."):
        get("scrolls_quality").examples("train")
    with pytest.raises(ConfigError, match=r"The test split of task 'scrolls_qasper' needs .*test.jsonl"):
        get("scrolls_qasper").examples("test")


def test_examples_of_any_task_as_a_table(tmp_path):
    row = {"id": "1", "inputs": "", "targets": "lemma", "references": []}
    schema = pa.schema([(x, pa.string()) for x in ("id", "inputs", "targets")]
                       + [("references", pa.list_(pa.string()))])  # fmt: skip
    for name in ("isabelle", "kjv", "hol_light", "metamath_set", "anarchism"):
        write_parquet(tmp_path / name / "train-00000-of-00001.parquet", [row], schema)
        task = famx.data.get(name, data_dir=str(tmp_path))
        assert list(task.examples("train")) == [row]
    ranked = {**row, "inputs": "Q", "references": ["b"], "choices": ["a", "b"], "answer": [1]}
    write_stream(tmp_path / "gpt3_copa" / "validation.arrow", [ranked])
    task = famx.data.get("gpt3_copa", data_dir=str(tmp_path))
    assert list(task.examples("validation")) == [ranked]
    assert task.evaluate("validation", [[0.0, 1.0]]) == {"accuracy": 100.0}
    write_stream(tmp_path / "gpt3_cb" / "validation.arrow", [{**row, "references": ["x"]}])
    with pytest.raises(ConfigError, match="The validation split of task 'gpt3_cb' needs"):  # no choices
        famx.data.get("gpt3_cb", data_dir=str(tmp_path)).examples("validation")
