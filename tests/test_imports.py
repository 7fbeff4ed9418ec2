"""Optional packages: the model needs only jax and flax, training on numpy data no TensorFlow."""

import os
import subprocess
import sys

import pytest

from famx.base import gin_utils


def run(code, *args):
    result = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=gin_utils.gin_root(),
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles faster
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
print("done")
"""


def test_the_model_imports_only_jax_and_flax():
    run(MODULES)


def test_the_engine_leaves_tensorflow_alone():
    run("import sys, famx.train, famx.training.loop, famx.evaluation, famx.data\n"
        "assert not {'tensorflow', 'seqio'} & set(sys.modules)\nprint('done')")  # fmt: skip


@pytest.mark.slow
def test_training_on_a_numpy_task_without_tensorflow(tmp_path):
    run(TRAIN, str(tmp_path))
    assert (tmp_path / "checkpoint_2" / "state").is_dir()
