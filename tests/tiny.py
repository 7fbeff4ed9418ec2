"""Tiny models and tasks for tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import unbox

from famx.data import PasskeyTask
from famx.memories import Fam
from famx.models import DecoderModel
from famx.modules import Decoder, DecoderConfig, Memory
from famx.training.run import Data, Run

BLOCK = 8  # S
BLOCKS = 4  # the fewest that hold a row of `passkey`


def fam(length: int) -> Memory:
    """FAM of this length, or no memory if it is 0."""
    return Fam(length) if length else Memory()


def make_model(
    random_position_offset=False, lora=None, vocabulary=None, loss_chunk=None, **changes
) -> DecoderModel:
    """A decoder of one layer, width 16 and blocks of 8 tokens; `changes` replace config fields."""
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
    return DecoderModel(
        module, vocabulary, random_position_offset, lora=lora, loss_chunk=loss_chunk
    )


def make_run(**changes) -> Run:
    """A run of the tiny model on PassKey; `changes` replace fields of `Run` and of its `Data`."""
    of_data = {field.name for field in dataclasses.fields(Data)}
    data = dict(
        task="passkey_words",
        lengths={"targets": BLOCKS * BLOCK},
        batch_size=2,
        options={"digits": 1, "header": False, "filler": "random_words"},
    )
    settings = dict(model=None, optimizer=optax.sgd(0.1), steps=1)
    for name, value in changes.items():
        (data if name in of_data else settings)[name] = value
    settings["model"] = settings["model"] or make_model()
    return Run(**{"data": Data(**data), **settings})


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
