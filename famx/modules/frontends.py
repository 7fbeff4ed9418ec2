"""Frontends: what a decoder reads at each position: tokens, vectors, ids, or a mixture of these.

A frontend is a frozen dataclass, `DecoderConfig.frontend`; `Frontend`, the default, reads tokens by the
embedding table. `build` makes the Flax module of another one. All these modules have one signature:

    module(inputs, tokens) -> [..., D]

`inputs` is a dict of arrays by name of feature, `[..., width]` or `[...]`, and `tokens` a function from
ids to rows of the embedding table. Rows have an expected norm of 1, as those of the table. Each position
is embedded by itself, so that state, streaming and padding are those of tokens. A frontend of your own
is a subclass with a `kind` of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from famx.base.features import KINDS, TOKENS, Feature
from famx.base.ranges import Name, Positive, Sizes
from famx.base.values import checked
from famx.modules.kinds import described
from famx.modules.products import product

Inputs = Mapping[str, jax.Array]
_KINDS: dict[str, type["Frontend"]] = {}


@checked
@dataclasses.dataclass(frozen=True)
class Frontend:
    """Reads tokens: int32 ids, rows of the embedding table. Base class of the others.

    Class attributes:
      kind: name in model.json and in error messages; each subclass has its own.
    """

    kind: ClassVar[str] = "tokens"

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            _KINDS[cls.kind] = cls

    @property
    def features(self) -> tuple[Feature, ...]:
        """The features that are read."""
        return (TOKENS,)

    @property
    def reads_tokens(self) -> bool:
        """Whether a sequence may consist of tokens alone, as where text is written."""
        return TOKENS in self.features

    @property
    def is_tokens(self) -> bool:
        """Whether it reads tokens alone, by the embedding table, and has no module."""
        return self.kind == Frontend.kind

    def accepts(self, features: bool) -> bool:
        """Whether features, or else ids of tokens, may be given; if not, `refusal` says why."""
        return not self.is_tokens if features else self.reads_tokens

    def refusal(self, features: bool) -> str:
        """The sentence about features that are given where tokens are read, or about the contrary."""
        if features:
            return "The model reads tokens alone: give ids, or set DecoderConfig.frontend."
        wanted = " and ".join(map(str, self.features))
        return f"The model reads {wanted}, not text: give these features at each position."

    def build(self, config: Any) -> nn.Module:
        """The module; `config` is the `DecoderConfig`."""
        return _Tokens()

    def to_dict(self) -> dict[str, Any]:
        """`kind` and every field, as plain values that JSON can hold."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> "Frontend":
        """The frontend with these fields, plain values as JSON holds them."""
        return cls(**fields)


@checked
@dataclasses.dataclass(frozen=True)
class Vectors(Frontend):
    """Reads vectors: patches of an image, frames of sound, channels of sensors.

    Attributes:
      name: name of the feature.
      width: numbers per position, which should be of the order of 1.
      hidden: width of a hidden layer (GELU); None: one linear map.
    """

    kind: ClassVar[str] = "vectors"
    name: Name
    width: Positive
    hidden: Positive | None = None

    @property
    def features(self):
        return (Feature(self.name, self.width),)

    def build(self, config):
        return _Vectors(self, config)


@checked
@dataclasses.dataclass(frozen=True)
class Ids(Frontend):
    """Reads several ids at each position, such as the two nodes of an edge; sums their embeddings.

    Attributes:
      name: name of the feature, int32 `[B, L, len(sizes)]`.
      sizes: number of ids of each column; each has a table of its own. An id beyond adds nothing.
    """

    kind: ClassVar[str] = "ids"
    name: Name
    sizes: Sizes

    def __post_init__(self):
        object.__setattr__(self, "sizes", tuple(self.sizes))  # lists come from gin and JSON

    @property
    def features(self):
        return (Feature(self.name, len(self.sizes), "int32"),)

    def build(self, config):
        return _Ids(self, config)


@checked
@dataclasses.dataclass(frozen=True)
class Mixed(Frontend):
    """Reads sequences of several kinds; the feature `kinds` says which of the parts reads a position.

    Attributes:
      parts: the frontends; position `i` is read by `parts[kinds[i]]`.
    """

    kind: ClassVar[str] = "mixed"
    parts: tuple[Frontend, ...]

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple(self.parts))
        if len(self.parts) < 2 or any(isinstance(part, Mixed) for part in self.parts):
            raise ValueError("A mixed frontend needs two parts at least, and none of them may be mixed.")
        names = [feature.name for part in self.parts for feature in part.features]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated or KINDS.name in names:
            raise ValueError(
                f"The parts of a mixed frontend read {', '.join(names)}: each needs a name of its own,"
                " and none may be named 'kinds'."
            )

    @property
    def features(self):
        return (*(feature for part in self.parts for feature in part.features), KINDS)

    def build(self, config):
        return _Mixed(self, config)

    def to_dict(self):
        return {"kind": self.kind, "parts": [part.to_dict() for part in self.parts]}

    @classmethod
    def of_fields(cls, fields):
        return cls(**{**fields, "parts": tuple(from_dict(part) for part in fields.get("parts", ()))})


_KINDS[Frontend.kind] = Frontend


def kinds() -> dict[str, type[Frontend]]:
    """The classes that are known, by their `kind`."""
    return dict(_KINDS)


def from_dict(fields: dict[str, Any]) -> Frontend:
    """The frontend that `Frontend.to_dict` described.

    Raises:
      ValueError: no imported module defines such a frontend, or it has other fields.
    """
    kind, fields = described(_KINDS, "frontend", fields)
    return kind.of_fields(fields)


class _Tokens(nn.Module):
    """Rows of the embedding table."""

    @nn.compact
    def __call__(self, inputs: Inputs, tokens: Callable):
        return tokens(inputs[TOKENS.name])


class _Vectors(nn.Module):
    """A linear map, or two with a GELU between them, of vectors `[..., W]` to `[..., D]`."""

    frontend: Vectors
    config: Any

    @nn.compact
    def __call__(self, inputs: Inputs, tokens: Callable):
        c, f = self.config, self.frontend
        x = inputs[f.name].astype(c.dtype)
        if f.hidden is not None:
            x = nn.gelu(_affine(self, "hidden", x, f.hidden, None, 1.0))
        return _affine(self, "", x, c.embed_dim, "embed", 1 / c.embed_dim)


class _Ids(nn.Module):
    """The sum of a row of each of several tables, which are one parameter `[sum(sizes), D]`."""

    frontend: Ids
    config: Any

    @nn.compact
    def __call__(self, inputs: Inputs, tokens: Callable):
        c, f = self.config, self.frontend
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
        init = nn.with_logical_partitioning(init, (None, "embed"))
        tables = self.param("tables", init, (sum(f.sizes), c.embed_dim), c.param_dtype)
        ids, sizes = inputs[f.name], np.array(f.sizes)
        first = np.cumsum(sizes) - sizes
        rows = jnp.where((ids >= 0) & (ids < sizes), first + ids, sum(f.sizes))
        found = jnp.take(tables, rows, axis=0, mode="fill", fill_value=0).astype(c.dtype)
        return jnp.sum(found, axis=-2)


class _Mixed(nn.Module):
    """At each position the result of the part that `kinds` names; zeros where there is no such part."""

    frontend: Mixed
    config: Any

    def setup(self):
        self.parts = [part.build(self.config) for part in self.frontend.parts]

    def __call__(self, inputs: Inputs, tokens: Callable):
        kinds, total = inputs[KINDS.name][..., None], 0
        for i, part in enumerate(self.parts):
            total = total + jnp.where(kinds == i, part(inputs, tokens), 0)
        return total


def _affine(module: nn.Module, prefix: str, x, width: int, axis: str | None, variance: float):
    """`x [..., W]` times a kernel `[W, width]`, whose outputs have this variance, plus a bias."""
    c, name = module.config, lambda leaf: f"{prefix}_{leaf}" if prefix else leaf
    init = nn.initializers.variance_scaling(variance, "fan_in", "normal")
    place = nn.with_logical_partitioning
    kernel = module.param(
        name("kernel"), place(init, (None, axis)), (x.shape[-1], width), c.param_dtype
    )
    bias = module.param(name("bias"), place(nn.initializers.zeros, (axis,)), (width,), c.param_dtype)
    return product(x, kernel.astype(c.dtype), 1) + bias.astype(c.dtype)
