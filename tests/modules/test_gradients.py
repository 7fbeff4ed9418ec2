"""Invariant 4: the gradient reaches what it should, stops where it was asked to, and is right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import assert_close, config, initial, jit, random_params, random_tokens
from memories_table import MEMORIES, REMEMBERING

from famx.memories import Fam
from famx.modules import Decoder, Memory
from famx.modules.memory import is_measured, of_memory

BLOCKS, SIZE = 4, 4
# Tokens 0 .. 11: each block has ids of its own, so a row of the embedding belongs to one block.
OWN_IDS = (np.arange(BLOCKS * SIZE, dtype=np.int32) // SIZE * 3 + np.arange(16) % 3)[None]
BASE = dict(
    dtype="float64", param_dtype="float64", memory_segments=0, tied_embeddings=False,
    block_size=SIZE,
)  # fmt: skip


def loss_of(logits):
    """A smooth scalar in which every logit counts differently."""
    weights = jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)
    return jnp.sum(jax.nn.log_softmax(logits.astype(jnp.float64)) * weights)


@functools.cache
def gradient_of_last_block(c):
    def loss(params):
        logits, _ = Decoder(c).apply({"params": params}, OWN_IDS)
        return loss_of(logits[:, -SIZE:])

    return jit(c, jax.grad(loss))(random_params(c))


def embedding_gradient_by_block(c):
    rows = np.abs(np.asarray(gradient_of_last_block(c)["embedding"])).sum(axis=1)
    return rows[:12].reshape(BLOCKS, 3)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", ["paper", "blockwise, block-outer", "prefix", "remat", *REMEMBERING])
def test_the_last_block_teaches_the_prompt_and_the_first_block(name):
    changes = {
        "paper": dict(attention_backend="xla"),
        "blockwise, block-outer": dict(attention_backend="blockwise", blocks_per_chunk=1),
        "prefix": dict(memory=Fam(2, start_from="prefix"), blocks_per_chunk=2),
        "remat": dict(remat="full", blocks_per_chunk=1),
        **{name: dict(memory=memory, blocks_per_chunk=2) for name, memory in REMEMBERING.items()},
    }
    c = config(**BASE, **changes[name])
    assert embedding_gradient_by_block(c).min() > 1e-9
    leaves = flatten_dict(gradient_of_last_block(c), sep="/").items()
    for path, leaf in leaves:
        reached = np.abs(np.asarray(leaf)).sum(axis=-1)
        if is_measured(path):
            assert not np.any(reached)
        elif of_memory(path):
            assert reached.min() > 1e-9, path


def test_without_memory_it_does_not_reach_beyond_the_window():
    c = config(**{**BASE, "memory_segments": 1, "memory": Memory(), "num_layers": 1})
    reached = embedding_gradient_by_block(c)
    assert reached[:2].max() == 0 and reached[2:].min() > 1e-6


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_stopped_segments_stop_it_but_for_the_memory(backend):
    stopped = {**BASE, "memory_segments": 2, "stop_gradient_segments": True, "num_layers": 1}
    stopped["attention_backend"] = backend
    reached = embedding_gradient_by_block(config(**stopped, memory=Memory()))
    assert reached[:3].max() == 0 and reached[3].min() > 1e-6
    assert embedding_gradient_by_block(config(**stopped)).min() > 1e-9


@pytest.mark.slow
def test_stopped_segments_are_the_same_in_both_backends():
    stopped = config(**{**BASE, "memory_segments": 2}, stop_gradient_segments=True)
    xla, blockwise = (
        gradient_of_last_block(dataclasses.replace(stopped, attention_backend=backend))
        for backend in ("xla", "blockwise")
    )
    assert_close(xla, blockwise, 1e-9)
    flowing = gradient_of_last_block(dataclasses.replace(stopped, stop_gradient_segments=False))
    assert np.abs(xla["embedding"] - flowing["embedding"]).max() > 1e-3


DIFFERENTIATED = {
    "paper": dict(memory_segments=1),
    "everything masked and capped": dict(
        memory_segments=2, window_mask=True, attention_softcap=2.0, num_heads=4, num_kv_heads=2,
        logit_softcap=4.0, qk_norm=True,
    ),
    "bswa": dict(memory_segments=2, memory=Memory(), num_kv_heads=1),
    "normalized": dict(memory=Fam(2, normalize=True, update_scale=0.5, positions="float")),
    **{name: dict(memory=memory, memory_segments=1) for name, memory in MEMORIES.items()},
}  # fmt: skip


@pytest.mark.sampled(20)
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_it_equals_finite_differences_in_both_backends(name):
    c = config(**{**BASE, **DIFFERENTIATED[name]})
    params, tokens = random_params(c), random_tokens(2, 14)
    direction = flatten_dict(random_params(c, seed=1), sep="/")
    of_learned = {path: d * (not is_measured(path)) for path, d in direction.items()}
    direction = unflatten_dict(of_learned, sep="/")

    def value_and_grad(c):
        loss = lambda p: loss_of(Decoder(c).apply({"params": p}, tokens)[0])
        return jit(c, jax.value_and_grad(loss))

    xla, blockwise = (
        value_and_grad(dataclasses.replace(c, attention_backend=backend))
        for backend in ("xla", "blockwise")
    )
    value, grad = xla(params)
    assert_close(blockwise(params), (value, grad), 1e-9 * (1 + abs(float(value))))
    step = 1e-6
    along = lambda s: float(xla(jax.tree.map(lambda p, d: p + s * d, params, direction))[0])
    slope = (along(step) - along(-step)) / (2 * step)
    dots = jax.tree.map(lambda g, d: np.vdot(g, d), grad, direction)
    expected = float(sum(jax.tree.leaves(dots)))
    np.testing.assert_allclose(expected, slope, rtol=1e-6, atol=1e-5)


def test_tiles_of_large_blocks_give_the_same():
    # At this size the blockwise backend cuts a block into two query tiles.
    c = config(
        num_layers=1, embed_dim=32, num_heads=16, num_kv_heads=8, block_size=128, memory=Fam(4),
        memory_segments=1, attention_softcap=3.0, dtype="float64",
    )  # fmt: skip
    params, tokens = random_params(c), random_tokens(1, 256)

    def run(backend):
        chosen = dataclasses.replace(c, attention_backend=backend)
        loss = lambda p: loss_of(Decoder(chosen).apply({"params": p}, tokens)[0])
        return jit(chosen, jax.value_and_grad(loss))(params)

    (value, grad), (other, other_grad) = run("xla"), run("blockwise")
    assert_close(value, other, 1e-9 * abs(float(value)))
    # Parameters are float32 here, and so are their gradients.
    assert_close(grad, other_grad, 1e-5 * max(np.abs(g).max() for g in jax.tree.leaves(grad)))


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    "changes",
    [*(dict(remat=policy) for policy in ("full", "attention", "dots", "dots_no_batch", "offload")),
     dict(unroll_layers=2), dict(unroll_layers=9, remat="full")],
)  # fmt: skip
def test_how_it_is_computed_changes_no_number(changes):
    c = config(**{**BASE, "memory_segments": 1}, blocks_per_chunk=2)
    plain = gradient_of_last_block(c)
    assert_close(gradient_of_last_block(dataclasses.replace(c, **changes)), plain, 1e-10)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("sizes", [(8, 8), (5, 1, 10)])
def test_it_flows_across_chunks(sizes):
    c = config(**{**BASE, "memory_segments": 1})

    def loss(params):
        model = Decoder(c)
        state = model.apply({"params": params}, 1, method="initial_state")
        logits, done = [], 0
        for size in sizes:
            chunk = OWN_IDS[:, done : done + size]
            out, state = model.apply({"params": params}, chunk, state)
            logits.append(out)
            done += size
        return loss_of(jnp.concatenate(logits, axis=1)[:, -SIZE:])

    assert_close(jit(c, jax.grad(loss))(random_params(c)), gradient_of_last_block(c), 1e-10)


def test_a_stopped_state_stops_it():
    c = config(**{**BASE, "memory_segments": 1})

    def loss(params):
        model = Decoder(c)
        _, state = model.apply({"params": params}, OWN_IDS[:, :8])
        state = jax.lax.stop_gradient(state)
        return loss_of(model.apply({"params": params}, OWN_IDS[:, 8:], state)[0])

    grad = jit(c, jax.grad(loss))(random_params(c))
    rows = np.abs(np.asarray(grad["embedding"])).sum(axis=1)[:12].reshape(BLOCKS, 3)
    assert rows[:2].max() == 0 and rows[2:].min() > 1e-6
    assert not np.any(grad["memory"]["prompt"])


def test_an_initial_state_that_is_passed_in_teaches_the_prompt():
    c = config(**BASE)

    def loss(params, state):
        return loss_of(Decoder(c).apply({"params": params}, OWN_IDS[:, :8], state)[0])

    params = random_params(c)
    grad = jit(c, jax.grad(loss, argnums=1, allow_int=True))(params, initial(c, params, 1))
    assert np.abs(np.asarray(grad.memory)).sum(axis=(1, 3)).min() > 1e-6
