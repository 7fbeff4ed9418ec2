"""Configuration of a decoder, checked on construction."""

import dataclasses
import math
from typing import Annotated, Literal

from famx.base.ranges import NonNegative, OneOf, Positive, Rate
from famx.base.values import checked
from famx.modules import frontends
from famx.modules import memory as memories
from famx.modules.backends import ATTENTION_BACKENDS, refusal
from famx.modules.frontends import Frontend
from famx.modules.heads import Values

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "squared_relu")
REMAT_POLICIES = ("none", "full", "attention", "dots", "dots_no_batch", "offload")
ROPE_LAYERS = ("global", "local", "none")
# Fields of the memory. With other values all parameters still fit, except the memory's own.
MEMORY_FIELDS = (*("block_size", "memory_segments", "memory", "window_mask", "stop_gradient_segments"),)
# Fields that change results only by rounding; models that differ in them count as the same.
COMPUTATION_FIELDS = (
    *("dtype", "param_dtype", "blocks_per_chunk", "remat", "attention_backend"),
    "unroll_layers",
)


_Dtype = Literal["float32", "bfloat16", "float64"]


@checked
@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling, or plain linear scaling when `original_length` is None."""

    factor: Rate
    low_frequency_factor: Rate = 1.0
    high_frequency_factor: Rate = 4.0
    original_length: Positive | None = None


@checked
@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder-only Transformer with block sliding window attention.

    Without a `memory` it is BSWA; `famx.memories.Fam(length=64)` adds feedback attention memory
    (Algorithm 2). The defaults of `block_size` and `memory_segments` are the paper's.

    Examples:
      >>> from famx.memories import Fam
      >>> sizes = dict(vocab_size=256, num_layers=2, embed_dim=64, num_heads=4, block_size=32)
      >>> DecoderConfig(**sizes, memory=Fam(length=8)).head_dim
      16
      >>> DecoderConfig(**{**sizes, "num_heads": 3})
      Traceback (most recent call last):
      ValueError: embed_dim 64 is not a multiple of num_heads 3; set head_dim or change one of them.

    Raises:
      ValueError: with one sentence, if sizes or options do not fit together.
    """

    vocab_size: Positive
    num_layers: Positive
    embed_dim: Positive  # D
    num_heads: Positive  # H
    num_kv_heads: Positive | None = None  # K; None: num_heads
    head_dim: Positive | None = None  # Dh; None: embed_dim / num_heads
    mlp_dim: Positive | None = None  # F; None: 4 * embed_dim

    # Memory.
    block_size: Positive = 1024  # S
    memory_segments: NonNegative = 3  # M: number of past blocks in the window
    memory: memories.Memory = memories.Memory()  # memory beyond the window; the default is BSWA
    window_mask: bool = False  # Transformer-XL: each token sees exactly its last M * S
    stop_gradient_segments: bool = False  # the paper's ablation M1_SG

    # What is read and predicted, where that is not tokens alone.
    frontend: Frontend = Frontend()  # what is read at each position; the default is a token
    values: Values | None = None  # numbers that are predicted besides the logits

    # The Transformer.
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: Rate = 1e-6
    post_norms: bool = False  # norms on the outputs of attention and feed-forward (Gemma 2, 3)
    parallel_block: bool = False  # attention and feed-forward in parallel (PaLM)
    gated_mlp: bool = True
    activation: Annotated[str, OneOf(ACTIVATIONS)] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of queries and keys over the head width
    query_scale: Rate | None = None  # None: head_dim ** -0.5
    attention_softcap: Rate | None = None
    logit_softcap: Rate | None = None
    tied_embeddings: bool = True
    scale_embeddings: bool = False  # by sqrt(embed_dim) (Gemma)
    rope_base: Rate = 10_000.0  # for "global" layers, like rope_scaling
    rope_scaling: RopeScaling | None = None
    rope_layers: tuple[Annotated[str, OneOf(ROPE_LAYERS)], ...] | None = None  # None: all "global"
    local_rope_base: Rate = 10_000.0  # for "local" layers (Gemma 3), never scaled

    # Computation. These change results only by rounding.
    dtype: _Dtype = "float32"  # dtype of activations, keys and values
    param_dtype: _Dtype = "float32"
    blocks_per_chunk: Positive | None = None  # None: all blocks at once (layer-parallel)
    # What the backward pass recomputes; "offload": all, with the inputs of layers on the host.
    remat: Annotated[str, OneOf(REMAT_POLICIES)] = "none"
    attention_backend: Annotated[str, OneOf(ATTENTION_BACKENDS)] = "auto"
    unroll_layers: Positive = 1  # layers per step of their scan; more compile longer and copy less

    def to_dict(self) -> dict:
        """Every field by name, as plain values that JSON can hold; the memory with its `kind`.

        A model that reads tokens and predicts no values has no fields of these, as before they existed.
        """
        fields = {**dataclasses.asdict(self), "memory": self.memory.to_dict()}
        del fields["frontend"], fields["values"]
        if self.frontend != Frontend():
            fields["frontend"] = self.frontend.to_dict()
        if self.values is not None:
            fields["values"] = dataclasses.asdict(self.values)
        return fields

    @classmethod
    def from_dict(cls, fields: dict) -> "DecoderConfig":
        """The config that `to_dict` described."""
        scaling, layers = fields.get("rope_scaling"), fields.get("rope_layers")
        scaling = scaling and RopeScaling(**scaling)
        memory = memories.from_dict(fields.get("memory", {"kind": "none"}))
        layers = layers and tuple(layers)
        fields = {**fields, "memory": memory, "rope_scaling": scaling, "rope_layers": layers}
        if "frontend" in fields:
            fields["frontend"] = frontends.from_dict(fields["frontend"])
        if fields.get("values") is not None:
            fields["values"] = Values(**fields["values"])
        return cls(**fields)

    def memory_fields(self) -> dict:
        """`MEMORY_FIELDS` by name, as plain values that JSON can hold."""
        fields = self.to_dict()
        return {name: fields[name] for name in MEMORY_FIELDS}

    def with_fields(self, fields: dict) -> "DecoderConfig":
        """This config with some fields, plain values as in `to_dict`, replaced."""
        return self.from_dict({**self.to_dict(), **fields})

    def __post_init__(self):
        fill = lambda name, value: object.__setattr__(self, name, value)
        if self.num_kv_heads is None:
            fill("num_kv_heads", self.num_heads)
        if self.head_dim is None:
            _require(
                self.embed_dim % self.num_heads == 0,
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}; "
                "set head_dim or change one of them.",
            )
            fill("head_dim", self.embed_dim // self.num_heads)
        if self.mlp_dim is None:
            fill("mlp_dim", 4 * self.embed_dim)
        if self.query_scale is None:
            fill("query_scale", 1.0 / math.sqrt(self.head_dim))
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}.",
        )
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even for RoPE.")
        if self.rope_layers is not None:
            fill("rope_layers", tuple(self.rope_layers))  # lists come from gin and JSON
            _require(
                len(self.rope_layers) == self.num_layers,
                f"rope_layers lists {len(self.rope_layers)} layers, but the model has {self.num_layers}.",
            )
        _require(
            self.attention_softcap is None or not self.memory.masks_columns,
            f"attention_softcap does not go with a memory of the kind {self.memory.kind!r}, whose columns"
            " fill up: a softcap would bring hidden ones back.",
        )
        for sentence in (self.memory.check(self), refusal(self, self.attention_backend)):
            _require(sentence is None, sentence)

    @property
    def memory_columns(self) -> int:
        """`N`: keys of the memory that every token of a block attends to together with its window."""
        return self.memory.columns

    @property
    def reach(self) -> int | None:
        """Number of tokens that BSWA can look back, `layers * M * S`; None with a memory (no bound).

        Exact with the window mask; without it whole blocks are counted, up to `S - 1` tokens more.
        """
        if self.memory.exists:
            return None
        return self.num_layers * self.memory_segments * self.block_size


def _require(condition: bool, sentence: str | None):
    if not condition:
        raise ValueError(sentence)
