"""Every way to compute attention gives what the plain formula gives, gradients included."""

import dataclasses
import functools
import importlib.util
import itertools
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from helpers import assert_close, config, fam, jit, random_params, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice
from plain_kernels import PLAIN

from famx.base.errors import ConfigError
from famx.memories import Fam
from famx.modules import Decoder, Memory
from famx.modules.attention import (
    column_dimensions,
    cudnn,
    dense,
    dispatch,
    splash,
    tokamax,
    token_attention,
    visible,
)
from famx.modules.backends import resolve_backend
from famx.scale.gpus import GPUS

SIZE = 128  # the least block of the splash kernel


def arrays(c, blocks, batch, seed=0):
    """`q, keys, values, memory_keys, memory_values`, and a cotangent."""
    count = c.memory_segments + blocks
    past, memory = (count, c.block_size, c.num_kv_heads), (blocks, c.memory_columns, c.num_kv_heads)
    queries = blocks, c.block_size, c.num_heads
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.standard_normal((batch, *shape, c.head_dim)).astype(np.float32)
    return [draw(shape) for shape in (queries, past, past, memory, memory, queries)]


def assert_equals_the_formula(c, function, first_block, blocks, seed=0):
    """Values and all gradients of `function(c, ...)`, which are handed back."""
    *args, cotangent = arrays(c, blocks, len(first_block), seed)
    first_block = np.array(first_block, np.int32)

    def run(function):
        def both(*args):
            out, back = jax.vjp(lambda *x: function(c, *x, first_block), *args)
            return out, *back(cotangent)

        return dict(zip("out q k v mk mv".split(), jit(c, both)(*args), strict=True))

    expected, found = run(dense.attention), run(function)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=3e-5, err_msg=name)
    return found


MASKS = {
    "paper": (dict(memory_segments=3), [0, 7], 2),
    "grouped heads, starts within reach": (
        dict(memory_segments=2, num_heads=4, num_kv_heads=2, memory=Fam(64)), [1, 2], 2,
    ),
    "one key head, capped": (
        dict(memory_segments=1, num_heads=3, num_kv_heads=1, attention_softcap=2.0, head_dim=6), [0], 3,
    ),
    "window mask, two memories in a tile": (
        dict(memory_segments=1, window_mask=True, memory=Fam(24), block_size=256), [3], 2,
    ),
    "no memory": (dict(memory_segments=2, memory=Memory(), query_scale=0.3), [0, 1], 2),
    "no past": (dict(memory_segments=0), [5], 2),
    "neither": (dict(memory_segments=0, memory=Memory()), [0], 2),
    "stopped segments": (
        dict(memory_segments=2, stop_gradient_segments=True, num_kv_heads=1, memory=Fam(24)), [1], 2,
    ),
}  # fmt: skip


def masked(case, block_size):
    changes, first_block, blocks = MASKS[case]
    changes = {"num_heads": 2, "head_dim": 8, "memory": Fam(8), "block_size": block_size, **changes}
    return config(**changes), first_block, blocks


@pytest.fixture
def interpret(monkeypatch):
    monkeypatch.setattr(splash, "INTERPRET", True)


def assert_stopped(c, gradients):
    """Past blocks before the chunk have no gradient, all else has."""
    for name in ("k", "v"):
        assert not gradients[name][:, : c.memory_segments].any()
    assert all(np.abs(x).max() > 1e-3 for x in gradients.values())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", MASKS)
def test_splash_equals_the_formula(case, interpret):
    c, *rest = masked(case, SIZE)
    found = assert_equals_the_formula(c, splash.attention, *rest)
    if c.stop_gradient_segments:
        assert_stopped(c, found)


def test_splash_in_several_tiles_for_a_block(interpret, monkeypatch):
    monkeypatch.setattr(splash, "TILE", SIZE)
    c = config(
        block_size=3 * SIZE, memory=Fam(24), memory_segments=1, num_heads=1, head_dim=8,
        window_mask=True, stop_gradient_segments=True,
    )  # fmt: skip
    assert splash.tile_size(c.block_size) == SIZE
    assert_stopped(c, assert_equals_the_formula(c, splash.attention, [2], 1))


def test_tiles_divide_blocks():
    assert [splash.tile_size(size) for size in (128, 384, 640, 1024, 2560)] == [128, 384, 128, 512, 512]


@given(
    blocks=st.integers(1, 3), size=st.integers(1, 9), segments=st.integers(0, 3),
    length=st.integers(0, 5), slot=st.sampled_from([8, 16]), padding=st.integers(0, 4),
    window=st.booleans(),
)  # fmt: skip
def test_the_sparse_mask_is_what_is_visible(blocks, size, segments, length, slot, padding, window):
    length = min(length, size)
    slot, padding = (slot, padding) if length else (0, 0)
    c = config(block_size=size, memory_segments=segments, memory=fam(length), window_mask=window)
    past, tokens = segments * size, (segments + blocks) * size
    columns = tokens + blocks * slot + padding
    expected = np.zeros((blocks, size, columns), bool)
    for t in range(blocks):
        seen = visible(c, np.arange(size)[:, None], np.arange(length + past + size), 0)
        memory = tokens + t * slot
        expected[t, :, memory : memory + length] = seen[:, :length]
        expected[t, :, t * size : t * size + past + size] = seen[:, length:]
    expected = expected.reshape(-1, columns)
    mask = splash.ChunkMask(blocks, size, segments, length, slot, columns, window)
    assert mask.shape == expected.shape
    np.testing.assert_array_equal(mask[:, :], expected)
    np.testing.assert_array_equal(mask[1:, 2:-1], expected[1:, 2:-1])
    assert_equal_by_tiles(mask, expected, size)
    if segments:
        for t in range(blocks):
            expected[t * size : (t + 1) * size, : t * size + past] = False
        own_only = dataclasses.replace(mask, own_only=True)
        np.testing.assert_array_equal(own_only[:, :], expected)
        assert_equal_by_tiles(own_only, expected, size)


def tiles(mask, size):
    return itertools.product(*([slice(i, i + size) for i in range(0, n, size)] for n in mask.shape))


def assert_equal_by_tiles(mask, expected, size):
    """As the kernel asks for it; most of its tiles are decided by bounds."""
    for tile in tiles(mask, size):
        np.testing.assert_array_equal(mask[tile], expected[tile], str(tile))


def test_few_tiles_of_a_long_text_need_their_pairs(monkeypatch):
    """Else the host would take hours to prepare the kernel for a text of a million tokens."""
    blocks, size, slot = 256, 4, 4
    mask = splash.ChunkMask(blocks, size, 2, 3, slot, (2 + 2 * blocks) * size, window=False)
    pairs = mock.Mock(side_effect=mask.mask_function)
    monkeypatch.setattr(splash.ChunkMask, "mask_function", lambda _, *args: pairs(*args))
    for tile in tiles(mask, size):
        mask[tile]
    assert pairs.call_count == 2 * blocks  # a block's own tokens, and its memory


@pytest.mark.parametrize("size, length", [(4, 2), (6, 3)])
def test_the_sparse_mask_is_the_same_within_the_kernel(size, length):
    mask = splash.ChunkMask(3, size, 1, length, 4, 4 * size + 3 * 4 + 2, window=False)
    within = mask.mask_function(jnp.asarray(mask.q_sequence)[:, None], jnp.arange(mask.columns))
    np.testing.assert_array_equal(within, mask[:, :])


def with_plain_kernels(c, *args):
    return cudnn.attention(c, *args, kernels=PLAIN)


CUDNN_MASKS = [case for case in MASKS if "capped" not in case]


@pytest.mark.parametrize("case", CUDNN_MASKS)
def test_cudnn_equals_the_formula_but_for_its_kernel(case):
    c, *rest = masked(case, 64)
    found = assert_equals_the_formula(c, with_plain_kernels, *rest)
    if c.stop_gradient_segments:
        assert_stopped(c, found)


@pytest.mark.parametrize("case", MASKS)
def test_tokamax_equals_the_formula(case):
    pytest.importorskip("tokamax")
    c, *rest = masked(case, 64)
    found = assert_equals_the_formula(c, tokamax.attention, *rest)
    if c.stop_gradient_segments:
        assert_stopped(c, found)


def test_a_model_reads_the_same_through_tokamax():
    pytest.importorskip("tokamax")
    tokens = random_tokens(2, 40)
    run = lambda backend: Decoder(config(attention_backend=backend)).apply(
        {"params": random_params(config())}, tokens
    )[0]
    np.testing.assert_allclose(run("tokamax"), run("xla"), atol=2e-4)


def test_tokamax_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package tokamax: pip install 'famx.tokamax.', or"):
        config(attention_backend="tokamax")


@pytest.mark.slow
@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 3),
    st.integers(0, 3), st.booleans(), st.booleans(),
)  # fmt: skip
def test_cudnn_masks_blocks_before_the_start(first_block, blocks, segments, length, window, stop):
    c = config(
        block_size=4, memory_segments=segments, memory=fam(length), head_dim=8,
        window_mask=window and segments > 0, stop_gradient_segments=stop,
    )  # fmt: skip
    assert_equals_the_formula(c, with_plain_kernels, first_block, blocks)


def test_what_a_part_without_columns_gives_does_not_matter():
    """The kernels may leave anything there; here, what is not a number."""

    def spoil(x, lengths):
        # The kernels get lengths of at least 1: where it is 1 here, there is no column.
        return x if lengths is None else jnp.where((lengths > 1).reshape(-1, 1, 1, 1), x, jnp.nan)

    def forward(scale, causal, q, k, v, lengths):
        out, lse = PLAIN.forward(scale, causal, q, k, v, lengths)
        return spoil(out, lengths), spoil(lse[..., None], lengths)[..., 0]

    def backward(scale, causal, q, k, v, lengths, *rest):
        return tuple(spoil(x, lengths) for x in PLAIN.backward(scale, causal, q, k, v, lengths, *rest))

    for window in (False, True):
        c = config(
            block_size=4, memory_segments=2, memory=Memory(), head_dim=8, window_mask=window
        )
        attention = functools.partial(cudnn.attention, kernels=cudnn.Kernels(forward, backward))
        assert_equals_the_formula(c, attention, [0, 1], 3)


@pytest.mark.parametrize("window, calls", [(False, 2), (True, 3)])
def test_cudnn_lowers_for_a_gpu_without_biases(window, calls):
    """As far as one comes without a GPU: the program that XLA would compile for one."""
    c = config(
        block_size=16, memory_segments=2, memory=Fam(4), num_heads=4, num_kv_heads=2, head_dim=8,
        dtype="bfloat16", attention_backend="cudnn", window_mask=window,
    )  # fmt: skip
    *args, cotangent = (x.astype(jnp.bfloat16) for x in arrays(c, 3, 2))

    def both(*args):
        out, back = jax.vjp(lambda *x: token_attention(*x, np.zeros(2, np.int32), c), *args)
        return out, back(cotangent)

    program = jax.jit(both).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    lines = [line for line in program.splitlines() if "__cudnn$fmha" in line]
    assert ["Backward" in line for line in lines] == [False] * calls + [True] * calls
    for line in lines:
        assert "Bias" not in re.search(r"@(\S+?)\(", line)[1]
        arrays_of_four = re.findall(r"tensor<((?:\d+x){4})bf16>", line)
        assert arrays_of_four and all(shape.endswith("x8x") for shape in arrays_of_four)  # no scores
    masks = [re.search(r'mask_type[^A-Z]*([A-Z_]+)', line)[1] for line in lines]
    of_window = ["PADDING_CAUSAL"] if window else []
    assert masks == ["CAUSAL", "PADDING", *of_window] * 2


BIASES = {
    "grouped heads": (dict(memory_segments=2, num_heads=4, num_kv_heads=2), [1, 2], 2),
    "window mask": (dict(memory_segments=1, window_mask=True), [3], 2),
    "no past": (dict(memory_segments=0, query_scale=0.3), [5], 2),
    "stopped segments": (dict(memory_segments=1, stop_gradient_segments=True), [1], 2),
}


def with_bias(c, bias, q, keys, values, memory_keys, memory_values, first_block):
    bias_query, bias_keys = column_dimensions(bias, c)
    keys, memory_keys = bias_keys(keys, False), bias_keys(memory_keys, True)
    return token_attention(bias_query(q), keys, values, memory_keys, memory_values, first_block, c)


def by_formula(c, bias, q, keys, values, memory_keys, memory_values, first_block):
    """The bias added to dense scores, each block on its own."""

    def window(x, memory, t):
        past = x[:, t : t + c.memory_segments].reshape(len(x), -1, *x.shape[3:])
        past = jax.lax.stop_gradient(past) if c.stop_gradient_segments else past
        joined = jnp.concatenate([memory[:, t], past, x[:, t + c.memory_segments]], axis=1)
        return jnp.repeat(joined, c.num_heads // c.num_kv_heads, axis=2)

    def block(t):
        k, v = window(keys, memory_keys, t), window(values, memory_values, t)
        scores = jnp.einsum("bshd,bxhd->bhsx", q[:, t], k) * c.query_scale
        columns = jnp.arange(k.shape[1])
        scores += jnp.where(columns < c.memory_columns, bias[:, None, None], 0)
        missing = jnp.maximum(c.memory_segments - first_block - t, 0)[:, None, None]
        seen = visible(c, jnp.arange(c.block_size)[:, None], columns, missing)
        shares = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30))
        return jnp.einsum("bhsx,bxhd->bshd", shares, v)

    return jnp.stack([block(t) for t in range(q.shape[1])], axis=1)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", BIASES)
@pytest.mark.parametrize("backend", ["xla", "blockwise", "splash", "cudnn"])
def test_every_backend_adds_the_bias_of_the_memory(case, backend, interpret, monkeypatch):
    """And has its gradient, which is exact: the bias is two dimensions of queries and keys."""
    changes, first_block, blocks = BIASES[case]
    size = SIZE if backend == "splash" else 16
    memory = Fam(8, bias="minus_log_length")
    c = config(**{"num_heads": 2, "head_dim": 8, "memory": memory, "block_size": size, **changes})
    monkeypatch.setattr(dispatch, "_backend", lambda config: backend)
    monkeypatch.setitem(dispatch._KERNELS, "cudnn", with_plain_kernels)
    *args, cotangent = arrays(c, blocks, len(first_block))
    first_block, bias = np.array(first_block), np.linspace(-3, 1, c.num_heads, dtype="float32")

    def run(function):
        def both(cotangent, first_block, bias, *args):
            out, back = jax.vjp(lambda *x: function(c, *x, first_block), bias, *args)
            return out, *back(cotangent)

        return jit(c, both)(cotangent, first_block, bias, *args)

    names = "out bias q k v mk mv".split()
    for name, found, expected in zip(names, run(with_bias), run(by_formula), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-4 if name == "bias" else 3e-5, err_msg=name)


def test_a_bias_loses_nothing_to_a_narrow_dtype():
    c = config(head_dim=8, dtype="bfloat16", memory=Fam(2, bias="zero"))
    bias = np.array([-4.158883, 1.2345678], np.float32)
    bias_query, bias_keys = column_dimensions(bias, c)
    q = bias_query(jnp.zeros((1, 2, 8), jnp.bfloat16)).astype(jnp.float32)
    ones = bias_keys(jnp.zeros((1, 2, 8), jnp.bfloat16), True).astype(jnp.float32)
    scores = jnp.sum(q * ones, axis=-1)[0] * c.query_scale
    np.testing.assert_allclose(scores, bias, rtol=2**-16)
    assert not bias_keys(jnp.zeros((1, 2, 8), jnp.bfloat16), False).any()


def test_cudnn_lowers_with_a_bias_of_the_memory():
    """Eight dimensions more, and still no array of biases."""
    c = config(
        block_size=16, memory=Fam(4, bias="zero"), head_dim=8, dtype="bfloat16",
        attention_backend="cudnn",
    )  # fmt: skip
    args = [x.astype(jnp.bfloat16) for x in arrays(c, 3, 2)[:-1]]

    def gradient(bias, *args):
        loss = lambda *x: jnp.sum(with_bias(c, *x, np.zeros(2, np.int32)).astype(jnp.float32))
        return jax.grad(loss, argnums=(0, 1))(bias, *args)

    program = jax.jit(gradient).trace(jnp.zeros(2), *args).lower(lowering_platforms=("cuda",)).as_text()
    lines = [line for line in program.splitlines() if "__cudnn$fmha" in line]
    assert len(lines) == 4 and all("x16xbf16" in line and "Bias" not in line for line in lines)


@pytest.mark.slow
def test_a_model_learns_the_same_through_splash(interpret):
    """Through scans over layers, chunks and blocks, rematerialised."""
    c = config(
        block_size=SIZE, memory_segments=1, memory=Fam(8), num_kv_heads=1, blocks_per_chunk=1,
        remat="full",
    )  # fmt: skip
    params, tokens = random_params(c), random_tokens(1, 2 * SIZE)

    def run(backend):
        model = Decoder(dataclasses.replace(c, attention_backend=backend))

        def loss(params):
            logits, _ = model.apply({"params": params}, tokens)
            return jnp.sum(jnp.sin(logits)), logits

        return jit(c, jax.grad(loss, has_aux=True))(params)

    (grad, logits), (expected_grad, expected) = run("splash"), run("xla")
    additions = rounding.of_decoder(c, 2 * SIZE)
    assert_close(logits, expected, rounding.bound(additions, np.abs(expected).max()))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected_grad))
    # The way back is twice as long, and a weight's gradient is a sum over the tokens.
    assert_close(grad, expected_grad, rounding.bound(3 * additions + 2 * SIZE, largest))


def backend_of(platform, devices=1, kind="", **changes):
    device = AbstractDevice(kind, None, platform)  # as a mesh describes its devices
    return resolve_backend(config(**{"block_size": SIZE, "head_dim": 8, **changes}), device, devices)


def test_auto_goes_by_platform_and_shape():
    assert backend_of("tpu") == "splash" == backend_of("tpu", 4, dtype="bfloat16")
    assert backend_of("tpu", block_size=100) == "xla" == backend_of("tpu", dtype="float64")
    for platform in ("gpu", "cuda"):
        assert backend_of(platform, dtype="bfloat16") == "cudnn"
        assert backend_of(platform) == "xla"
    assert backend_of("gpu", dtype="bfloat16", attention_softcap=3.0) == "xla"
    assert backend_of("gpu", dtype="bfloat16", memory=Fam(3, bias="zero")) == "cudnn"
    full = dict(head_dim=128, kind=GPUS["a100"].kind, dtype="bfloat16")
    assert backend_of("gpu", **full, memory=Fam(3)) == "cudnn"
    assert backend_of("gpu", **full, memory=Fam(3, bias="zero")) == "xla"
    assert backend_of("gpu", dtype="bfloat16", memory=Fam(3), block_size=127) == "cudnn"
    assert backend_of("cpu") == "blockwise"
    assert backend_of("cpu", 2) == "xla" == backend_of("cpu", block_size=64)
    assert backend_of("rocm", dtype="bfloat16") == "xla"


def test_wide_heads_need_a_hopper_gpu(monkeypatch):
    wide = dict(dtype="bfloat16", head_dim=256)
    of = lambda kind, **changes: backend_of("gpu", kind=kind, **{**wide, **changes})
    for gpu in GPUS.values():
        assert of(gpu.kind) == ("xla" if "A100" in gpu.kind else "cudnn")
        assert of(gpu.kind, head_dim=128) == "cudnn"
    with pytest.raises(ConfigError) as caught:
        of(GPUS["a100"].kind, attention_backend="cudnn")
    assert str(caught.value) == (
        "attention_backend 'cudnn' needs a Hopper GPU or a later one for head_dim 256, more than 128, not"
        " NVIDIA A100-SXM4-80GB: choose auto or xla."
    )
    # A kind that is not in the table is asked, if it is there.
    assert of("NVIDIA X") == "xla" and of("NVIDIA X", attention_backend="cudnn") == "cudnn"
    for capability, backend in (("12.0", "cudnn"), ("8.6", "xla")):
        here = types.SimpleNamespace(device_kind="NVIDIA X", compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda here=here: [here])
        assert of("NVIDIA X") == backend
        assert of("NVIDIA Y") == "xla"


def test_a_chosen_backend_stays_or_is_refused():
    assert backend_of("tpu", attention_backend="xla") == "xla"
    assert backend_of("tpu", attention_backend="blockwise") == "blockwise"
    assert backend_of("tpu", attention_backend="splash") == "splash"
    assert backend_of("cuda", attention_backend="cudnn", dtype="bfloat16", head_dim=256) == "cudnn"
    with pytest.raises(ValueError, match="'splash' runs on TPU alone, not on CPU: choose auto or xla."):
        backend_of("cpu", attention_backend="splash")
    with pytest.raises(ValueError, match="'cudnn' runs on GPU alone, not on TPU"):
        backend_of("tpu", attention_backend="cudnn", dtype="bfloat16")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(attention_backend="splash", block_size=96), "multiple of 128, got 96"),
        (dict(attention_backend="splash", dtype="float64"), "bfloat16 or float32, not float64"),
        (dict(attention_backend="cudnn", dtype="float32"), "set dtype to bfloat16, not float32"),
        (
            dict(attention_backend="cudnn", attention_softcap=2.0),
            "does not support attention_softcap 2.0",
        ),
        (dict(attention_backend="cudnn", head_dim=12), "a multiple of 8 up to 256, got 12"),
        (dict(attention_backend="cudnn", head_dim=264), "a multiple of 8 up to 256, got 264"),
        (
            dict(attention_backend="cudnn", head_dim=256, memory=Fam(2, bias="zero")),
            "no room for what the memory's columns need beside a head_dim of 256",
        ),
        (
            dict(attention_backend="cudnn", memory_segments=0, window_mask=True),
            "does not support window_mask without memory_segments",
        ),
    ],
)
def test_what_a_backend_cannot_do_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(**{"block_size": SIZE, "head_dim": 8, "dtype": "bfloat16", **changes})
