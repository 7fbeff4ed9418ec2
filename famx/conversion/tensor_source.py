"""Interface of the sources of an import: pretrained models that are read tensor by tensor.

Names and layouts are Hugging Face's, whatever the format.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

READABLE = ("float32", "float16", "bfloat16", "float64")  # dtypes of tensors that can be read


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor; a dtype that is not in `READABLE` has the format's name."""

    shape: tuple[int, ...]
    dtype: str


class Source(Protocol):
    """A pretrained model that is read tensor by tensor.

    Attributes:
      name: name of the directory or file.
      config: content of `config.json`, of the model without its memory.
      memory_fields: `MEMORY_FIELDS` of DecoderConfig, as an export of famx keeps them; else empty.
      tensors: all tensors, by their names at Hugging Face.
      end_ids: ids that end a text or an answer, of all files that name some.
      tokenizer: a file for `open_vocabulary`, or None.
    """

    name: str
    config: Mapping[str, Any]
    memory_fields: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    end_ids: tuple[int, ...]
    tokenizer: pathlib.Path | None

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is stored, in float32, float16, bfloat16 or float64."""
