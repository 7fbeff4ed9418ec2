"""`famx verify`: one line for each thing, and an exit code."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny import make_model, make_params

from famx import verify
from famx.base.checksums import read_checked_json, write_checked_json
from famx.base.errors import ConfigError
from famx.data.vocabularies import ByteVocabulary, save_vocabulary
from famx.lora import Lora, load_adapter, save_adapter
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.identity import check_same_model, read_model_config
from famx.model_dir.loading import TrainedModel
from famx.model_dir.memory_file import save_memory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A MODEL_DIR with two checkpoints, an adapter and a memory file."""
    directory = tmp_path_factory.mktemp("made")
    run = directory / "run"
    with Checkpointer(run) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"target": {"w": jnp.arange(4.0)}}, {"i": step})
    check_same_model(run, {"num_layers": 2, "rope_base": 10000.0})
    save_vocabulary(ByteVocabulary(), run)
    write_checked_json(run / "base.json", {"checkpoint": "/base", "weights": "0"})
    rng = np.random.default_rng(0)
    layer = {"query": {"lora_a": rng.normal(size=(1, 4, 2)), "lora_b": rng.normal(size=(1, 2, 2, 2))}}
    save_adapter(run / "adapter", {"layers": layer}, Lora(2, 4.0), base="/base")
    model = make_model()
    trained = TrainedModel(model, make_params(model.module), 1, run)
    state = model.initial_state(trained.params, 1)
    save_memory(directory / "book.famem", trained, jnp.zeros((1, 260)), state)
    return directory


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "made")


def run(capsys, monkeypatch, *paths):
    """`(exit code, lines)` of the command."""
    monkeypatch.setattr(sys, "argv", ["famx verify", *map(str, paths)])
    try:
        verify.main()
    except SystemExit as end:
        return end.code, capsys.readouterr().out.splitlines()
    return 0, capsys.readouterr().out.splitlines()


def test_a_sound_run_and_memory_file(made, capsys, monkeypatch):
    code, lines = run(capsys, monkeypatch, made / "run", made / "book.famem")
    assert code == 0 and all(": sound" in line for line in lines), lines
    names = [line.split(": ")[0].removeprefix(f"{made}/") for line in lines]
    assert names == [
        "run/model.json", "run/vocabulary.json", "run/base.json", "run/checkpoint_1",
        "run/checkpoint_2", "run/adapter", "book.famem",
    ]  # fmt: skip
    assert run(capsys, monkeypatch, made / "run" / "checkpoint_2")[0] == 0
    assert run(capsys, monkeypatch, made / "run" / "adapter")[0] == 0


@pytest.mark.parametrize("name", [
    "run/model.json", "run/vocabulary.json", "run/base.json", "run/checkpoint_1/state/_METADATA",
    "run/checkpoint_2/dataset/metadata", "run/adapter/adapter_model.safetensors",
    "run/adapter/adapter_config.json", "book.famem",
])  # fmt: skip
def test_each_damage_is_one_line_and_exit_code_1(copy, capsys, monkeypatch, name):
    path = copy / name
    data = bytearray(path.read_bytes())
    changed = data.replace(b"10000.0", b"10001.0").replace(b'"r": 2', b'"r": 3').replace(b"base", b"bass")
    path.write_bytes(changed if changed != data else data[:-1] + bytes([data[-1] ^ 1]))
    code, lines = run(capsys, monkeypatch, copy / name.split("/")[0])
    wrong = [line for line in lines if ": sound" not in line]
    assert code == 1 and len(wrong) == 1, lines
    assert wrong[0].startswith(f"{copy}/{'/'.join(name.split('/')[:2])}: "), wrong


def test_a_checkpoint_without_digests_is_said(copy, capsys, monkeypatch):
    path = copy / "run" / "checkpoint_1"
    (path / "digests.json").unlink()
    assert run(capsys, monkeypatch, path)[0] == 1  # its metadata says that there are some
    metadata = path / "_CHECKPOINT_METADATA"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "custom_metadata": {}}))
    code, (line,) = run(capsys, monkeypatch, path)
    assert code == 0 and "has no digests" in line
    (path / "state" / "_METADATA").write_text("{")
    code, (line,) = run(capsys, monkeypatch, path)
    assert code == 1 and "state/_METADATA cannot be read" in line


def test_other_paths_are_bad_usage(tmp_path, capsys, monkeypatch):
    for paths in ((), ("--all",), (tmp_path / "none",), (tmp_path,)):
        with pytest.raises(ConfigError):
            run(capsys, monkeypatch, *paths)
    (tmp_path / "x.txt").write_text("text")
    assert run(capsys, monkeypatch, tmp_path / "x.txt")[0] == 1


def test_a_change_by_hand_can_be_meant(tmp_path):
    check_same_model(tmp_path, {"rope_base": 10000.0, "num_layers": 2})
    path = tmp_path / "model.json"
    path.write_text(path.read_text().replace("10000.0", "20000.0"))
    with pytest.raises(ConfigError, match='if the change is meant, remove the line "sha256"'):
        read_model_config(tmp_path)
    lines = [line for line in path.read_text().splitlines() if "sha256" not in line]
    path.write_text("\n".join(lines).replace("20000.0,", "20000.0"))
    assert read_model_config(tmp_path) == {"rope_base": 20000.0, "num_layers": 2}


@pytest.mark.parametrize("value", [{}, {"a": [1, 2.5, None], "é": "\udcff"}, {"n": 1e-300}])
def test_checked_json_is_read_as_it_was_written(tmp_path, value):
    write_checked_json(tmp_path / "x.json", value)
    assert read_checked_json(tmp_path / "x.json") == value
    for content in (b"[]", b"\xff", b"[" * 100_000, b""):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ConfigError, match="x.json is damaged"):
            read_checked_json(tmp_path / "x.json")


def test_every_flipped_byte_of_an_adapters_weights_is_found_or_harmless(copy):
    path = copy / "run" / "adapter" / "adapter_model.safetensors"
    kernel = lambda *shape: {"kernel": jax.ShapeDtypeStruct((1, *shape), jnp.float32)}
    mlp = {"gate": kernel(4, 8), "up": kernel(4, 8), "down": kernel(8, 4)}
    params = {"layers": {"query": kernel(4, 2, 2), "mlp": mlp}}
    whole, settings = load_adapter(path.parent, params)
    data, found = path.read_bytes(), 0
    for offset in range(0, len(data), 3):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        try:
            tree, lora = load_adapter(path.parent, params)
        except ConfigError:
            found += 1
        else:
            assert lora == settings
            jax.tree.map(np.testing.assert_array_equal, tree, whole)
    assert found > 100


def test_an_adapter_of_peft_has_no_checksum(copy, capsys, monkeypatch):
    path = copy / "run" / "adapter"
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(safetensors.numpy.save(safetensors.numpy.load_file(weights), {"format": "pt"}))
    code, (line,) = run(capsys, monkeypatch, path)
    assert code == 0 and "has no checksum" in line
