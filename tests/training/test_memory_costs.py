"""What memories cost, against the arrays that exist, the loops and the products that are traced."""

import dataclasses
import pathlib
import re

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from memories_table import MEMORIES, REMEMBERING
from modules.helpers import config, initial, random_params, shapes
from test_flops import jaxpr_flops

from famx.memories import (
    AutoCompressor,
    BlockRecurrent,
    Fam,
    Feedback,
    Infini,
    KeyValueMeans,
    Landmark,
    Rmt,
)
from famx.modules import Decoder, DecoderConfig, Memory
from famx.modules.memory import of_memory
from famx.training.memory_costs import memory_costs

LAYERS, BLOCKS = 3, 5
# Products that the dense programs have beyond those that count: masked scores, queries and keys of rows
# that are projected together with others, dimensions that mark columns. At most this share of all.
MORE = {
    "fam with options": 0.15, "several fams": 0.35, "fam that asks by learned queries": 0.15,
    "feedback": 0.25, "landmark": 0.45, "landmark, the best": 0.45, "means": 0.45, "growing means": 0.45,
    "auto compressor": 0.05,
}  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", MEMORIES)
def test_bytes_and_parameters_are_those_of_the_arrays(name):
    c = config(memory=MEMORIES[name], memory_segments=2)
    params = random_params(c)
    costs, state = memory_costs(c), initial(c, params, 1)
    size = lambda *trees: sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
    assert costs.state_bytes == size(state.memory, state.features)
    assert costs.window_bytes == size(state.keys, state.values)
    of_its_own = [
        leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if of_memory(jax.tree_util.keystr(path, simple=True, separator="/"))
    ]  # fmt: skip
    assert costs.parameters == sum(of_its_own)
    assert (costs.state_bytes > 0) == (costs.flops_per_token > 0) == c.memory.exists


def traced(c, blocks):
    """The program that reads blocks on from a state at a block's start."""
    params = shapes(c)
    module = Decoder(c)
    state = jax.eval_shape(
        lambda p: module.apply({"params": p}, 1, method="initial_state"), params
    )
    tokens = jax.ShapeDtypeStruct((1, blocks * c.block_size), jnp.int32)
    read = lambda p, t, s: module.apply({"params": p}, t, s, None, True, method="read")
    return jax.make_jaxpr(read)(params, tokens, state).jaxpr


def longest(jaxpr):
    """The largest product of the lengths of loops within each other."""
    found = 1
    for eqn in jaxpr.eqns:
        repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = map(longest, jax.extend.core.jaxprs_in_params(eqn.params))
        found = max(found, repeats * max(inner, default=1))
    return found


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", MEMORIES)
def test_what_waits_is_what_loops(name):
    c = config(memory=MEMORIES[name], num_layers=LAYERS)
    assert longest(traced(c, BLOCKS)) == memory_costs(c).serial_steps(LAYERS, BLOCKS)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", REMEMBERING)
def test_operations_are_those_of_the_program(name):
    """Of blocks in the middle of a text: its beginning and its end do not count."""
    changes = dict(embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=40, block_size=8)
    memory = MEMORIES[name]
    if isinstance(memory, BlockRecurrent):
        memory = dataclasses.replace(memory, layers=(0, 1))  # the loop over layers is counted as a whole
    c = config(**changes, memory=memory, attention_backend="xla")
    without = dataclasses.replace(c, memory=Memory())
    counted = {
        key: jaxpr_flops(traced(c_, 8)) - jaxpr_flops(traced(c_, 4))
        for key, c_ in (("with", c), ("without", without))
    }
    per_token = (counted["with"] - counted["without"]) / (4 * c.block_size)
    expected = memory_costs(c).flops_per_token
    more = (per_token - expected) * 4 * c.block_size / counted["with"]
    assert 0 <= more <= MORE.get(name, 0), (per_token, expected, more)


PAPER = DecoderConfig(
    vocab_size=8, num_layers=18, embed_dim=1536, num_heads=12, mlp_dim=8 * 1536, block_size=1024,
    memory_segments=3, dtype="bfloat16",
)  # fmt: skip
TABLED = {
    "FAM": Fam(64),
    "FAM, 3 past memories": Fam(64, past=3),
    "Infini": Infini(),
    "Infini, delta rule": Infini(delta=True),
    "Key-Value Means": KeyValueMeans(256),
    "Landmark": Landmark(piece=64, pieces=64),
    "RMT": Rmt(16),
    "AutoCompressor": AutoCompressor(50, most=20),
    "Block-Recurrent": BlockRecurrent(512),
    "Feedback of blocks": Feedback(1024),
}


def rows():
    for name, memory in TABLED.items():
        costs = memory_costs(dataclasses.replace(PAPER, memory=memory))
        waits = {"nothing": "nothing", "memory": "the memory", "tokens": "tokens"}[costs.waits]
        share = 100 * costs.share_of_flops
        yield name, [
            f"{costs.state_bytes / 1e6:.3g} MB", f"{costs.parameters:,}".replace(",", " "),
            f"{share:.0f} %" if share >= 10 else f"{share:.1f} %", waits,
        ]  # fmt: skip


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_is_computed():
    text = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "memories.md").read_text()
    for name, cells in rows():
        assert f"| {name} | {' | '.join(cells)} |" in text, (name, cells)
    window = memory_costs(PAPER).window_bytes
    assert re.search(rf"{window / 1e6:.3g} MB", text), window
