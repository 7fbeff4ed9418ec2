"""Memory files: loading returns what was saved bit for bit, and rejects everything else."""

import dataclasses
import errno
import json
import os
import pathlib
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from memories_table import MEMORIES
from tiny import assert_identical, make_model, make_params, make_tokens
from trained import write_model_dir

import famx
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.data import ByteVocabulary
from famx.data.probes.passkey_text import passkey_words
from famx.decoding import Streamer
from famx.memories import Fam
from famx.model_dir import memory_file
from famx.model_dir.loading import TrainedModel, load_model
from famx.model_dir.memory_file import (
    load_memory,
    read_header,
    restore_memory,
    save_memory,
    with_memory,
)
from famx.modules import DecoderState


def make_trained(vocabulary=None, seed=0, **changes) -> TrainedModel:
    model = make_model(vocabulary=vocabulary, **changes)
    return TrainedModel(model, make_params(model.module, seed), 1, pathlib.Path("/model/checkpoint_1"))


def any_state(trained, batch, seed=0) -> tuple[jax.Array, DecoderState]:
    """Logits and a state of arbitrary bits, including NaN and -0."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda p: trained.model.initial_state(p, batch), trained.params)
    fill = lambda leaf: jnp.asarray(
        np.frombuffer(rng.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype).reshape(leaf.shape)
    )
    logits = jnp.asarray(rng.normal(size=(batch, trained.model.config.vocab_size)), jnp.float32)
    return logits, jax.tree.map(fill, shapes)


@pytest.fixture
def saved(tmp_path):
    """`(path, trained)` of a memory file."""
    trained = make_trained(ByteVocabulary())
    save_memory(tmp_path / "x.famem", trained, *any_state(trained, 1), ["book.txt"])
    return tmp_path / "x.famem", trained


# ---------------------------------------------------------------- there and back


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_comes_back_bit_for_bit(tmp_path, dtype, name, batch):
    with jax.enable_x64(dtype == "float64"):
        trained = make_trained(dtype=dtype, param_dtype=dtype, memory=MEMORIES[name], num_layers=2)
        logits, state = any_state(trained, batch)
        assert state.keys.dtype == dtype
        save_memory(tmp_path / "x.famem", trained, logits, state)
        assert_identical(restore_memory(tmp_path / "x.famem", trained), (logits, state))
        assert_identical(load_memory(tmp_path / "x.famem", trained), state)


def test_a_memory_can_be_used_again_and_again(saved):
    """Reading on donates its buffers, which must not affect the next reader."""
    path, trained = saved
    _, state = restore_memory(path, trained)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    assert_identical(restore_memory(path, trained), any_state(trained, 1))


def test_another_dtype_is_the_same_model(tmp_path):
    trained, short = make_trained(), make_trained(dtype="bfloat16")
    logits, state = any_state(trained, 1)
    state = jax.tree.map(lambda x: jnp.ones_like(x) / 3 if x.dtype == jnp.float32 else x, state)
    save_memory(tmp_path / "x.famem", trained, logits, state)
    found = load_memory(tmp_path / "x.famem", short)
    assert found.keys.dtype == found.values.dtype == jnp.bfloat16
    assert found.memory.dtype == jnp.float32
    assert_identical(found.keys, state.keys.astype(jnp.bfloat16))


def test_the_header_says_what_was_read(tmp_path):
    trained = make_trained(passkey_words())
    logits, state = any_state(trained, 2)
    state = state.replace(position=jnp.array([700, 3]), updates=jnp.array([87, 0]))
    returned = save_memory(tmp_path / "x.famem", trained, logits, state, ["a.txt", "b.txt"])
    header = read_header(tmp_path / "x.famem")
    assert header == returned
    assert (header.position, header.updates, header.sources) == ([700, 3], [87, 0], ["a.txt", "b.txt"])
    assert header.num_bytes == state.num_bytes() and header.famx == famx.__version__
    assert header.model["embed_dim"] == 16
    assert header.vocabulary_fingerprint == passkey_words().fingerprint


def test_the_file_is_a_plain_safetensors_file(saved):
    path, trained = saved
    logits, state = any_state(trained, 1)
    arrays = safetensors.numpy.load_file(path)
    names = {field.name for field in dataclasses.fields(state) if getattr(state, field.name) is not None}
    assert set(arrays) == names | {"logits", "filled"}
    np.testing.assert_array_equal(arrays["logits"], logits)


CONTINUE = """
import sys
import numpy as np
from famx.decoding import Sampling, Streamer
from famx.model_dir.loading import load_model
from famx.model_dir.memory_file import restore_memory
directory, path, tokens, out = sys.argv[1:]
trained = load_model(directory)
streamer = Streamer(trained.model.module)
logits, state = restore_memory(path, trained)
written = streamer.generate(trained.params, logits, state, Sampling(12)).tokens
logits, state = streamer.read(trained.params, restore_memory(path, trained)[1], np.load(tokens))
np.savez(out, written=written, logits=logits, memory=state.memory)
"""


@pytest.mark.slow
def test_another_process_goes_on_exactly(tmp_path):
    model = make_model()
    write_model_dir(tmp_path / "model", model, make_params(model.module), ByteVocabulary())
    trained = load_model(str(tmp_path / "model"))
    streamer = Streamer(model.module)
    state = streamer.initial_state(trained.params, 2)
    lengths = np.array([45, 13])
    logits, state = streamer.read(trained.params, state, make_tokens(2, 45), lengths)
    save_memory(tmp_path / "x.famem", trained, logits, state)
    more = make_tokens(2, 30, seed=1)
    np.save(tmp_path / "more.npy", more)
    names = ("model", "x.famem", "more.npy", "out.npz")
    result = subprocess.run(
        [sys.executable, "-c", CONTINUE, *(str(tmp_path / name) for name in names)],
        cwd=gin_utils.gin_root(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    there = np.load(tmp_path / "out.npz")
    from famx.decoding import Sampling

    copy = jax.tree.map(jnp.copy, state)
    written = streamer.generate(trained.params, logits, copy, Sampling(12)).tokens
    logits, state = streamer.read(trained.params, state, more)
    here = {"written": written, "logits": logits, "memory": state.memory}
    for name, value in here.items():
        np.testing.assert_array_equal(there[name], value)


# ---------------------------------------------------------------- what is refused


def refusal(path, trained):
    with pytest.raises(ConfigError) as caught:
        load_memory(path, trained)
    text = str(caught.value)
    assert text.startswith(str(path)) or text.endswith(f"{path}.")
    assert "\n" not in text and text.endswith(".")
    return text


def test_missing_file(tmp_path):
    assert refusal(tmp_path / "no.famem", make_trained()) == (
        f"There is no memory file {tmp_path / 'no.famem'}."
    )
    assert "There is no memory file" in refusal(tmp_path, make_trained())


def test_some_other_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("Once upon a time there was a text that nobody had read. " * 9)
    assert "is not a whole memory file" in refusal(path, make_trained())
    safetensors.numpy.save_file({"a": np.zeros(3)}, path)
    assert "is a safetensors file, but not a memory of famx" in refusal(path, make_trained())


def test_another_model(saved):
    path, _ = saved
    sentence = refusal(path, make_trained(ByteVocabulary(), embed_dim=32, mlp_dim=64, memory=Fam(3)))
    assert "another model" in sentence and "embed_dim (16 there, 32 here)" in sentence
    assert "memory.length (2 there, 3 here)" in sentence and "num_layers" not in sentence


def test_other_weights(saved):
    path, trained = saved
    sentence = refusal(path, make_trained(ByteVocabulary(), seed=1))
    assert "the memory of this model with other weights" in sentence
    load_memory(path, trained)


def test_another_vocabulary(saved):
    path, trained = saved
    assert "another vocabulary" in refusal(path, make_trained(passkey_words()))
    load_memory(path, make_trained(None))  # bare ids: nothing to compare


def test_another_format(saved):
    path, trained = saved
    with safetensors.safe_open(path, "np") as file:
        fields = json.loads(file.metadata()["famem"])
    fields |= {"format": 3, "famx": "9.9", "unheard": "of"}
    safetensors.numpy.save_file({"x": np.zeros(1)}, path, {"famem": json.dumps(fields)})
    sentence = refusal(path, trained)
    assert "has format 3" in sentence and "reads the formats 1 and 2" in sentence
    assert "famx 9.9 wrote" in sentence
    with pytest.raises(ConfigError, match="has format 3"):
        read_header(path)


def few_tokens(trained, count=5):
    """`(logits, state)` of two texts, of which the second is shorter by two tokens."""
    streamer = Streamer(trained.model.module)
    tokens, lengths = np.arange(2 * count).reshape(2, count) % 60 + 1, np.array([count, count - 2])
    state = streamer.initial_state(trained.params, 2)
    return streamer.read(trained.params, state, tokens.astype(np.int32), lengths)


def test_a_file_holds_only_the_slots_that_are_filled(tmp_path):
    trained = make_trained(block_size=64)
    logits, state = few_tokens(trained)
    header = save_memory(tmp_path / "x.famem", trained, logits, state)
    with safetensors.safe_open(tmp_path / "x.famem", "np") as file:
        assert file.get_tensor("keys").shape[2] == len(file.get_tensor("filled")) == 5
    assert (tmp_path / "x.famem").stat().st_size < header.num_bytes / 4
    assert_identical(restore_memory(tmp_path / "x.famem", trained), (logits, state))


def test_a_file_of_format_1_is_read_and_rewritten(tmp_path):
    trained = make_trained()
    logits, state = few_tokens(trained)
    header = dataclasses.replace(save_memory(tmp_path / "x.famem", trained, logits, state), format=1)
    whole = {**memory_file._named(state), "logits": np.asarray(logits)}
    memory_file._write(tmp_path / "old.famem", header, whole)
    assert read_header(tmp_path / "old.famem").format == 1
    assert_identical(restore_memory(tmp_path / "old.famem", trained), (logits, state))
    other = jax.tree.map(lambda x: x + 1, state.memory)
    with_memory(tmp_path / "old.famem", tmp_path / "new.famem", other)
    assert_identical(load_memory(tmp_path / "new.famem", trained), state.replace(memory=other))


@pytest.mark.parametrize(
    "slots", [[0, 1, 2, 3], [4, 3, 2, 1, 0], [0, 1, 2, 3, 10**6], [-1, 0, 1, 2, 3], None]
)
def test_slots_that_are_not_those_of_the_window_are_refused(tmp_path, slots):
    trained = make_trained()
    header = save_memory(tmp_path / "x.famem", trained, *few_tokens(trained))
    arrays = dict(memory_file._read(tmp_path / "x.famem", load=True)[1])
    del arrays["filled"]
    if slots is not None:
        arrays["filled"] = np.array(slots, np.int32)
    memory_file._write(tmp_path / "x.famem", header, arrays)
    assert "does not hold the window of this model" in refusal(tmp_path / "x.famem", trained)


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_refused(tmp_path_factory, share):
    path, trained, data = whole_file(tmp_path_factory)
    path.write_bytes(data[: int(share * len(data))])
    assert "is not a whole memory file" in refusal(path, trained)
    with pytest.raises(ConfigError, match="is not a whole memory file"):
        read_header(path)


@settings(max_examples=300)
@given(share=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_an_altered_file_is_refused_or_says_the_same(tmp_path_factory, share, change):
    path, trained, data = whole_file(tmp_path_factory)
    altered = bytearray(data)
    altered[int(share * len(data))] ^= change
    path.write_bytes(altered)
    try:
        found = restore_memory(path, trained)
    except ConfigError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:  # such as 1E-06 for 1e-06 in the header
        assert_identical(found, any_state(trained, 1))


def test_an_altered_array_is_named_as_damage(saved):
    path, trained = saved
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "is damaged, its checksum does not fit" in refusal(path, trained)
    with pytest.raises(ConfigError, match="is damaged"):
        with_memory(path, path.with_name("y.famem"), any_state(trained, 1)[1].memory)
    assert not path.with_name("y.famem").exists()


_WHOLE = {}


def whole_file(factory):
    """`(path to write to, trained, bytes of a whole file)`, made once."""
    if not _WHOLE:
        path, trained = factory.mktemp("memory") / "x.famem", make_trained(ByteVocabulary())
        save_memory(path, trained, *any_state(trained, 1), ["book.txt"])
        _WHOLE["file"] = path, trained, path.read_bytes()
    return _WHOLE["file"]


# ---------------------------------------------------------------- interrupted writing


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_writing_leaves_the_old_file(saved, monkeypatch, step, error):
    path, trained = saved
    before = path.read_bytes()

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises((ConfigError, KeyboardInterrupt)) as caught:
            save_memory(path, trained, *any_state(trained, 1, seed=1))
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path} cannot be written: No space left on device."
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    save_memory(path, trained, *any_state(trained, 1, seed=1))
    assert path.read_bytes() != before


def test_a_file_that_does_not_fit_leaves_the_old_one(saved):
    path, trained = saved
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(ConfigError, match="cannot be written: File too large."):
            save_memory(path, trained, *any_state(trained, 1, seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    trained = make_trained()
    for folder in ("missing", "file"):
        with pytest.raises(ConfigError, match="x.famem cannot be written: "):
            save_memory(tmp_path / folder / "x.famem", trained, *any_state(trained, 1))


def test_a_new_file_has_the_usual_rights(saved):
    path, _ = saved
    (path.parent / "other").write_text("")
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode
