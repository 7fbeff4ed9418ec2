"""Rules, meshes and shardings; what needs several devices runs in one subprocess with eight."""

import os
import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xla_flags
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from tiny import make_model

import famx
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.mesh import (
    PRESETS,
    Rules,
    batch_shard,
    check_batch_size,
    check_blocks,
    logical_to_sharding,
    make_mesh,
    make_rules,
)

ROOT = str(pathlib.Path(famx.__file__).parent.parent)


def test_presets():
    query = ("embed", "heads", "kv")
    assert make_rules("data").spec(query) == P(None, None, None)
    assert make_rules("fsdp").spec(query) == P("fsdp", None, None)
    assert make_rules("fsdp_tensor").spec(query) == P("fsdp", "tensor", None)
    assert make_rules("fsdp_tensor").spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")
    assert make_rules("fsdp_tensor").spec(("vocab", "embed")) == P("tensor", "fsdp")
    assert make_rules("fsdp_tensor").spec(("memory", "embed")) == P(None, "fsdp")


def test_batch_wins_over_the_width_of_activations():
    for preset in PRESETS:
        spec = make_rules(preset).spec(("batch", "blocks", "length", "embed"))
        assert spec == P(("data", "fsdp"), None, "context", None)
    assert make_rules().spec(("layers", "batch", "memory", "embed"))[1] == ("data", "fsdp")
    assert make_rules().spec(("batch", "length", "vocab"))[2] == "tensor"


@given(st.permutations(["embed", "mlp", "kv"]))
def test_collisions_are_refused(names):
    both = Rules({"embed": ("tensor",), "mlp": ("tensor",)})
    with pytest.raises(ConfigError, match="both cut over the mesh axis tensor"):
        both.spec(names)
    with pytest.raises(ConfigError, match="both cut"):
        make_rules("fsdp").spec(["embed", "embed"])


def test_unknown_names():
    with pytest.raises(ConfigError, match="no logical axis named 'widht': choose from"):
        Rules({"widht": ("data",)})
    with pytest.raises(ConfigError, match="no mesh axis named 'model'"):
        Rules({"embed": ("model",)})
    with pytest.raises(ConfigError, match="no logical axis named 'joined'"):
        make_rules().spec(["joined"])
    with pytest.raises(ConfigError, match="preset must be one of 'data', 'fsdp', 'fsdp_tensor', not"):
        make_rules("zero")


def test_pairs_agree_with_flax():
    with nn.logical_axis_rules(make_rules().pairs()):
        for names in (("embed", "mlp"), ("batch", "length", "embed"), ("layers", "vocab", "embed")):
            assert nn.logical_to_mesh_axes(names) == make_rules().spec(names)


def test_mesh_on_one_device():
    one = jax.devices()[:1]
    assert make_mesh(devices=one).devices.shape == (1, 1, 1, 1)
    with pytest.raises(ConfigError, match="does not fit 1 device.*must divide"):
        make_mesh(fsdp=2, devices=one)
    with pytest.raises(ConfigError, match="multiply to"):
        make_mesh(data=2, devices=one)
    for size, sentence in (
        ({"fsdp": 0}, "make_mesh.fsdp must be a whole number of at least 1, or -1 for the rest, not 0"),
        ({"fsdp": -1}, "At most one size of the mesh may be -1"),
        ({"tensor": -2}, "make_mesh.tensor must be a whole number of at least 1, or -1 for the rest,"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            make_mesh(**size, devices=one)


class Chip:
    """A device of a slice, as far as a mesh looks at it."""

    platform = device_kind = "cpu"
    process_index = 0

    def __init__(self, id, slice_index):
        self.id, self.slice_index = id, slice_index


def chips(*counts):
    slices = [index for index, count in enumerate(counts) for _ in range(count)]
    return [Chip(id, index) for id, index in enumerate(slices)]


def slices_of(mesh):
    """The slice of each device by its place in data, fsdp, tensor."""
    return np.vectorize(lambda chip: chip.slice_index)(mesh.devices)[..., 0]


def test_slices_are_crossed_by_data_first():
    mesh = make_mesh(fsdp=2, tensor=2, devices=chips(4, 4))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    where = slices_of(mesh)
    assert (where[0] == 0).all() and (where[1] == 1).all()
    where = slices_of(make_mesh(data=4, fsdp=2, devices=chips(4, 4)))
    assert [sorted(set(row.flat)) for row in where] == [[0], [0], [1], [1]]


def test_slices_are_crossed_by_fsdp_where_it_is_asked_for_or_nothing_else_can():
    where = slices_of(make_mesh(data=2, fsdp=4, dcn_fsdp=2, devices=chips(4, 4)))
    assert where[:, :, 0].tolist() == [[0, 0, 1, 1]] * 2
    where = slices_of(make_mesh(data=1, fsdp=8, devices=chips(4, 4)))
    assert where.ravel().tolist() == [0] * 4 + [1] * 4
    where = slices_of(make_mesh(data=2, fsdp=4, tensor=2, devices=chips(4, 4, 4, 4)))
    assert where[:, :, 0].tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert (where[:, :, 0] == where[:, :, 1]).all()


@pytest.mark.parametrize("sizes, counts, sentence", [
    (dict(data=1, tensor=8), (4, 4), "data 1 x fsdp 1 x tensor 8 x context 1 over 2 slices has no place"
     " for dcn_fsdp 2"),
    (dict(data=1, fsdp=8, dcn_data=2), (4, 4), "no place for dcn_data 2"),
    (dict(dcn_data=3), (4, 4), "dcn_data 3 x dcn_fsdp 1 must multiply to the 2 slice"),
    (dict(dcn_data=0), (4, 4), "make_mesh.dcn_data must be a whole number of at least 1 or None, not 0"),
    (dict(dcn_data=2), (8,), "must multiply to the 1 slice"),
    (dict(), (4, 2), "The 2 slices have 2, 4 devices"),
])  # fmt: skip
def test_meshes_that_do_not_fit_the_slices_are_refused(sizes, counts, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        make_mesh(**sizes, devices=chips(*counts))


def test_meshes_of_a_tpu_that_is_not_there(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    one = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = make_mesh(tensor=8, devices=one)  # along no axis of the chip's own torus
    assert mesh.shape["tensor"] == 8 and set(mesh.devices.flat) == set(one)
    two = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    assert slices_of(make_mesh(fsdp=4, devices=two))[:, :, 0].tolist() == [[0] * 4, [1] * 4]


@pytest.mark.parametrize("sizes, per_process, parts", [
    (dict(), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    (dict(tensor=2), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    (dict(tensor=4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    (dict(fsdp=2, context=2, tensor=2, data=1), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    (dict(tensor=8), 4, [(0, 1), (0, 1)]),
])  # fmt: skip
def test_processes_that_hold_the_same_rows_make_the_same_rows(sizes, per_process, parts):
    devices = chips(8)
    for device in devices:
        device.process_index = device.id // per_process
    mesh = make_mesh(**sizes, devices=devices)
    assert [batch_shard(mesh, i) for i in range(8 // per_process)] == parts


def test_processes_whose_rows_overlap_are_refused():
    devices = chips(6)
    for device in devices:
        device.process_index = device.id // 3
    mesh = make_mesh(data=3, tensor=2, devices=devices)
    with pytest.raises(ConfigError, match="parts of the batch that overlap"):
        batch_shard(mesh, 0)


@pytest.mark.parametrize("name, bindings, sizes, query", [
    ("data", [], (8, 1, 1, 1), P(None, None, None)),
    ("fsdp", [], (1, 8, 1, 1), P("fsdp", None, None)),
    ("fsdp", ["DATA_PARALLEL = 2"], (2, 4, 1, 1), P("fsdp", None, None)),
    ("fsdp_tensor", ["TENSOR_PARALLEL = 4"], (1, 2, 4, 1), P("fsdp", "tensor", None)),
])  # fmt: skip
def test_gin_files_of_meshes(name, bindings, sizes, query):
    try:
        gin_utils.parse_gin([f"gin_configs/meshes/{name}.gin"], bindings)
        assert make_mesh(devices=chips(4, 4)).devices.shape == sizes
        assert make_rules().spec(("embed", "heads", "kv")) == query
    finally:
        gin.clear_config()


def test_rows_are_cut_over_context_by_whole_blocks():
    devices = chips(4)
    mesh = make_mesh(context=4, devices=devices)
    config = make_model(block_size=16).config
    check_blocks(64, config, mesh)
    for length in (32, 72, 80):
        with pytest.raises(ConfigError, match="4 devices .* whole blocks of 16: use a multiple of 64"):
            check_blocks(length, config, mesh)
    check_blocks(72, config, make_mesh(devices=devices))


@pytest.mark.parametrize("chunk,fits", [(4, True), (8, True), (2, False), (12, False)])
def test_chunks_are_cut_over_context_by_whole_blocks(chunk, fits):
    mesh = make_mesh(context=4, devices=chips(4))
    config = make_model(block_size=16, blocks_per_chunk=chunk).config
    if fits:
        return check_blocks(128, config, mesh)
    with pytest.raises(ConfigError, match=f"chunks of {chunk} blocks .* a multiple of 4 that divides 8"):
        check_blocks(128, config, mesh)


EIGHT = """
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from famx.base.errors import ConfigError
from famx.mesh import batch_sharding, check_batch_size, logical_to_sharding, make_mesh, make_rules

def sentence(call, *args):
    try:
        call(*args)
    except ConfigError as error:
        return str(error)
    raise AssertionError("no error")

assert jax.device_count() == 8
mesh = make_mesh(fsdp=2, tensor=2)
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
assert all("Auto" in str(kind) for kind in mesh.axis_types)
assert make_mesh().shape["data"] == 8
assert "data -1 x fsdp 3 x tensor 1 x context 1 does not fit 8" in sentence(make_mesh, -1, 3)

class Net(nn.Module):
    heads: int = 4
    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "heads", "kv"))
        w = self.param("w", init, (16, self.heads, 5))
        plain = self.param("plain", nn.initializers.ones, (3,))
        return jnp.einsum("be,ehk->bhk", x, w) * plain[0]

x = jnp.arange(8.0 * 16).reshape(8, 16) / 100
boxed = jax.eval_shape(Net().init, jax.random.key(0), x)
for preset, want in (("data", P(None, None, None)), ("fsdp_tensor", P("fsdp", "tensor", None))):
    shardings = logical_to_sharding(boxed, mesh, make_rules(preset))
    assert shardings["params"]["w"].spec == want, shardings
    assert shardings["params"]["plain"].is_fully_replicated
    init = jax.jit(lambda key: nn.unbox(Net().init(key, x)), out_shardings=shardings)
    params = init(jax.random.key(0))
    assert params["params"]["w"].sharding == shardings["params"]["w"]
    one = nn.unbox(Net().init(jax.random.key(0), x))
    # Another program, in which a normal number of about 0.01 may be rounded otherwise.
    np.testing.assert_allclose(params["params"]["w"], one["params"]["w"], rtol=1e-6, atol=1e-7)
    y = jax.jit(Net().apply)(params, jax.device_put(x, batch_sharding(mesh)))
    np.testing.assert_allclose(y, Net().apply(one, x), rtol=1e-4, atol=1e-5)
shards = {s.data.shape for s in params["params"]["w"].addressable_shards}
assert shards == {(8, 2, 5)}, shards

odd = jax.eval_shape(Net(heads=1).init, jax.random.key(0), x)
text = sentence(logical_to_sharding, odd, mesh, make_rules("fsdp_tensor"))
assert "Axis heads of params/w has size 1, which cannot be divided over 2 devices" in text, text
kept = logical_to_sharding(odd, mesh, make_rules("fsdp_tensor", ["heads"]))
assert kept["params"]["w"].spec == P("fsdp", None, None)
specs = logical_to_sharding({"a": P("batch", "embed")}, mesh, make_rules())
assert specs["a"].spec == P(("data", "fsdp"), None)

assert batch_sharding(mesh).shard_shape((8, 3)) == (2, 3)
check_batch_size(8, mesh)
text = sentence(check_batch_size, 6, mesh)
assert text == ("BATCH_SIZE 6 cannot be divided over 4 devices (data 2 x fsdp 2):"
                " use a multiple of 4."), text
print("done")
"""


def test_eight_devices():
    result = subprocess.run(
        [sys.executable, "-c", EIGHT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {xla_flags.FAST}",
        },
    )
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_any_batch_size_fits_one_device():
    mesh = make_mesh(devices=jax.devices()[:1])
    check_batch_size(3, mesh)


def test_unboxed_leaves_stay_whole():
    mesh = make_mesh(devices=jax.devices()[:1])
    shardings = logical_to_sharding({"a": jnp.ones((2, 3))}, mesh, make_rules())
    assert shardings["a"].is_fully_replicated


def test_batch_must_divide_over_processes(monkeypatch):
    mesh = make_mesh()
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    check_batch_size(6, mesh)
    with pytest.raises(ConfigError, match="cannot be divided over 3 processes"):
        check_batch_size(4, mesh)
