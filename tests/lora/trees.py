"""Decoders of several styles with random adapters, and their logits with and without `intercept`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from compiling import COMPILE_FAST
from modules.helpers import config, precision, random_params

from famx.lora import Lora, combine, intercept, merged
from famx.memories import Fam
from famx.modules import Decoder, Memory

DOUBLE = dict(dtype="float64", param_dtype="float64")
STYLES = {
    "GQA, gated": dict(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm=True),
    "MQA, plain, biases": dict(
        num_kv_heads=1, gated_mlp=False, qkv_bias=True, output_bias=True, mlp_bias=True
    ),
    "parallel": dict(parallel_block=True, memory=Fam(2, normalize=True, update="gated")),
    "BSWA": dict(memory=Memory(), window_mask=True, memory_segments=2),
}
LORA = Lora(rank=3, alpha=4.5)


def adapters_of(params, lora=LORA, seed=0):
    """Adapters in which `B` is random too, numpy float32."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lora.init, jax.random.key(0), params)
    draw = lambda x: (rng.standard_normal(x.shape) * 0.3).astype(np.float32)
    return jax.tree.map(draw, shapes)


def adapted(lora=LORA, **changes):
    """`(config, params, combined tree)`."""
    c = config(**changes)
    params = random_params(c)
    return c, params, combine(params, adapters_of(params, lora))


def logits(c, tree, tokens, lora=LORA, rng=None):
    """Logits of the combined tree, or of a plain one if `lora` is None."""

    def apply(tree, rng):
        if lora is None:
            return Decoder(c).apply({"params": tree}, tokens)[0]
        with intercept(lora, rng):
            return Decoder(c).apply({"params": tree}, tokens)[0]

    with precision(c):
        return np.asarray(jax.jit(apply, compiler_options=COMPILE_FAST)(tree, rng))


def merged_logits(c, tree, tokens, dtype=None):
    """Logits of the merged tree by a plain decoder."""
    with precision(c):
        params = merged(tree, LORA, dtype)
    return logits(c, params, tokens, None)


@functools.cache
def loss_of(c, lora=LORA):
    """A function of `(adapters, params, tokens, rng)` whose gradient reaches every adapter."""

    def loss(adapters, params, tokens, rng=None):
        with intercept(lora, rng):
            hidden = Decoder(c).apply({"params": combine(params, adapters)}, tokens, method="read")[0]
        return jnp.mean(jnp.square(hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))))

    return loss
