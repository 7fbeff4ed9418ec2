"""Checkpoints written piece by piece: equal to ordinary ones, in little memory, complete or absent."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import xla_flags
from flax import traverse_util
from flax.linen import unbox
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType
from tiny import make_model

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.conversion import writer
from famx.conversion.writer import LeafShape, chunk_shape, leaf_shapes, write_checkpoint
from famx.mesh import MESH_AXES, logical_to_sharding, make_rules
from famx.model_dir.checkpointer import Checkpointer
from famx.modules import Decoder

CONFIG = make_model(num_layers=3, embed_dim=32, num_heads=4, num_kv_heads=2, tied_embeddings=False).config
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def draw(leaf: LeafShape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=leaf.shape)


def by_layer(array):
    """Pieces of an array, one for each index of its first axis."""
    return [(i, lambda x=x: x) for i, x in enumerate(array)]


def restore(directory, leaves):
    wanted = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    with Checkpointer(directory, read_only=True) as checkpointer:
        target = {"target": traverse_util.unflatten_dict(wanted)}
        tree, data, step = checkpointer.restore(None, target, partial=True)
    assert step == 0 and data is None
    return traverse_util.flatten_dict(tree["target"])


@settings(max_examples=15)
@given(st.data())
def test_what_is_written_comes_back_bit_for_bit(tmp_path_factory, data):
    shapes = data.draw(st.lists(SHAPES, min_size=1, max_size=3))
    leaves, arrays, pieces = {}, {}, {}
    for number, shape in enumerate(shapes):
        path = ("a", str(number)) if number % 2 else (f"b{number}",)
        dtype = np.dtype(data.draw(st.sampled_from((np.float32, ml_dtypes.bfloat16, np.float64))))
        chunks = tuple(data.draw(st.integers(1, size)) for size in shape)
        stacked = data.draw(st.booleans())
        leaves[path] = LeafShape(tuple(shape), dtype, (1, *chunks[1:]) if stacked else chunks)
        arrays[path] = draw(leaves[path], number)
        arrays[path].flat[0] = 0  # a chunk of zeros is stored like any other
        pieces[path] = by_layer(arrays[path]) if stacked else [(None, lambda x=arrays[path]: x)]
    directory, told = tmp_path_factory.mktemp("x"), []
    write_checkpoint(directory, leaves, pieces, told.append)
    assert sum(told) == sum(leaf.num_bytes for leaf in leaves.values())
    restored = restore(directory, leaves)
    for path, leaf in leaves.items():
        expected = arrays[path].astype(leaf.dtype)
        assert restored[path].dtype == leaf.dtype and restored[path].tobytes() == expected.tobytes()


def test_arrays_are_cast_from_any_dtype_and_layout(tmp_path):
    leaf = LeafShape((2, 4, 3), np.dtype(np.float32), (1, 4, 3))
    narrow = [draw(leaf)[i].T.astype(dtype).copy() for i, dtype in enumerate((np.float16, "bfloat16"))]
    pieces = [(i, lambda x=x: x.T) for i, x in enumerate(narrow)]
    write_checkpoint(tmp_path, {("x",): leaf}, {("x",): pieces})
    np.testing.assert_array_equal(restore(tmp_path, {("x",): leaf})[("x",)], [x.T for x in narrow])


def test_the_leaves_are_those_of_the_model():
    module = Decoder(CONFIG)
    tokens = np.zeros((1, CONFIG.block_size), np.int32)
    shapes = unbox(jax.eval_shape(module.init, jax.random.key(0), tokens)["params"])
    leaves = leaf_shapes(CONFIG)
    expected = {path: (x.shape, x.dtype) for path, x in traverse_util.flatten_dict(shapes).items()}
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()} == expected
    for path, leaf in leaves.items():
        assert leaf.chunks[0] == (1 if path[0] == "layers" else leaf.shape[0])


# --------------------------------------------------------------------------- chunks


@given(st.data())
def test_chunks_are_small_and_end_where_shards_end(data):
    shard = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    shape = [size * data.draw(st.integers(1, 3)) for size in shard]
    limit = data.draw(st.integers(4, 4000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK_BYTES", limit)
        chunks = chunk_shape(tuple(shape), tuple(shard), 4)
    assert math.prod(chunks) * 4 <= limit
    for whole, part, chunk in zip(shape, shard, chunks, strict=True):
        assert 1 <= chunk <= part and (whole == part or part % chunk == 0)
    if math.prod(shard) * 4 <= limit:
        assert chunks == tuple(shard), "nothing is cut needlessly"


MESH = {"fsdp": 4, "tensor": 2}


def test_each_device_of_a_mesh_reads_chunks_that_no_other_part_shares(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 1024)
    leaves = leaf_shapes(CONFIG, MESH)
    sizes = tuple(MESH.get(name, 1) for name in MESH_AXES)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
    module = Decoder(CONFIG)
    boxed = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    shardings = logical_to_sharding(boxed, mesh, make_rules())
    shardings = traverse_util.flatten_dict(shardings)
    cut = 0
    for path, leaf in leaves.items():
        shard = shardings[path].shard_shape(leaf.shape)
        cut += shard != leaf.shape
        for whole, part, chunk in zip(leaf.shape, shard, leaf.chunks, strict=True):
            assert whole == part or part % chunk == 0, path
    assert cut > 8
    arrays = {path: draw(leaf).astype(np.float32) for path, leaf in leaves.items()}
    stacked = lambda path, x: by_layer(x) if path[0] == "layers" else [(None, lambda: x)]
    write_checkpoint(tmp_path, leaves, {path: stacked(path, x) for path, x in arrays.items()})
    for path, leaf in leaves.items():
        array = tmp_path / "checkpoint_0" / "state" / ".".join(("target", *path)) / ".zarray"
        assert json.loads(array.read_text())["chunks"] == list(leaf.chunks)
    for path, x in restore(tmp_path, leaves).items():
        np.testing.assert_array_equal(x, arrays[path])


def test_axes_that_a_mesh_does_not_divide_are_kept_whole():
    leaves = leaf_shapes(CONFIG, {"tensor": 4})
    assert leaves[("layers", "key", "kernel")].chunks == (1, 32, 2, 8), "two heads, four devices"
    assert leaves[("layers", "query", "kernel")].chunks == (1, 32, 1, 8)


def test_meshes_that_make_no_sense():
    with pytest.raises(ConfigError, match="A mesh has no axis expert; its axes are data, fsdp, tensor"):
        leaf_shapes(CONFIG, {"expert": 2})
    with pytest.raises(ConfigError, match="The sizes of a mesh must be at least 1, not fsdp=0."):
        leaf_shapes(CONFIG, {"fsdp": 0})


# --------------------------------------------------------------------------- failures

LEAF = LeafShape((2, 3), np.dtype(np.float32), (1, 3))
ROW = np.ones(3, np.float32)


@pytest.mark.parametrize(
    "pieces",
    [[], [(0, lambda: ROW)], [(1, lambda: ROW), (0, lambda: ROW)], [(None, lambda: ROW)] * 2,
     [(i, lambda: ROW) for i in range(3)]],
)  # fmt: skip
def test_pieces_that_do_not_make_up_the_leaf(tmp_path, pieces):
    with pytest.raises(ValueError, match="a of shape .2, 3. cannot be made of"):
        write_checkpoint(tmp_path / "new", {("a",): LEAF}, {("a",): pieces})
    assert not (tmp_path / "new").exists()


def test_a_piece_of_another_shape(tmp_path):
    with pytest.raises(ValueError, match=r"takes pieces of shape .*3.*, not \(4,\)"):
        write_checkpoint(tmp_path, {("a",): LEAF}, {("a",): by_layer(np.ones((2, 4)))})


@pytest.mark.parametrize("stopped", (0, 1))
def test_a_failure_leaves_no_checkpoint_and_the_next_call_clears_up(tmp_path, stopped):
    def fail():
        raise KeyboardInterrupt

    pieces = by_layer(np.ones((2, 3)))
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, {("a",): LEAF}, {("a",): [*pieces[:stopped], (stopped, fail),
                                                             *pieces[stopped + 1:]]})  # fmt: skip
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.all_steps() == []
    write_checkpoint(tmp_path, {("a",): LEAF}, {("a",): pieces})
    assert os.listdir(tmp_path) == ["checkpoint_0"]
    np.testing.assert_array_equal(restore(tmp_path, {("a",): LEAF})[("a",)], np.ones((2, 3)))


def test_a_chunk_that_was_lost_is_noticed(tmp_path):
    write_checkpoint(tmp_path, {("a",): LEAF}, {("a",): by_layer(np.zeros((2, 3)))})
    (tmp_path / "checkpoint_0" / "state" / "target.a" / "1.0").unlink()
    with pytest.raises(ValueError):
        restore(tmp_path, {("a",): LEAF})


@pytest.mark.slow
def test_a_disk_that_is_full_is_an_error_of_the_system(tmp_path):
    code = """if True:
        import resource, sys
        import numpy as np
        from famx.conversion.writer import LeafShape, write_checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
        leaf = LeafShape((1 << 16,), np.dtype(np.float32), (1 << 16,))
        values = np.random.default_rng(0).normal(size=leaf.shape)
        try:
            write_checkpoint(sys.argv[1], {("a",): leaf}, {("a",): [(None, lambda: values)]})
        except OSError as error:
            print(error.strerror)
    """
    result = run(code, str(tmp_path / "new"))
    assert result.stdout == "File too large\n", result.stderr
    with Checkpointer(tmp_path / "new", read_only=True) as checkpointer:
        assert checkpointer.all_steps() == []


# --------------------------------------------------------------------------- other processes


def run(code, *args, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=gin_utils.gin_root(), env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


DEVICES = """if True:
    import sys
    import gin, jax, numpy as np
    from famx.model_dir.loading import load_model
    gin.bind_parameter("make_mesh.fsdp", 4)
    gin.bind_parameter("make_mesh.tensor", 2)
    gin.bind_parameter("make_mesh.data", 1)
    trained = load_model(sys.argv[1])
    key = trained.params["layers"]["query"]["kernel"]
    assert len(key.sharding.device_set) == 8 and key.addressable_shards[0].data.shape == (3, 8, 2, 8)
    for path, x in jax.tree_util.tree_leaves_with_path(trained.params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        np.testing.assert_array_equal(x, np.load(f"{sys.argv[2]}/{name}.npy"))
    print("done")
"""


@pytest.mark.slow
def test_eight_devices_read_what_was_written_for_their_mesh(tmp_path):
    leaves = leaf_shapes(CONFIG, MESH)
    (tmp_path / "values").mkdir()
    pieces = {}
    for path, leaf in leaves.items():
        array = draw(leaf).astype(np.float32)
        np.save(tmp_path / "values" / ".".join(path), array)
        pieces[path] = by_layer(array) if path[0] == "layers" else [(None, lambda x=array: x)]
    directory = tmp_path / "model"
    write_checkpoint(directory, leaves, pieces)
    (directory / "model.json").write_text(json.dumps(CONFIG.to_dict()))
    flags = f"--xla_force_host_platform_device_count=8 {xla_flags.FAST}"
    result = run(DEVICES, str(directory), str(tmp_path / "values"), XLA_FLAGS=flags)
    assert result.stdout == "done\n", result.stderr
    # Each device has chunks of its own, so what another one reads may be gone.
    array = directory / "checkpoint_0" / "state" / "target.layers.query.kernel"
    chunks = {path.name for path in array.iterdir()} - {".zarray"}
    grid = itertools.product(range(3), range(4), range(2), (0,))
    assert chunks == {".".join(map(str, place)) for place in grid}


MEMORY = """if True:
    import pathlib, re, sys, threading, time
    from famx.conversion.importing import plan_import, write_model
    from famx.conversion.sources import open_source
    from famx.conversion.writer import CHUNK_BYTES

    def anonymous():
        text = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", text)[1])

    plan = plan_import(open_source(sys.argv[1]), {"param_dtype": sys.argv[3]})
    before, peak, done = anonymous(), 0, threading.Event()

    def watch():
        global peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    write_model(plan, sys.argv[2])
    done.set()
    thread.join()
    largest = 4 * max(x.shape[0] * x.shape[-1] for x in plan.source.tensors.values())
    print(plan.num_bytes / 1e6, (peak - before) / 1e6, (1.3 * largest + CHUNK_BYTES) / 1e6)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored, param_dtype", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_peak_memory_is_that_of_the_largest_tensor(tmp_path, stored, param_dtype):
    from published import LLAMA, write_source

    from famx.conversion.families import decoder_config, tensors

    hf = {**LLAMA, "vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 2048,
          "num_hidden_layers": 12, "tie_word_embeddings": False}  # fmt: skip
    block = np.random.default_rng(0).normal(size=1 << 20).astype(stored)
    wanted = tensors(hf, decoder_config(hf))
    write_source(tmp_path / "x", hf, {t.name: np.resize(block, t.shape) for t in wanted}, shards=2)
    result = run(MEMORY, str(tmp_path / "x"), str(tmp_path / "y"), param_dtype)
    assert result.returncode == 0, result.stderr
    total, used, allowed = map(float, result.stdout.split())
    shutil.rmtree(tmp_path / "y")
    assert total > 150 and used < allowed < total
