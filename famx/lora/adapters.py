"""Which kernels have adapters, the adapters' initial values, and merging them into the kernels.

`R` is the rank. A kernel `[layers, *in, *out]` has the adapters `A [layers, *in, R]` and
`B [layers, R, *out]`, which add `alpha / R * A B` to it.
"""

import dataclasses
import difflib
import math
import re
import zlib
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from famx.base.errors import ConfigError
from famx.base.ranges import Name, Positive, Rate, ShareBelowOne
from famx.base.values import checked
from famx.modules import Decoder, DecoderConfig
from famx.modules.frontends import Frontend
from famx.modules.memory import of_memory

GROUPS = {
    "attention": ("layers/query", "layers/key", "layers/value", "layers/output"),
    "feed_forward": ("layers/mlp/gate", "layers/mlp/up", "layers/mlp/down"),
}
ADAPTERS = ("lora_a", "lora_b")
_OUTSIDE = ("frontend", "value_head")  # modules whose kernels are no projections
SCALE = "kernel_scale"  # the leaf next to an int8 kernel, see `famx.lora.int8`


@checked
@dataclasses.dataclass(frozen=True)
class Lora:
    """Settings of the adapters.

    Attributes:
      rank: rank `R` of `A B`.
      alpha: numerator of the scale `alpha / rank`; None: `rank`, so that the scale is 1.
      dropout: probability of dropping each element of the adapters' input, only in training.
      targets: projections that have adapters: names of groups ("attention", "feed_forward"), or regular
        expressions that match whole paths such as "layers/query".
    """

    rank: Positive = 64
    alpha: Rate | None = None
    dropout: ShareBelowOne = 0.0
    targets: Name | tuple[Name, ...] = ("attention", "feed_forward")

    def __post_init__(self):
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)

    @property
    def scale(self) -> float:
        """Factor of `A B`: `alpha / rank`."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def check(self, config: DecoderConfig) -> None:
        """Check that a decoder of this config can have these adapters.

        Raises:
          ConfigError: the rank or a target does not fit.
        """
        tokens = jax.ShapeDtypeStruct((1, config.block_size), jnp.int32)
        config = dataclasses.replace(config, frontend=Frontend())  # which no adapter changes
        self._kernels(jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"])

    def init(self, key, params) -> dict[str, Any]:
        """Initialize the adapters: `A` normal with standard deviation `in ** -0.5`, `B` zero.

        Since `A B` is zero, the model computes the same as without adapters.

        Args:
          key: random key.
          params: the decoder's parameters, arrays or ShapeDtypeStructs, boxed or not.

        Returns:
          A tree like `params` with only the leaves `lora_a` and `lora_b`, float32. They are boxed with
          the logical axes of their kernel if the kernel is boxed; the axis of the rank is "lora_rank".

        Raises:
          ConfigError: the rank or a target does not fit.
        """
        adapters = {}
        for path, kernel in self._kernels(params).items():
            shape, n = value(kernel).shape, inputs_end(path)
            std = math.prod(shape[1:n]) ** -0.5
            path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            a = std * jax.random.normal(path_key, (*shape[:n], self.rank), jnp.float32)
            b = jnp.zeros((shape[0], self.rank, *shape[n:]), jnp.float32)
            if isinstance(kernel, nn.Partitioned):
                names = kernel.names
                a = kernel.replace(value=a, names=(*names[:n], "lora_rank"))
                b = kernel.replace(value=b, names=(names[0], "lora_rank", *names[n:]))
            adapters[f"{path}/lora_a"], adapters[f"{path}/lora_b"] = a, b
        return unflatten_dict(adapters, sep="/")

    def _kernels(self, params) -> dict[str, Any]:
        """The kernels of the targets by path; ConfigError if the rank does not fit one of them."""
        kernels = select(params, self.targets)
        for path, kernel in kernels.items():
            shape, n = value(kernel).shape, inputs_end(path)
            width = min(math.prod(shape[1:n]), math.prod(shape[n:]))
            if self.rank > width:
                raise ConfigError(
                    f"The rank of LoRA is {self.rank}, but {path} is only {width} wide, which is the"
                    f" largest rank it can use: set the rank to at most {width}, or leave {path}"
                    " out of the targets."
                )
        return kernels


def inputs_end(path: str) -> int:
    """Index after the last input axis of the stacked kernel at `path`; axis 0 is the layer."""
    return 3 if path.endswith("output") else 2  # `output` reads two axes, heads and head width


def select(params, targets: Iterable[str]) -> dict[str, Any]:
    """Kernels of the projections that `targets` name, by the path of the projection.

    Raises:
      ConfigError: a target matches no projection, or there are no targets.
    """
    flat = flatten_dict(params, sep="/")
    outside = lambda path: of_memory(path) or path.partition("/")[0] in _OUTSIDE
    flat = {path: leaf for path, leaf in flat.items() if not outside(path)}
    kernels = {p.removesuffix("/kernel"): x for p, x in flat.items() if p.endswith("/kernel")}
    chosen = set()
    for target in targets:
        try:
            matches = [p for p in kernels if p in GROUPS.get(target, ()) or re.fullmatch(target, p)]
        except re.error as error:
            raise ConfigError(f"The target {target!r} is not a regular expression: {error}.") from None
        if not matches:
            known = [*GROUPS, *kernels]
            near = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
            raise ConfigError(
                f"No projection is named {target!r}.{''.join(f' Did you mean {x!r}?' for x in near)}"
                f" The groups are {', '.join(GROUPS)}; the paths are {', '.join(kernels)}."
            )
        chosen.update(matches)
    if not chosen:
        raise ConfigError(f"LoRA's targets are empty: name groups ({', '.join(GROUPS)}) or paths.")
    return {path: kernel for path, kernel in kernels.items() if path in chosen}


def combine(params, adapters) -> dict[str, Any]:
    """One tree with the leaves of both; those of `adapters` replace leaves of the same path."""
    flat = {**flatten_dict(params, sep="/"), **flatten_dict(adapters, sep="/")}
    return unflatten_dict(flat, sep="/")


def split(tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a combined tree into `(params, adapters)`."""
    flat = flatten_dict(tree, sep="/")
    parts = {}, {}
    for path, leaf in flat.items():
        parts[path.endswith(ADAPTERS)][path] = leaf
    params, adapters = (unflatten_dict(part, sep="/") for part in parts)
    return params, adapters


def merged(tree, lora: Lora | None = None, dtype=None):
    """Merge adapters and int8 scales into plain kernels that compute the same.

    Args:
      tree: parameters with adapters or int8 kernels, unboxed.
      lora: settings of the adapters; None if there are none.
      dtype: dtype of the merged kernels; None: that of the kernel, and float32 for int8 kernels.

    Returns:
      The tree with `W + alpha / R * A B`, computed in at least float32, in place of each kernel; `tree`
      itself if there is nothing to merge.
    """
    flat = flatten_dict(tree, sep="/")
    extra = {path for path in flat if path.endswith((*ADAPTERS, SCALE))}
    if not extra:
        return tree
    params = {path: leaf for path, leaf in flat.items() if path not in extra}
    for path in sorted({path.rpartition("/")[0] for path in extra}):
        kernel, stored = dequantized(flat, path), flat[f"{path}/kernel"].dtype
        target = dtype or (jnp.float32 if stored == jnp.int8 else stored)
        if f"{path}/lora_a" in flat:
            a, b = (flat[f"{path}/{name}"].astype(kernel.dtype) for name in ADAPTERS)
            kernel = kernel + lora.scale * _product(a, b)
        params[f"{path}/kernel"] = kernel.astype(target)
    return unflatten_dict(params, sep="/")


def dequantized(flat, path: str):
    """The kernel at `path` of a flat tree, in at least float32, times its int8 scale if it has one."""
    kernel = flat[f"{path}/kernel"]
    if f"{path}/{SCALE}" not in flat:
        return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    scale, n = flat[f"{path}/{SCALE}"], inputs_end(path)
    return kernel * jnp.expand_dims(scale, range(1, n))


def _product(a, b):
    """`A B` of each layer."""
    # At the default precision GPUs and TPUs would round the factors.
    times = lambda a, b: jnp.tensordot(a, b, axes=1, precision="highest")
    return jax.vmap(times)(a, b)


def value(leaf):
    """The array of a leaf, which may be boxed."""
    return leaf.value if isinstance(leaf, nn.Partitioned) else leaf
