"""The same numbers on one device, on eight under every mesh, and on two processes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

import famx
from famx.training.run_log import read_metrics

HERE = pathlib.Path(__file__).parent
PATHS = os.pathsep.join([str(pathlib.Path(famx.__file__).parent.parent), str(HERE.parent)])
STEPS = 5

# The sizes are those of the mesh data, fsdp, tensor; both a FAM with segments and a BSWA.
COMMON = """
import sys, json, jax, numpy as np, optax, gin
from famx.training import loop, partitioning
from tiny import make_model, BLOCK, BLOCKS

class Look:
    def __call__(self, model, params, step):
        self.shards = {
            jax.tree_util.keystr(path, simple=True, separator="/"):
                [list(leaf.shape), list(leaf.addressable_shards[0].data.shape)]
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        return {}

def run(folder, fam_length, mode="none"):
    look = Look()
    loop.train(
        model_dir=folder,
        model=make_model(fam_length=fam_length, num_kv_heads=2, memory_segments=2),
        mixture_or_task_name="passkey_words",
        task_options={"digits": 1, "header": False, "filler": "random_words"},
        task_feature_lengths={"targets": BLOCKS * BLOCK},
        total_steps=STEPS, batch_size=8, optimizer=optax.adam(1e-2), state_passing_mode=mode,
        evaluation=look, log_period=1,
    )
    return look.shards
"""

EIGHT = COMMON + """
assert jax.device_count() == 8
def mesh(data, fsdp, tensor):
    gin.clear_config()
    gin.bind_parameter("partitioning.make_mesh.data", data)
    gin.bind_parameter("partitioning.make_mesh.fsdp", fsdp)
    gin.bind_parameter("partitioning.make_mesh.tensor", tensor)
out = {}
make_mesh = partitioning.make_mesh
partitioning.make_mesh = lambda: make_mesh(devices=jax.devices()[:1])
out["fam_1"] = run(f"{sys.argv[1]}/fam_1", 2)
out["bswa_1"] = run(f"{sys.argv[1]}/bswa_1", 0)
partitioning.make_mesh = make_mesh
for sizes in ((8, 1, 1), (2, 4, 1), (2, 2, 2)):
    mesh(*sizes)
    name = "fam_" + "x".join(map(str, sizes))
    out[name] = run(f"{sys.argv[1]}/{name}", 2)
mesh(2, 2, 2)
out["bswa_2x2x2"] = run(f"{sys.argv[1]}/bswa_2x2x2", 0)
mesh(4, 1, 2)
out["lanes_4x1x2"] = run(f"{sys.argv[1]}/lanes_4x1x2", 2, "continuous")
json.dump(out, open(f"{sys.argv[1]}/shards.json", "w"))
"""

TWO = COMMON + """
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
assert jax.process_count() == 2 and jax.device_count() == 2
run(f"{sys.argv[1]}/two", 2)
print("done")
"""


def start(code, *args, devices):
    env = {
        **os.environ,
        "PYTHONPATH": PATHS,
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        " --xla_backend_optimization_level=0",  # compiles faster
    }
    return subprocess.Popen(
        [sys.executable, "-c", code.replace("STEPS", str(STEPS)), *map(str, args)],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One process with eight devices trains under all meshes."""
    path = tmp_path_factory.mktemp("eight")
    process = start(EIGHT, path, devices=8)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    return path


def losses(folder, name):
    lines = read_metrics(str(folder / name), "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return np.array([[line["loss"], line["gradient_norm"], line["accuracy"]] for line in lines])


def params(folder, name):
    path = folder / name / f"checkpoint_{STEPS}" / "state"
    return restore(path)["target"]


def restore(path):
    """{"target": {"layers/...": array}, ...}: read on this one device, whatever wrote it."""
    checkpointer = ocp.PyTreeCheckpointer()
    stored = checkpointer.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    tree = checkpointer.restore(path, restore_args=as_numpy)
    return {name: traverse_util.flatten_dict(part, sep="/") for name, part in tree.items()}


def assert_same_run(folder, one, other):
    np.testing.assert_allclose(losses(folder, one), losses(folder, other), rtol=2e-4, atol=1e-5)
    a, b = params(folder, one), params(folder, other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=5e-3, atol=5e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fam_8x1x1", "fam_2x4x1", "fam_2x2x2", "bswa_2x2x2"])
def test_eight_devices_equal_one(folder, name):
    assert_same_run(folder, name, name.split("_")[0] + "_1")


@pytest.mark.slow
def test_weights_are_cut_as_the_rules_say(folder):
    shards = json.loads((folder / "shards.json").read_text())
    embedding = {name: shards[name]["embedding"][1] for name in shards}
    assert embedding["fam_1"] == embedding["fam_8x1x1"] == [260, 16]
    assert embedding["fam_2x4x1"] == [260, 4]
    assert embedding["fam_2x2x2"] == embedding["bswa_2x2x2"] == [130, 8]
    assert embedding["lanes_4x1x2"] == [130, 16]
    for name, (shape, shard) in shards["fam_2x2x2"].items():
        parts = np.prod(shape) / np.prod(shard)  # a vector of the width is cut by fsdp alone
        assert parts == (2 if "norm" in name or name == "fam" else 4), (name, shape, shard)


@pytest.mark.slow
def test_lanes_are_carried_over_devices(folder):
    assert np.isfinite(losses(folder, "lanes_4x1x2")).all()
    tree = restore(folder / "lanes_4x1x2" / f"checkpoint_{STEPS}" / "state")
    assert tree["lanes"]["memory"].shape == (1, 8, 2, 16)


@pytest.mark.slow
def test_two_processes_equal_one(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [start(TWO, folder, address, i, devices=1) for i in range(2)]
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    assert texts[0].endswith("done\n")
    assert_same_run(folder, "two", "fam_1")
