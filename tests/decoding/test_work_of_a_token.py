"""What the loop over written tokens computes: nothing that every token would compute alike, in one line.

Counted in the traced program and in XLA's optimised program for the CPU; nothing is timed.
"""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import known
from flax.traverse_util import flatten_dict
from memories_table import MEMORIES
from modules.helpers import assert_close, config, precision, random_params, random_tokens, shapes

from famx.decoding import Sampling, Streamer, generate, generation
from famx.memories import Fam
from famx.modules import Decoder, Memory
from famx.modules.components import JOINT
from famx.modules.memory import of_memory
from famx.modules.prepared import computing, with_joint_kernels
from famx.scale import hlo

LAYERS, BATCH = 3, 2
# Query, key and value are one product, and so are gate and up. Attention has scores of the window and of
# the token itself, and a mean of the window's values.
PRODUCTS = 4 + 3
# Operations of a token, those within fusions included, for the sizes below.
OPERATIONS = {"FAM": 974, "BSWA": 955}
LEEWAY = 1.03
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}


def sizes(memory: Memory, **changes):
    # No size is 1: XLA would compute such a product without a `dot`.
    heads = dict(num_heads=4, num_kv_heads=2, head_dim=4, embed_dim=16, mlp_dim=40, vocab_size=24)
    return config(num_layers=LAYERS, block_size=8, memory=memory, **heads, **changes)


def write(c, sampling=Sampling(20)):
    """The program that writes, and the shapes of its arguments."""
    module = Decoder(c)
    params = shapes(c)
    state = jax.eval_shape(
        lambda p: module.apply({"params": p}, BATCH, method="initial_state"), params
    )
    logits = jax.ShapeDtypeStruct((BATCH, c.vocab_size), jnp.float32)
    return lambda p, l, s: generate(module, p, l, s, sampling), (params, logits, state)


# The traced program.


def equations(jaxpr):
    """All equations, those of inner functions and loops included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def token_loop(c, **kwargs):
    function, args = write(c, **kwargs)
    traced = jax.make_jaxpr(function)(*args).jaxpr
    (loop,) = (
        eqn for eqn in equations(traced)
        if eqn.primitive.name == "scan" and str(eqn.source_info.name_stack).endswith("tokens")
    )  # fmt: skip
    return loop.params["jaxpr"].jaxpr


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", MEMORIES)
def test_no_token_casts_weights(name):
    c = sizes(MEMORIES[name], dtype="bfloat16", qkv_bias=True, mlp_bias=True)
    paths = flatten_dict(shapes(c), sep="/")
    params = {path: leaf for path, leaf in paths.items() if not of_memory(path)}
    weights = {leaf.shape for leaf in params.values() if leaf.ndim > 1}  # also stacks
    weights |= {leaf.shape[1:] for path, leaf in params.items() if path.startswith("layers/")}
    weights |= {shape[:1] + (math.prod(shape[1:]),) for shape in weights}
    cast = {
        eqn.invars[0].aval.shape for eqn in equations(token_loop(c))
        if eqn.primitive.name == "convert_element_type" and eqn.invars[0].aval.dtype == jnp.float32
        and eqn.outvars[0].aval.dtype == jnp.bfloat16
    }  # fmt: skip
    assert cast and not cast & weights


# The compiled program.


@functools.cache
def compiled(name: str, dtype: str = "float32"):
    """The optimised program and the body of its loop over tokens, two at a time."""
    memory = {"FAM": Fam(2), "BSWA": Memory()}[name]
    function, args = write(sizes(memory, dtype=dtype))
    # The optimization is that of the machine code; XLA's program is the same.
    options = known(xla_backend_optimization_level=0, xla_cpu_use_fusion_emitters=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(generation._TOKENS_AT_ONCE, "cpu", 2)
        text = jax.jit(function, donate_argnums=(2,)).lower(*args).compile(options).as_text()
    module = hlo.parse(text)
    (body,) = (
        x.called("body") for c in module.computations.values() for x in c.instructions.values()
        if x.opcode == "while" and (x.attribute(r'op_name="([^"]*)"') or "").endswith("/tokens/while")
    )  # fmt: skip
    return module, body


def inside(name):
    """Instructions of a token, those within fusions included."""
    module, body = compiled(name)

    def walk(computation):
        for x in module.computations[computation].instructions.values():
            yield x
            if x.opcode in ("fusion", "call"):
                yield from walk(x.called("calls") or x.called("to_apply"))

    return list(walk(body))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_token_is_one_line_of_few_products(name):
    """Without a loop inside, a GPU can record all of it as one graph."""
    counts = collections.Counter(x.opcode for x in inside(name))
    assert counts["while"] == counts["conditional"] == 0
    assert counts["dot"] == LAYERS * PRODUCTS + 1  # and the head


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_token_has_no_more_operations_than_it_had(name):
    assert sum(x.opcode not in FREE for x in inside(name)) <= LEEWAY * OPERATIONS[name]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_token_copies_neither_weights_nor_window(name):
    window = LAYERS * BATCH * 2 * (2 * 8 + 2 * (name == "FAM")) * 4
    copies = [x for x in inside(name) if x.opcode == "copy" and x.arrays[0].size >= window]
    assert copies == []


# Results.


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", MEMORIES)
def test_tokens_after_an_end_write_nothing(name, monkeypatch):
    """The host looks only now and then whether to go on; here within blocks, and after the last token."""
    c = config(memory=MEMORIES[name], dtype="float64", param_dtype="float64")
    params, sampling = random_params(c), Sampling(21, stop_tokens=(3,))
    outs = []
    for steps in (1, 3):
        monkeypatch.setitem(generation._TOKENS_AT_ONCE, "cpu", steps)
        with precision(c):
            reader = Streamer(Decoder(c))
            state = reader.initial_state(params, 3)
            logits, state = reader.read(params, state, random_tokens(3, 6), np.array([1, 4, 6]))
            outs.append(jax.device_get(reader.generate(params, logits, state, sampling)))
    assert_close(*outs, 1e-12)
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)


# Prepared parameters.


def test_what_is_cast_is_what_projections_and_tables_use():
    c = sizes(Fam(2, start_from="prefix"), norm="layer", qkv_bias=True, tied_embeddings=False)
    c = c.with_fields(dict(dtype="bfloat16"))
    flat = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.dtype
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    dtypes = flat(jax.eval_shape(lambda p: computing(p, c, tables=True), shapes(c)))
    kept = {path for path, dtype in dtypes.items() if dtype == jnp.float32}
    assert kept == {path for path in dtypes if "norm" in path or "memory" in path}
    dtypes = flat(jax.eval_shape(lambda p: computing(p, c, tables=False), shapes(c)))
    assert dtypes["embedding"] == dtypes["head"] == jnp.float32
    assert dtypes["layers/query/bias"] == dtypes["layers/mlp/down/kernel"] == jnp.bfloat16


@pytest.mark.sampled(2)
@pytest.mark.parametrize("changes", [{}, dict(gated_mlp=False), dict(qk_norm=True), dict(mlp_bias=True)])
def test_joint_kernels_compute_the_same(changes):
    c = config(dtype="float64", param_dtype="float64", qkv_bias=True, num_kv_heads=1, **changes)
    params = random_params(c)
    with precision(c):
        both = with_joint_kernels(params)
        assert JOINT in both["layers"]["query"]
        assert (JOINT in both["layers"]["mlp"].get("gate", {})) == c.gated_mlp
        read = jax.jit(lambda p: Decoder(c).apply({"params": p}, random_tokens(2, 10)))
        assert_close(read(both), read(params), 1e-12)


def test_what_is_added_to_a_kernel_keeps_it_alone():
    params = dict(layers=dict(
        query=dict(kernel=np.ones((2, 4, 2, 2)), lora_a=np.ones((2, 4, 1)), lora_b=np.ones((2, 1, 2, 2))),
        key=dict(kernel=np.ones((2, 4, 2, 2))), value=dict(kernel=np.ones((2, 4, 2, 2))),
        mlp=dict(gate=dict(kernel=np.ones((2, 4, 6))), up=dict(kernel=np.ones((2, 4, 6)))),
    ))  # fmt: skip
    layers = with_joint_kernels(params)["layers"]
    assert JOINT not in layers["query"] and layers["mlp"]["gate"][JOINT].shape == (2, 4, 12)


def test_kernels_stay_alone_on_several_devices():
    params = random_params(config())
    for devices in (1, 2):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((devices,), ("x",))):
            assert (JOINT in with_joint_kernels(params)["layers"]["query"]) == (devices == 1)
