"""Attention of tokamax, where that library is installed, by whichever of its kernels fits the device.

Only its public interface is used, which takes no intervals of columns: the window of each block is copied
together and masked by an array of bools, without a gradient.
"""

import sys

from jax.ad_checkpoint import checkpoint_name

from famx.modules.attention import dense
from famx.modules.attention.common import ATTENTION_RESULT


def attention(config, q, *rest):
    """`token_attention` with the config first."""
    import tokamax  # optional; `famx.modules.backends.refusal` says so where it is missing
    from absl import flags

    if not flags.FLAGS.is_parsed():  # else tokamax would parse the arguments of whichever program this is
        flags.FLAGS(sys.argv[:1])
    keys, values, mask = dense.windows(config, *rest)
    out = tokamax.dot_product_attention(
        q, keys, values, mask=mask[:, :, None], scale=float(config.query_scale),
        logits_soft_cap=config.attention_softcap,
    )  # fmt: skip
    return checkpoint_name(out, ATTENTION_RESULT)
