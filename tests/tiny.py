"""Tiny models and tasks for tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import unbox

from famx.data import PasskeyTask
from famx.memories import Fam
from famx.models import DecoderModel
from famx.modules import Decoder, DecoderConfig, Memory

BLOCK = 8  # S
BLOCKS = 4  # the fewest that hold a row of `passkey`


def fam(length: int) -> Memory:
    """FAM of this length; without memory where it is 0."""
    return Fam(length) if length else Memory()


def make_model(random_position_offset=False, **changes) -> DecoderModel:
    """A decoder of one layer, width 16 and blocks of 8 tokens."""
    sizes = dict(
        vocab_size=260,  # enough for words and for bytes
        num_layers=1,
        embed_dim=16,
        num_heads=2,
        mlp_dim=32,
        block_size=BLOCK,
        memory_segments=1,
        memory=Fam(2),
    )
    module = Decoder(DecoderConfig(**{**sizes, **changes}))
    return DecoderModel(module, random_position_offset=random_position_offset)


@functools.cache
def make_params(module: Decoder, seed=0):
    """Unboxed random parameters, cached by the arguments and drawn without compiling."""
    tokens = np.zeros((1, module.config.block_size), np.int32)
    shapes = unbox(jax.eval_shape(module.init, jax.random.key(0), tokens)["params"])
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        scale = any("norm" in str(key) for key in path)
        values = rng.normal(1.0 if scale else 0.0, 0.1 if scale else 0.3, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def passkey(**changes) -> PasskeyTask:
    """PassKey of one digit without header; the shortest row takes 4 blocks."""
    return PasskeyTask(**{"digits": 1, "header": False, "filler": "random_words", **changes})


def make_tokens(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 100, shape).astype(np.int32)


def assert_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b)


def assert_identical(a, b):
    """The same trees, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
