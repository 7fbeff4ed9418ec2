"""Checkpoints: exact, atomic, sharded, and refused with a sentence when they do not fit."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import xla_flags
from flax import struct
from processes import start_process

import famx
from famx.base.errors import ConfigError
from famx.memories import Fam
from famx.model_dir import checkpointer
from famx.model_dir.checkpointer import Checkpointer, check_model_dir
from famx.model_dir.identity import check_same_model, split_checkpoint
from famx.modules import Memory
from famx.training import optimizers

ROOT = str(pathlib.Path(famx.__file__).parent.parent)


@struct.dataclass
class Lane:
    memory: jax.Array
    count: jax.Array


def make_tree(seed=0, optimizer=optimizers.adamw):
    key = jax.random.key(seed)
    params = {"layer": {"w": jax.random.normal(key, (4, 3)), "b": jnp.full(3, 0.1, jnp.bfloat16)}}
    optimizer = optimizer(optax.linear_schedule(1e-3, 0, 10), weight_decay=0.1)
    return {
        "target": params,
        "state": {"step": jnp.asarray(7, jnp.int32), "param_states": optimizer.init(params)},
        "flax_mutables": {"memory": jax.random.normal(key, (2, 5))},
        "rng": jax.random.key_data(key),
        "lane": Lane(jnp.arange(6.0).reshape(2, 3), jnp.zeros(2, jnp.int32)),
        "bswa": Lane(jnp.zeros((2, 0, 3), jnp.bfloat16), jnp.zeros(2, jnp.int32)),  # no memory
        "nothing": {},
        "unset": None,
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(
    "async_, optimizer",
    [(True, optimizers.adamw), (False, optimizers.adafactor), (True, optimizers.lion)],
)
def test_round_trip_is_exact(tmp_path, async_, optimizer):
    tree, data = make_tree(optimizer=optimizer), {"index": 41, "epoch": [1, 2]}
    with Checkpointer(tmp_path, async_=async_) as saver:
        assert saver.save(7, tree, data)
    with Checkpointer(tmp_path) as saver:
        got, got_data, step = saver.restore(None, abstract(tree))
    assert_identical(got, tree)
    assert (got_data, step) == (data, 7)


def test_layout_and_no_dataset(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(3, make_tree(), {"i": 1})
        saver.save(4, make_tree())
        assert saver.restore(4, abstract(make_tree()))[1] is None
        assert saver.restore(3, abstract(make_tree()))[1] == {"i": 1}
    assert (tmp_path / "checkpoint_3" / "state").is_dir()
    assert (tmp_path / "checkpoint_3" / "dataset").is_dir()
    assert not (tmp_path / "checkpoint_4" / "dataset").exists()


def test_state_is_a_plain_orbax_tree(tmp_path):

    tree = make_tree()
    with Checkpointer(tmp_path) as saver:
        saver.save(1, tree)
    plain = ocp.PyTreeCheckpointer().restore(tmp_path / "checkpoint_1" / "state")
    np.testing.assert_array_equal(plain["target"]["layer"]["w"], tree["target"]["layer"]["w"])
    assert plain["state"]["step"].dtype == np.int32
    assert set(plain["state"]["param_states"]["1"]["0"]) == {"count", "mu", "nu"}


def test_values_may_be_donated_while_saving(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x = jnp.ones((1024, 1024))
    with Checkpointer(tmp_path) as saver:
        saver.save(1, {"x": x})
        overwrite(x).block_until_ready()
        got, _, _ = saver.restore(1, {"x": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)})
    assert (got["x"] == 1).all()


def test_numpy_values_may_be_changed_while_saving(tmp_path):
    x = np.ones((1024, 1024), np.float32)
    with Checkpointer(tmp_path) as saver:
        saver.save(1, {"x": x})
        x[:] = -1
        got, _, _ = saver.restore(1, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
    assert (got["x"] == 1).all()


def test_data_state_may_be_changed_while_saving(tmp_path, monkeypatch):
    """Orbax writes JSON in the background, so it must be given what nobody else holds."""
    given, make = [], ocp.args.JsonSave

    def note(item):
        given.append(item)
        return make(item)

    monkeypatch.setattr(ocp.args, "JsonSave", note)
    data = {"pending": [1], "feed": {"lengths": [2, 3]}}
    with Checkpointer(tmp_path) as saver:
        saver.save(1, {"x": jnp.ones(2)}, data)
        data["pending"].append(5)
        data["feed"]["lengths"][0] = 7
        _, got, _ = saver.restore(1, {"x": jax.ShapeDtypeStruct((2,), jnp.float32)})
    assert got == given[0] == {"pending": [1], "feed": {"lengths": [2, 3]}}


def test_keeps_the_newest_and_follows_the_interval(tmp_path):
    tree = {"x": jnp.ones(2)}
    with Checkpointer(tmp_path, keep=2, save_interval=10) as saver:
        assert saver.latest_step() is None
        done = [step for step in range(0, 41, 5) if saver.save(step, tree)]
        assert done == [0, 10, 20, 30, 40]
        assert saver.save(43, tree, force=True)
        assert not saver.save(43, tree, force=True)
        saver.wait()
        assert saver.all_steps() == [40, 43] and saver.latest_step() == 43


def refuse(tmp_path, change, step=None):
    with Checkpointer(tmp_path) as saver:
        saver.save(5, make_tree())
        with pytest.raises(ConfigError) as caught:
            saver.restore(step, change(abstract(make_tree())))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_shape_is_one_sentence(tmp_path):
    def wider(tree):
        tree["target"]["layer"]["w"] = jax.ShapeDtypeStruct((4, 8), jnp.float32)
        return tree

    sentence = refuse(tmp_path, wider)
    assert "target/layer/w is float32[4, 3] there and float32[4, 8] here" in sentence


def test_other_dtype_is_one_sentence(tmp_path):
    def half(tree):
        tree["target"]["layer"]["b"] = jax.ShapeDtypeStruct((3,), jnp.float32)
        return tree

    assert "target/layer/b is bfloat16[3] there and float32[3] here" in refuse(tmp_path, half)


def test_missing_and_extra_leaves(tmp_path):
    more = lambda tree: {**tree, "ema": jax.ShapeDtypeStruct((1,), jnp.float32)}  # noqa: E731
    fewer = lambda tree: {k: v for k, v in tree.items() if k != "rng"}  # noqa: E731
    assert "it has no ema" in refuse(tmp_path / "a", more)
    assert "this model has no rng" in refuse(tmp_path / "b", fewer)


def test_missing_steps(tmp_path):
    with Checkpointer(tmp_path / "empty") as saver:
        with pytest.raises(ConfigError, match="There is no checkpoint in"):
            saver.restore(None, {})
    assert "no checkpoint of step 6" in refuse(tmp_path / "a", lambda tree: tree, step=6)
    assert "saved steps: 5" in refuse(tmp_path / "b", lambda tree: tree, step=6)


KILLED = """
import jax.numpy as jnp, sys
from famx.model_dir.checkpointer import Checkpointer
saver = Checkpointer(sys.argv[1])
saver.save(1, {"x": jnp.full((512, 512), 1.0)}, {"i": 1})
saver.wait()
for step in range(2, 100000):
    saver.save(step, {"x": jnp.full((512, 512), float(step))}, {"i": step})
    print(step, flush=True)
"""


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    process = start_process(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    for _ in range(4):
        process.stdout.readline()
    # Whatever is being written now is cut off; an unfinished directory is made certain below.
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = tmp_path / "checkpoint_999999.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    (half / "state" / "manifest.ocdbt").write_bytes(b"half")
    with Checkpointer(tmp_path) as saver:
        x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
        got, data, step = saver.restore(None, {"x": x})
        assert step >= 1 and (got["x"] == step).all() and data == {"i": step}
        assert saver.save(step + 1, {"x": jnp.zeros((512, 512))}, {"i": step + 1})
        saver.wait()
        assert saver.latest_step() == step + 1
    assert not half.exists()


SHARDED = """
import os, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from famx.model_dir.checkpointer import Checkpointer
assert jax.device_count() == 8
def place(*shape):
    return NamedSharding(Mesh(np.array(jax.devices()).reshape(shape), ("a", "b")), P("a", "b"))
x = jax.random.normal(jax.random.key(0), (8, 16))
tree = {"x": jax.device_put(x, place(4, 2)), "step": jnp.int32(3)}
with Checkpointer(sys.argv[1]) as saver:
    saver.save(3, tree)
    want = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(2, 4)),
            "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=tree["step"].sharding)}
    got, _, _ = saver.restore(3, want)
assert got["x"].sharding == place(2, 4), got["x"].sharding
assert len(got["x"].addressable_shards) == 8 and got["x"].addressable_shards[0].data.shape == (4, 4)
np.testing.assert_array_equal(got["x"], x)
assert got["step"].dtype == jnp.int32 and isinstance(got["step"], jax.Array)
"""


def test_sharded_arrays_change_mesh(tmp_path):
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED), str(tmp_path)],
        cwd=ROOT,
        check=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {xla_flags.FAST}",
        },
    )


def test_model_dir_relative():
    with pytest.raises(ConfigError, match="must be an absolute path, not runs/x: write /"):
        check_model_dir("runs/x")


def test_model_dir_on_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="is not a directory"):
            check_model_dir(path)


def test_model_dir_not_writable(tmp_path, monkeypatch):
    def touch(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "touch", touch)
    with pytest.raises(ConfigError, match="is not writable: Permission denied"):
        check_model_dir(tmp_path)


def test_paths_that_the_system_refuses(tmp_path):
    name = 300 * "x"  # longer than file systems allow; an error of the system, as a closed directory is
    with pytest.raises(ConfigError, match="is not writable: File name too long"):
        check_model_dir(tmp_path / name)
    with pytest.raises(ConfigError, match="There is no checkpoint "):
        split_checkpoint(str(tmp_path / name))


def test_model_dir_full(tmp_path, monkeypatch):
    usage = lambda path: type("Usage", (), {"free": 3_000_000})  # noqa: E731
    monkeypatch.setattr(checkpointer.shutil, "disk_usage", usage)
    with pytest.raises(ConfigError, match="has 3 MB free and this run needs 2 GB"):
        check_model_dir(tmp_path, need_bytes=2_000_000_000)
    check_model_dir(tmp_path, need_bytes=1_000_000)


def test_model_dir_is_made_and_left_empty(tmp_path):
    assert check_model_dir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_same_model(tmp_path):
    config = {"embed_dim": 64, "dtype": jnp.dtype("float32"), "sizes": (1, 2)}
    check_same_model(tmp_path, config)
    check_same_model(tmp_path, config)
    other = {**config, "embed_dim": 128, "extra": None}
    with pytest.raises(ConfigError) as caught:
        check_same_model(tmp_path, other)
    assert "embed_dim (64 there, 128 here), extra ('unset' there, None here)" in str(caught.value)
    check_same_model(tmp_path, config)


def test_a_field_of_the_memory_that_was_not_written_has_its_default(tmp_path):
    older = Fam(8).to_dict()
    del older["normalize"]
    check_same_model(tmp_path, {"memory": older})
    check_same_model(tmp_path, {"memory": Fam(8).to_dict()})
    with pytest.raises(ConfigError, match=r"memory.normalize \(False there, True here\)"):
        check_same_model(tmp_path, {"memory": Fam(8, normalize=True).to_dict()})
    with pytest.raises(ConfigError, match=r"memory.kind \('fam' there, 'none' here\)"):
        check_same_model(tmp_path, {"memory": Memory().to_dict()})


def test_model_json_damaged(tmp_path):
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        check_same_model(tmp_path, {})
