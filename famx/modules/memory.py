"""Interface of a memory, which keeps what has left a layer's window: four moments.

A memory is a frozen dataclass, `DecoderConfig.memory`. Its class derives from `Memory`, which keeps
nothing and is block sliding window attention (BSWA), and overrides what it does differently:

* `start`: the memory before the first token;
* `open`: once per block, before its tokens: what these read of the memory;
* `attend`: attention of tokens to their window and to the result of `open`;
* `close`: once, when a block is full: the memory after it.

Decoder, decoding, state passing, sharding, checkpoints, memory files, figures and maps know only this
interface, so that a new memory is one file (docs/memories.md). This module needs jax and flax alone,
and imports nothing of famx, so that the config may name it.
"""

import dataclasses
import numbers
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax

from famx.modules.kinds import described

_KINDS: dict[str, type["Memory"]] = {}
# Names of parameters `[..., N, D]` that are like token embeddings and may be initialised with such.
PROMPTS = ("prompt", "prefix")
# Names of parameters that are measured on plain text (`famx.models.memory_start`) and never learn.
MEASURED = ("rms",)
COLLECTION = "memory"  # name of a memory's parameters, above the layers and in each layer


@flax.struct.dataclass
class Opened:
    """What a block reads of the memory, made by `Memory.open` before the block's tokens.

    Attributes:
      keys, values: columns `[B, N, K, Dh]` that every token of the block attends to, in one softmax
        with its window; `N` is `Memory.columns`. None: no columns.
      visible: which columns are seen, bool `[B, N]`, of a memory that `masks_columns`; else None.
      extra: any pytree, leaves `[B, ...]`, that `Memory.attend` reads from `Tokens.extra`.
      held: any pytree that `Memory.close` reads; tokens do not see it.
    """

    keys: Any = None
    values: Any = None
    visible: Any = None
    extra: Any = None
    held: Any = None


@flax.struct.dataclass
class Block:
    """A block that is full, as `Memory.close` takes it up.

    Attributes:
      keys: rotated keys `[B, S, K, Dh]`; `Layer.unrotate(keys, index, here)` inverts the rotation.
      values: values `[B, S, K, Dh]`, which are never rotated.
      index: index of the block in each example's sequence, int32 `[B]`.
      features: `Memory.features` of its tokens `[B, S, *F]`; None: the memory has none.
      rows: keys and values `[B, R, K, Dh]` of the rows that climbed with it; None: it has none.
      past: keys and values `[B, M, S, K, Dh]` of the `M` blocks before it, of a memory that `sees_past`;
        `Layer.sees_past` says which of them exist. Else None.
    """

    keys: jax.Array
    values: jax.Array
    index: jax.Array
    features: Any = None
    rows: Any = None
    past: Any = None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a decoder, in this class none: block sliding window attention (Algorithm 1).

    Methods get the bound `Layer` (`qkv`, `finish`, `angles`, `unrotate`, and `memory`, the module that
    `layer_parameters` made) and `here`, the `ChunkContext` of one block: its index, the number of
    updates before it, position offsets and the layer's rotation. What `start` and `close` return is the
    memory, any pytree of real numbers `[B, ...]` (`start`: without the batch axis); the decoder keeps it
    as `DecoderState.memory`, leaves `[layers, B, ...]`.

    A memory `through_depth` is made at the top of the stack and read from the bottom (Recurrent Memory
    Transformer). It belongs to the model and not to each layer (`DecoderState.memory` then has leaves
    `[1, B, ...]`), and blocks are read one after another. In `open` and `close`, `climb` is the value
    passed from layer to layer: `enter` gives its first value, and `leave` makes the new memory from
    what `close` returned in the last layer. For all other memories `climb` is None there.

    `open` is a pure function of its arguments and is called again where reading resumes within a block
    and, while text is written, before `close`. `open` and `close` together call each projection of the
    layer at most once, unless the memory is `through_depth` (`famx.modules.deferred`).

    `prompt`, `enter` and `leave` get the bound `Decoder`: `memory`, the module that `parameters` made,
    `config` and `final_norm`.

    Class attributes:
      kind: name in model.json and in error messages; each subclass has its own.
      through_depth: see above; such a memory sets neither of the two attributes below.
      attends: whether the memory itself attends, with `queries`, to its columns and the block in
        `close`; attention maps then show it.
      masks_columns: whether `open` says which columns are seen, for a memory that fills up.
      plain_columns: whether the columns are compared with queries before their rotation, so that no
        position plays a part; the columns are then not rotated either.
      closes_oldest: whether `close` takes the block that leaves the window, `M` blocks before the one
        just filled, so that no token is in the window and in the memory at once.
      sees_past: whether `close` also gets the window's blocks before the one just filled; it goes
        without `closes_oldest`.
    """

    kind: ClassVar[str] = "none"
    through_depth: ClassVar[bool] = False
    attends: ClassVar[bool] = False
    masks_columns: ClassVar[bool] = False
    plain_columns: ClassVar[bool] = False
    closes_oldest: ClassVar[bool] = False
    sees_past: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        other = _KINDS.setdefault(cls.kind, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"A memory named {cls.kind!r} exists already: give {cls.__qualname__} another `kind`."
            )
        if cls.through_depth and (cls.attends or cls.closes_oldest):
            raise ValueError(
                f"{cls.__qualname__} is `through_depth`, which goes with neither `attends` nor"
                " `closes_oldest`."
            )
        if cls.row_slots is not Memory.row_slots and (cls.through_depth or cls.closes_oldest):
            raise ValueError(
                f"{cls.__qualname__} has `row_slots`, which goes with neither `through_depth` nor"
                " `closes_oldest`."
            )
        if "kind" in cls.__dict__:  # gin derives a class of the same name and without a `kind`
            _KINDS[cls.kind] = cls

    # Description.

    @property
    def columns(self) -> int:
        """`N`: number of keys and values of `open` that every token of a block attends to."""
        return 0

    @property
    def has_column_bias(self) -> bool:
        """Whether `column_bias` is not None."""
        return False

    def row_slots(self, config) -> tuple[int, ...]:
        """Slots, of a block, of the rows that climb the layers with every block; empty: there are none.

        A row is like a token of that slot which nothing sees but the memory, in `close`.
        """
        return ()

    def block_rows(self, decoder) -> Any:
        """The rows of a block before the first layer, `[R, D]`, from the bound decoder."""
        return None

    def feature_shape(self, config) -> tuple[int, ...] | None:
        """Shape `F` of what `features` gives for a token; None: nothing."""
        return None

    @property
    def updates_in_order(self) -> bool:
        """Whether `scan` updates the memory block after block, and not for all blocks at once."""
        return self.exists

    @property
    def exists(self) -> bool:
        """Whether anything is remembered beyond the window."""
        return type(self) is not Memory

    def check(self, config) -> str | None:
        """One sentence on what does not fit the config, whose other fields are all set; or None."""
        return None

    def parameters(self, config) -> nn.Module | None:
        """The module of parameters above the layers, at `memory/...`; None: no such parameters."""
        return None

    def layer_parameters(self, config) -> nn.Module | None:
        """The module of each layer's parameters, at `layers/memory/...`; None: no such parameters."""
        return None

    def turns(self, radians) -> Any:
        """What each layer has of its own, such as more rotations as fixed-point turns.

        Args:
          radians: radians per token `[layers, Dh / 2]`.

        Returns:
          Any pytree, leaves `[layers, ...]`; a layer's part is `here.rotation.memory`.
        """
        return None

    # The four moments.

    def prompt(self, decoder) -> Any:
        """The `climb` of `start` in the first layer, from the bound decoder."""
        return None

    def start(self, layer, climb, here) -> tuple[Any, Any]:
        """`(climb, memory)` before the first token, without the batch axis.

        For a memory `through_depth` it is called once, with None for `layer`.
        """
        return climb, None

    def enter(self, decoder, memory) -> tuple[Any, Any]:
        """First values of `climb` for `open` and for `close`, from the memory of the whole model."""
        return memory, memory

    def leave(self, decoder, climb, memory) -> Any:
        """The memory of the whole model after a block, from the `climb` of the last layer's `close`."""
        return climb

    def open(self, layer, climb, memory, here) -> tuple[Any, Opened]:
        """`(climb, Opened)` for the block `here`, once, before its tokens."""
        return climb, Opened()

    def column_bias(self, layer) -> Any:
        """What the scores of the columns are raised by, in every query head, `[H]`; None: nothing."""
        return None

    def shared(self, decoder) -> Any:
        """Arrays that every layer gets as `here.shared`, such as parameters above the layers.

        Args:
          decoder: the bound decoder.
        """
        return None

    def beside(self, layer, tokens, here) -> Any:
        """A term `[..., D]` next to the attention of `tokens`, behind its output projection; None: none.

        Arguments as for `attend`.
        """
        return None

    def features(self, layer, x) -> Any:
        """What `close` needs of each token besides keys and values, with which it is kept in the window.

        Args:
          layer: the bound layer.
          x: the layer's input `[..., D]`.

        Returns:
          `[..., *F]` in the compute dtype, with the shape `F` of `feature_shape`, or None.
        """
        return None

    def attend(self, layer, tokens, here):
        """Attention of tokens or of the block's rows before the output projection, `[..., H, Dh]`.

        Args:
          layer: the bound layer.
          tokens: `famx.modules.window.Tokens`: queries, and attention to the window and the columns in
            one softmax, by the fused kernels.
          here: context of the first block.
        """
        return tokens.attend(tokens.query)

    def close(self, layer, climb, memory, opened: Opened, block: Block, here) -> tuple[Any, Any]:
        """`(climb, memory)` after a block is full; `closes_oldest` says which block it gets."""
        return climb, memory

    def scan(self, layer, memory, blocks: Block, here) -> tuple[Any, Opened]:
        """Opens and closes the blocks of a chunk one after another; override it if they can be parallel.

        Args:
          layer: the bound layer.
          memory: memory before the chunk, leaves `[B, ...]`.
          blocks: blocks that `close` gets, leaves `[P * B, C, ...]`; `P` shards of the chunk are
            folded into the batch, first shard first (`ChunkContext`).
          here: context of the chunk.

        Returns:
          The memory after the chunk, and `Opened` of every block, leaves `[P * B, C, ...]`, without
          `held`.
        """
        return layer.scan_memory(memory, blocks, here) if self.exists else (memory, Opened())

    # Information for the rest of the package.

    def axes(self) -> Any:
        """Logical axes of the memory's leaves without layers and batch: a pytree of tuples of names."""
        return None

    @property
    def feature_axes(self) -> tuple[str, ...]:
        """Logical axes of `feature_shape`."""
        return ()

    def queries(self, opened: Opened):
        """Queries `[B, N, H, Dh]` of a memory that `attends`, which see its columns and the block."""
        return None

    def attention_share(self, on_block, first):
        """Share of each new memory token that is attention, for traces of a memory that `attends`.

        The rest is what the memory token was before the update. Unless a subclass says otherwise, the
        attention and its residual count equally.

        Args:
          on_block: share of each memory token's attention on the block, mean over heads, `[N]`.
          first: whether this is the first update of the memory, bool.

        Returns:
          Shares in [0, 1], `[N]`, of the dtype of `on_block`.
        """
        return 0 * on_block + 0.5

    def figures(self, parameters, memory) -> dict[str, jax.Array]:
        """Scalars that describe the state of the memory, by name; training and evaluation log them.

        Args:
          parameters: parameters of `layer_parameters`, of one layer or stacked; None: there are none.
          memory: the memory, with any leading axes.
        """
        return {}

    def flops(self, config, price, length: int, from_start: bool) -> tuple[numbers.Rational, int]:
        """Matrix-product operations of a training step on one example.

        Args:
          config: the `DecoderConfig`.
          price: `famx.training.flops.Price`: operations of a row of each projection, of a score, and of a
            multiplication with its addition.
          length: number of tokens.
          from_start: whether the example starts from `start`, not from an earlier memory.

        Returns:
          Operations in each layer, in the mean, and additional operations of all layers, once per batch.
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
    kind, fields = described(_KINDS, "memory", fields)
    return kind(**fields)


def is_prompt(path: str) -> bool:
    """Whether the parameter at `path` is a memory's prompt, or its prefixes in the layers."""
    return of_memory(path) and path.rpartition("/")[2] in PROMPTS


def is_measured(path: str) -> bool:
    """Whether the parameter at `path` is a memory's that is measured, and so does not learn."""
    return of_memory(path) and path.rpartition("/")[2] in MEASURED


def of_memory(path: str) -> bool:
    """Whether the parameter at `path`, such as "memory/prompt" or "layers/memory/gate", is a memory's."""
    return COLLECTION in path.split("/")
