"""Products of activations and weights are those of numpy, in the form that is fast on the device."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from famx.modules.products import matrix_product, product

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
sizes = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple)


def draw(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def wide(x):
    return np.asarray(x, np.float64)


def close(array, expected, dtype):
    assert array.dtype == dtype
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(wide(array), expected, atol=TOLERANCE[dtype] * scale)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=2).map(tuple), sizes, sizes, st.sampled_from([*TOLERANCE]))
def test_results_and_gradients_are_those_of_numpy(rows, inner, outer, dtype):
    rng, axes = np.random.default_rng(0), len(inner)
    x, kernel = draw(rng, rows + inner, dtype), draw(rng, inner + outer, dtype)
    y, pull = jax.vjp(lambda x, kernel: product(x, kernel, axes), x, kernel)
    close(y, np.tensordot(wide(x), wide(kernel), axes), dtype)
    gradient = draw(rng, y.shape, dtype)
    of_x, of_kernel = pull(gradient)
    back, n = len(outer), len(rows)
    of_outer = (range(n, n + back), range(axes, axes + back))
    close(of_x, np.tensordot(wide(gradient), wide(kernel), of_outer), dtype)
    close(of_kernel, np.tensordot(wide(x), wide(gradient), (range(n), range(n))), dtype)


def products(jaxpr) -> set[tuple[str, ...]]:
    """Dtypes of operands and result of each product, also of inner functions."""
    inner = (jaxpr for eqn in jaxpr.eqns for jaxpr in jex.jaxprs_in_params(eqn.params))
    found = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general")
    own = {tuple(str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)) for eqn in found}
    return own.union(*map(products, inner))


def traced(dtype, platform=None, rows=3):
    x, kernel = jnp.ones((rows, 4), dtype), jnp.ones((4, 5), dtype)
    device = platform and AbstractDevice("", None, platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        loss = lambda x, kernel: product(x, kernel, 1).astype(jnp.float32).sum()
        return jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(x, kernel).jaxpr


def test_products_of_bfloat16_have_wide_results_on_cpus_alone():
    narrow = "bfloat16"
    assert products(traced(narrow)) == {(narrow, narrow, "float32")}
    assert products(traced(narrow, "gpu")) == {(narrow, narrow, narrow)}
    assert products(traced("float32")) == {("float32",) * 3}
    assert (narrow, narrow, narrow) in products(traced(narrow, rows=1))


@pytest.mark.parametrize("dtype", [*TOLERANCE])
@pytest.mark.parametrize("platform, computed", [(None, 1), ("gpu", 2)])
def test_a_single_row_is_computed_twice_where_that_is_faster(dtype, platform, computed):
    jaxpr = traced(dtype, platform, rows=1)
    rows = lambda jaxpr: [
        *(e.outvars[0].aval.shape[0] for e in jaxpr.eqns if e.primitive.name == "dot_general"),
        *(n for e in jaxpr.eqns for inner in jex.jaxprs_in_params(e.params) for n in rows(inner)),
    ]
    assert rows(jaxpr)[0] == computed


def test_the_result_may_be_wider_than_the_matrices():
    x = jnp.full((2, 300), 1 + 2**-7, "bfloat16")
    y = matrix_product(x, x.T, jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 300 * (1 + 2**-7) ** 2, rtol=1e-6)
