"""Size of a compiled training step: its matrix products, loop by loop, and its number of operations.

Counted in XLA's optimised program for the CPU, which contains the body of each loop once. Operations
within fusions count, so that it does not matter what XLA fuses.
"""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from compiling import known

from famx.memories import Fam
from famx.models import DecoderModel
from famx.modules import Decoder, DecoderConfig, Memory
from famx.scale import hlo

MEMORIES = {"FAM": Fam(length=2), "BSWA": Memory()}

# Query, key, value, output, and the three of a gated feed-forward; scores and their mean of values.
PROJECTIONS, ATTENTION = 7, 2
FORWARD = PROJECTIONS + ATTENTION
BACKWARD = 2 * FORWARD  # each product has a gradient for both of its factors
# In the scan over blocks projections of one array are one product: query, key and value; gate and up. For
# tokens only the first three are: gate and up are too wide. The prompt has too few rows for either.
MERGED, TOKENS = 4, 5
# The memory attends to two parts, itself and the block. A product computes its input's gradient alone.
# That of its weights is made after the scan for all blocks at once, in the body of the loop over layers.
SCAN_FORWARD, SCAN_BACKWARD = MERGED + 2 * ATTENTION, MERGED + 4 * ATTENTION
TOKENS_FORWARD, TOKENS_BACKWARD = TOKENS + ATTENTION, 2 * (TOKENS + ATTENTION)
HEAD = 3

# Number of operations of the sizes below, each loop's body counted once.
OPERATIONS = {"FAM": 2967, "BSWA": 1023}
LEEWAY = 1.03
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}  # these compute nothing


@functools.cache
def model(name: str, layers: int) -> DecoderModel:
    # No size is 1: XLA would compute such a product without a `dot`.
    sizes = dict(vocab_size=24, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, block_size=8)
    config = DecoderConfig(
        num_layers=layers, **sizes, memory_segments=1, memory=MEMORIES[name], attention_backend="xla"
    )
    return DecoderModel(Decoder(config))


@functools.cache
def loops(name: str, layers: int = 2, blocks: int = 4) -> list[tuple[int, collections.Counter]]:
    """Nesting depth of each loop, and operations of its body by opcode, inner loops excluded."""
    m = model(name, layers)
    rows = jax.ShapeDtypeStruct((2, blocks * m.config.block_size), jnp.int32)
    batch = {"decoder_input_tokens": rows, "decoder_target_tokens": rows}

    def step(params, batch):
        loss, grads = jax.value_and_grad(lambda params: m.loss(params, batch)[0])(params)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    # The optimization is that of the machine code; XLA's program is the same.
    options = known(xla_backend_optimization_level=0, xla_cpu_use_fusion_emitters=True)
    lowered = jax.jit(step, donate_argnums=0).lower(nn.unbox(m.abstract_params()), batch)
    module = hlo.parse(lowered.compile(options).as_text())
    bodies = [(0, collections.Counter())]

    def count(computation: str, depth: int, counts: collections.Counter):
        for x in module.computations[computation].instructions.values():
            counts[x.opcode] += x.opcode not in FREE
            if x.opcode == "while":
                bodies.append((depth + 1, collections.Counter()))
                count(x.called("body"), *bodies[-1])
            elif x.opcode in ("fusion", "call"):
                count(x.called("calls") or x.called("to_apply"), depth, counts)

    count(module.entry, *bodies[0])
    return bodies


def products(name: str, **sizes) -> list[tuple[int, int]]:
    """Depth and number of matrix products of each loop that has some, sorted."""
    return sorted((depth, counts["dot"]) for depth, counts in loops(name, **sizes) if counts["dot"])


def operations(name: str, **sizes) -> int:
    return sum(sum(counts.values()) for _, counts in loops(name, **sizes))


@pytest.mark.slow
def test_products_of_block_sliding_window_attention():
    assert products("BSWA") == [(0, HEAD), (1, TOKENS_FORWARD), (1, TOKENS_BACKWARD)]


@pytest.mark.slow
def test_products_of_the_memory():
    # The gradients of the prompt's climb are computed for all layers at once.
    prompt = [(1, FORWARD), (1, PROJECTIONS + 2 * ATTENTION)]
    outside = [(0, HEAD + FORWARD - 1 + BACKWARD)]
    tokens = [(1, TOKENS_FORWARD), (1, TOKENS_BACKWARD + MERGED)]
    memory = [(2, SCAN_FORWARD), (2, SCAN_BACKWARD)]
    assert products("FAM") == sorted([*outside, *prompt, *tokens, *memory])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(layers=3, blocks=6)])
def test_loops_do_not_grow_with_layers_and_blocks(sizes):
    small, large = loops("FAM"), loops("FAM", **sizes)
    assert products("FAM", **sizes) == products("FAM")
    bodies = lambda loops: sorted((depth, sum(counts.values())) for depth, counts in loops if depth)
    assert bodies(large) == bodies(small)
    # Outside of loops XLA computes a mean over more tokens in more steps.
    assert operations("FAM", **sizes) <= 1.01 * operations("FAM")


@pytest.mark.slow
def test_the_memory_costs_what_a_layer_does():
    """A step of the scan is a layer's pass over `N` tokens instead of `S`, and so is the prompt."""
    (_, forward), (_, backward) = sorted(
        (x for x in loops("BSWA") if x[0] and x[1]["dot"]), key=lambda x: x[1]["dot"]
    )
    layer = sum(forward.values()) + sum(backward.values())
    inner = sorted((sum(counts.values()) for depth, counts in loops("FAM") if depth == 2))
    assert len(inner) == 2 and sum(inner) <= 1.1 * layer
    # Less than a layer for the scan; two for the prompt, computed twice; and what the scan keeps.
    assert operations("FAM") - operations("BSWA") <= 3.3 * layer


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_training_step_has_no_more_operations_than_it_had(name):
    assert operations(name) <= LEEWAY * OPERATIONS[name]
