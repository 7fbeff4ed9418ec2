"""Registry of tasks, and the promise that famx.data needs no TensorFlow."""

import functools
import subprocess
import sys
import types

import pytest

import famx.data
from famx.data import PasskeyTask, TextFiles
from famx.data.tasks import registry


def test_our_names(tmp_path):
    assert set(famx.data.names()) >= {
        "passkey_words", "passkey_bytes", "python_stdlib", "own_text"}
    assert famx.data.get("passkey_words", digits=3) == PasskeyTask("words", digits=3)
    assert famx.data.get("passkey_bytes") == PasskeyTask("bytes")
    (tmp_path / "a.txt").write_text("text")
    own = famx.data.get("own_text", files=str(tmp_path / "*.txt"), validation_fraction=0.0)
    assert isinstance(own, TextFiles) and len(own) == 1
    assert len(famx.data.get("python_stdlib", split="validation")) > 1


def test_register_and_refuse_a_taken_name():
    famx.data.register("mine", dict)
    assert famx.data.get("mine", a=1) == {"a": 1}
    famx.data.register("mine", dict)
    with pytest.raises(ValueError, match="registered already"):
        famx.data.register("mine", list)


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="The nearest name is 'passkey_words'"):
        famx.data.get("paskey_word")


def test_seqio_names_are_found_once_seqio_is_imported(monkeypatch):
    task = object()
    fake = types.SimpleNamespace(
        TaskRegistry=types.SimpleNamespace(names=lambda: ["their_task"]),
        MixtureRegistry=types.SimpleNamespace(names=lambda: ["their_mixture"]),
        get_mixture_or_task=lambda name: (task, name),
    )
    monkeypatch.setitem(sys.modules, "seqio", fake)
    assert famx.data.get("their_mixture") == (task, "their_mixture")
    with pytest.raises(ValueError, match="takes no options"):
        famx.data.get("their_task", digits=3)
    with pytest.raises(ValueError, match="The nearest name is 'their_task'"):
        famx.data.get("their_tusk")


def test_what_a_factory_takes_and_needs(monkeypatch):
    factories = {
        "plain": lambda vocabulary=None: None,
        "bound": functools.partial(lambda vocabulary: None, vocabulary="bytes"),
        "needy": lambda steps, *, vocabulary=None: None,
    }
    monkeypatch.setattr(registry, "_FACTORIES", factories)
    assert [name for name in factories if registry.takes(name, "vocabulary")] == ["plain", "needy"]
    assert not registry.takes("unknown", "vocabulary")
    assert [name for name in factories if registry.needs_options(name)] == ["needy"]


def test_data_imports_no_tensorflow_and_no_jax():
    code = (
        "import sys, famx.data, famx.data.probes.passkey\n"
        "famx.data.get('passkey_words').batch([0], 100)\n"
        "heavy = {'tensorflow', 'seqio', 'gin', 'jax', 'flax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
