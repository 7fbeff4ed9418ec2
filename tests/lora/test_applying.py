"""`intercept` in every way of reading and generating; gradients; dropout."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import COMPILE_FAST
from modules.helpers import (
    assert_close,
    config,
    difference,
    precision,
    random_params,
    random_tokens,
)
from trees import DOUBLE, LORA, adapted, adapters_of, logits, loss_of

from famx.decoding import Sampling, Streamer
from famx.lora import Lora, combine, intercept, merged, split
from famx.modules import Decoder, Memory
from famx.modules.components import Projection

DROPPING = Lora(rank=3, dropout=0.5, targets=("layers/query", "layers/mlp/down"))


def test_streaming_and_writing_use_the_adapters():
    c, _, tree = adapted(num_heads=4, num_kv_heads=2, head_dim=4, **DOUBLE)
    tokens, lengths = random_tokens(2, 11), np.array([11, 6])

    def run(params):
        streamer = Streamer(Decoder(c))
        state = streamer.initial_state(params, 2)
        last, state = streamer.read(params, state, tokens, lengths)
        return last, jax.device_get(streamer.generate(params, last, state, Sampling(7)))

    with precision(c):
        wanted, written = run(merged(tree, LORA))
        with intercept(LORA):
            last, out = run(tree)
    assert_close(last, wanted, 1e-9)
    np.testing.assert_array_equal(out.tokens, written.tokens)
    np.testing.assert_allclose(out.log_likelihood, written.log_likelihood, 1e-5)


def test_chunks_change_no_number():
    c, _, tree = adapted(**DOUBLE)
    tokens = random_tokens(2, 14)
    one = config(blocks_per_chunk=1, **DOUBLE)
    assert difference(logits(c, tree, tokens), logits(one, tree, tokens)) < 1e-9


@pytest.mark.slow
def test_remat_changes_no_gradient_and_drops_the_same_numbers():
    params, tree = adapted(DROPPING)[1:]
    grads = []
    for remat in ("none", "full"):
        loss = loss_of(config(remat=remat), DROPPING)
        grad = jax.jit(jax.grad(loss), compiler_options=COMPILE_FAST)
        grads.append(grad(split(tree)[1], params, random_tokens(2, 8), jax.random.key(0)))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads[0]))
    assert_close(*grads, 1e-4 * largest)
    assert all(np.any(g) for g in jax.tree.leaves(grads[0]))


# Dropout.


def test_nothing_is_dropped_without_a_key():
    c, _, tree = adapted(DROPPING)
    tokens = random_tokens(2, 9)
    still, dropped = (logits(c, tree, tokens, DROPPING, rng) for rng in (None, jax.random.key(0)))
    plain = dataclasses.replace(DROPPING, dropout=0.0)
    for rng in (None, jax.random.key(0)):
        assert still.tobytes() == logits(c, tree, tokens, plain, rng).tobytes()
    assert difference(still, dropped) > 0.1


class Pair(nn.Module):
    """Two projections `[..., 16] -> [..., 1]`, of the same input."""

    @nn.compact
    def __call__(self, x):
        make = lambda name: Projection(config(), (1,), ("embed",), ("mlp",), name=name)(x)
        return make("one"), make("two")


def kept(rng, first=1.0, rows=512):
    """Number of inputs of each row that `(one, two)` do not drop; `first` is the first element of `A`."""
    a, b = np.ones((16, 1), np.float32), np.ones((1, 1), np.float32)
    a[0, 0] = first
    leaves = {"kernel": np.zeros((16, 1), np.float32), "lora_a": a, "lora_b": b}
    with intercept(Lora(rank=1, dropout=0.25), rng):
        out = Pair().apply({"params": {"one": leaves, "two": leaves}}, np.ones((rows, 16), np.float32))
    return [np.asarray(x[:, 0]) * 0.75 for x in out]


def test_dropout_keeps_the_mean():
    one, _ = kept(jax.random.key(0), rows=4096)
    assert np.mean(one) == pytest.approx(0.75 * 16, rel=0.01)
    assert np.var(one) == pytest.approx(16 * 0.25 * 0.75, rel=0.1)


def test_the_same_key_drops_the_same_numbers_and_another_others():
    first, again, other = (kept(jax.random.key(i))[0] for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.2


def test_projections_and_layers_drop_different_numbers():
    one, two = (np.round(x) for x in kept(jax.random.key(0)))
    other_layer, _ = (np.round(x) for x in kept(jax.random.key(0), first=1.0001))
    for other in (two, other_layer):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


# What training costs.


@functools.cache
def compiled():
    """The gradients with respect to the adapters and to everything, compiled."""
    c = config(embed_dim=48, mlp_dim=208, num_layers=2, num_heads=4, vocab_size=300)
    params = random_params(c)
    adapters, tokens = adapters_of(params), random_tokens(1, 8)
    loss = loss_of(c)
    lower = lambda arguments: jax.jit(jax.grad(loss, arguments)).lower(adapters, params, tokens)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (adapters, params)]
    return [lower(arguments).compile(COMPILE_FAST) for arguments in (0, (0, 1))], sizes


def kernel_gradients(program):
    """Shapes of matrix products that are as large as a feed-forward kernel, in one program."""
    dots = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", program.as_text())
    return [shape for shape in dots if np.prod([int(n) for n in shape.split(",")]) == 48 * 208]


@pytest.mark.slow
def test_gradients_of_adapters_need_none_of_the_kernels():
    (own, everything), (small, large) = compiled()
    assert own.memory_analysis().output_size_in_bytes < 1.1 * small + 1024
    needed = lambda p: sum(
        getattr(p.memory_analysis(), f"{kind}_size_in_bytes") for kind in ("temp", "output")
    )
    assert needed(everything) - needed(own) > 0.9 * large
    assert kernel_gradients(everything) and not kernel_gradients(own)


def test_adapters_find_a_planted_change_of_their_rank():
    lora = Lora(rank=2, targets=("layers/mlp/down", "layers/value"))
    c = config(num_layers=1, memory=Memory())
    params = random_params(c)
    planted = adapters_of(params, lora, seed=1)
    tokens = random_tokens(8, 16)
    apply = lambda adapters: (
        Decoder(c).apply({"params": combine(params, adapters)}, tokens, method="read")[0]
    )
    with intercept(lora):
        wanted = jax.jit(apply)(planted)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 1500))

    def step(carry, _):
        adapters, state = carry
        with intercept(lora):
            loss, grads = jax.value_and_grad(lambda a: jnp.mean((apply(a) - wanted) ** 2))(adapters)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(adapters, updates), state), loss

    start = lora.init(jax.random.key(0), params)
    run = jax.jit(lambda a: jax.lax.scan(step, (a, optimizer.init(a)), length=1500))
    (found, _), losses = run(start)
    assert losses[-1] < 1e-4 * losses[0]
    for name in ("value", "mlp/down"):
        one, other, base = (
            functools.reduce(dict.get, name.split("/"), merged(tree, lora)["layers"])["kernel"]
            for tree in (combine(params, found), combine(params, planted), params)
        )
        assert difference(one, other) < 0.1 * difference(other, base), name
