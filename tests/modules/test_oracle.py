"""Invariant 1: the decoder computes what Algorithms 1 and 2 say, for every option."""

import dataclasses
import itertools
import operator

import jax
import numpy as np
import pytest
from helpers import assert_close, config, initial, precision, random_params, random_tokens, read
from hypothesis import given, settings
from hypothesis import strategies as st
from memories_table import MEMORIES, oracle_of
from oracle import Oracle

from famx.memories import Infini
from famx.memories.fam import POSITIONS, Fam
from famx.modules import Memory, RopeScaling

# The oracle's frequencies are not rounded to 2^-33 turns per token; all else agrees to 1e-12.
FLOAT64 = 1e-6
FLOAT32 = 2e-4

LLAMA3 = RopeScaling(8.0, 1.0, 4.0, original_length=40)
WINDOWS = {
    "no segments, norms": dict(memory_segments=0, qk_norm=True, post_norms=True),
    "two segments, grouped heads": dict(memory_segments=2, num_heads=4, num_kv_heads=2, head_dim=4),
    "window mask": dict(window_mask=True, rope_layers=("local", "global")),
}
CASES = {
    "paper": dict(),
    "bswa": dict(memory=Memory(), memory_segments=2),
    "no segments": dict(memory_segments=0, memory=Fam(4)),
    "three segments": dict(memory_segments=3, block_size=3, memory=Fam(1)),
    "transformer-xl": dict(memory=Memory(), memory_segments=1, window_mask=True),
    "window mask with memory": dict(memory_segments=2, window_mask=True),
    "window mask, no segments": dict(memory_segments=0, window_mask=True),
    "float positions": dict(memory=Fam(3, positions="float")),
    "zero positions": dict(memory=Fam(2, positions="zero")),
    "prefix": dict(memory=Fam(2, start_from="prefix"), memory_segments=0),
    "prefix, float, normalized": dict(
        memory=Fam(2, start_from="prefix", positions="float", normalize=True)
    ),
    "normalized, scaled": dict(memory=Fam(2, normalize=True, update_scale=0.3)),
    "scaled": dict(memory=Fam(2, update_scale=0.5), memory_segments=0),
    "gated": dict(memory=Fam(4, update="gated")),
    "gated, normalized, scaled": dict(
        memory=Fam(2, update="gated", normalize=True, update_scale=0.4), num_kv_heads=1
    ),
    "ordinary first residual": dict(memory=Fam(2, first_residual="ordinary"), memory_segments=0),
    "ordinary first residual, gated": dict(
        memory=Fam(4, first_residual="ordinary", update="gated", update_scale=0.5)
    ),
    "measured": dict(memory=Fam(2, normalize="measured", update_scale=0.5)),
    "bias, grouped heads": dict(
        memory=Fam(3, bias="zero"), num_heads=4, num_kv_heads=2, head_dim=4, memory_segments=2
    ),
    "bias and softcap, no segments": dict(
        memory=Fam(2, bias="minus_log_length", update="gated"), attention_softcap=2.0,
        query_scale=0.3, memory_segments=0,
    ),
    "adapters of the memory": dict(
        memory=Fam(2, adapter_rank=3), qkv_bias=True, mlp_bias=True, output_bias=True, num_kv_heads=1
    ),
    "adapters of the memory, plain and parallel": dict(
        memory=Fam(2, adapter_rank=1, start_from="prefix", bias="zero"), gated_mlp=False,
        parallel_block=True, activation="relu",
    ),
    "all options": dict(memory=dataclasses.replace(MEMORIES["fam with options"], update="gated")),
    "like llama": dict(
        num_heads=4, num_kv_heads=2, head_dim=4, rope_base=500.0, rope_scaling=LLAMA3,
        tied_embeddings=False, qkv_bias=True, query_scale=0.3,
    ),
    "like gemma": dict(
        post_norms=True, qk_norm=True, attention_softcap=2.0, logit_softcap=3.0, num_kv_heads=1,
        scale_embeddings=True, activation="gelu_tanh", head_dim=6,
    ),
    "like palm": dict(
        num_heads=4, num_kv_heads=1, head_dim=2, parallel_block=True, memory_segments=2,
        memory=Fam(2, start_from="prefix"),
    ),
    "parallel, post norms": dict(parallel_block=True, post_norms=True, norm="layer"),
    "like neox": dict(
        norm="layer", parallel_block=True, gated_mlp=False, activation="gelu", qkv_bias=True,
        output_bias=True, mlp_bias=True, rope_scaling=RopeScaling(4.0), tied_embeddings=False,
    ),
    "like gemma 3": dict(
        rope_layers=("local", "global"), rope_base=300.0, local_rope_base=20.0,
        rope_scaling=RopeScaling(2.0), qk_norm=True, memory=Fam(3, positions="float"),
    ),
    "like smollm 3": dict(rope_layers=("global", "none"), num_kv_heads=1),
    "plain relu": dict(
        gated_mlp=False, activation="relu", mlp_bias=True, norm="layer", qk_norm=True
    ),
    "gated squared relu": dict(activation="squared_relu", norm_epsilon=0.1, output_bias=True),
    **{
        f"{name}, {window}": dict(memory=memory, **changes)
        for name, memory in MEMORIES.items()
        if oracle_of(memory)
        for window, changes in WINDOWS.items()
    },
}  # fmt: skip
COMPUTATIONS = list(itertools.product(("xla", "blockwise"), (None, 1, 2)))


def check(c, length, tolerance, batch=2, seed=0, offset=0):
    """The decoder against the oracle on `batch` sequences: logits, memory, counters."""
    params, tokens = random_params(c, seed), random_tokens(batch, length, seed)
    state = None
    if offset:
        state = initial(c, params, batch)
        state = state.replace(offset=np.full((batch,), offset, np.int32))
    logits, state = read(c, params, tokens, state)
    assert logits.dtype == np.dtype(c.dtype)
    for example in range(batch):
        expected, memories, updates = oracle_of(c.memory)(c, params).read(tokens[example], offset)
        assert_close(logits[example], expected, tolerance)
        if c.memory.exists:
            of_example = operator.itemgetter(np.s_[:, example])
            memory = jax.tree.map(of_example, jax.device_get(state.memory))
            assert_close(memory, memories, tolerance)
        assert state.updates[example] == updates
        assert state.position[example] == length


def computed(c, number):
    """`c` computed in one of the six ways."""
    backend, blocks = COMPUTATIONS[number % len(COMPUTATIONS)]
    return dataclasses.replace(c, attention_backend=backend, blocks_per_chunk=blocks)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case):
    c = computed(config(dtype="float64", **CASES[case]), list(CASES).index(case))
    check(c, 4 * c.block_size + 1, FLOAT64)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("number", range(len(COMPUTATIONS)))
def test_equals_the_oracle_however_computed(number):
    c = config(dtype="float64", memory_segments=2, num_heads=4, num_kv_heads=2)
    check(computed(c, number), 18, FLOAT64)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "case", ["paper", "gated", "like gemma", "like neox", "infini, two segments, grouped heads"]
)
def test_equals_the_oracle_in_float32(case):
    check(config(**CASES[case]), 17, FLOAT32)


@pytest.mark.parametrize("memory", [Fam(2), Fam(2, positions="zero"), Infini()], ids=str)
def test_equals_the_oracle_with_a_position_offset(memory):
    c = config(dtype="float64", memory=memory)
    check(c, 14, FLOAT64, offset=29)


@st.composite
def memories(draw, block):
    if draw(st.booleans()):
        return Infini(delta=draw(st.booleans()))
    length = draw(st.integers(0, block))
    return Fam(length, positions=draw(st.sampled_from(POSITIONS))) if length else Memory()


@st.composite
def sizes(draw):
    block = draw(st.integers(2, 8))
    kv_heads, group, half = (draw(st.integers(1, 2)) for _ in range(3))
    length = draw(st.integers(1, 5 * block))
    return length, config(
        dtype="float64",
        num_layers=draw(st.integers(1, 3)),
        embed_dim=draw(st.sampled_from([8, 10, 16])),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=2 * half,
        block_size=block,
        memory_segments=draw(st.integers(0, 3)),
        memory=draw(memories(block)),
        window_mask=draw(st.booleans()),
        attention_backend=draw(st.sampled_from(["xla", "blockwise"])),
        blocks_per_chunk=draw(st.sampled_from([None, 1, 2, 3])),
    )


@pytest.mark.slow
@settings(max_examples=6)
@given(sizes(), st.integers(0, 2**32 - 1))
def test_equals_the_oracle_at_any_size(drawn, seed):
    length, c = drawn
    check(c, length, FLOAT64, batch=1, seed=seed)


def test_initial_state_is_the_prompt_run_up_the_layers():
    c = config(dtype="float64", num_layers=3, memory=Fam(3))
    params = random_params(c)
    state = initial(c, params, 2)
    expected = np.array(Oracle(c, params).first_memories(0))
    with precision(c):
        assert_close(state.memory, np.stack([expected, expected], axis=1), FLOAT64)
    assert not np.any(state.updates) and not np.any(state.position) and not np.any(state.keys)


def test_first_update_has_no_residual_and_later_ones_have():
    c = config(dtype="float64", memory_segments=0)
    params, tokens = random_params(c), random_tokens(1, c.block_size)
    start = initial(c, params, 1)
    oracle = Oracle(c, params)
    # In the first layer the memory is the prompt itself: the residual is exactly that.
    f_0 = [np.array(f) for f in params["memory"]["prompt"].astype(np.float64)]
    inputs = [oracle.embed(token) for token in tokens[0]]
    first = np.array(oracle.block(oracle.layers[0], inputs, 0, [], [], f_0, 0)[1])
    _, after_first = read(c, params, tokens, start)
    assert_close(after_first.memory[0, 0], first, FLOAT64)
    _, after_later = read(c, params, tokens, start.replace(updates=np.ones((1,), np.int32)))
    assert np.abs(np.asarray(after_later.memory[0, 0]) - first).max() > 0.1
    assert after_later.updates[0] == 2
