"""Selection of the parameters that learn; the others have neither gradient nor optimiser state.

| `TRAINABLE` | what learns |
|---|---|
| `all` | everything |
| `lora` | the adapters (`famx.lora`) and the memory's own parameters, such as FAM's prompt |
| `memory` | the memory alone: its parameters, or the state that every example begins from |
| a regular expression | parameters whose whole path matches, such as `layers/mlp/.*` |
"""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from famx.base.errors import ConfigError
from famx.lora import combine, quantize
from famx.lora.adapters import ADAPTERS
from famx.modules.memory import of_memory

NAMES = ("all", "lora", "memory")
FROZEN_DTYPES = ("float32", "bfloat16", "int8")
_WIDE = ("kernel", "embedding", "head")  # matrices; norms and biases are small


@dataclasses.dataclass(frozen=True)
class Trainable:
    """Which parameters learn, and how the others are stored.

    Attributes:
      name: one of the names in the module's table, or a regular expression.
      frozen_dtype: dtype of matrices that do not learn: "float32", "bfloat16", or "int8" for projections
        with bfloat16 for the other matrices; None: unchanged.

    Raises:
      ConfigError: on construction, if a value is not valid.
    """

    name: str = "all"
    frozen_dtype: str | None = None

    def __post_init__(self):
        if self.frozen_dtype not in (None, *FROZEN_DTYPES):
            raise ConfigError(
                f"FROZEN_DTYPE must be None or one of {', '.join(FROZEN_DTYPES)}; got"
                f" {self.frozen_dtype!r}."
            )
        try:
            re.compile(self.name)
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"TRAINABLE {self.name!r} is neither one of {', '.join(NAMES)} nor a regular"
                f" expression: {error}."
            ) from error

    def learns(self, path: str) -> bool:
        """Whether the parameter at `path`, such as "layers/query/kernel", learns."""
        if self.name == "all":
            return True
        if self.name in ("lora", "memory"):
            adapter = path.endswith(ADAPTERS) and self.name == "lora"
            return adapter or of_memory(path)
        return re.fullmatch(self.name, path) is not None

    def check(self, params) -> None:
        """Raises ConfigError unless at least one of the parameters learns."""
        paths = list(flatten_dict(params, sep="/"))
        if self.name == "lora" and not any(path.endswith(ADAPTERS) for path in paths):
            raise ConfigError("TRAINABLE is 'lora', but the model has no adapters: set LORA=@Lora().")
        if not any(self.learns(path) for path in paths):
            why = "the model has no memory" if self.name in NAMES else "it matches no whole path"
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
