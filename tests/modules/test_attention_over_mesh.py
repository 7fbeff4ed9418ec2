"""Attention kernels on meshes: eight virtual devices, and the TPU compiler without a TPU.

Each runs in one subprocess.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import xla_flags

import famx

ROOT = str(pathlib.Path(famx.__file__).parent.parent)
HERE = str(pathlib.Path(__file__).parent)

EIGHT = """
import functools, types, jax, numpy as np, flax.linen as nn
from plain_kernels import PLAIN
from famx.memories import Fam
from famx.modules import DecoderConfig
from famx.modules.attention import cudnn, dense, dispatch, splash, token_attention
from famx.modules.attention.over_mesh import over_mesh
from famx.mesh import batch_sharding, logical_to_sharding, make_mesh, make_rules

splash.INTERPRET = True
FIRST = np.arange(8, dtype=np.int32)

def run(function, args):
    def both(*args):
        *primals, cotangent = args
        out, back = jax.vjp(function, *primals)
        return out, *back(cotangent)
    return jax.jit(both)(*args)

def check(backend, sizes, rules=None, batch=4, cut=None, axis="batch", **changes):
    sizes_of_model = dict(num_heads=4, num_kv_heads=2, head_dim=8, memory_segments=1, memory=Fam(8))
    c = DecoderConfig(**{**dict(vocab_size=8, num_layers=1, embed_dim=8, block_size=128),
                         **sizes_of_model, **changes})
    window, memory = (2, 128, c.num_kv_heads), (1, 8, c.num_kv_heads)
    queries = 1, 128, c.num_heads
    rng = np.random.default_rng(0)
    args = [rng.standard_normal((batch, *shape, 8)).astype(np.float32)
            for shape in (queries, window, window, memory, memory, queries)]
    first = FIRST[:batch]
    seen = []
    def kernel(q, *rest):
        seen.append((q.shape[0], q.shape[3], rest[0].shape[3]))
        if backend == "splash":
            return splash.attention(c, q, *rest)
        return cudnn.attention(c, q, *rest, kernels=PLAIN)
    expected = run(lambda *x: dense.attention(c, *x, first), args)
    with jax.set_mesh(make_mesh(**sizes)), nn.logical_axis_rules(rules or make_rules().pairs()):
        found = run(lambda *x: over_mesh(kernel, (*x, first), axis), args)
    for name, x, y in zip("out q k v mk mv".split(), expected, found, strict=True):
        np.testing.assert_allclose(y, x, atol=3e-5, err_msg=f"{backend} {sizes} {changes} {name}")
    assert seen[0] == cut, (seen, cut)  # examples, query heads and key heads of one device

check("splash", dict(data=2, fsdp=2, tensor=2), cut=(1, 2, 1))
check("splash", dict(tensor=4), num_heads=8, num_kv_heads=1, cut=(2, 2, 1))
xla = functools.partial(check, "cudnn")
xla(dict(), batch=8, cut=(1, 4, 2))
xla(dict(tensor=4), cut=(2, 1, 1))  # one key head of two
xla(dict(tensor=4), num_heads=12, num_kv_heads=6, cut=(2, 3, 3))  # heads 0 0 1, 1 2 2, ...
xla(dict(tensor=2), num_heads=3, num_kv_heads=1, cut=(1, 3, 1))  # not divided
xla(dict(), batch=3, cut=(3, 4, 2))
whole_keys = [("batch", ("data", "fsdp")), ("heads", "tensor")]
xla(dict(tensor=2), whole_keys, cut=(1, 2, 1))  # key heads follow the query heads
folded = [*make_rules().pairs(), ("folded", ("context", "data", "fsdp"))]
xla(dict(data=2, fsdp=2, context=2), folded, batch=8, axis="folded", cut=(1, 4, 2))

# `auto` on several TPUs, pretended, without a mesh: nothing says how to cut the kernel.
c = DecoderConfig(vocab_size=8, num_layers=1, embed_dim=8, num_heads=2, head_dim=8, block_size=128,
                  memory_segments=0)
jax.devices = lambda: [types.SimpleNamespace(platform="tpu", device_kind="TPU v5e")]
called = []
dispatch._KERNELS["splash"] = lambda c, q, *rest: called.append(q.shape[0]) or q
q, empty = np.ones((8, 1, 128, 2, 8), np.float32), np.ones((8, 1, 0, 2, 8), np.float32)
attend = lambda: token_attention(q, q, q, empty, empty, FIRST, c)
jax.jit(attend).trace()
assert called == [], called
jax.device_count = lambda: 1
jax.jit(lambda: attend()).trace()
assert called == [8], called
print("done")
"""

# No number of this model but the window is 776 = 8 + 3 * 256, or 768 = 3 * 256.
TPU = """
import re, jax, jax.numpy as jnp, flax.linen as nn
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from famx.memories import Fam
from famx.modules import Decoder, DecoderConfig
from famx.mesh import batch_sharding, logical_to_sharding, make_mesh, make_rules

assert jax.default_backend() == "cpu"
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=devices)
rules = make_rules(may_replicate=["kv_heads"])
tokens = jax.ShapeDtypeStruct((2, 1024), jnp.int32, sharding=batch_sharding(mesh))

def program(backend):
    model = Decoder(DecoderConfig(
        vocab_size=64, num_layers=2, embed_dim=128, num_heads=2, num_kv_heads=1, block_size=256,
        memory_segments=2, memory=Fam(8), dtype="bfloat16", remat="full", attention_backend=backend))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256), jnp.int32))["params"]
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    params = jax.tree.map(place, nn.unbox(boxed), logical_to_sharding(boxed, mesh, rules))

    def step(params, tokens):
        loss = lambda params: jnp.mean(jax.nn.logsumexp(model.apply({"params": params}, tokens)[0], -1))
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.pairs()):
        return jax.jit(step, donate_argnums=0).lower(params, tokens)

window = re.compile(r"\\b(776|768)\\b")
assert window.search(program("xla").as_text())  # what must not be there would be found
compiled = program("auto").compile().as_text()
assert "tpu_custom_call" in compiled
shapes = re.findall(r"\\w+\\[[\\d,]+\\]", compiled)
assert len(shapes) > 100 and not [shape for shape in shapes if window.search(shape)]
print("done")
"""


def run(code, **variables):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([ROOT, HERE]), **variables
        },
    )
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr[-3000:]


@pytest.mark.slow
def test_eight_devices_equal_one():
    flags = f"--xla_force_host_platform_device_count=8 {xla_flags.FAST}"
    run(EIGHT, XLA_FLAGS=flags)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)
def test_a_train_step_compiles_for_a_tpu_without_an_array_of_scores():
    # Several processes may hold the compiler at once; there is no TPU to share.
    run(TPU, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", XLA_FLAGS="")
