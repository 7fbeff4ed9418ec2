"""Projections of one array are one product where that pays, with the results of each alone."""

import contextlib

import flax.linen as nn
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, config
from jax.sharding import AbstractMesh

from famx.lora import intercept
from famx.modules import components
from famx.modules.components import Projection

WIDTH, FEATURES = 4, ((3,), (2, 2), (1,))  # joint: 8 columns


class Three(nn.Module):
    """Projections of one array, two of them with biases."""

    dtype: str = "float32"

    def setup(self):
        c = config(dtype=self.dtype, param_dtype=self.dtype)
        axes = ("heads", "kv")
        self.all = [
            Projection(c, features, ("embed",), axes[: len(features)], use_bias=len(features) == 1)
            for features in FEATURES
        ]

    def __call__(self, x):
        first, *others = self.all
        return first.jointly(x, *others)


def make(rows, dtype="float32"):
    module, rng = Three(dtype), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, WIDTH)), dtype)
    params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype)
    return module, jax.tree.map(draw, params), x


def products(module, params, x) -> int:
    jaxpr = jax.make_jaxpr(lambda: module.apply({"params": params}, x))().jaxpr
    return count(jaxpr)


def count(jaxpr) -> int:
    inner = (jaxpr for eqn in jaxpr.eqns for jaxpr in jex.jaxprs_in_params(eqn.params))
    return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) + sum(map(count, inner))


def test_results_and_gradients_are_those_of_each_alone(monkeypatch):
    with jax.enable_x64(True):
        module, params, x = make(9, "float64")

        def loss(params, x):
            parts = module.apply({"params": params}, x)
            assert [part.shape for part in parts] == [(9, *features) for features in FEATURES]
            return sum(jnp.sum(jnp.sin((i + 1) * part)) for i, part in enumerate(parts))

        results = jax.value_and_grad(loss, (0, 1))(params, x)
        assert products(module, params, x) == 1
        monkeypatch.setattr(components, "can_join", lambda members: False)
        assert products(module, params, x) == 3
        assert_close(results, jax.value_and_grad(loss, (0, 1))(params, x), 1e-12)


@pytest.mark.parametrize(
    "rows, context, number",
    [
        (8, contextlib.nullcontext, 1),
        (7, contextlib.nullcontext, 3),  # making the joint kernel costs more than it saves
        (8, lambda: jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",))), 1),
        (8, lambda: jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",))), 3),
    ],
)
def test_many_rows_on_one_device_have_one_product(rows, context, number):
    with context():
        assert products(*make(rows)) == number


@pytest.mark.parametrize("rows", [8, 2])
def test_a_projection_with_an_adapter_is_computed_alone(rows):
    module, params, x = make(rows)
    plain = module.apply({"params": params}, x)
    params["all_1"] |= {"lora_a": jnp.ones((WIDTH, 2)), "lora_b": jnp.ones((2, 2, 2))}
    with intercept():
        adapted = module.apply({"params": params}, x)
        assert products(module, params, x) == 5
    more = 2 * jnp.sum(x, axis=1)[:, None, None]
    assert_close(adapted, [plain[0], plain[1] + more, plain[2]], 1e-5)
