"""GGUF files, the format of llama.cpp, read with Hugging Face's names, layouts and `config.json`."""

import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any

import ml_dtypes
import numpy as np
from pydantic import Field

from famx.base.errors import ConfigError
from famx.base.packages import optional_package
from famx.base.untrusted import Fields, Name, parsed, parsed_as, shown
from famx.conversion.config_file import MOST_LAYERS, MOST_WIDTH, Id, Positions, Positive, is_on
from famx.conversion.tensor_source import TensorInfo
from famx.data.vocabularies.gguf_file import GgufFile

_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Types of tensors that can be read.
TYPES = (
    *_STORED, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
# `general.architecture` -> architecture and model type of a config.json.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma": ("GemmaForCausalLM", "gemma"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3"),
}
# In these architectures RoPE rotates pairs of neighbours; in the others, as at Hugging Face, pairs of
# one element from each half of the head.
_INTERLEAVED = ("llama", "smollm3")
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_POST_NORMS = ("gemma2", "gemma3")  # architectures whose `ffn_norm` has another name at Hugging Face
_ROPE_FACTORS = "rope_freqs.weight"
_ROPE_LENGTH = 8192  # length that every Llama 3 was trained on before its positions were scaled
_PIECE = 1 << 18  # number of values that are dequantised at once

_Count = Annotated[int, Field(ge=1, le=16 * MOST_WIDTH)]
_PerLayer = _Count | Annotated[list[_Count], Field(min_length=1, max_length=MOST_LAYERS)] | None
_Parts = Annotated[int, Field(ge=0, le=1 << 16)]
_Slides = Annotated[list[bool], Field(max_length=MOST_LAYERS)]
_NotNegative = Annotated[float, Field(ge=0, lt=1e30)] | None


class _Keys(Fields):
    """Entries of a GGUF header under the architecture's name."""

    embedding_length: _PerLayer = None
    feed_forward_length: _PerLayer = None
    block_count: Annotated[int, Field(ge=1, le=MOST_LAYERS)] | None = None
    context_length: Positions = None
    head_count: _PerLayer = Field(None, alias="attention.head_count")
    head_count_kv: _PerLayer = Field(None, alias="attention.head_count_kv")
    key_length: _Count | None = Field(None, alias="attention.key_length")
    value_length: _Count | None = Field(None, alias="attention.value_length")
    layer_norm_rms_epsilon: Positive = Field(None, alias="attention.layer_norm_rms_epsilon")
    sliding_window: Annotated[int, Field(ge=0, le=1 << 40)] | None = Field(
        None, alias="attention.sliding_window"
    )
    sliding_window_pattern: Annotated[int, Field(ge=1, le=MOST_LAYERS)] | _Slides | None = Field(
        None, alias="attention.sliding_window_pattern"
    )
    expert_count: Annotated[int, Field(ge=0)] | None = None
    attn_logit_softcapping: _NotNegative = None
    final_logit_softcapping: _NotNegative = None
    rope_dimensions: _Count | None = Field(None, alias="rope.dimension_count")
    rope_dimensions_local: _Count | None = Field(None, alias="rope.dimension_count_swa")
    rope_base: Positive = Field(None, alias="rope.freq_base")
    rope_local_base: Positive = Field(None, alias="rope.freq_base_swa")
    rope_scale_linear: _NotNegative = Field(None, alias="rope.scale_linear")
    rope_type: Name | None = Field(None, alias="rope.scaling.type")
    rope_factor: _NotNegative = Field(None, alias="rope.scaling.factor")
    rope_attention_factor: Positive = Field(None, alias="rope.scaling.attn_factor")


class _TokenIds(Fields):
    """Entries `tokenizer.ggml.<role>_token_id`; several tokens may end a text."""

    bos_token_id: Id | None = None
    eos_token_id: Id | None = None
    pad_token_id: Id | None = None
    eot_token_id: Id | None = None
    eom_token_id: Id | None = None


_ROPE_KEYS = {field.alias for field in _Keys.model_fields.values() if field.alias} | {
    # The length before scaling and whether it was trained for it: neither changes linear scaling.
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
}


class GgufSource:
    """A GGUF file, presented like a Hugging Face directory; see `tensor_source.Source`.

    Queries and keys of llama.cpp's Llamas are returned in Hugging Face's order, and the 1 that llama.cpp
    adds to the norms of Gemma is subtracted. Settings that the file omits have llama.cpp's defaults for
    the architecture.

    Args:
      path: a file of one of `ARCHITECTURES`, in a single part.

    Attributes:
      config: content of the equivalent `config.json`.
      tensors: shape and dtype by Hugging Face's name; a tensor without one keeps its name in the file.
      end_ids: ids of the tokens that end a text, a turn and a message.
      tokenizer: the file itself.
      name: name of the file, without its suffix.

    Raises:
      ConfigError: the package `gguf` is missing, or the file is not a GGUF file, is damaged, is one of
        several parts, or holds an architecture or types that cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self._gguf = optional_package("gguf", "GGUF files")
        self._path = pathlib.Path(path)
        self.name, self.tokenizer = self._path.stem, self._path
        self._file = GgufFile(path)
        architecture = self._file.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise ConfigError(
                f"'{path}' holds a model of architecture {shown(architecture)}; of GGUF files, those of "
                f"{', '.join(ARCHITECTURES)} can be read."
            )
        self._architecture = architecture
        parts = parsed_as(_Parts, self._file.get("split.count", 1), f"'{path}'", "split.count")
        if parts > 1:
            raise ConfigError(
                f"'{path}' is one of {parts} parts of a model; join them first with llama.cpp's "
                "llama-gguf-split --merge."
            )
        prefix = f"{architecture}."
        own = {k.removeprefix(prefix): v for k, v in self._file.values.items() if k.startswith(prefix)}
        self._keys = parsed(_Keys, own, f"'{path}' ({architecture})")
        self._check_rope_keys(own)
        keys = {"pad": "padding", **{role: role for role in ("bos", "eos", "eot", "eom")}}
        of_tokens = {
            f"{role}_token_id": self._file.get(f"tokenizer.ggml.{key}_token_id")
            for role, key in keys.items()
        }
        self._ids = parsed(_TokenIds, of_tokens, f"'{path}' (tokenizer.ggml)")
        ends = (self._ids.eos_token_id, self._ids.eot_token_id, self._ids.eom_token_id)
        self.end_ids = tuple(i for i in ends if i is not None)
        self._tensors = {self._translate(tensor.name): tensor for tensor in self._file.tensors}
        self._factors = self._tensors.pop(_ROPE_FACTORS, None)
        for tensor in self._tensors.values():
            kind = tensor.tensor_type.name
            if kind not in TYPES or (kind not in _STORED and len(tensor.shape) < 2):
                raise ConfigError(
                    f"The tensor {tensor.name} of '{path}' is of type {kind}; the types "
                    f"{', '.join(TYPES)} can be read."
                )
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tensor.shape, self._dtype(name, tensor))
            for name, tensor in self._tensors.items()
        }
        self.config, self.memory_fields = self._config(), {}

    def read(self, name: str) -> np.ndarray:
        """The tensor in Hugging Face's layout; float32 if it is quantised, otherwise as stored."""
        tensor, info = self._tensors[name], self.tensors[name]
        out = np.empty(info.shape, getattr(ml_dtypes, info.dtype, info.dtype))
        order = self._order(name, len(out))
        kind = tensor.tensor_type
        step = max(1, _PIECE // math.prod(info.shape[1:]))
        for start in range(0, len(out), step):
            data = tensor.data[order[start : start + step]]
            if kind.name in _STORED:
                data = data.view(getattr(ml_dtypes, _STORED[kind.name], _STORED[kind.name]))
            else:
                data = self._gguf.dequantize(data, kind)
            out[start : start + step] = data
        if self._added_one(name):
            out -= 1
        return out

    def _added_one(self, name: str) -> bool:
        """Whether llama.cpp added 1 to the tensor, as it does for norms of Gemma."""
        return self._architecture.startswith("gemma") and name.endswith("norm.weight")

    def _dtype(self, name: str, tensor) -> str:
        """Dtype of the array that `read` returns."""
        stored = _STORED.get(tensor.tensor_type.name, "float32")
        return "float32" if self._added_one(name) else stored

    def _order(self, name: str, rows: int) -> np.ndarray:
        """Index in the file's tensor of each row of Hugging Face's."""
        order = np.arange(rows)
        if self._architecture in _INTERLEAVED and re.search(r"\.[qk]_proj\.", name):
            heads = self.config[f"num_{'attention' if '.q_proj.' in name else 'key_value'}_heads"]
            order = order.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return order

    def _translate(self, name: str) -> str:
        """Hugging Face's name of a tensor, or its name in the file if it has none."""
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        layer, part, kind = match.groups() if match else (None, None, None)
        names = _TOP_NAMES if layer is None else _LAYER_NAMES
        if part not in names:
            return name
        part = names[part]
        if name.endswith("ffn_norm.weight") and self._architecture in _POST_NORMS:
            part = "pre_feedforward_layernorm"
        return f"{part}.{kind}" if layer is None else f"model.layers.{layer}.{part}.{kind}"

    # ---------------------------------------------------------------- config.json

    def _size(self, key: str) -> int:
        """The value of a key that may be a list of one number for each layer."""
        value = getattr(self._keys, key.rpartition(".")[2])
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int):
            why = "lacks" if value is None else "has a number for each layer instead of a single one for"
            raise ConfigError(f"'{self._path}' {why} {self._architecture}.{key}; take another file.")
        return value

    def _check_rope_keys(self, own: Mapping[str, Any]) -> None:
        """Check that every entry about rotary positions is one that `_rope_scaling` knows, or off."""
        for key, value in own.items():
            if re.search("rope|rotary", key) and key not in _ROPE_KEYS and is_on(value):
                raise ConfigError(
                    f"'{self._path}' sets {self._architecture}.{key} to {shown(value)}, which is not"
                    " understood: the model would differ."
                )
        k = self._keys
        if k.rope_attention_factor not in (None, 1.0):
            raise ConfigError(
                f"'{self._path}' sets {self._architecture}.rope.scaling.attn_factor to"
                f" {k.rope_attention_factor}, which is not supported."
            )

    def _config(self) -> dict[str, Any]:
        name, kind = ARCHITECTURES[self._architecture]
        k = self._keys
        if k.expert_count:
            raise ConfigError(f"'{self._path}' is a mixture of experts, which is not supported.")
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise ConfigError(f"'{self._path}' has no token_embd.weight, so it holds no model.")
        hidden, heads = self._size("embedding_length"), self._size("attention.head_count")
        head_dim = k.key_length or hidden // heads
        if (k.value_length or head_dim) != head_dim:
            raise ConfigError(f"In '{self._path}' keys and values differ in width: not supported.")
        norms = k.layer_norm_rms_epsilon
        config = {
            "architectures": [name],
            "model_type": kind,
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._size("feed_forward_length"),
            "num_hidden_layers": self._size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._size("attention.head_count_kv"),
            "head_dim": head_dim,
            "max_position_embeddings": self._size("context_length"),
            "rms_norm_eps": 1e-6 if norms is None else float(str(np.float32(norms))),  # 1e-05 again
            "hidden_act": "gelu_pytorch_tanh" if kind.startswith("gemma") else "silu",
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "rope_theta": k.rope_base or (1e6 if kind == "gemma3_text" else 1e4),
        }
        for role in ("bos", "eos", "pad"):
            if (i := getattr(self._ids, f"{role}_token_id")) is not None:
                config[f"{role}_token_id"] = i
        for rotated in (k.rope_dimensions, k.rope_dimensions_local):
            if (rotated or head_dim) != head_dim:
                config["partial_rotary_factor"] = rotated / head_dim
        scaling = self._rope_scaling(head_dim, config["rope_theta"])
        if scaling is not None:
            config["rope_scaling"] = scaling
        first = "model.layers.0."
        if kind in ("llama", "qwen3", "smollm3"):
            config["attention_bias"] = f"{first}self_attn.q_proj.bias" in self.tensors
        if kind in ("llama", "smollm3"):
            config["mlp_bias"] = f"{first}mlp.up_proj.bias" in self.tensors
        if kind == "smollm3":
            config["no_rope_layer_interval"] = 4
        if window := k.sliding_window:
            config["sliding_window"] = window
            if kind == "llama":
                config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        if kind in ("gemma2", "gemma3_text"):
            config |= self._gemma(config)
        return config

    def _gemma(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Additional fields of config.json for Gemma 2 and 3."""
        layers, second = config["num_hidden_layers"], config["model_type"] == "gemma2"
        k = self._keys
        # Only the models of 27 billion parameters scale queries by a width other than the head's.
        large = layers == (46 if second else 62)
        scalar = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
        every = k.sliding_window_pattern or (2 if second else 6)
        slides = every if isinstance(every, list) else [(i + 1) % every != 0 for i in range(layers)]
        kinds = ("full_attention", "sliding_attention")
        windowed = "sliding_window" in config
        fields = {
            "query_pre_attn_scalar": scalar,
            "layer_types": [kinds[bool(windowed and slide)] for slide in slides],
            "attn_logit_softcapping": k.attn_logit_softcapping or (50.0 if second else None),
            "final_logit_softcapping": k.final_logit_softcapping or (30.0 if second else None),
        }
        if not second:
            fields["rope_local_base_freq"] = k.rope_local_base or 1e4
        return fields

    def _rope_scaling(self, head_dim: int, base: float) -> dict[str, Any] | None:
        # As in llama.cpp: without a type scaling is linear, an older key counts where the factor is
        # missing, and 0 is no scaling.
        kind, factor = self._keys.rope_type or "linear", self._keys.rope_factor
        factor = self._keys.rope_scale_linear if factor is None else factor
        divisors = np.ones(1)
        if self._factors is not None:  # the file stores Llama 3's scaling as a divisor for each frequency
            if self._factors.data.dtype != np.float32:
                raise ConfigError(f"'{self._path}' has {_ROPE_FACTORS} in another type than F32.")
            divisors = np.asarray(self._factors.data, np.float64).reshape(-1)
        plain = bool(np.all(divisors == 1))
        if kind != "none" and (kind != "linear" or factor not in (None, 0.0, 1.0)):
            if not plain:
                raise ConfigError(
                    f"'{self._path}' scales its rotary positions twice, by rope.scaling and by"
                    f" {_ROPE_FACTORS}, which is not supported."
                )
            return {"rope_type": kind, "factor": factor or 1.0}
        if plain:
            return None
        scaling = {
            "rope_type": "llama3",
            "factor": float(divisors[-1]),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": _ROPE_LENGTH,
        }
        turns = _ROPE_LENGTH * base ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
        share = np.clip((turns - 1) / 3, 0, 1)  # weight of the unscaled frequency
        expected = 1 / ((1 - share) / scaling["factor"] + share)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
            raise ConfigError(
                f"'{self._path}' scales its rotary positions ({_ROPE_FACTORS}) in another way than "
                "Llama 3, which is not supported."
            )
        return scaling
