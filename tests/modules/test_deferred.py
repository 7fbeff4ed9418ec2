"""The scans over blocks and over the prompt's layers, whose gradients are made after the loop."""

import functools

import flax.linen as nn
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import plain_scans
import pytest
from compiling import known
from helpers import assert_close, config, jit, random_params, random_tokens
from jax.sharding import AbstractMesh

from famx.memories import Fam
from famx.modules import Decoder, decoder, deferred, layer
from famx.modules.components import Norm, Projection
from famx.scale import hlo

WIDE = dict(dtype="float64", param_dtype="float64")


def gradient(c, tokens):
    def loss(params):
        logits, state = Decoder(c).apply({"params": params}, tokens)
        return jnp.sum(jnp.sin(logits)) + jnp.sum(jnp.cos(state.memory))

    return jax.grad(loss)


@pytest.mark.sampled(4)
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
    monkeypatch.setattr(Decoder, "_start", plain_scans.start)
    assert_close(got, jit(c, gradient(c, tokens))(params), 1e-10)
    monkeypatch.setattr(layer.deferred, "scan", plain_scans.scan)
    assert_close(got, jit(c, gradient(c, tokens))(params), 1e-10)


@pytest.mark.parametrize("devices, at_once", [(1, True), (2, False)])
def test_on_a_mesh_the_gradient_of_the_prompt_is_made_layer_by_layer(devices, at_once, monkeypatch):
    """Otherwise the weights of all layers would be gathered at the same time."""
    c, tokens, calls = config(), random_tokens(2, 8), []
    scan_layers = decoder.scan_layers
    monkeypatch.setattr(decoder, "scan_layers", lambda *args: calls.append(1) or scan_layers(*args))
    with jax.sharding.use_abstract_mesh(AbstractMesh((devices,), ("fsdp",))):
        jax.eval_shape(lambda params: Decoder(c).apply({"params": params}, tokens), random_params(c))
    assert bool(calls) == at_once


class Steps(nn.Module):
    """Projections of one array and of another, a carry that counts, and what every step has alike."""

    def setup(self):
        c = config(**WIDE)
        project = lambda size: Projection(c, (size,), ("embed",), ("mlp",), use_bias=True)
        self.left, self.right, self.back = project(3), project(5), project(4)
        self.norm = Norm(c)

    def __call__(self, carry, x, factor):
        y, count = carry
        position, offset = x
        z = self.norm(y) + jnp.sin(position * factor["scale"])
        left, right = self.left.jointly(z, self.right)
        z = jnp.concatenate([left * factor["count"], right], axis=-1)
        y = y + jnp.where(count % 3 == 0, 0, self.back(z)) + offset
        return (y, count + factor["count"]), (z, count)


def steps_and_their_gradient(scan):
    module, rng = Steps(), np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    carry, xs = (draw(2, 4), jnp.int32(1)), (draw(6), draw(6, 2, 4))
    scale = jnp.float64(0.3)
    init = lambda key: module.init(key, carry, (xs[0][0], xs[1][0]), {"scale": scale, "count": 2})
    params = nn.unbox(init(jax.random.key(0)))

    def loss(params, y, xs, scale):
        bound = module.bind(params)
        factor = {"scale": scale, "count": jnp.int32(2)}
        (y, count), (zs, counts) = scan(bound, "__call__", (y, carry[1]), xs, factor)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(zs)), (count, counts)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(params, carry[0], xs, scale)


@pytest.mark.parametrize("rematerialized", [False, True])
def test_integers_in_the_carry_and_all_kinds_of_arguments(rematerialized):
    scan = functools.partial(deferred.scan, rematerialized=rematerialized)
    with jax.enable_x64(True):
        assert_close(steps_and_their_gradient(scan), steps_and_their_gradient(plain_scans.scan), 1e-10)


def loops_over(steps, c, tokens):
    """Kernels and stacked results of each loop of this many steps in a compiled gradient."""
    lowered = jax.jit(gradient(c, tokens)).lower(random_params(c))
    options = known(xla_backend_optimization_level=0, xla_cpu_use_fusion_emitters=True)
    module = hlo.parse(lowered.compile(options).as_text())
    found = []
    for computation in module.computations.values():
        for x in computation.instructions.values():
            if x.opcode == "while" and module.trip_count(x, computation) == steps:
                found.append(module.computations[x.called("body")])
    return found


def test_the_memory_is_never_scanned_again():
    """Rematerialised layers keep the memory before each block: one loop forward, one backward."""
    c = config(num_layers=3, remat="full")
    assert len(loops_over(7, c, random_tokens(2, 7 * c.block_size))) == 2


def test_the_forward_loop_keeps_the_memory_alone():
    """Not the intermediate results of its steps; and it computes no rotation, which needs no memory."""
    c = config(num_layers=3, mlp_dim=20, remat="full")
    jaxpr = jax.make_jaxpr(gradient(c, random_tokens(2, 7 * c.block_size)))(random_params(c)).jaxpr
    forward, backward = loops_of(7, jaxpr)
    kept = forward.outvars[forward.params["num_carry"] :]
    assert [v.aval.shape for v in kept] == [(7, 2, c.memory.length, c.embed_dim)]
    for eqn in (forward, backward):
        names = {inner.primitive.name for inner in equations(eqn.params["jaxpr"].jaxpr)}
        assert not names & {"cos", "sin"}, names


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def loops_of(steps, jaxpr):
    """The scans of this many steps that compute something, forward ones first."""
    found = [
        eqn for eqn in equations(jaxpr)
        if eqn.primitive.name == "scan" and eqn.params["length"] == steps and eqn.params["jaxpr"].eqns
    ]  # fmt: skip
    return sorted(found, key=lambda eqn: eqn.params["reverse"])


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("gated_mlp, count", [(True, 4), (False, 4)])
def test_projections_of_one_array_are_one_product(gated_mlp, count, remat):
    """Queries, keys and values; gate and up; each with one product backward. Two more are attention."""
    c = config(gated_mlp=gated_mlp, mlp_dim=20, remat=remat)
    jaxpr = jax.make_jaxpr(gradient(c, random_tokens(2, 7 * c.block_size)))(random_params(c)).jaxpr
    forward, backward = loops_of(7, jaxpr)
    dots = lambda eqn: sum(1 for _ in products(eqn.params["jaxpr"].jaxpr))
    # Attention has two parts, the memory's own columns and the block's, with two products each.
    assert dots(forward) == count + 4 and dots(backward) == count + 8


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
    monkeypatch.setattr(deferred, "scan", plain_scans.scan)
    assert loops_around_weight_gradients() == {1, 2}
