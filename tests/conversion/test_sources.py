"""Hugging Face directories: what is read, and one sentence for each defect."""

import hashlib
import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import LLAMA, make_weights, train_bpe, train_sentencepiece, write_source

from famx.base.errors import ConfigError
from famx.conversion.sources import known_sha256, open_source, read_header
from famx.conversion.tensor_source import TensorInfo

FLOATS = ("float32", "float16", "bfloat16", "float64")


def sentence(path) -> str:
    """The error for a source that cannot be opened."""
    with pytest.raises(ConfigError) as caught:
        open_source(path)
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "!"))
    return text


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shards", (1, 3))
def test_every_tensor_is_read_as_it_was_written(tmp_path, dtype, shards):
    weights = make_weights(LLAMA, dtype)
    source = open_source(write_source(tmp_path / "model", weights=weights, shards=shards))
    assert source.config == LLAMA and source.name == "model" and source.tokenizer is None
    assert source.tensors == {name: TensorInfo(x.shape, dtype) for name, x in weights.items()}
    for name, x in weights.items():
        read = source.read(name)
        assert type(read) is np.ndarray and read.dtype == x.dtype and read.tobytes() == x.tobytes()


def test_types_that_no_array_of_ours_has_keep_their_name(tmp_path):
    weights = {"a": np.zeros(3, np.int8), "b": np.zeros(2, np.float32)}
    source = open_source(write_source(tmp_path / "model", weights=weights))
    assert source.tensors["a"] == TensorInfo((3,), "I8")


def test_one_weight_file_of_any_name_is_enough(tmp_path):
    directory = write_source(tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    assert open_source(directory).tensors


# --------------------------------------------------------------------------- what is no source


def test_what_is_not_there_or_of_another_kind(tmp_path):
    assert sentence(tmp_path / "x") == (
        f"There is no model {tmp_path / 'x'}: give a directory or a GGUF file that is here."
    )
    (tmp_path / "x").write_text("text")
    assert sentence(tmp_path / "x").endswith("is neither a Hugging Face directory nor a GGUF file.")
    directory = write_source(tmp_path / "model")
    assert f"give its directory {directory}" in sentence(directory / "model.safetensors")


@pytest.mark.parametrize(
    "name, said",
    [
        (None, "there is no config.json in it."),
        ("model.json", "it is a MODEL_DIR of famx, which needs no import."),
        ("adapter_config.json", "it is an adapter; give the model that it was trained on."),
        ("x.gguf", "/x.gguf itself."),
    ],
)
def test_directories_without_a_config(tmp_path, name, said):
    if name:
        (tmp_path / name).touch()
    assert sentence(tmp_path).startswith(f"{tmp_path} holds no model of Hugging Face: ")
    assert sentence(tmp_path).endswith(said)


def test_a_damaged_config(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures":')
    assert "config.json is damaged: it is not readable as JSON" in sentence(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json is damaged: it must hold a JSON object" in sentence(tmp_path)


def test_directories_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert sentence(tmp_path).endswith("but no weights: there is no model.safetensors.")
    (tmp_path / "adapter_model.safetensors").touch()
    assert "no weights" in sentence(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "convert them to safetensors, with save_pretrained of transformers." in sentence(tmp_path)


# --------------------------------------------------------------------------- shards


def test_a_shard_that_is_missing(tmp_path):
    directory = write_source(tmp_path / "model", shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert sentence(directory) == (
        f"{directory} lacks model-00002-of-00003.safetensors, which model.safetensors.index.json lists:"
        " download it again."
    )
    (directory / "model-00001-of-00003.safetensors").unlink()
    assert sentence(directory).endswith("download them again.")
    (directory / "model.safetensors.index.json").unlink()
    assert "but no model.safetensors.index.json: download it too." in sentence(directory)


@pytest.mark.parametrize("text", ("{}", "[]", '{"weight_map": 3}', '{"weight'))
def test_an_index_that_is_damaged(tmp_path, text):
    directory = write_source(tmp_path / "model", shards=2)
    (directory / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in sentence(directory)


def test_an_index_of_another_download(tmp_path):
    directory = write_source(tmp_path / "model", shards=2)
    index = directory / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    swapped = dict(zip(places, reversed(places.values())))
    index.write_text(json.dumps({"weight_map": swapped}))
    assert "the files are not of one download" in sentence(directory)


@pytest.mark.parametrize("shards", (1, 2))
@given(data=st.data())
def test_a_file_that_is_cut_short_or_too_long_is_named_with_both_sizes(tmp_path_factory, shards, data):
    weights = {"a": np.ones((4, 3), np.float32), "b": np.ones(5, np.float16)}
    directory = write_source(tmp_path_factory.mktemp("x") / "m", weights=weights, shards=shards)
    file = data.draw(st.sampled_from(sorted(directory.glob("*.safetensors"))))
    whole = file.read_bytes()
    size = data.draw(st.integers(0, len(whole) + 9).filter(lambda size: size != len(whole)))
    file.write_bytes((whole + bytes(9))[:size])
    said = sentence(directory)
    assert said.startswith(f"{file} is not whole: it has {size:,} bytes")
    header = 8 + int.from_bytes(whole[:8], "little")
    if size >= header:
        assert f"should have {len(whole):,};" in said
    elif size >= 8:
        assert f"{header:,}; download it again." in said


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda x: len(x).to_bytes(8, "little") + x))
def test_no_content_of_a_file_ends_in_anything_but_a_sentence(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "x.safetensors"
    file.write_bytes(content)
    try:
        assert read_header(file) == {}
    except ConfigError as error:
        assert str(file) in str(error)


@given(st.dictionaries(st.text(max_size=3), st.recursive(
    st.integers(-9, 99) | st.text(max_size=3) | st.sampled_from(("F32", "BF16")),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(
        st.sampled_from(("dtype", "shape", "data_offsets")), x), max_leaves=6), max_size=2))  # fmt: skip
def test_no_header_ends_in_anything_but_a_sentence(tmp_path_factory, header):
    file = tmp_path_factory.getbasetemp() / "y.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    try:
        read_header(file)
    except ConfigError as error:
        assert str(file) in str(error)


def test_a_header_whose_shapes_do_not_fit_its_offsets(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ConfigError, match="is no safetensors file, or damaged"):
        read_header(tmp_path / "x")


def test_a_pointer_of_git_lfs(tmp_path):
    directory = write_source(tmp_path / "model")
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (directory / "model.safetensors").write_text(text)
    assert sentence(directory).endswith("is a pointer of Git LFS, not the file itself: run git lfs pull.")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path):
    directory = write_source(tmp_path / "model")
    (directory / "model.safetensors").chmod(0)
    assert sentence(directory).endswith("model.safetensors cannot be read: Permission denied.")


# --------------------------------------------------------------------------- checksums


def note_checksum(directory: pathlib.Path, name: str, digest: str, how: str) -> None:
    if how == "beside":
        (directory / f"{name}.sha256").write_text(f"{digest}  {name}\n")
    elif how == "download":
        folder = directory / ".cache" / "huggingface" / "download"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.metadata").write_text(f"{'0' * 40}\n{digest}\n1700000000.5\n")
    else:  # Hugging Face's cache: a link to a file that is named by its sum
        blobs = directory.parent / "blobs"
        blobs.mkdir(exist_ok=True)
        (directory / name).rename(blobs / digest)
        (directory / name).symlink_to(blobs / digest)


@pytest.mark.parametrize("how", ("beside", "download", "cache"))
def test_a_file_with_another_checksum_is_named(tmp_path, how):
    directory = write_source(tmp_path / "model", shards=2)
    name = "model-00002-of-00002.safetensors"
    digest = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    note_checksum(directory, name, digest, how)
    told = []
    open_source(directory, lambda done, total: told.append((done, total)))
    size = (directory / name).stat().st_size
    assert told[-1] == (size, size) and known_sha256(directory / name) == digest
    with (directory / name).resolve().open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert f"{name} is damaged: its SHA-256 is " in sentence(directory)
    assert f"should be {digest[:12]}...; download it again." in sentence(directory)


def test_an_etag_that_is_no_sha256_is_no_checksum(tmp_path):
    directory = write_source(tmp_path / "model")
    note_checksum(directory, "model.safetensors", "a" * 40, "download")
    assert known_sha256(directory / "model.safetensors") is None and open_source(directory)


# --------------------------------------------------------------------------- tokenizers


def test_the_sentencepiece_model_is_taken_unless_the_json_is_byte_level(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("sentencepiece")
    directory = write_source(tmp_path / "model")
    train_bpe(directory / "tokenizer.json")
    assert open_source(directory).tokenizer == directory / "tokenizer.json"
    train_sentencepiece(directory / "tokenizer.model")
    assert open_source(directory).tokenizer == directory / "tokenizer.json"
    spec = json.loads((directory / "tokenizer.json").read_text())
    spec |= {"pre_tokenizer": None, "decoder": {"type": "ByteFallback"}}
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    assert open_source(directory).tokenizer == directory / "tokenizer.model"
    (directory / "tokenizer.json").write_text("[]")
    assert "tokenizer.json is damaged" in sentence(directory)
    (directory / "tokenizer.json").unlink()
    assert open_source(directory).tokenizer == directory / "tokenizer.model"
