"""Text files: which files, which split, which tokens."""

import os

import numpy as np
import pytest

from famx.data import TextFiles, WordVocabulary, stdlib_text_files


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
    with pytest.raises(ValueError, match="at least one path"):
        TextFiles([])
    with pytest.raises(ValueError, match="empty"):
        TextFiles(str(folder / "empty.txt"))
    with pytest.raises(ValueError, match="'train' or 'validation'"):
        TextFiles(str(folder / "*.md"), split="test")
    with pytest.raises(ValueError, match="validation split .* no document"):
        TextFiles(str(folder / "*.md"), split="validation", validation_fraction=0.0)
    with pytest.raises(ValueError, match="below 1"):
        TextFiles(str(folder / "*.md"), validation_fraction=1.0)
    with pytest.raises(ValueError, match="no vocabulary"):
        TextFiles(str(folder / "*.md"), vocabulary="letters")


def test_the_standard_library_is_there():
    paths = stdlib_text_files()
    assert paths == sorted(paths)
    assert any(path.endswith(os.path.join("pydoc_data", "topics.py")) for path in paths)
    assert not any("site-packages" in path for path in paths)
    files = TextFiles()
    assert sum(files.num_tokens(i) for i in range(len(files))) > 3_000_000
