"""Optional packages: the model needs only jax and flax, training on numpy data no TensorFlow."""

import os
import subprocess
import sys

import pytest
import xla_flags

from famx.base import gin_utils
from famx.base.errors import ConfigError


def run(code, *args):
    result = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=gin_utils.gin_root(),
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags.FAST,
        },
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


MODULES = """
import sys
for name in ("tensorflow", "seqio", "gin", "clu"):
    sys.modules[name] = None
import famx.modules
from famx.modules import Decoder, DecoderConfig, DecoderState, RopeScaling
ours = {name for name in sys.modules if name.startswith("famx")}
assert not any(name.startswith(("famx.data", "famx.training", "famx.t5x")) for name in ours), ours
assert DecoderConfig(vocab_size=8, num_layers=1, embed_dim=8, num_heads=2).head_dim == 4
print("done")
"""
TRAIN = """
import sys
for name in ("tensorflow", "seqio", "t5x", "tensorflow_datasets", "clu"):
    sys.modules[name] = None
import optax
from famx import memories, models, modules
from famx.training import loop, state_passing
from famx.training.run import Data, Run
config = modules.DecoderConfig(vocab_size=128, num_layers=1, embed_dim=8, num_heads=2, block_size=8,
                               memory_segments=0, memory=memories.Fam(2))
scalars = loop.train(Run(
    models.DecoderModel(modules.Decoder(config)),
    Data("passkey_words", {"targets": 32}, batch_size=2, options={"digits": 1, "header": False}),
    optax.sgd(0.1), steps=2, model_dir=sys.argv[1], state_passing=state_passing.Lanes(),
))
assert scalars["loss"] > 0
assert "tensorboardX" in sys.modules and "torch" not in sys.modules
print("done")
"""


def test_the_model_imports_only_jax_and_flax():
    run(MODULES)


MISTAKE = """
import runpy, sys
sys.argv = ["famx.train", "--gin_file=gin_configs/examples/passkey_tiny.gin",
            "--gin.MODEL_DIR='/tmp/never'", "--gin.TRAIN_STEPS=-3"]
try:
    runpy.run_module("famx.train", run_name="__main__")
except SystemExit as stop:
    assert stop.code == 2, stop.code
slow = {"torch", "tensorboardX", "orbax.checkpoint", "tensorflow", "seqio", "tensorflow_datasets", "clu",
        "matplotlib", "jax.experimental.pallas", "scipy.signal", "transformers"}
assert not slow & set(sys.modules), slow & set(sys.modules)
assert "famx.training.loop" in sys.modules, "the mistake was found without what it is about"
print("done")
"""


def test_a_mistake_is_refused_before_slow_imports():
    run(MISTAKE)


@pytest.fixture
def without_seqio(monkeypatch):
    """A process in which SeqIO and TensorFlow cannot be imported."""
    for name in [x for x in sys.modules if x.split(".")[:3] == ["famx", "data", "seqio"]]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("seqio", "tensorflow", "tensorflow_datasets"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    class Missing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name in ("seqio", "tensorflow", "tensorflow_datasets"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])


def test_a_missing_seqio_is_one_sentence(without_seqio, monkeypatch, tmp_path):
    from famx.data import seqio_cache

    with pytest.raises(ConfigError, match=r"^SeqIO's tasks need the package .*famx\[seqio\]'\.$"):
        import famx.data.seqio  # noqa: F401
    with pytest.raises(ConfigError, match=r"^Caches of SeqIO's tasks need .*famx\[seqio\]'\.$"):
        seqio_cache.seqio_task("pg19")
    (tmp_path / "my_seqio_tasks.py").write_text("import seqio\n")
    (tmp_path / "my.gin").write_text("from __gin__ import dynamic_registration\nimport my_seqio_tasks\n")
    monkeypatch.syspath_prepend(tmp_path)
    hint = r" Run pip install 'famx\[seqio\]'\.$"
    with pytest.raises(ConfigError, match="^A gin file imports a module that cannot be .*" + hint):
        gin_utils.parse_gin([str(tmp_path / "my.gin")])
    with pytest.raises(ConfigError, match="^The module my_seqio_tasks cannot be imported: .*" + hint):
        seqio_cache.Recipe("pg19", modules=("my_seqio_tasks",)).task()


@pytest.mark.slow
def test_training_on_a_numpy_task_without_tensorflow(tmp_path):
    run(TRAIN, str(tmp_path))
    assert (tmp_path / "checkpoint_2" / "state").is_dir()
