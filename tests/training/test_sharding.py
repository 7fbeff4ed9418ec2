"""The same numbers on one device, on eight under every mesh, and on two and four processes."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xla_flags
from flax import traverse_util
from processes import free_address, start_process

import famx
from famx.training.run_log import read_metrics

HERE = pathlib.Path(__file__).parent
PATHS = os.pathsep.join([str(pathlib.Path(famx.__file__).parent.parent), str(HERE.parent)])
STEPS = 5
MESHES = (  # data x fsdp x tensor x context
    *("fam_8x1x1", "fam_1x8x1", "fam_2x1x4", "fam_2x2x2", "bswa_2x2x2", "lora_2x2x2", "frozen_1x4x2"),
    *("random_2x2x2", "continuous_4x1x2"),
    *("fam_1x2x2x2", "fam_1x4x1x2", "bswa_2x1x1x4", "lora_1x2x1x4", "continuous_1x2x2x2"),
    *("infini_2x2x2", "infini_1x2x2x2", "delta_2x1x2x2"),
)

COMMON = """
import gin, jax, json, numpy as np, optax, pathlib, sys
from famx.lora import Lora
from famx.training.state_passing import Fresh, Lanes, Random
from famx.training.trainable import Trainable
from famx.training.run import Every
from famx.training import loop, optimizers
from famx.mesh import make_mesh, make_rules
from famx.model_dir.checkpointer import Checkpointer
from famx.training.step import make_initializer
from famx.memories import Infini
from tiny import fam, make_model, make_run, BLOCK, BLOCKS

# Matrices of the tiny model are factored too, and plain gradients show in what SGD leaves.
OPTIMIZERS = {
    "random": optimizers.adafactor(1e-2, min_dim_size_to_factor=4), "bswa": optax.sgd(0.1, 0.9),
}

class Look:
    def __call__(self, model, params, step):
        self.shards = {
            jax.tree_util.keystr(path, simple=True, separator="/"):
                [list(leaf.shape), list(leaf.addressable_shards[0].data.shape)]
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        return {}

STATES = {"random": Random(0.9), "continuous": Lanes(document_length=7 * BLOCK, num_documents=20)}

class Devices(list):
    def __deepcopy__(self, memo):  # gin copies what is bound, and a device cannot be copied
        return self

def run_of(kind, **changes):
    memory = {"infini": Infini(), "delta": Infini(delta=True)}.get(kind)
    memory = memory or fam(0 if kind in ("bswa", "frozen") else 2)
    lora = kind in ("lora", "frozen")
    model = make_model(
        memory=memory, num_heads=8, num_kv_heads=4, memory_segments=2,
        lora=Lora(rank=2) if lora else None,
    )
    trainable = Trainable("lora" if lora else "all", "bfloat16" if kind == "frozen" else None)
    return make_run(
        model=model, trainable=trainable, steps=STEPS, batch_size=8,
        optimizer=OPTIMIZERS.get(kind, optax.adam(1e-2)), state_passing=STATES.get(kind, Fresh()),
        **changes,
    )

def set_mesh(data=1, fsdp=1, tensor=1, context=1, devices=None):
    gin.clear_config()
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor, context=context, devices=devices)
    for name, value in sizes.items():
        gin.bind_parameter(f"mesh.make_mesh.{name}", value)

def run(folder, kind, **changes):
    look = Look()
    loop.train(run_of(
        kind, model_dir=folder, evaluation=look, every=Every(log=1, checkpoint=2),
        checkpoints_to_keep=None, **changes,
    ))
    return look.shards
"""

EIGHT = COMMON + """
assert jax.device_count() == 8
folder, out = sys.argv[1], {}
set_mesh(devices=Devices(jax.devices()[:1]))
for kind in ("fam", "bswa", "infini", "delta", "lora", "frozen", "random", "continuous"):
    out[f"{kind}_1"] = run(f"{folder}/{kind}_1", kind)
for name in MESHES:
    kind, _, sizes = name.partition("_")
    set_mesh(*map(int, sizes.split("x")))
    out[name] = run(f"{folder}/{name}", kind)
json.dump(out, open(f"{folder}/shards.json", "w"))

# A checkpoint that one mesh wrote, read on others.
def moved(name, kind, mesh):
    abstract = make_initializer(run_of(kind, mesh=mesh).ready())[1]
    with Checkpointer(pathlib.Path(folder) / name) as checkpointer:
        tree = checkpointer.restore(None, abstract.to_checkpoint())[0]
    wanted = jax.tree.leaves(abstract.to_checkpoint())
    for have, want in zip(jax.tree.leaves(tree), wanted, strict=True):
        assert have.sharding.is_equivalent_to(want.sharding, have.ndim), (have.sharding, want)
    return tree

gin.clear_config()
set_mesh()
meshes = [make_mesh(2, 2, 2), make_mesh(8, 1, 1), make_mesh(devices=jax.devices()[:1])]
for name, kind in (("random_2x2x2", "random"), ("continuous_4x1x2", "continuous")):
    own, *others = (moved(name, kind, mesh) for mesh in meshes)
    for other in others:
        same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), own, other)
        assert all(jax.tree.leaves(same)), same
"""

PROCESSES = COMMON + """
folder, address, count, index = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, count, index)
assert jax.process_count() == count and jax.device_count() == 4
for kind, sizes in (("fam", (1, 4)), ("random", (2, 2)), ("continuous", (2, 1, 2))):
    set_mesh(*sizes)
    run(f"{folder}/{kind}_processes_{count}", kind)
print("done")
"""


def start(code, *args, devices):
    env = {
        **os.environ,
        "PYTHONPATH": PATHS,
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {xla_flags.FAST}",
    }
    return start_process(
        [
            sys.executable, "-c", code.replace("STEPS", str(STEPS)).replace("MESHES", str(MESHES)),
            *map(str, args),
        ],
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


def restore(path):
    """{"target": {"layers/...": array}, ...}: read on this one device, whatever wrote it."""
    checkpointer = ocp.PyTreeCheckpointer()
    stored = checkpointer.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    tree = checkpointer.restore(path, restore_args=as_numpy)
    return {name: traverse_util.flatten_dict(part, sep="/") for name, part in tree.items()}


def assert_same_run(folder, one, other):
    np.testing.assert_allclose(losses(folder, one), losses(folder, other), rtol=2e-4, atol=1e-5)
    a, b = (restore(folder / name / f"checkpoint_{STEPS}" / "state") for name in (one, other))
    for part in {"target", "flax_mutables", "lanes"} & a.keys():
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            x, y = (np.asarray(tree[part][name], np.float32) for tree in (a, b))
            np.testing.assert_allclose(x, y, rtol=5e-3, atol=5e-4, err_msg=f"{part}/{name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one(folder, name):
    assert_same_run(folder, name, name.split("_")[0] + "_1")


@pytest.mark.slow
def test_weights_are_cut_as_the_rules_say(folder):
    shards = json.loads((folder / "shards.json").read_text())
    embedding = {name: shards[name]["embedding"][1] for name in shards}
    assert embedding["fam_1"] == embedding["fam_8x1x1"] == [260, 16]
    assert embedding["fam_1x8x1"] == [260, 2]
    assert embedding["fam_2x2x2"] == embedding["bswa_2x2x2"] == [130, 8]
    assert embedding["fam_2x1x4"] == [65, 16]
    for name, (shape, shard) in shards["fam_2x2x2"].items():
        parts = np.prod(shape) / np.prod(shard)  # a vector of the width is cut by fsdp alone
        assert parts == (2 if "norm" in name or name == "memory/prompt" else 4), (name, shape, shard)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_equal_one(folder, count):
    """Two from the start; four continue from what one process saved after two steps."""
    if count == 4:
        for kind in ("fam", "random", "continuous"):
            shutil.copytree(folder / f"{kind}_1", folder / f"{kind}_processes_4")
            for step in (4, STEPS):
                shutil.rmtree(folder / f"{kind}_processes_4" / f"checkpoint_{step}")
    address = free_address()
    processes = [
        start(PROCESSES, folder, address, count, index, devices=4 // count) for index in range(count)
    ]
    texts = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, "\n".join(texts)
    assert all(text.endswith("done\n") for text in texts)
    assert ("Resuming from step 2 of" in texts[0]) == (count == 4)
    for kind in ("fam", "random", "continuous"):
        assert_same_run(folder, f"{kind}_processes_{count}", f"{kind}_1")
