"""Text files: which files, which split, which tokens."""

import os

import numpy as np
import pytest
from pretrained import TOKENIZERS, write_byte_pair, write_tokenizer

import famx.data
from famx.base.errors import ConfigError
from famx.data import ByteVocabulary, TextFiles, WordVocabulary, save_vocabulary, stdlib_text_files
from famx.data.tasks import registry
from famx.data.vocabularies import as_vocabulary


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        path = tmp_path / f"part{i % 3}" / f"{i:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {i} ü\n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "other.md").write_text("not text")
    return tmp_path


def contents(files):
    return {files.vocab.decode(files[i]) for i in range(len(files))}


def test_splits_are_disjoint_and_together_everything(folder):
    pattern = str(folder / "**" / "*.txt")
    train, validation = (TextFiles(pattern, split=s, validation_fraction=0.2)
                         for s in ("train", "validation"))
    assert contents(train) | contents(validation) == {f"document {i} ü\n" for i in range(40)}
    assert not contents(train) & contents(validation)
    assert 2 <= len(validation) <= 16
    other = TextFiles(pattern, split="validation", validation_fraction=0.2, seed=1)
    assert contents(other) != contents(validation)
    assert len(TextFiles(pattern, validation_fraction=0.0)) == 40


def test_split_does_not_depend_on_the_place_or_on_new_files(folder, tmp_path_factory):
    def names(root, split):
        files = TextFiles(str(root / "**" / "*.txt"), split=split, validation_fraction=0.2)
        return {os.path.relpath(path, root) for path in files.paths}

    before = names(folder, "validation")
    moved = tmp_path_factory.mktemp("elsewhere") / "deep"
    os.rename(folder, moved)
    assert names(moved, "validation") == before
    (moved / "part0" / "new.txt").write_text("new")
    after = names(moved, "validation")
    assert after - {os.path.join("part0", "new.txt")} == before


def test_few_files_have_both_splits(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    for fraction in (0.001, 0.999):
        sizes = [len(TextFiles(str(tmp_path / "*"), split=s, validation_fraction=fraction))
                 for s in ("train", "validation")]
        assert sum(sizes) == 3 and min(sizes) == 1


def test_one_file_gives_its_tail_to_validation(tmp_path):
    path = tmp_path / "one[1].txt"  # characters of a glob pattern in a real name
    data = bytes(range(100)) * 10
    path.write_bytes(data)
    train, validation = (TextFiles(str(path), split=s) for s in ("train", "validation"))
    assert train.vocab.decode_bytes(train[0]) == data[:950]
    assert validation.vocab.decode_bytes(validation[0]) == data[950:]
    assert (train.num_tokens(0), validation.num_tokens(0)) == (950, 50)


def test_several_patterns_count_a_file_once(folder):
    files = TextFiles([str(folder / "part0" / "*"), str(folder / "part0" / "00.txt")],
                      validation_fraction=0.0)
    assert len(files) == len(os.listdir(folder / "part0"))
    assert [files.num_tokens(i) for i in range(len(files))] == [len(files[i]) for i in range(
        len(files))]
    assert files[0].dtype == np.int32


def test_words(tmp_path):
    (tmp_path / "a").write_text("b a c")
    files = TextFiles(str(tmp_path / "a"), WordVocabulary(["a", "b"]), validation_fraction=0.0)
    assert files[0].tolist() == [5, 4, 3] and files.num_tokens(0) == 3


def test_bad_input_gets_a_sentence(folder):
    with pytest.raises(ValueError, match="No file matches '.*none.*'"):
        TextFiles([str(folder / "*.md"), str(folder / "none*")])
    with pytest.raises(ValueError, match="must be a path or glob pattern"):
        TextFiles([])
    with pytest.raises(ValueError, match="empty"):
        TextFiles(str(folder / "empty.txt"))
    with pytest.raises(ValueError, match="must be one of 'train', 'validation'"):
        TextFiles(str(folder / "*.md"), split="test")
    with pytest.raises(ValueError, match="validation split .* no document"):
        TextFiles(str(folder / "*.md"), split="validation", validation_fraction=0.0)
    with pytest.raises(ValueError, match="below 1"):
        TextFiles(str(folder / "*.md"), validation_fraction=1.0)
    with pytest.raises(ValueError, match="is not a vocabulary"):
        TextFiles(str(folder / "*.md"), vocabulary="letters")


def test_the_standard_library_is_there():
    paths = stdlib_text_files()
    assert paths == sorted(paths)
    assert any(path.endswith(os.path.join("pydoc_data", "topics.py")) for path in paths)
    assert not any("site-packages" in path for path in paths)
    files = TextFiles()
    assert sum(files.num_tokens(i) for i in range(len(files))) > 3_000_000


# ------ The one rule for vocabularies


WORDS = WordVocabulary(["a", "b"])


def test_names_of_vocabularies():
    assert as_vocabulary("bytes") == ByteVocabulary()
    assert as_vocabulary("words", words=lambda: WORDS) is WORDS
    assert as_vocabulary(WORDS) is WORDS
    for value in ("words", "letters"):
        with pytest.raises(ConfigError, match=f"'{value}' is not a vocabulary, and no such path exists"):
            as_vocabulary(value)
    with pytest.raises(ConfigError, match="None is not a vocabulary; give 'bytes', the directory of"):
        as_vocabulary(None)


def test_a_saved_vocabulary_is_found_in_a_model_dir_and_in_its_checkpoints(tmp_path):
    save_vocabulary(WORDS, tmp_path)
    (tmp_path / "checkpoint_10").mkdir()
    for path in (tmp_path, str(tmp_path), f"{tmp_path}/", tmp_path / "checkpoint_10"):
        assert as_vocabulary(path) == WORDS
    assert as_vocabulary(tmp_path) is as_vocabulary(str(tmp_path))  # read once
    other = WordVocabulary(["a", "b", "c"])
    save_vocabulary(other, tmp_path)
    assert as_vocabulary(tmp_path) == other
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="empty' has no vocabulary, none of vocabulary.json, "):
        as_vocabulary(empty)
    (tmp_path / "vocabulary.json").write_text("{")
    with pytest.raises(ConfigError, match="vocabulary.json is damaged: "):
        as_vocabulary(tmp_path)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_file_is_a_vocabulary_and_so_is_its_folder(tmp_path, name):
    folder = write_tokenizer(tmp_path, name)
    kind = "tokenizer.model" if name == "sentencepiece" else "tokenizer.json"
    file = as_vocabulary(tmp_path / kind)
    assert file == as_vocabulary(folder) and file.bos_id is not None
    text = "The grass is green.\nIs it? 12345"
    assert file.decode(file.encode(text)) == text
    (tmp_path / kind).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        as_vocabulary(folder)


# Sequences of features, whose few words are the task's own.
SEQUENCES = {
    "album_first", "album_same", "image_then_text", "key_then_images", "melody", "pixels",
    "reachable_sparse", "reachable_tree", "spoken_digit",
}  # fmt: skip


def test_every_task_says_that_it_takes_a_vocabulary():
    """An engine that has one looks at the signature. Names with a vocabulary in them have theirs."""
    without = {name for name in famx.data.names() if not registry.takes(name, "vocabulary")}
    assert without == {"passkey_words", "passkey_bytes", "passkey_python_docs"} | SEQUENCES


def test_every_task_takes_the_directory_of_a_model(tmp_path):
    write_byte_pair(tmp_path / "tokenizer")
    vocabulary = as_vocabulary(tmp_path / "tokenizer")
    save_vocabulary(vocabulary, tmp_path / "model")
    (tmp_path / "a.txt").write_text("The grass is green.")
    (tmp_path / "a.jsonl").write_text('{"text": "The sky is blue."}\n' * 30)
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "assistant", "content": "Hi"}]}\n' * 30)
    more = {"own_text": "a.txt", "own_records": "a.jsonl", "own_chat": "b.jsonl"}
    for name in sorted(set(famx.data.names()) - SEQUENCES):
        options = {"files": str(tmp_path / more[name])} if name in more else {}
        if name in ("copy_at_distance", "associative_recall"):
            options["block_size"] = 128
        task = famx.data.get(name, vocabulary=str(tmp_path / "model"), **options)
        for part in getattr(task, "tasks", (task,)):
            assert part.vocab == vocabulary, name
        with pytest.raises(ConfigError, match="'/none' is not a vocabulary, and no such path exists"):
            famx.data.get(name, vocabulary="/none", **options)
        if hasattr(task, "batch") and name != "flan_packed":
            rows = task.batch([3, 4], -(-task.min_length // 128) * 128)["decoder_target_tokens"]
            assert rows.max() < vocabulary.vocab_size
