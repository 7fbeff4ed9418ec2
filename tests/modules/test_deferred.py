"""The scan over blocks adds up no gradient of a weight: that is made once, after the loop."""

import flax.linen as nn
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import pytest
from helpers import assert_close, config, jit, random_params, random_tokens

from famx.memories import Fam
from famx.modules import Decoder, deferred, layer

WIDE = dict(dtype="float64", param_dtype="float64")


def plain(module, method, carry, xs, *args):
    """What `deferred.scan` equals: the lifted scan of Flax, differentiated as it stands."""
    step = lambda module, carry, x: getattr(module, method)(carry, x, *args)
    scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
    return scan(module, carry, xs)


def gradient(c, tokens):
    def loss(params):
        logits, state = Decoder(c).apply({"params": params}, tokens)
        return jnp.sum(jnp.sin(logits)) + jnp.sum(jnp.cos(state.memory))

    return jax.grad(loss)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(remat="full", num_heads=4, num_kv_heads=2, memory=Fam(2, update="gated")),
        dict(remat="dots", qkv_bias=True, output_bias=True, mlp_bias=True, norm="layer"),
        dict(parallel_block=True, gated_mlp=False, blocks_per_chunk=2, post_norms=True, qk_norm=True),
    ],
)
def test_the_gradient_is_that_of_a_plain_scan(changes, monkeypatch):
    c = config(**WIDE, **changes)
    params, tokens = random_params(c), random_tokens(2, 16)
    got = jit(c, gradient(c, tokens))(params)
    monkeypatch.setattr(layer.deferred, "scan", plain)
    assert_close(got, jit(c, gradient(c, tokens))(params), 1e-10)


def products(jaxpr, depth=0):
    """Every matrix product in a jaxpr: how many loops are around it, and its shape."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield depth, eqn.outvars[0].aval.shape
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from products(inner, depth + (eqn.primitive.name == "scan"))


def test_no_weight_gradient_is_made_in_the_loop(monkeypatch):
    c, tokens = config(mlp_dim=20, num_layers=3), random_tokens(2, 16)

    def loops_around_weight_gradients():
        jaxpr = jax.make_jaxpr(gradient(c, tokens))(random_params(c)).jaxpr
        return {depth for depth, shape in products(jaxpr) if sorted(shape) == [8, 20]}

    assert loops_around_weight_gradients() == {1}  # of layers, not of the blocks within
    monkeypatch.setattr(deferred, "scan", plain)
    assert loops_around_weight_gradients() == {1, 2}
