"""The header of a GGUF file, the format of llama.cpp, read with limits and without trust in its counts.

Little-endian: "GGUF", version, number of tensors and of entries; the entries `key, type, value`; for each
tensor name, dimensions, type and offset; then, aligned, the data. Every count is compared with the bytes
that are left before anything is read or allocated for it. (The `gguf` package's reader believes counts:
one of 2^40 in a damaged file makes it loop without end.) The format is described in docs/gguf.md of ggml.
"""

import dataclasses
import math
import mmap
import os
from typing import Any

import numpy as np

from famx.base.errors import ConfigError
from famx.base.packages import optional_package
from famx.base.untrusted import shown

_VERSIONS = (2, 3)
# Numbers by their type in the format, as numpy names them.
_NUMBERS = {
    0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "u1", 10: "u8", 11: "i8", 12: "f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_ALIGNMENT = 32
MOST_ENTRIES, MOST_TENSORS = 1 << 16, 1 << 20
MOST_STRINGS = 1 << 22  # of one array, such as the tokens or the merges
_MOST_HEADER_BYTES = 1 << 28
_MOST_NAME, _MOST_STRING = 1 << 10, 1 << 24
_MOST_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
      name: its name in the file.
      shape: numbers of elements, the innermost dimension last.
      tensor_type: its `gguf.GGMLQuantizationType`.
      data: the elements if they are numbers of numpy, else the rows of blocks as bytes; a memory map.
    """

    name: str
    shape: tuple[int, ...]
    tensor_type: Any
    data: np.ndarray


class GgufFile:
    """A GGUF file: entries of the header, and tensors as memory maps.

    Args:
      path: the file.

    Attributes:
      values: entries by key: int, float, bool, str or a list of one of these.
      tensors: the tensors, in the order of the file.

    Raises:
      ConfigError: the package `gguf` is missing, or the file is not a whole GGUF file; names the entry or
        the tensor that is wrong.
    """

    def __init__(self, path: str | os.PathLike):
        self._gguf = optional_package("gguf", "GGUF files")
        self.path = path
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be read: {error.strerror}.") from error
        except ValueError as error:  # an empty file cannot be mapped
            raise ConfigError(f"'{path}' is not a whole GGUF file (empty); fetch it again.") from error
        self._data, self._at, self._where = data, 0, "its beginning"
        if self._take(4) != b"GGUF":
            raise self._damaged("it does not begin with GGUF")
        version = self._number(4)
        if version and version & 0xFFFF == 0:
            raise ConfigError(f"'{path}' has the byte order of another machine; fetch another file.")
        if version not in _VERSIONS:
            raise self._damaged(f"version {version} of the format, of which 2 and 3 can be read")
        num_tensors, num_entries = self._number(8), self._number(8)
        if num_tensors > MOST_TENSORS or num_entries > MOST_ENTRIES:
            raise self._damaged(f"it claims {num_tensors:,} tensors and {num_entries:,} entries")
        self.values: dict[str, Any] = {}
        for _ in range(num_entries):
            self._where = f"the entry after {shown(next(reversed(self.values), 'the first'))}"
            key = self._string(_MOST_NAME)
            self._where = shown(key)
            if key in self.values:
                raise self._damaged("the entry is there twice")
            self.values[key] = self._value(self._number(4))
        self.tensors = self._tensors(num_tensors)

    def get(self, key: str, default: Any = None) -> Any:
        """Value of an entry."""
        return self.values.get(key, default)

    # ------ Numbers and strings

    def _damaged(self, what: str) -> ConfigError:
        return ConfigError(
            f"'{self.path}' is not a whole GGUF file (at {self._where}, {what}); fetch it again."
        )

    def _take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > min(len(self._data), _MOST_HEADER_BYTES):
            raise self._damaged("the header ends or is too long")
        return self._data[start : self._at]

    def _number(self, num_bytes: int) -> int:
        return int.from_bytes(self._take(num_bytes), "little")

    def _string(self, most: int) -> str:
        count = self._number(8)
        if count > most:
            raise self._damaged(f"a text would have {count:,} bytes, and at most {most:,} are read")
        try:
            return self._take(count).decode()
        except UnicodeDecodeError as error:
            raise self._damaged("a text is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string(_MOST_STRING)
        if kind == _ARRAY:
            return self._array(self._number(4), self._number(8))
        if kind not in _NUMBERS:
            raise self._damaged(f"the type {kind} is not known")
        return self._numbers(kind, 1)[0]

    def _array(self, kind: int, count: int) -> list[Any]:
        left = min(len(self._data), _MOST_HEADER_BYTES) - self._at
        if kind != _STRING and kind not in _NUMBERS:
            raise self._damaged(f"an array of the type {kind} is not known")
        size = 8 if kind == _STRING else np.dtype(_NUMBERS[kind]).itemsize
        if count * size > left or (kind == _STRING and count > MOST_STRINGS):
            raise self._damaged(f"an array would have {count:,} elements")
        if kind == _STRING:
            return [self._string(_MOST_STRING) for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> list[Any]:
        form = np.dtype("<" + _NUMBERS[kind])
        numbers = np.frombuffer(self._take(count * form.itemsize), form)
        return (numbers.astype(bool) if kind == _BOOL else numbers).tolist()

    # ------ Tensors

    def _tensors(self, count: int) -> list[GgufTensor]:
        infos, names = [], set()
        for i in range(count):
            self._where = f"the tensor {i}"
            name = self._string(_MOST_NAME)
            self._where = f"the tensor {shown(name)}"
            if name in names:
                raise self._damaged("the tensor is there twice")
            names.add(name)
            rank = self._number(4)
            if rank > _MOST_DIMENSIONS:
                raise self._damaged(f"it would have {rank:,} dimensions")
            shape = tuple(self._number(8) for _ in range(rank))[::-1]
            infos.append((name, shape, self._number(4), self._number(8)))
        alignment = self.values.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16:
            self._where = "general.alignment"
            raise self._damaged(f"the alignment is {shown(alignment)}")
        start = -(-self._at // alignment) * alignment
        return [self._tensor(start, *info) for info in infos]

    def _tensor(self, start: int, name: str, shape: tuple[int, ...], kind, offset: int) -> GgufTensor:
        self._where = f"the tensor {shown(name)}"
        types, sizes = self._gguf.GGMLQuantizationType, self._gguf.GGML_QUANT_SIZES
        try:
            kind = types(kind)
            block, block_bytes = sizes[kind]
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"'{self.path}' holds tensors of an unknown type ({shown(name)}: {kind}); use a file with"
                " tensors of type Q8_0, or a newer package gguf."
            ) from error
        if not shape or shape[-1] % block or math.prod(shape) < 1:
            raise self._damaged(f"the shape {list(shape)} does not fit the type {kind.name}")
        num_bytes = math.prod(shape) // block * block_bytes
        if start + offset + num_bytes > len(self._data):
            raise self._damaged(f"{num_bytes:,} bytes of data end after the file")
        data = np.frombuffer(self._data, np.uint8, num_bytes, start + offset)
        plain = {types.F32: np.float32, types.F16: np.float16, types.F64: np.float64}
        if kind in plain:
            data = data.view(plain[kind]).reshape(shape)
        else:
            data = data.reshape(*shape[:-1], shape[-1] // block * block_bytes)
        return GgufTensor(name, shape, kind, data)
