"""Parameters prepared for reading without gradients: what every token would make of them is made once."""

import operator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from famx.modules.components import JOINT, joint
from famx.modules.config import DecoderConfig
from famx.modules.memory import of_memory
from famx.modules.weights import one_device

# Projections of the same array. In the order of the arguments of `Projection.jointly`.
_TOGETHER = (("query", "key", "value"), ("mlp/gate", "mlp/up"))
_OWN = {"kernel", "bias"}  # leaves of a projection that nothing is added to (adapters, int8 scales)


def computing(params, config: DecoderConfig, tables: bool):
    """The decoder's parameters, those that are used only in the compute dtype in that dtype.

    A decoder computes the same with them, bit for bit. Norms are float32, and how a memory uses its
    own parameters is not known here; both stay as they are.

    Args:
      params: parameters of a decoder, boxed or not.
      config: its configuration.
      tables: whether to cast the embedding and output tables too: logits need all of them, an embedding
        only a few rows.
    """
    flat = traverse_util.flatten_dict(nn.unbox(params), sep="/")
    for path, leaf in flat.items():
        *module, name = path.split("/")
        table = tables and not module and name in ("embedding", "head")
        of_projection = name in _OWN and "/".join((*module, "kernel")) in flat
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        if (table or of_projection) and real and not of_memory(path):
            flat[path] = leaf.astype(config.dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def with_joint_kernels(params):
    """The decoder's parameters with the kernels of projections of the same array next to each other, too.

    Not on several devices, where the shards of a joint kernel would not be those of its parts.
    """
    if not one_device():
        return params
    flat = traverse_util.flatten_dict(params["layers"], sep="/")
    for paths in _TOGETHER:
        leaves = {p.removeprefix(f"{path}/") for path in paths for p in flat if p.startswith(f"{path}/")}
        kernels = [flat[f"{path}/kernel"] for path in paths if f"{path}/kernel" in flat]
        if len(kernels) == len(paths) and leaves <= _OWN:
            flat[f"{paths[0]}/{JOINT}"] = jax.vmap(lambda *of_layer: joint(of_layer))(*kernels)
    return {**params, "layers": traverse_util.unflatten_dict(flat, sep="/")}


def apart(tree) -> list:
    """The tree of each layer, in arrays of its own: a loop over tokens then takes no parts of stacks."""
    count = jax.tree.leaves(tree)[0].shape[0]
    return [jax.tree.map(operator.itemgetter(i), tree) for i in range(count)]
