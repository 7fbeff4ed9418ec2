"""Tensors of a checkpoint of theirs: names, shapes, and where each belongs in our tree."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from famx.conversion.architectures import MULTIMODAL, Family, architecture, open_config
from famx.modules.config import DecoderConfig

# Prefixes of the text part of a multimodal checkpoint, old and new, and what stands for them.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_VISION = ("vision_tower.", "multi_modal_projector.", "vision_model.")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint of theirs and where it belongs in ours.

    Attributes:
      name: theirs, of a text model (see `standard_name`).
      path: our leaf.
      layer: index on the leaf's first axis; None: the leaf is this tensor alone.
      shape: theirs.
      our_shape: of the leaf, without its axis of layers.
      one_plus: theirs is a norm's weight that is added to 1.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    our_shape: tuple[int, ...]
    one_plus: bool = False

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Their array in our layout, in its own dtype; a norm that is added to 1 in float32."""
        if self.one_plus:
            return _at_least_float32(array) + 1
        return array if self.path == ("embedding",) else array.T.reshape(self.our_shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.one_plus:
            return _at_least_float32(array) - 1
        return array if self.path == ("embedding",) else array.reshape(self.shape[::-1]).T


def _at_least_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.promote_types(array.dtype, np.float32))


def tensors(hf: Mapping[str, Any], config: DecoderConfig) -> list[Tensor]:
    """Every tensor that a checkpoint of the model has, in the order in which it is read.

    A tied head is no tensor of its own, and the FAM prompt is not among them.
    """
    family, c = open_config(hf)[0], config
    table = (c.vocab_size, c.embed_dim)
    found = [Tensor("model.embed_tokens.weight", ("embedding",), None, table, table)]
    for layer in range(c.num_layers):
        found += _layer_tensors(family, c, layer)
    width = (c.embed_dim,)
    path = ("final_norm", "scale")
    found.append(Tensor("model.norm.weight", path, None, width, width, family.gemma))
    if not c.tied_embeddings:
        found.append(Tensor("lm_head.weight", ("head",), None, table, table[::-1]))
    return found


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
    """The name that a text model gives to a tensor, of its name in a multimodal checkpoint."""
    for prefix, standard in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return standard + name[len(prefix) :]
    return name


def ignored(hf: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor of a checkpoint is none of the model's weights and may be left out."""
    name = standard_name(name)
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if architecture(hf) == MULTIMODAL and name.removeprefix("model.").startswith(_VISION):
        return True
    return name == "lm_head.weight" and bool(open_config(hf)[1]("tie_word_embeddings"))
