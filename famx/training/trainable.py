"""Selection of the parameters that learn; the others have neither gradient nor optimiser state.

| `TRAINABLE` | what learns |
|---|---|
| `all` | everything |
| `lora` | the adapters (`famx.lora`) and the memory's own parameters, such as FAM's prompt |
| `memory` | the memory alone: its parameters, or the state that every example begins from |
| `norms` | the scales and biases of all norms |
| several of these | `lora+norms`: all that one of them names |
| a regular expression | parameters whose whole path matches, such as `layers/mlp/.*` |

What is measured of a memory (`famx.modules.memory.MEASURED`) never learns. The optimisers name parts of
the parameters in the same way.
"""

import dataclasses
import re
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from famx.base.errors import ConfigError
from famx.base.ranges import Name
from famx.base.values import checked
from famx.lora import combine, quantize
from famx.lora.adapters import ADAPTERS
from famx.modules.memory import is_measured, of_memory

NAMES = ("all", "lora", "memory", "norms")
_WIDE = ("kernel", "embedding", "head")  # matrices; norms and biases are small


def names_of(part: str) -> set[str] | None:
    """The names of the module's table that `part` is made of; None if it is a regular expression."""
    names = set(part.split("+"))
    return names if names <= set(NAMES) else None


def in_part(part: str, path: str) -> bool:
    """Whether a part of the module's table has the parameter at `path`, such as "layers/query/kernel"."""
    if is_measured(path):
        return False
    names = names_of(part)
    if names is None:
        return re.fullmatch(part, path) is not None
    of_norm = not of_memory(path) and any(word.endswith("norm") for word in path.split("/"))
    return (
        "all" in names
        or ("lora" in names and path.endswith(ADAPTERS))
        or (bool(names & {"lora", "memory"}) and of_memory(path))
        or ("norms" in names and of_norm)
    )


@checked
@dataclasses.dataclass(frozen=True)
class Trainable:
    """Which parameters learn, and how the others are stored.

    Attributes:
      name: a part of the module's table.
      frozen_dtype: dtype of matrices that do not learn: "float32", "bfloat16", or "int8" for projections
        with bfloat16 for the other matrices; None: unchanged.

    Raises:
      ConfigError: on construction, if `name` is no part and no regular expression.
    """

    name: Name = "all"
    frozen_dtype: Literal["float32", "bfloat16", "int8"] | None = None

    def __post_init__(self):
        try:
            re.compile(self.name)
        except re.error as error:
            raise ConfigError(
                f"TRAINABLE {self.name!r} is neither one of {', '.join(NAMES)} nor a regular"
                f" expression: {error}."
            ) from error

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are among what learns, so that the model gets some."""
        return "lora" in (names_of(self.name) or ())

    def learns(self, path: str) -> bool:
        """Whether the parameter at `path`, such as "layers/query/kernel", learns."""
        return in_part(self.name, path)

    def check(self, params) -> None:
        """Raises ConfigError unless at least one of the parameters learns."""
        paths = list(flatten_dict(params, sep="/"))
        if self.has_adapters and not any(path.endswith(ADAPTERS) for path in paths):
            raise ConfigError(
                f"TRAINABLE is {self.name!r}, but the model has no adapters: set LORA=@Lora()."
            )
        if not any(self.learns(path) for path in paths):
            why = "the model has no memory" if names_of(self.name) else "it matches no whole path"
            raise ConfigError(
                f"TRAINABLE {self.name!r} leaves nothing to learn: {why}; the parameters are"
                f" {', '.join(paths)}."
            )

    def freeze(self, params) -> dict[str, Any]:
        """`params`, boxed or not, with the matrices that do not learn in `frozen_dtype`."""
        if self.frozen_dtype is None:
            return params
        flat = flatten_dict(params, sep="/")
        frozen = {path for path in flat if not self.learns(path)}
        narrow = "bfloat16" if self.frozen_dtype == "int8" else self.frozen_dtype
        frozen = {path for path in frozen if not of_memory(path)}
        int8 = [p.removesuffix("/kernel") for p in sorted(frozen) if p.endswith("/kernel")]
        for path in frozen:
            if path.rpartition("/")[2] in _WIDE and nn.unbox(flat[path]).dtype != jnp.int8:
                to_int8 = self.frozen_dtype == "int8" and path.endswith("/kernel")
                flat[path] = (
                    flat[path] if to_int8 else jax.tree.map(lambda leaf: leaf.astype(narrow), flat[path])
                )
        params = unflatten_dict(flat, sep="/")
        return quantize(params, map(re.escape, int8)) if self.frozen_dtype == "int8" and int8 else params

    def part(self, params) -> dict[str, Any]:
        """The parameters that learn."""
        if self.name == "all":
            return params
        flat = flatten_dict(params, sep="/")
        return unflatten_dict({p: leaf for p, leaf in flat.items() if self.learns(p)}, sep="/")

    def put(self, params, part):
        """`params` with `part` in place of the parameters that learn."""
        return part if self.name == "all" else combine(params, part)
