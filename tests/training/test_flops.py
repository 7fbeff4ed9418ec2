"""Operation counts against a loop over pairs, a walk through the jaxpr, and XLA's own count."""

import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp
import plain_scans
import pytest
from flax.linen import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.interpreters import partial_eval
from tiny import fam

from famx.lora import Lora
from famx.memories import Fam, Infini
from famx.models import DecoderModel
from famx.modules import Decoder, DecoderConfig, Memory, rope
from famx.modules.layer import ChunkContext, Layer
from famx.training.flops import Learning, train_flops

SIZES = dict(vocab_size=11, num_layers=2, embed_dim=12, num_heads=2, head_dim=4, mlp_dim=20)


def config_of(**changes):
    memory = dict(block_size=4, memory_segments=1, memory=Fam(2))
    return DecoderConfig(**{**SIZES, **memory, **changes})


# Against loops.


def slow_pairs(c, length, from_start):
    """Every query looks at every key, one pair at a time."""
    before = 0 if from_start else (c.memory_segments + 1) * c.block_size  # more than is seen
    pairs = 0
    for query in range(before, before + length):
        for key in range(before + length):
            seen = key <= query
            seen &= key // c.block_size >= query // c.block_size - c.memory_segments
            if c.window_mask:
                seen &= key >= query - c.memory_segments * c.block_size
            pairs += seen
    return pairs


configs = st.builds(
    config_of,
    block_size=st.integers(3, 6),
    memory_segments=st.integers(0, 3),
    memory=st.one_of(
        st.just(Memory()),
        st.builds(Fam, st.integers(1, 3), start_from=st.sampled_from(["prompt", "prefix"])),
    ),
    num_layers=st.integers(1, 3),
    num_kv_heads=st.sampled_from([1, 2]),
    gated_mlp=st.booleans(),
    window_mask=st.booleans(),
)


@settings(max_examples=60)
@given(configs, st.integers(1, 3), st.integers(1, 25), st.booleans())
def test_counts_equal_a_loop_over_tokens_and_pairs(c, batch, length, from_start):
    d, heads, kv, dh = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
    product = lambda rows, inner, columns: 2 * rows * inner * columns
    pair = heads * (product(1, dh, 1) + product(1, 1, dh))
    query_output = product(1, d, heads * dh) + product(1, heads * dh, d)
    keys_values = 2 * product(1, d, kv * dh)
    feed = (2 if c.gated_mlp else 1) * product(1, d, c.mlp_dim) + product(1, c.mlp_dim, d)
    expected = dict.fromkeys(("projections", "attention", "feed_forward", "memory", "head"), 0)
    for _ in range(batch):
        expected["head"] += length * product(1, d, c.vocab_size)
        for _ in range(c.num_layers):
            expected["projections"] += length * (query_output + keys_values)
            expected["feed_forward"] += length * feed
            expected["attention"] += slow_pairs(c, length, from_start) * pair
            for token in range(length):
                expected["memory"] += c.memory_columns * pair
                if token % c.block_size == 0:
                    expected["memory"] += c.memory_columns * keys_values
                    if token > 0:  # a block before this one has updated the memory
                        seen = c.memory_columns + c.block_size
                        expected["memory"] += c.memory_columns * (query_output + seen * pair + feed)
    if from_start and c.memory.exists and c.memory.start_from == "prompt":
        for _ in range(c.num_layers - 1):
            tokens = c.memory_columns
            expected["memory"] += tokens * (query_output + keys_values + tokens * pair + feed)
    counted = train_flops(c, batch, length, from_start)
    assert counted == {kind: 3 * count for kind, count in expected.items()}


@settings(max_examples=40)
@given(
    st.booleans(), st.integers(0, 2), st.sampled_from([1, 2]), st.integers(1, 25), st.booleans()
)  # fmt: skip
def test_counts_of_infini_equal_a_loop_over_tokens(delta, segments, kv_heads, length, from_start):
    memory = Infini(delta=delta)
    c = config_of(memory=memory, memory_segments=segments, num_kv_heads=kv_heads)
    recall, expected = 2 * c.head_dim * c.head_dim + 2 * c.head_dim, 0
    written = 0 if from_start else 1  # blocks in the memory; a state that is given has some
    for token in range(length):
        block = token // c.block_size
        if token % c.block_size == 0 and block > 0 and (block > segments or not from_start):
            write = 2 * c.head_dim * c.head_dim + delta * recall
            expected += c.num_kv_heads * c.block_size * write
            written += 1
        expected += c.num_heads * recall * (written > 0)
    assert train_flops(c, 3, length, from_start)["memory"] == 3 * 3 * c.num_layers * expected


def test_causal_half_of_one_block():
    c = config_of(block_size=4, memory_segments=0, memory=Memory())
    assert train_flops(c, 1, 4)["attention"] == 3 * 2 * (4 * 2 * 4) * (1 + 2 + 3 + 4)


def test_memory_is_all_that_fam_adds():
    fam, bswa = train_flops(config_of(), 2, 12), train_flops(config_of(memory=Memory()), 2, 12)
    assert bswa["memory"] == 0 < fam["memory"]
    assert {**fam, "memory": 0} == bswa


@pytest.mark.parametrize("batch, length", [(0, 4), (1, 0)])
def test_refuses_empty_batches(batch, length):
    with pytest.raises(ValueError, match="at least 1"):
        train_flops(config_of(), batch, length)


# Against what is really computed.


def jaxpr_flops(jaxpr):
    """Operations of all matrix products, inside a scan times its length, and of the longest branch."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        inner = [jaxpr_flops(inner) for inner in jax.extend.core.jaxprs_in_params(eqn.params)]
        if eqn.primitive.name == "cond":
            inner = [max(inner)]
        total += repeats * sum(inner)
    return total


@pytest.fixture
def prompt_by_plain_scan(monkeypatch):
    """`climb.scan_layers` makes each layer of the prompt twice more, and recomputation does not count."""
    monkeypatch.setattr(Decoder, "_start", plain_scans.start)


def gradient_flops(c, batch, length):
    """Operations of the loss's gradient, as traced."""
    model = DecoderModel(Decoder(c))
    tokens = jnp.ones((batch, length), jnp.int32)
    inputs = {"decoder_input_tokens": tokens, "decoder_target_tokens": tokens}
    params = unbox(jax.eval_shape(model.module.init, jax.random.key(0), tokens)["params"])
    gradient = jax.grad(lambda params: model.loss(params, inputs)[0])
    return jaxpr_flops(jax.make_jaxpr(gradient)(params).jaxpr)


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("prompt_by_plain_scan")
@pytest.mark.parametrize("memory", [fam(0), fam(3), Fam(3, adapter_rank=2)], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_equals_the_products_of_the_gradient_but_for_masks_and_unread_memory(memory, kv_heads):
    """The dense backend also multiplies masked pairs, the last update and the last prompt layer."""
    c = config_of(
        block_size=5, memory_segments=2, memory=memory, num_kv_heads=kv_heads, num_layers=3,
        attention_backend="xla",
    )  # fmt: skip
    batch, blocks = 2, 4
    length = blocks * c.block_size
    done = gradient_flops(c, batch, length)

    pair = 4 * c.num_heads * c.head_dim
    window = (c.memory_segments + 1) * c.block_size
    masked = length * window - slow_pairs(c, length, True)
    n, d, width = c.memory_columns, c.embed_dim, c.num_heads * c.head_dim
    feed, query_output = 6 * d * c.mlp_dim, 4 * d * width
    keys_values = 4 * d * c.num_kv_heads * c.head_dim
    if memory.exists and memory.adapter_rank:  # of each projection, `R` times what it takes and makes
        rank, kv_width = memory.adapter_rank, c.num_kv_heads * c.head_dim
        feed += 2 * rank * 3 * (d + c.mlp_dim)
        query_output += 2 * rank * 2 * (d + width)
        keys_values += 2 * rank * 2 * (d + kv_width)
    update = n * (query_output + (n + c.block_size) * pair + feed)
    prompt = n * (query_output + keys_values + n * pair + feed)
    unneeded = batch * c.num_layers * (masked * pair + update) + prompt
    assert done == sum(train_flops(c, batch, length).values()) + 3 * unneeded


@pytest.mark.parametrize("delta", [False, True])
def test_infini_equals_the_products_of_the_gradient_but_for_what_nobody_reads(delta):
    """Computed as well: reads while the memory is empty, and writes after the last block."""
    c = config_of(memory=Infini(delta=delta), memory_segments=0, num_kv_heads=1, attention_backend="xla")
    batch, length = 2, 12
    done, without = (
        gradient_flops(config, batch, length)
        for config in (c, dataclasses.replace(c, memory=Memory()))
    )
    recall, written = 2 * c.head_dim * (c.head_dim + 1), 2 * c.head_dim * c.head_dim
    unneeded = c.block_size * (c.num_heads * recall + c.num_kv_heads * (written + delta * recall))
    counted = train_flops(c, batch, length)["memory"]
    assert done - without == counted + 3 * batch * c.num_layers * unneeded


def partial_gradient_flops(model, learns, tokens):
    """Operations of the loss's gradient with respect to the parameters whose path `learns` holds."""
    flat = flatten_dict(unbox(model.abstract_params()), sep="/")
    part = {path: leaf for path, leaf in flat.items() if learns(path)}
    inputs = {"decoder_input_tokens": tokens, "decoder_target_tokens": tokens}
    loss = lambda part, params: model.loss(unflatten_dict({**params, **part}, sep="/"), inputs)[0]
    jaxpr = jax.make_jaxpr(jax.grad(loss))(part, flat).jaxpr
    # The backward pass of the memory's scan also says what frozen weights would get; nobody asks.
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return part.keys(), jaxpr_flops(used)


@pytest.mark.sampled(4)
@pytest.mark.usefixtures("prompt_by_plain_scan")
@pytest.mark.parametrize("memory_length", [0, 3])
@pytest.mark.parametrize("targets, learns", [
    (("attention", "feed_forward"), lambda path: "lora" in path or path == "memory/prompt"),
    (("layers/query", "layers/mlp/down"), lambda path: "lora" in path or path == "memory/prompt"),
    ((), lambda path: path.startswith("layers/mlp") or path == "embedding"),
    ((), lambda path: path == "layers/attention_norm/scale"),
    ((), lambda path: path == "final_norm/scale"),
    ((), lambda path: path == "head"),
])  # fmt: skip
def test_a_part_that_learns_has_the_products_of_its_own_gradient(memory_length, targets, learns):
    tied = not any(map(learns, ("head", "final_norm/scale")))
    c = config_of(
        block_size=5, memory_segments=2, memory=fam(memory_length), num_kv_heads=1, num_layers=3,
        attention_backend="xla", tied_embeddings=tied,
    )  # fmt: skip
    model = DecoderModel(Decoder(c), lora=Lora(rank=2, targets=targets) if targets else None)
    batch, length = 2, 4 * c.block_size
    paths, done = partial_gradient_flops(model, learns, jnp.ones((batch, length), jnp.int32))
    learning = Learning(paths, 2 if targets else 0)

    # The dense backend's surplus: masked pairs, the last update, the last layer of the prompt.
    flows = learning.through_layers
    d, width, kv = c.embed_dim, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sizes = {
        "query": (d, width), "key": (d, kv), "value": (d, kv), "output": (width, d),
        "mlp/gate": (d, c.mlp_dim), "mlp/up": (d, c.mlp_dim), "mlp/down": (c.mlp_dim, d),
    }  # fmt: skip

    def row(*names):
        total = 0
        for name in names:
            i, o = sizes[name]
            kernel, adapter = (f"layers/{name}/{leaf}" in paths for leaf in ("kernel", "lora_a"))
            total += 2 * i * o * (1 + flows + kernel) + adapter * 2 * 2 * (i + o) * 3
        return total

    pair = 4 * width * (3 if flows else 1)
    masked = length * (c.memory_segments + 1) * c.block_size - slow_pairs(c, length, True)
    feed, n = ("mlp/gate", "mlp/up", "mlp/down"), memory_length
    update = n * (row("query", "output", *feed) + (n + c.block_size) * pair)
    prompt = n * (row("query", "key", "value", "output", *feed) + n * pair)
    surplus = batch * c.num_layers * (masked * pair + update) + prompt
    assert done == sum(train_flops(c, batch, length, learning=learning).values()) + surplus


def test_agrees_with_xla_on_one_dense_layer():
    """XLA counts scans once, so one layer alone; it also counts what is no matrix product."""
    c = config_of(
        block_size=32, memory_segments=0, memory=Memory(), num_layers=1, embed_dim=128, num_heads=4,
        head_dim=32, mlp_dim=512, attention_backend="xla",
    )  # fmt: skip
    x = jnp.zeros((2, 1, c.block_size, c.embed_dim))
    keys = jnp.zeros((2, 1, c.block_size, c.num_kv_heads, c.head_dim))
    zero = jnp.zeros((2,), jnp.int32)
    rotation = jax.tree.map(lambda turns: turns[0], rope.rotations(c))
    context = ChunkContext(zero, zero, zero, rotation=rotation)
    args = x, None, None, keys, keys, None, context
    run = lambda params: Layer(c).apply(params, *args, method="read_chunk")
    init = lambda key: Layer(c).init(key, *args, method="read_chunk")
    shapes = jax.eval_shape(init, jax.random.key(0))
    measured = jax.jit(run).lower(shapes).cost_analysis()["flops"]

    counted = train_flops(c, 2, c.block_size)
    dense = counted["attention"] * 2 * c.block_size // (c.block_size + 1)  # masked pairs as well
    products = (counted["projections"] + counted["feed_forward"] + dense) / 3
    assert products <= measured <= 1.1 * products
