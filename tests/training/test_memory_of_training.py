"""What a compiled training step holds: nothing large whole on every device, no table of all logits."""

import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from tiny import BLOCK, make_model, make_run

import famx
from famx.mesh import make_rules
from famx.models import DecoderModel
from famx.modules import Decoder, DecoderConfig, Memory
from famx.scale import hlo
from famx.training.step import make_initializer, make_train_step

ROOT = str(pathlib.Path(famx.__file__).parent.parent)
HERE = pathlib.Path(__file__).parent

# The paper's 1B, but for the blocks, which only the activations depend on.
ONE_B = """
import jax, math, sys
from famx.memories import Fam
from famx.models import DecoderModel
from famx.modules import Decoder, DecoderConfig
from famx.training.state_passing import named
from famx.training.step import make_initializer
from famx.training import optimizers
from famx.mesh import make_mesh, make_rules
from test_memory_of_training import compile_step, gathers, shapes_of
from tiny import make_run

config = DecoderConfig(
    vocab_size=256_000, num_layers=18, embed_dim=1536, num_heads=12, mlp_dim=8 * 1536, block_size=64,
    memory_segments=1, memory=Fam(64), dtype="bfloat16", remat="full", attention_backend="xla",
)
size = lambda leaf: leaf.size * leaf.dtype.itemsize
shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

def state_on(mesh, optimizer, mode):
    run = make_run(
        model=DecoderModel(Decoder(config), loss_chunk=128), optimizer=optimizer, mesh=mesh,
        batch_size=16, lengths={"targets": 256}, state_passing=named(mode),
    ).ready()
    return run, make_initializer(run)[1]

def check_cut(state, parts):
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        heads = name.startswith((".kept['lanes'].keys", ".kept['lanes'].values"))
        if size(leaf) > 2**20:
            assert size(leaf) == (8 if heads else parts) * shard(leaf), (name, leaf.sharding.spec)

# Described alone: eight-fold under FSDP, under a mixed mesh by the axes that a thing has.
mesh = make_mesh(data=1, fsdp=8)
adafactor = optimizers.adafactor(1e-3)
for mode in ("random", "continuous"):
    state = state_on(mesh, adafactor, mode)[1]
    check_cut(state, 8)
    moments = state.opt_state[1]
    row, column = moments.v_row["layers"]["mlp"]["up"], moments.v_col["layers"]["key"]
    for leaf in (row["kernel"], column["kernel"]):
        assert leaf.ndim > 1 and size(leaf) == 8 * shard(leaf), leaf
    for leaf in jax.tree.leaves(state.kept.get('flax_mutables', {})):
        assert size(leaf) == (8 if leaf.ndim else 1) * shard(leaf), leaf
mixed = make_mesh(data=2, fsdp=2, tensor=2)
check_cut(state_on(mixed, adafactor, "continuous")[1], 4)

# Compiled.
run, abstract = state_on(mesh, optimizers.adamw(1e-3), "none")
compiled = compile_step(run, abstract)
memory, total = compiled.memory_analysis(), sum(map(size, jax.tree.leaves(abstract)))
for found in (memory.argument_size_in_bytes, memory.output_size_in_bytes):
    assert total / 8 <= found < 1.01 * total / 8, (found, total)
assert memory.alias_size_in_bytes > 0.99 * total / 8  # given away
# One layer at a time is gathered: nothing that holds half of all layers of a matrix, or more.
largest = max(math.prod(shape) for dtype, shape in shapes_of(compiled) if shape[:1] == (18,))
matrices = [leaf.size for leaf in jax.tree.leaves(abstract.params["layers"]) if leaf.ndim > 2]
assert largest <= max(matrices) / 8, largest
# The table alone is gathered as a whole, for the loss; nothing is larger, as all layers' would be.
table = abstract.params["embedding"].size
assert max(math.prod(shape) for _, shape in shapes_of(compiled)) == table
# However few the rows are, weights are gathered before the loop over blocks, not activations in it.
weights = min(matrices) / 18
assert [depth for depth, size in gathers(compiled) if size >= weights and depth >= 2] == []
assert any(size >= weights for depth, size in gathers(compiled) if depth == 1)
print("done")
"""


def compile_step(run, abstract):
    """The compiled step of a run that is ready; nothing is materialised."""
    rows = run.abstract_batch()
    del rows["decoder_loss_weights"]
    with run.on_mesh():
        return make_train_step(run, abstract).lower(abstract, rows).compile()


def shapes_of(compiled):
    """`(dtype, shape)` of every result in the compiled program."""
    found = set(re.findall(r"(\w+)\[([\d,]+)\]", compiled.as_text()))
    return [(dtype, tuple(map(int, shape.split(",")))) for dtype, shape in found]


def gathers(compiled):
    """`(depth, size)`: each gather's number of loops around it and the elements of its result."""
    module, found = hlo.parse(compiled.as_text()), []

    def visit(computation, depth):
        for x in module.computations[computation].instructions.values():
            if x.opcode.startswith("all-gather"):
                found.append((depth, max(array.size for array in x.arrays)))
            if x.opcode == "while":
                visit(x.called("body"), depth + 1)
            elif x.opcode == "call":
                visit(x.called("to_apply"), depth)

    visit(module.entry, 0)
    return found


@pytest.mark.slow
def test_nothing_large_of_1b_is_whole_on_each_of_eight_devices():
    # On CPUs the pass that widens reductions of bfloat16 aborts on those of shard_map.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags += " --xla_disable_hlo_passes=all-reduce-promotion"
    found = subprocess.run(
        [sys.executable, "-c", ONE_B], cwd=ROOT, capture_output=True, text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([ROOT, str(HERE), str(HERE.parent)]),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_llvm_disable_expensive_passes=true",
        },
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (0, "done\n"), found.stderr


def step_on_one_device(model, batch, length):
    run = make_run(model=model, batch_size=batch, lengths={"targets": length}).ready(jax.devices()[:1])
    return compile_step(run, make_initializer(run)[1])


@pytest.mark.slow
def test_all_logits_never_exist_where_the_loss_is_cut_into_chunks():
    vocabulary, batch, length = 256_000, 2, 8 * BLOCK
    found = {}
    for chunk in (None, 2 * BLOCK):
        model = make_model(vocab_size=vocabulary, embed_dim=8, num_heads=1, loss_chunk=chunk)
        compiled = step_on_one_device(model, batch, length)
        largest = max(math.prod(shape) for _, shape in shapes_of(compiled))
        found[chunk] = largest, compiled.memory_analysis().temp_size_in_bytes
    table = batch * length * vocabulary
    assert found[None][0] >= table and found[None][1] >= 4 * table  # it is seen where it exists
    assert found[2 * BLOCK][0] < table / 2 and found[2 * BLOCK][1] < 4 * table / 2


@pytest.mark.slow
def test_offloaded_layer_inputs_lie_in_the_memory_of_a_tpu_s_host(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    config = DecoderConfig(
        vocab_size=128, num_layers=3, embed_dim=128, num_heads=1, mlp_dim=128, block_size=128,
        memory_segments=0, memory=Memory(), dtype="bfloat16", remat="offload", attention_backend="xla",
    )  # fmt: skip
    batch, length = 4, 512
    run = make_run(
        model=DecoderModel(Decoder(config)), batch_size=batch, lengths={"targets": length},
        rules=make_rules("data"),
    ).ready(devices)  # fmt: skip
    memory = compile_step(run, make_initializer(run)[1]).memory_analysis()
    inputs = config.num_layers * batch // 4 * length * config.embed_dim * 2
    assert memory.host_temp_size_in_bytes == inputs
