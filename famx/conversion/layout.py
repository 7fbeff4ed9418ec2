"""Tensors of a Hugging Face checkpoint: names, shapes, and the leaves that they become."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from famx.conversion.architectures import MULTIMODAL, Family, architecture, open_config
from famx.modules.config import DecoderConfig
from famx.modules.memory import of_memory

# Prefixes of the text part of multimodal checkpoints, old and new, and those of a text model.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_VISION = ("vision_tower.", "multi_modal_projector.", "vision_model.")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint and its place in the parameter tree.

    Attributes:
      name: name of the tensor in a text model (see `standard_name`).
      path: path of the leaf.
      layer: index on the first axis of the leaf; None: the tensor is the whole leaf.
      shape: shape of the tensor.
      our_shape: shape of the leaf, without its axis of layers.
      one_plus: the tensor is the weight of a norm that multiplies by `1 + weight`.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    our_shape: tuple[int, ...]
    one_plus: bool = False

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Convert the tensor to the leaf's layout, in the same dtype; `one_plus` in at least float32."""
        if self.one_plus:
            return _at_least_float32(array) + 1
        return array if self._as_it_is else array.T.reshape(self.our_shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Inverse of `to_ours`."""
        if self.one_plus:
            return _at_least_float32(array) - 1
        return array if self._as_it_is else array.reshape(self.shape[::-1]).T

    @property
    def _as_it_is(self) -> bool:
        return self.path == ("embedding",) or of_memory("/".join(self.path))


def _at_least_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.promote_types(array.dtype, np.float32))


def tensors(hf: Mapping[str, Any], config: DecoderConfig) -> list[Tensor]:
    """All tensors of a checkpoint of the model, in the order in which they are read.

    A tied head has no tensor of its own. Parameters of the memory are not among them.
    """
    family, c = open_config(hf)[0], config
    table = (c.vocab_size, c.embed_dim)
    expected = [Tensor("model.embed_tokens.weight", ("embedding",), None, table, table)]
    for layer in range(c.num_layers):
        expected += _layer_tensors(family, c, layer)
    width = (c.embed_dim,)
    path = ("final_norm", "scale")
    expected.append(Tensor("model.norm.weight", path, None, width, width, family.gemma))
    if not c.tied_embeddings:
        expected.append(Tensor("lm_head.weight", ("head",), None, table, table[::-1]))
    return expected


def _layer_tensors(family: Family, c: DecoderConfig, layer: int):
    prefix = f"model.layers.{layer}."

    def norm(theirs, ours, width):
        name = f"{prefix}{theirs}.weight"
        return Tensor(name, ("layers", ours, "scale"), layer, (width,), (width,), family.gemma)

    def projection(theirs, ours, inputs, outputs, bias):
        name, path = f"{prefix}{theirs}.", ("layers", *ours)
        shape = (math.prod(outputs), math.prod(inputs))
        yield Tensor(f"{name}weight", (*path, "kernel"), layer, shape, (*inputs, *outputs))
        if bias:
            yield Tensor(f"{name}bias", (*path, "bias"), layer, shape[:1], outputs)

    width, mlp = (c.embed_dim,), (c.mlp_dim,)
    heads, kv_heads = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
    yield norm("input_layernorm", "attention_norm", c.embed_dim)
    yield from projection("self_attn.q_proj", ("query",), width, heads, c.qkv_bias)
    yield from projection("self_attn.k_proj", ("key",), width, kv_heads, c.qkv_bias)
    yield from projection("self_attn.v_proj", ("value",), width, kv_heads, c.qkv_bias)
    yield from projection("self_attn.o_proj", ("output",), heads, width, c.output_bias)
    if c.qk_norm:
        yield norm("self_attn.q_norm", "query_norm", c.head_dim)
        yield norm("self_attn.k_norm", "key_norm", c.head_dim)
    if c.post_norms:
        yield norm("post_attention_layernorm", "post_attention_norm", c.embed_dim)
        yield norm("pre_feedforward_layernorm", "mlp_norm", c.embed_dim)
        yield norm("post_feedforward_layernorm", "post_mlp_norm", c.embed_dim)
    else:
        yield norm("post_attention_layernorm", "mlp_norm", c.embed_dim)
    for name in ("gate", "up"):
        yield from projection(f"mlp.{name}_proj", ("mlp", name), width, mlp, c.mlp_bias)
    yield from projection("mlp.down_proj", ("mlp", "down"), mlp, width, c.mlp_bias)


def standard_name(name: str) -> str:
    """The name of a tensor in a text model, given its name in a checkpoint that may be multimodal."""
    for prefix, standard in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return standard + name[len(prefix) :]
    return name


def ignored(hf: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor is not a weight of the text model: a buffer, a tied head, a part for images."""
    name = standard_name(name)
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if architecture(hf) == MULTIMODAL and name.removeprefix("model.").startswith(_VISION):
        return True
    return name == "lm_head.weight" and bool(open_config(hf)[1]("tie_word_embeddings"))
