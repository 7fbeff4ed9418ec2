"""The seam of a memory: what a layer keeps of the blocks that it no longer sees, in four moments.

A memory is a frozen dataclass, `DecoderConfig.memory`. Its class derives from `Memory`, which keeps
nothing and is block sliding window attention (BSWA), and overrides what it does differently:

* `start`: what a layer remembers before the first token;
* `open`: once per block, before its tokens: what these read of the memory;
* `attend`: the attention of tokens to their window and to what `open` gave;
* `close`: once, when a block is full: the memory after it.

Decoder, decoding, state passing, sharding, checkpoints, memory files, figures and maps know only this
interface, so that a new memory is one file (docs/memories.md). This module needs jax and flax alone,
and imports nothing of famx, so that the config may name it.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax

_KINDS: dict[str, type["Memory"]] = {}
# Names of parameters `[..., N, D]` that are like embeddings of tokens, and may start as such.
PROMPTS = ("prompt", "prefix")
COLLECTION = "memory"  # name of the parameters of a memory, above the layers and in each


@flax.struct.dataclass
class Opened:
    """What a block meets of the memory, made by `Memory.open` before the block's tokens.

    Attributes:
      keys, values: columns `[B, N, K, Dh]` that every token of the block attends to, in one softmax
        with its window; `N` is `Memory.columns`. None: no columns.
      extra: any pytree, leaves `[B, ...]`, that `Memory.attend` reads from `Tokens.extra`.
      held: any pytree that `Memory.close` reads; tokens do not see it.
    """

    keys: Any = None
    values: Any = None
    extra: Any = None
    held: Any = None


@flax.struct.dataclass
class Block:
    """A block that is full, as `Memory.close` takes it up.

    Attributes:
      keys: rotated keys `[B, S, K, Dh]`; `Layer.unrotate(keys, index, here)` gives them before rotation.
      values: likewise, never rotated.
      index: index of the block in each example's sequence, int32 `[B]`.
    """

    keys: jax.Array
    values: jax.Array
    index: jax.Array


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a decoder, in this class none: block sliding window attention (Algorithm 1).

    Methods get the bound `Layer` (`qkv`, `finish`, `angles`, `unrotate`, and `memory`, the module that
    `layer_parameters` made) and `here`, the `ChunkContext` of one block: its index, the number of
    updates before it, position offsets and the layer's rotation. What `start` and `close` return is the
    memory, any pytree with leaves `[B, ...]` (`start`: without the batch axis); the decoder carries it
    as `DecoderState.memory`, leaves `[layers, B, ...]`.

    A memory `through_depth` is made at the top of the stack and read from the bottom (Recurrent Memory
    Transformer). It belongs to the model and not to each layer (`DecoderState.memory` then has leaves
    `[1, B, ...]`), and blocks are read one after another. In `open` and `close`, `climb` is what goes
    from layer to layer: it begins as `enter` says, and `leave` makes the new memory of what `close`
    gave in the last layer. For all others `climb` is None there.

    `open` is a pure function of its arguments and is called again where reading resumes within a block
    and, while text is written, before `close`. `open` and `close` together call each projection of the
    layer at most once, unless the memory is `through_depth` (`famx.modules.deferred`).

    Class attributes:
      kind: name in model.json and in error messages; each subclass has its own.
      through_depth: see above.
      attends: whether the memory itself attends to its columns and the block when the block closes, by
        the `queries`; attention maps then show it.
      closes_oldest: whether `close` takes the block that leaves the window, `M` blocks before the one
        just filled, so that no token is in the window and in the memory at once.
    """

    kind: ClassVar[str] = "none"
    through_depth: ClassVar[bool] = False
    attends: ClassVar[bool] = False
    closes_oldest: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "kind" not in cls.__dict__:  # a variation of its base, which has that name
            return
        other = _KINDS.setdefault(cls.kind, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"A memory named {cls.kind!r} exists already: choose another `kind`.")
        _KINDS[cls.kind] = cls

    # What it is.

    @property
    def columns(self) -> int:
        """`N`: keys and values that `open` gives every token of a block to attend to."""
        return 0

    @property
    def exists(self) -> bool:
        """Whether anything is remembered beyond the window."""
        return type(self) is not Memory

    def check(self, config) -> str | None:
        """One sentence that says what does not fit the config (all other fields are set), or None."""
        return None

    def parameters(self, config) -> nn.Module | None:
        """The module of parameters above the layers, at `memory/...`; None: no such parameters."""
        return None

    def layer_parameters(self, config) -> nn.Module | None:
        """The module of each layer's parameters, at `layers/memory/...`; None: no such parameters."""
        return None

    def turns(self, radians) -> Any:
        """Rotations of its own as fixed-point turns, from radians per token `[layers, Dh / 2]`.

        Any pytree, leaves `[layers, ...]`; a layer finds its part in `here.rotation.memory`.
        """
        return None

    # The four moments.

    def prompt(self, parameters, config) -> Any:
        """What climbs into `start` of the first layer; `parameters`: the bound module of that name."""
        return None

    def start(self, layer, climb, here) -> tuple[Any, Any]:
        """`(climb, memory)` before the first token, without the batch axis.

        A memory `through_depth` is asked once, with None for `layer`.
        """
        return climb, None

    def enter(self, parameters, memory, config) -> tuple[Any, Any]:
        """What climbs through `open`, and what through `close`, from a memory of the whole model."""
        return memory, memory

    def leave(self, parameters, climb, memory, config) -> Any:
        """The memory of the whole model after a block, from what `close` gave in the last layer."""
        return climb

    def open(self, layer, climb, memory, here) -> tuple[Any, Opened]:
        """`(climb, Opened)` for the block `here`, once, before its tokens."""
        return climb, Opened()

    def attend(self, layer, tokens, here):
        """Attention of tokens before the output projection, `[..., H, Dh]`.

        Args:
          layer: the bound layer.
          tokens: `famx.modules.window.Tokens`: queries, and attention to the window and the columns in
            one softmax, by the fused kernels.
          here: context of the first block.
        """
        return tokens.attend(tokens.query)

    def close(self, layer, climb, memory, opened: Opened, block: Block, here) -> tuple[Any, Any]:
        """`(climb, memory)` after a block is full. See `closes_oldest` for which block it takes."""
        return climb, memory

    def scan(self, layer, memory, blocks: Block, here) -> tuple[Any, Opened]:
        """All blocks of a chunk, one after another; override it where blocks need not wait.

        Args:
          layer: the bound layer.
          memory: before the chunk, leaves `[B, ...]`.
          blocks: what `close` takes, leaves `[P * B, C, ...]`; `P` shards of the chunk are folded into
            the batch, first shard first (`ChunkContext`).
          here: context of the chunk.

        Returns:
          The memory after the chunk, and `Opened` of every block, leaves `[P * B, C, ...]`, without
          `held`.
        """
        return layer.scan_memory(memory, blocks, here) if self.exists else (memory, Opened())

    # What others ask.

    def axes(self) -> Any:
        """Logical axes of the memory's leaves without layers and batch: a pytree of tuples of names."""
        return None

    def queries(self, opened: Opened):
        """Queries `[B, N, H, Dh]` of a memory that `attends`, to its columns and the block."""
        return None

    def figures(self, parameters, memory) -> dict[str, jax.Array]:
        """Scalars by name that say how it fares; training and evaluation log them.

        Args:
          parameters: of `layer_parameters`, of one layer or of all in a stack; None: there are none.
          memory: the memory, with any leading axes.
        """
        return {}

    def flops(self, config, price, length: int, from_start: bool) -> tuple[int, int]:
        """Matrix-product operations of a training step on one example.

        Args:
          config: the `DecoderConfig`.
          price: `famx.training.flops.Price`: operations of a row of each projection, and of a score.
          length: tokens.
          from_start: whether the example begins from `start`.

        Returns:
          Operations in each layer, and in all layers together once per batch.
        """
        return 0, 0

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, and `kind`, as plain values that JSON can hold."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


_KINDS[Memory.kind] = Memory


def from_dict(fields: dict[str, Any]) -> Memory:
    """The memory that `Memory.to_dict` described.

    Raises:
      ValueError: no imported module defines such a memory, or it has other fields.
    """
    fields = dict(fields)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(
            f"memory is of the kind {kind!r}, which is not known here: import the module that defines"
            f" it, or choose from {', '.join(_KINDS)}."
        )
    names = {field.name for field in dataclasses.fields(_KINDS[kind])}
    unknown = ", ".join(sorted(fields.keys() - names))
    if unknown:
        known = ", ".join(sorted(names))
        raise ValueError(f"A memory of the kind {kind!r} has no field {unknown}; it has {known}.")
    return _KINDS[kind](**fields)


def of_memory(path: str) -> bool:
    """Whether the parameter at `path`, such as "memory/prompt" or "layers/memory/gate", is a memory's."""
    return COLLECTION in path.split("/")
