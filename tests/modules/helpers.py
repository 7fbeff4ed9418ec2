"""Small configurations, parameters without compilation, and jitted calls that are compiled once."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from compiling import COMPILE_FAST

from famx.memories import Fam
from famx.modules import Decoder, DecoderConfig, Memory

VOCAB = 13


def fam(length: int) -> Memory:
    """FAM of this length; without memory where it is 0."""
    return Fam(length) if length else Memory()


def config(**changes) -> DecoderConfig:
    """Two small layers of FAM, with `changes`."""
    sizes = dict(vocab_size=VOCAB, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12)
    memory = dict(block_size=4, memory_segments=1, memory=Fam(2))
    return DecoderConfig(**{**sizes, **memory, **changes})


@functools.cache
def shapes(config: DecoderConfig):
    """The parameter tree as ShapeDtypeStructs, unboxed."""
    init = functools.partial(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    with precision(config):
        return nn.unbox(jax.eval_shape(init))["params"]


def random_params(config: DecoderConfig, seed: int = 0):
    """Parameters as numpy arrays in which every leaf, biases and scales too, is random."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        x = rng.standard_normal(leaf.shape)
        if name.endswith(("scale", "rms")):
            x = 1 + 0.3 * x
        elif name.endswith("bias"):
            x = 0.3 * x
        elif name.endswith("output/kernel"):
            x = x / np.sqrt(leaf.shape[1] * leaf.shape[2])
        elif name.endswith("kernel"):
            x = x / np.sqrt(leaf.shape[1])
        elif name == "head":
            x = x / np.sqrt(leaf.shape[0])
        if "adapters/" in name:  # smaller than what they are added to, as adapters are
            x = 0.5 * x
        # Sharp attention, so that a wrong mask or position is seen in the logits.
        return (2 * x if name.endswith("/query/kernel") else x).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes(config))


def random_tokens(batch: int, length: int, seed: int = 0):
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length), dtype=np.int32)


def precision(config: DecoderConfig):
    """The context in which a float64 model is traced and run."""
    return jax.enable_x64(config.dtype == "float64")


def jit(config: DecoderConfig, function):
    """`jax.jit(function)`, run with float64 enabled where the model needs it."""
    jitted = jax.jit(function, compiler_options=COMPILE_FAST)

    def run(*args, **kwargs):
        with precision(config):
            return jitted(*args, **kwargs)

    return run


@functools.cache
def reader(config: DecoderConfig, aligned: bool = False):
    """Jitted `f(params, tokens, state, valid)` of `Decoder.__call__`, one for each config."""

    def call(params, tokens, state, valid):
        return Decoder(config).apply({"params": params}, tokens, state, valid, aligned)

    return jit(config, call)


def read(config: DecoderConfig, params, tokens, state=None, valid=None, aligned=False):
    """Logits and state of `Decoder.__call__`, jitted."""
    return reader(config, aligned)(params, tokens, state, valid)


@functools.cache
def _initial(config, batch):
    call = lambda params: Decoder(config).apply({"params": params}, batch, method="initial_state")
    return jit(config, call)


def initial(config: DecoderConfig, params, batch: int):
    """`Decoder.initial_state` for `batch` examples, jitted."""
    return _initial(config, batch)(params)


def difference(a, b) -> float:
    """The largest absolute difference of two trees of equal structure, in float64."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape, (x.shape, y.shape)
        if x.size:
            gap = np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))
            worst = max(worst, float(gap.max()))
    return worst


def assert_close(a, b, tolerance: float):
    """Two trees of arrays agree to `tolerance`, absolutely."""
    gap = difference(a, b)
    assert gap <= tolerance, f"differs by {gap:.3g}, more than {tolerance:.3g}"
