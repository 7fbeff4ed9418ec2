"""The gated update: what the gate is, what it keeps, and that a closed gate can learn to open."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import config, random_params, random_tokens

from famx.memories import Fam, fam
from famx.modules import Decoder

GATED = config(memory=Fam(2, update="gated", normalize=True))


def gate_of(mass):
    """The gate where each memory query puts `mass` of its attention on the block."""
    n, size = GATED.memory_columns, GATED.block_size
    row = jnp.concatenate([jnp.full(n, (1 - mass) / n), jnp.full(size, mass / size)])
    probabilities = jnp.broadcast_to(row, (1, GATED.num_kv_heads, 1, n, n + size))
    return fam.write_gate(probabilities, n)


@pytest.mark.parametrize("mass, gate", [(0.0, 0.0), (0.3, 0.0), (0.5, 0.0), (0.75, 0.5), (1.0, 1.0)])
def test_gate_is_open_as_far_as_most_attention_goes_to_the_block(mass, gate):
    np.testing.assert_allclose(gate_of(mass), np.full((1, GATED.memory_columns, 1), gate), atol=1e-6)


@pytest.mark.parametrize("mass", [0.2, 0.8])
def test_gradient_passes_a_closed_gate_as_an_open_one(mass):
    slope = jax.grad(lambda m: gate_of(m).sum())(mass)
    np.testing.assert_allclose(slope, 2 * GATED.memory_columns, rtol=1e-5)


def read(monkeypatch, gate):
    """The states after one block and after six, read block by block, with every gate held at `gate`."""
    make = lambda p, length: jnp.full((p.shape[0], GATED.memory_columns, 1), gate)
    monkeypatch.setattr(fam, "write_gate", make)
    params, size = random_params(GATED), GATED.block_size
    apply = jax.jit(lambda tokens, state: Decoder(GATED).apply({"params": params}, tokens, state)[1])
    state = Decoder(GATED).apply({"params": params}, 2, method="initial_state")
    states = []
    for block in np.split(np.asarray(random_tokens(2, 6 * size)), 6, axis=1):
        state = apply(block, state)
        states.append(state)
    return states[0], states[-1]


def test_a_closed_gate_keeps_the_memory_bit_for_bit(monkeypatch):
    first, last = read(monkeypatch, 0.0)
    assert np.asarray(first.memory).tobytes() == np.asarray(last.memory).tobytes()
    assert last.updates.tolist() == [6, 6]


def test_an_open_gate_writes(monkeypatch):
    first, last = read(monkeypatch, 1.0)
    assert np.abs(np.asarray(first.memory) - np.asarray(last.memory)).max() > 0.1
