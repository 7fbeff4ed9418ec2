"""Invariant 6: feedback memory adds N * D numbers and nothing else; and what a config refuses."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import config, random_params, random_tokens, read, shapes
from memories_table import MEMORIES

from famx.memories import BlockRecurrent, Fam, Feedback, Landmark
from famx.mesh import LOGICAL_AXES
from famx.modules import Decoder, Memory
from famx.modules.memory import from_dict

STYLES = {
    "plain": dict(),
    "all biases": dict(
        norm="layer", qkv_bias=True, output_bias=True, mlp_bias=True, gated_mlp=False,
        tied_embeddings=False,
    ),
    "all norms": dict(post_norms=True, qk_norm=True, num_heads=4, num_kv_heads=2, memory=Fam(3)),
    "parallel": dict(parallel_block=True, memory=Fam(2, normalize=True, update="gated")),
}  # fmt: skip


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("style", STYLES)
def test_memory_adds_n_times_d_parameters(style):
    fam = config(**STYLES[style])
    bswa = dataclasses.replace(fam, memory=Memory())
    with_memory, without = dict(shapes(fam)), dict(shapes(bswa))
    assert count(with_memory) == count(without) + fam.memory_columns * fam.embed_dim
    assert with_memory.pop("memory")["prompt"].shape == (fam.memory_columns, fam.embed_dim)
    assert with_memory == without


def test_a_prefix_adds_as_many_for_every_layer():
    c = config(memory=Fam(2, start_from="prefix"), num_layers=3)
    without = count(shapes(dataclasses.replace(c, memory=Memory())))
    assert count(shapes(c)) == without + 3 * c.memory_columns * c.embed_dim


def test_parameters_of_one_load_into_the_other():
    c = config()
    bswa = dataclasses.replace(c, memory=Memory())
    params, tokens = random_params(c), random_tokens(2, 9)
    without = {name: part for name, part in params.items() if name != "memory"}
    logits, _ = read(bswa, without, tokens)
    back, _ = read(c, {**without, "memory": params["memory"]}, tokens)
    assert logits.shape == back.shape
    assert np.abs(np.asarray(logits) - np.asarray(back)).max() > 1e-3


@pytest.mark.parametrize("style", [*STYLES, "prefix"])
def test_every_parameter_names_its_axes(style):
    c = config(**STYLES.get(style, dict(memory=Fam(2, start_from="prefix"))))
    init = lambda: Decoder(c).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    boxed = jax.eval_shape(init)["params"]
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    for leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
        assert set(leaf.names) <= set(LOGICAL_AXES)
        sizes = dict(
            embed=c.embed_dim, layers=c.num_layers, heads=c.num_heads, kv_heads=c.num_kv_heads,
            kv=c.head_dim, mlp=c.mlp_dim, vocab=c.vocab_size, memory=c.memory_columns,
        )  # fmt: skip
        assert leaf.value.shape == tuple(sizes[name] for name in leaf.names)


@pytest.mark.sampled(18)
@pytest.mark.parametrize("name", MEMORIES)
def test_variables_are_read_as_init_returns_them(name):
    """Boxed with their axes or not: the same logits and gradients."""
    model, tokens = Decoder(config(memory=MEMORIES[name])), random_tokens(2, 10)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    assert isinstance(variables["params"]["embedding"], nn.meta.AxisMetadata)
    loss = lambda variables: jnp.sum(jnp.sin(model.apply(variables, tokens)[0]))
    boxed, plain = (jax.jit(jax.value_and_grad(loss))(v) for v in (variables, nn.unbox(variables)))
    assert jax.tree.structure(nn.unbox(boxed)) == jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(boxed), plain)


def test_fresh_parameters_have_a_sensible_scale():
    c = config(embed_dim=64, num_heads=4, vocab_size=50, memory=Fam(4))
    init = jax.jit(lambda key: Decoder(c).init(key, jnp.zeros((1, 4), jnp.int32)))
    params = nn.unbox(init(jax.random.key(1)))["params"]
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
    assert rms(params["embedding"]) == pytest.approx(1 / 8, rel=0.1)
    assert rms(params["memory"]["prompt"]) == pytest.approx(1 / 8, rel=0.2)
    for name in ("query", "key", "value", "output"):
        assert rms(params["layers"][name]["kernel"]) == pytest.approx(1 / 8, rel=0.1)
    assert rms(params["layers"]["mlp"]["down"]["kernel"]) == pytest.approx(12**-0.5, rel=0.15)
    kernels = params["layers"]["query"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1  # layers begin differently


def test_bfloat16_keeps_parameters_and_memory_in_float32():
    c = config(dtype="bfloat16", attention_backend="blockwise")
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(c))} == {np.dtype("float32")}
    params, tokens = random_params(c), random_tokens(2, 17)
    logits, state = read(c, params, tokens)
    exact, _ = read(dataclasses.replace(c, dtype="float32"), params, tokens)
    assert logits.dtype == state.keys.dtype == state.values.dtype == jnp.bfloat16
    assert state.memory.dtype == jnp.float32
    error = np.abs(np.asarray(logits, np.float32) - np.asarray(exact))
    assert error.mean() < 0.03 * np.asarray(exact).std()


BAD = [
    *(({name: 0}, f"DecoderConfig.{name} must be a whole number of at least 1, not 0.")
      for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "block_size", "unroll_layers")),
    *(({name: 0}, f"DecoderConfig.{name} must be a whole number of at least 1 or None, not 0.")
      for name in ("num_kv_heads", "head_dim", "mlp_dim", "blocks_per_chunk")),
    (dict(memory_segments=-1), "memory_segments must be a whole number of at least 0, not -1"),
    (dict(num_heads=3), "embed_dim 8 is not a multiple of num_heads 3; set head_dim"),
    (dict(num_heads=4, num_kv_heads=3), "num_heads 4 is not a multiple of num_kv_heads 3"),
    (dict(head_dim=3), "head_dim 3 must be even"),
    (dict(memory=None), "DecoderConfig.memory must be a Memory"),
    (dict(memory=dict(length=0)), "Fam.length must be .* at least 1 .for none set DecoderConfig.memory"),
    (dict(memory=dict(length=5)), "Fam.length 5 exceeds block_size 4"),
    (dict(memory=dict(update_scale=0.0)), "Fam.update_scale must be a number above 0 and at most 1"),
    (dict(memory=dict(update_scale=1.5)), "Fam.update_scale must be a number above 0 and at most 1"),
    (dict(memory=dict(adapter_rank=-1)), "Fam.adapter_rank must be a whole number of at least 0"),
    (dict(memory=dict(positions="first")), "Fam.positions must be one of 'last', 'float', 'zero', not"),
    (dict(memory=dict(start_from="zeros")), "Fam.start_from must be one of 'prompt', 'prefix'"),
    (dict(memory=dict(update="add")), "Fam.update must be one of 'residual', 'gated'"),
    (dict(memory=dict(normalize="some")), "Fam.normalize must be True or False or 'measured'"),
    (dict(norm="batch"), "norm must be one of 'rms', 'layer'"),
    (dict(activation="swish"), "activation must be one of 'silu'"),
    (dict(dtype="float16"), "dtype must be one of 'float32', 'bfloat16', 'float64', not 'float16'"),
    (dict(param_dtype="int8"), "param_dtype must be one of"),
    (dict(remat="some"), "remat must be one of 'none', 'full'"),
    (dict(attention_backend="flash"), "attention_backend must be one of 'auto', 'xla', 'blockwise'"),
    (dict(rope_layers=("global", "lokal")), "rope_layers.1. must be one of 'global', 'local', 'none'"),
]  # fmt: skip


@pytest.mark.parametrize("changes,sentence", BAD, ids=[str(changes) for changes, _ in BAD])
def test_a_bad_config_is_refused_with_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        if isinstance(changes.get("memory"), dict):
            changes = {"memory": Fam(**{"length": 2, **changes["memory"]})}
        config(**changes)
    assert str(error.value).endswith((".", "?"))


def test_every_memory_is_the_same_after_json():
    for memory in MEMORIES.values():
        again = from_dict(json.loads(json.dumps(memory.to_dict())))
        assert again == memory and hash(again) == hash(memory)


@pytest.mark.parametrize(
    "memory, sentence",
    [
        (BlockRecurrent(3, layers=(0, 2)), "BlockRecurrent.layers .0, 2. must be different .* 0 to 1."),
        (BlockRecurrent(3, layers=(1, 1)), "BlockRecurrent.layers .1, 1. must be different layers"),
        (Feedback(6), "Feedback.length 6 must be a multiple of block_size 4."),
        (Landmark(piece=3), "Landmark.piece 3 must divide block_size 4."),
        (Landmark(piece=2, pieces=3, top=4), "Landmark.top 4 exceeds pieces 3, from which it chooses."),
    ],
)
def test_a_memory_that_does_not_fit_is_refused_with_a_sentence(memory, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(memory=memory)


def test_a_memory_has_a_kind_of_its_own():
    """Else model.json would name its base, and a load would silently give that."""
    with pytest.raises(ValueError, match="A memory named 'fam' exists already: give .*Other another"):

        class Other(Fam):
            pass

    names = {"__module__": Fam.__module__, "__qualname__": Fam.__qualname__}
    type("Fam", (Fam,), names)  # as gin derives a class
    assert type(from_dict(Fam(3).to_dict())) is Fam


def test_a_memory_through_the_depth_has_no_attention_of_its_own():
    for attribute in ("attends", "closes_oldest"):
        fields = {"kind": f"deep and {attribute}", "through_depth": True, attribute: True}
        with pytest.raises(ValueError, match="`through_depth`, which goes with neither"):
            type("Deep", (Memory,), fields)


def test_defaults_are_filled_in():
    c = config(mlp_dim=None)
    assert (c.num_kv_heads, c.head_dim, c.mlp_dim, c.query_scale) == (2, 4, 32, 0.5)
