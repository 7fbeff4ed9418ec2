"""PG-19: a book is a document, cut at max_tokens."""

import numpy as np
import pytest

import famx.data
from famx.base.errors import ConfigError
from famx.data import ContinuousLanes
from famx.data.storage.records import write_tfrecords


@pytest.fixture
def task(tmp_path):
    for split, names in (("train", ["999", "10001"]), ("validation", ["7"])):
        (tmp_path / "pg19" / split).mkdir(parents=True)
        for name in names:
            (tmp_path / "pg19" / split / f"{name}.txt").write_bytes(f"Book {name}\r\n❦ 𝄞".encode())
    (tmp_path / "pg19" / "metadata.csv").write_text("7,Title,1900,http://x\n")
    return famx.data.get("pg19", data_dir=str(tmp_path))


def test_books_in_the_order_of_their_numbers(task):
    assert [x["id"] for x in task.examples("train")] == ["999", "10001"]
    tokens, weights = task[1]
    assert tokens.dtype == np.int32 and weights.dtype == np.float32 and (weights == 1).all()
    assert tokens[-1] == task.vocab.eos_id
    assert task.vocab.decode_bytes(tokens) == "Book 10001\r\n❦ 𝄞".encode()


def test_max_tokens_cuts_the_end_together_with_eos(task):
    whole, _ = task[0]
    for size in (1, len(whole) - 1, len(whole), len(whole) + 5):
        tokens, weights = task.documents("train", max_tokens=size)[0]
        assert tokens.tolist() == whole[:size].tolist() and len(weights) == len(tokens)


def test_lanes_read_the_task_as_it_is(task):
    batch = next(ContinuousLanes(task, batch_size=2, length=8))
    firsts = {tuple(row) for row in batch["decoder_target_tokens"].tolist()}
    assert firsts == {tuple(task[i][0][:8].tolist()) for i in range(2)}


def test_next_token_accuracy_from_counts_of_every_book(task):
    assert task.evaluate("train", [(1, 4), (5, 6)]) == {"next_token_accuracy": 60}
    found = task.evaluate("train", [(5, 6)], indices=[1])
    assert found == {"next_token_accuracy": pytest.approx(500 / 6)}


def test_bad_books_get_a_sentence(task, tmp_path):
    with pytest.raises(ConfigError, match=r"needs .*pg19/test/\*.txt, which is not.*tfds build pg19"):
        task.examples("test")
    (tmp_path / "pg19" / "test").mkdir()
    with pytest.raises(ValueError, match="no book"):
        task.examples("test")
    (tmp_path / "pg19" / "validation" / "7.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match="7.txt is not UTF-8 at byte 3"):
        task.examples("validation")[0]


def test_books_prepared_by_tensorflow_datasets(tmp_path, monkeypatch):
    folder = tmp_path / "pg19" / "0.1.1"
    folder.mkdir(parents=True)
    book = {"book_text": "ü", "book_id": 5, "book_title": "t", "publication_date": "d", "book_link": "l"}
    write_tfrecords(folder / "pg19-test.tfrecord", [book])
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (example,) = famx.data.get("pg19", data_dir=str(tmp_path / "elsewhere")).examples("test")
    assert (example["id"], example["targets"]) == ("5", "ü")
