"""What is adapted, the adapters' first values, and trees with and without them.

`R` is the rank. A kernel `[layers, *in, *out]` has the adapters `A [layers, *in, R]` and
`B [layers, R, *out]`; its update is `alpha / R * A B`.
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
from famx.modules import Decoder, DecoderConfig

GROUPS = {
    "attention": ("layers/query", "layers/key", "layers/value", "layers/output"),
    "feed_forward": ("layers/mlp/gate", "layers/mlp/up", "layers/mlp/down"),
}
ADAPTERS = ("lora_a", "lora_b")
SCALE = "kernel_scale"  # of an int8 kernel, see `famx.lora.int8`


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which projections get adapters, and how large these are.

    Attributes:
      rank: `R`.
      alpha: the update is `alpha / rank * A B`; None: equal to `rank`.
      dropout: probability that a number of the adapters' input is dropped, in training alone.
      targets: names of groups ("attention", "feed_forward"), or regular expressions that match
        whole paths such as "layers/query".
    """

    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention", "feed_forward")

    def __post_init__(self):
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)

    @property
    def scale(self) -> float:
        """What `A B` is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def check(self, config: DecoderConfig) -> None:
        """Whether a decoder of this config can have these adapters.

        Raises:
          ConfigError: rank, alpha, dropout or a target makes no sense.
        """
        tokens = jax.ShapeDtypeStruct((1, config.block_size), jnp.int32)
        self._kernels(jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"])

    def init(self, key, params) -> dict[str, Any]:
        """Adapters that change nothing yet: `A` is normal, `B` zero.

        Args:
          key: of the random numbers.
          params: the decoder's parameters, arrays or ShapeDtypeStructs, boxed or not.

        Returns:
          The leaves `lora_a` and `lora_b` alone, float32, in a tree like that of `params`. They are
          boxed with the logical axes of their kernel if that is; the axis of the rank is
          "lora_rank".

        Raises:
          ConfigError: rank, alpha, dropout or a target makes no sense.
        """
        adapters = {}
        for path, kernel in self._kernels(params).items():
            shape, n = value(kernel).shape, inputs_end(path)
            std = math.prod(shape[1:n]) ** -0.5
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            a = std * jax.random.normal(own, (*shape[:n], self.rank), jnp.float32)
            b = jnp.zeros((shape[0], self.rank, *shape[n:]), jnp.float32)
            if isinstance(kernel, nn.Partitioned):
                names = kernel.names
                a = kernel.replace(value=a, names=(*names[:n], "lora_rank"))
                b = kernel.replace(value=b, names=(names[0], "lora_rank", *names[n:]))
            adapters[f"{path}/lora_a"], adapters[f"{path}/lora_b"] = a, b
        return unflatten_dict(adapters, sep="/")

    def _kernels(self, params) -> dict[str, Any]:
        """The kernels of the targets by path, after a check of everything."""
        if self.rank < 1:
            raise ConfigError(f"The rank of LoRA must be at least 1; it is {self.rank}.")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(
                f"LoRA's alpha is {self.alpha}; it must be positive, or None for the rank itself."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA's dropout is {self.dropout}; it must lie in [0, 1).")
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
    """Where the input axes of the kernel at `path` end; the first axis is that of the layers."""
    return 3 if path.endswith("output") else 2  # heads and their width


def select(params, targets: Iterable[str]) -> dict[str, Any]:
    """The kernels of the projections that `targets` name, by the projection's path.

    Raises:
      ConfigError: a target fits no projection.
    """
    flat = flatten_dict(params, sep="/")
    kernels = {p.removesuffix("/kernel"): x for p, x in flat.items() if p.endswith("/kernel")}
    chosen = set()
    for target in targets:
        try:
            found = [p for p in kernels if p in GROUPS.get(target, ()) or re.fullmatch(target, p)]
        except re.error as error:
            raise ConfigError(f"The target {target!r} is no regular expression: {error}.") from None
        if not found:
            known = [*GROUPS, *kernels]
            near = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
            raise ConfigError(
                f"No projection is called {target!r}.{''.join(f' Did you mean {x!r}?' for x in near)}"
                f" There are the groups {', '.join(GROUPS)} and the paths {', '.join(kernels)}."
            )
        chosen.update(found)
    if not chosen:
        raise ConfigError(f"LoRA's targets are empty: name groups ({', '.join(GROUPS)}) or paths.")
    return {path: kernel for path, kernel in kernels.items() if path in chosen}


def combine(params, adapters) -> dict[str, Any]:
    """One tree of both: the leaves of `adapters` are put beside, or in the place of, others."""
    flat = {**flatten_dict(params, sep="/"), **flatten_dict(adapters, sep="/")}
    return unflatten_dict(flat, sep="/")


def split(tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(params, adapters)` of a combined tree."""
    flat = flatten_dict(tree, sep="/")
    parts = {}, {}
    for path, leaf in flat.items():
        parts[path.endswith(ADAPTERS)][path] = leaf
    params, adapters = (unflatten_dict(part, sep="/") for part in parts)
    return params, adapters


def merged(tree, lora: Lora | None = None, dtype=None):
    """The parameters of a decoder without adapters and int8 kernels that computes the same.

    Args:
      tree: combined and unboxed.
      lora: what the adapters belong to; None if there are none.
      dtype: of the kernels that change; None: as they are, and float32 for those of int8.

    Returns:
      `W + alpha / R * A B`, computed in float32 at least, in the place of each kernel; `tree` itself
      where nothing is to be merged.
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
    """The kernel at `path` of a flat tree, float32 at least."""
    kernel = flat[f"{path}/kernel"]
    if f"{path}/{SCALE}" not in flat:
        return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    scale, n = flat[f"{path}/{SCALE}"], inputs_end(path)
    return kernel * jnp.expand_dims(scale, range(1, n))


def _product(a, b):
    """`A B` layer by layer; a GPU or TPU would round the factors without the precision."""
    times = lambda a, b: jnp.tensordot(a, b, axes=1, precision="highest")
    return jax.vmap(times)(a, b)


def value(leaf):
    """A leaf without its box."""
    return leaf.value if isinstance(leaf, nn.Partitioned) else leaf
