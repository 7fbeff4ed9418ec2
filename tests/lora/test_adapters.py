"""Adapters: targets, initial values, trees with and without adapters, and bad settings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from modules.helpers import assert_close, config, difference, random_params, random_tokens, shapes
from trees import DOUBLE, LORA, STYLES, adapted, logits, merged_logits

from famx.base.errors import ConfigError
from famx.lora import Lora, combine, intercept, merged, split
from famx.mesh import LOGICAL_AXES
from famx.modules import Decoder
from famx.modules.components import Projection


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def boxed(c):
    tokens = jnp.zeros((1, c.block_size), jnp.int32)
    return jax.eval_shape(Decoder(c).init, jax.random.key(0), tokens)["params"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("style", STYLES)
def test_merged_equals_unmerged(style):
    c, params, tree = adapted(**STYLES[style], **DOUBLE)
    tokens = random_tokens(2, 15)
    with_adapters = logits(c, tree, tokens)
    assert difference(with_adapters, merged_logits(c, tree, tokens)) < 1e-9
    assert difference(with_adapters, logits(c, params, tokens, None)) > 0.1


def test_merged_equals_unmerged_in_float32_and_rounds_to_a_bfloat16_base():
    c, _, tree = adapted(param_dtype="bfloat16")
    tokens = random_tokens(2, 15)
    with_adapters = logits(c, tree, tokens)
    assert merged(tree, LORA)["layers"]["query"]["kernel"].dtype == jnp.bfloat16
    assert merged(tree, LORA, jnp.float32)["layers"]["query"]["kernel"].dtype == jnp.float32
    assert difference(with_adapters, merged_logits(c, tree, tokens, jnp.float32)) < 1e-3
    rounded = difference(with_adapters, merged_logits(c, tree, tokens))
    assert 1e-3 < rounded < 0.1 * np.abs(with_adapters).max()


def test_adapters_are_applied_in_the_compute_dtype():
    c, _, tree = adapted(dtype="bfloat16", param_dtype="bfloat16")
    tokens = random_tokens(2, 8)
    out = logits(c, tree, tokens)
    assert out.dtype == jnp.bfloat16
    wide = logits(config(param_dtype="bfloat16"), tree, tokens)
    assert difference(out, wide) < 0.2 * np.abs(wide).max()


def test_merging_is_the_product_times_alpha_over_rank():
    _, params, tree = adapted(num_heads=4, num_kv_heads=2, head_dim=4)
    query, output = (tree["layers"][name] for name in ("query", "output"))
    change = 1.5 * np.einsum("ldr,lrhk->ldhk", query["lora_a"], query["lora_b"])
    after = 1.5 * np.einsum("lhkr,lrd->lhkd", output["lora_a"], output["lora_b"])
    layers = merged(tree, LORA)["layers"]
    np.testing.assert_allclose(layers["query"]["kernel"], query["kernel"] + change, 1e-5, 1e-5)
    np.testing.assert_allclose(layers["output"]["kernel"], output["kernel"] + after, 1e-5, 1e-5)
    assert jax.tree.structure(merged(tree, LORA)) == jax.tree.structure(params)


def test_a_tree_without_adapters_is_merged_as_it_is():
    params = random_params(config())
    assert merged(params, LORA) is params
    assert merged(params) is params


def test_fresh_adapters_change_no_bit():
    c, params, _ = adapted()
    tree = combine(params, LORA.init(jax.random.key(0), params))
    x = np.random.default_rng(0).standard_normal((5, c.embed_dim)).astype(np.float32)
    heads = Projection(c, (c.num_heads, c.head_dim), ("embed",), ("heads", "kv"))
    query = {"params": jax.tree.map(lambda leaf: leaf[0], tree["layers"]["query"])}
    plain = heads.apply(query, x)
    with intercept(LORA):
        assert np.asarray(heads.apply(query, x)).tobytes() == np.asarray(plain).tobytes()
    # A whole decoder with adapters is another program, which may add in another order.
    tokens = random_tokens(2, 9)
    wanted = logits(c, params, tokens, None)
    near = rounding.bound(rounding.of_decoder(c, 9), np.abs(wanted).max())
    assert difference(logits(c, tree, tokens), wanted) <= near


def test_fresh_a_keeps_the_variance_of_what_it_reads():
    params = random_params(config(embed_dim=64, mlp_dim=256, num_heads=4))
    adapters = Lora(16).init(jax.random.key(0), params)["layers"]
    seen = {}
    for path, leaf in paths(adapters).items():
        assert leaf.dtype == jnp.float32
        if path.endswith("lora_a"):
            width = np.prod(leaf.shape[1:-1])
            np.testing.assert_allclose(np.std(leaf), width**-0.5, rtol=0.1)
            seen[path] = float(leaf.reshape(-1)[0]) * width**0.5
        else:
            assert not np.any(leaf)
    assert len(set(np.round(list(seen.values()), 4))) == len(seen)  # no two draw the same


def test_adapters_name_the_axes_of_their_kernels():
    params = boxed(config(num_heads=4, num_kv_heads=2, head_dim=4))
    adapters = jax.eval_shape(LORA.init, jax.random.key(0), params)["layers"]
    query, output = adapters["query"], adapters["output"]
    assert query["lora_a"].names == ("layers", "embed", "lora_rank")
    assert query["lora_b"].names == ("layers", "lora_rank", "heads", "kv")
    assert output["lora_a"].names == ("layers", "heads", "kv", "lora_rank")
    assert output["lora_b"].names == ("layers", "lora_rank", "embed")
    for leaf in jax.tree.leaves(adapters, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
        assert len(leaf.names) == len(leaf.value.shape) and set(leaf.names) <= set(LOGICAL_AXES)


def test_boxes_and_jit_change_no_value():
    c = config()
    plain = LORA.init(jax.random.key(3), random_params(c))
    jitted = jax.jit(LORA.init)(jax.random.key(3), random_params(c))
    from_boxes = nn.unbox(jax.jit(lambda key: LORA.init(key, boxed(c)))(jax.random.key(3)))
    near = rounding.bound(20, 2)  # a normal number is a polynomial of degree 8 and a square root
    assert_close(plain, jitted, near)
    assert_close(plain, from_boxes, near)


def test_split_undoes_combine():
    _, params, tree = adapted()
    base, adapters = split(tree)
    assert jax.tree.structure(base) == jax.tree.structure(params)
    assert all(path.endswith(("lora_a", "lora_b")) for path in paths(adapters))
    jax.tree.map(np.testing.assert_array_equal, combine(base, adapters), tree)
    assert split(params)[1] == {}


ATTENTION = ["key", "output", "query", "value"]


@pytest.mark.parametrize(
    "targets, wanted",
    [
        ("attention", ATTENTION),
        (["feed_forward"], ["mlp/down", "mlp/gate", "mlp/up"]),
        (("layers/(query|value)",), ["query", "value"]),
        ((".*/down", "layers/key"), ["key", "mlp/down"]),
        (("attention", "layers/query"), ATTENTION),
    ],
)
def test_targets_are_groups_or_expressions_on_whole_paths(targets, wanted):
    adapters = Lora(2, targets=targets).init(jax.random.key(0), shapes(config()))
    found = sorted({path.rpartition("/")[0] for path in paths(adapters["layers"])})
    assert found == wanted


def test_only_what_is_targeted_changes():
    lora = Lora(3, targets=("layers/value",))
    _, params, tree = adapted(lora)
    changed = {
        path
        for path, same in paths(
            jax.tree.map(lambda a, b: a is b or np.array_equal(a, b), params, merged(tree, lora))
        ).items()
        if not same
    }
    assert changed == {"layers/value/kernel"}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(rank=0), "Lora.rank must be a whole number of at least 1, not 0"),
        (dict(rank=9), "The rank of LoRA is 9, but layers/.* is only 8 wide"),
        (dict(alpha=0.0), "Lora.alpha must be a number above 0 or None, not 0.0"),
        (dict(dropout=1.0), "Lora.dropout must be a number of at least 0 and below 1, not 1.0"),
        (dict(targets=("atention",)), "'atention'. Did you mean 'attention'"),
        (dict(targets=("query",)), "No projection is named 'query'.*layers/query"),
        (dict(targets=("layers/(query",)), "is not a regular expression"),
        (dict(targets=()), "targets are empty"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(changes, sentence):
    c = config()
    with pytest.raises(ConfigError, match=sentence):
        Lora(**{"rank": 2, **changes}).check(c)
    with pytest.raises(ConfigError, match=sentence):
        Lora(**{"rank": 2, **changes}).init(jax.random.key(0), shapes(c))


def test_rank_may_be_as_large_as_the_narrowest_target():
    c = config(num_kv_heads=1, head_dim=6)
    Lora(6).check(c)
    Lora(8, targets=("feed_forward",)).check(c)
    with pytest.raises(ConfigError, match="layers/(key|value) is only 6 wide"):
        Lora(7).check(c)


def test_what_the_default_says():
    assert Lora().rank == 64 and Lora().scale == 1.0 and Lora(8, alpha=16).scale == 2.0
    Lora().check(config(embed_dim=64, mlp_dim=128))
