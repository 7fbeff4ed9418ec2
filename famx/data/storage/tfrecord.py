"""Encoding of TFRecord files and of the `tf.train.Example`s in them, without TensorFlow.

A record is its length (uint64), the masked CRC-32C of the length, the data, and the masked CRC-32C
of the data; all numbers are little endian. An Example is a protocol buffer that maps names to lists
of bytes, floats or int64.
"""

import functools
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
_POLYNOMIAL = 0x82F63B78  # CRC-32C, reflected
_BLOCK = 1024
_BYTES, _FLOAT, _INT64 = 1, 2, 3  # field numbers of the lists in a Feature
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


# ---------------------------------------------------------------- checksums
@functools.cache
def _crc_tables() -> tuple[np.ndarray, list[int]]:
    """uint32 `[_BLOCK, 256]` contributions by position and byte; the register after `n` zero bytes."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    places = np.empty((_BLOCK, 256), np.uint32)
    places[-1] = table
    for place in range(_BLOCK - 2, -1, -1):
        after = places[place + 1]
        places[place] = (after >> 8) ^ table[after & 255]
    starts = [0xFFFFFFFF]
    for _ in range(_BLOCK - 1):
        starts.append((starts[-1] >> 8) ^ int(table[starts[-1] & 255]))
    return places, starts


def masked_crc(data: bytes) -> int:
    """Masked CRC-32C of `data`, as TFRecord files store it.

    A CRC is linear: that of a block is the exclusive or of the contributions of its bytes, which a
    table lists by position and value.
    """
    places, starts = _crc_tables()
    values = np.frombuffer(data, np.uint8)
    first = len(values) % _BLOCK
    where = np.arange(_BLOCK)
    crc = starts[first] ^ int(
        np.bitwise_xor.reduce(places[where[_BLOCK - first :], values[:first]], initial=0))
    for block in values[first:].reshape(-1, _BLOCK):
        head = np.frombuffer(struct.pack("<I", crc), np.uint8)
        crc = int(np.bitwise_xor.reduce(places[where, block]))
        crc ^= int(np.bitwise_xor.reduce(places[where[:4], head]))
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """`data` as one record of a TFRecord file."""
    length = struct.pack("<Q", len(data))
    return b"".join(
        [length, FOOTER.pack(masked_crc(length)), data, FOOTER.pack(masked_crc(data))])


# ------------------------------------------------------------------ varints
def _encode_varints(values: np.ndarray) -> bytes:
    """Encode int64 values as groups of seven bits, lowest first; all but the last have bit 8 set."""
    values = values.astype(np.uint64)
    width = max(1, -(-int(values.max(initial=0)).bit_length() // 7))
    groups = values[:, None] >> (7 * np.arange(width + 1, dtype=np.uint64))
    continued, written = groups[:, 1:] != 0, groups[:, :-1] != 0
    written[:, 0] = True  # a zero takes a byte too
    return ((groups[:, :-1] & 127) | continued * np.uint64(128)).astype(np.uint8)[written].tobytes()


def _decode_varints(data: bytes) -> np.ndarray:
    values = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(values < 128)
    if not len(values):
        return np.zeros(0, np.int64)
    if not len(ends) or ends[-1] != len(values) - 1:
        raise ValueError("a number is cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    width = int(sizes.max())
    if width > 10:
        raise ValueError("a number is longer than 10 bytes")
    numbers = (values[starts] & 127).astype(np.uint64)
    for place in range(1, width):
        longer = np.flatnonzero(sizes > place)
        group = (values[starts[longer] + place] & 127).astype(np.uint64)
        numbers[longer] |= group << np.uint64(7 * place)
    return numbers.view(np.int64)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at offset `at`, and the offset after it."""
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number is longer than 10 bytes")


# ----------------------------------------------------------------- Examples
def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (field number, wire type, bytes of the value) of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            _, end = _varint(data, at)
        elif wire == _DELIMITED:
            length, at = _varint(data, at)
            end = at + length
        elif wire in (_FIXED32, _FIXED64):
            end = at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"wire type {wire} is unknown")
        if end > len(data):
            raise ValueError("a field is cut off")
        yield number, wire, data[at:end]
        at = end


def decode_example(data: bytes) -> dict[str, Any]:
    """Decode a serialised Example into a dict.

    Numbers are int64 or float32 arrays `[n]`. A list of bytes with one item is `bytes`, else a list.

    Raises:
      ValueError: `data` is not an Example.
    """
    example = {}
    try:
        for number, wire, features in _fields(data):
            for entry_number, entry_wire, entry in _fields(features) if number == 1 else ():
                if (wire, entry_number, entry_wire) == (_DELIMITED, 1, _DELIMITED):
                    pair = {n: value for n, _, value in _fields(entry)}
                    example[pair.get(1, b"").decode()] = _decode_feature(pair.get(2, b""))
    except (ValueError, IndexError) as error:
        raise ValueError(f"The record is not a tf.train.Example: {error}.") from error
    return example


def _decode_feature(data: bytes) -> Any:
    value: Any = []
    for kind, _, values in _fields(data):
        parts = [part for part in _fields(values) if part[0] == 1]
        joined = b"".join(part for _, _, part in parts) if kind in (_FLOAT, _INT64) else b""
        if kind == _BYTES:
            value = [part for _, _, part in parts]
            value = value[0] if len(value) == 1 else value
        elif kind == _FLOAT:
            value = np.frombuffer(joined, "<f4").astype(np.float32)
        elif kind == _INT64:
            value = _decode_varints(joined)
    return value


def encode_example(record: Mapping[str, Any]) -> bytes:
    """Serialise `record` as an Example with sorted names.

    Args:
      record: maps names to text, bytes, a list of these, or numbers (scalar or array `[n]`). Whole
        numbers and truth values become int64, others float32.

    Raises:
      ValueError: a value has none of these types.
    """
    entries = []
    for name in sorted(record):
        entry = _delimited(1, name.encode()) + _delimited(2, _encode_feature(name, record[name]))
        entries.append(_delimited(1, entry))
    return _delimited(1, b"".join(entries))


def _encode_feature(name: str, value: Any) -> bytes:
    texts = [value] if isinstance(value, str | bytes) else value
    if isinstance(texts, list | tuple) and texts and all(isinstance(x, str | bytes) for x in texts):
        texts = [x.encode() if isinstance(x, str) else x for x in texts]
        return _delimited(_BYTES, b"".join(_delimited(1, text) for text in texts))
    try:
        numbers = np.atleast_1d(np.asarray(value))
    except ValueError:  # lists of different lengths
        numbers = np.empty((0, 0))
    kind = numbers.dtype.kind
    if numbers.ndim != 1 or kind not in "biuf" or (kind == "u" and (numbers > 2**63 - 1).any()):
        raise ValueError(
            f"'{name}' cannot be written to a TFRecord file: give text, bytes, a list of these, or "
            "numbers in at most one dimension that fit int64 or float32."
        )
    if kind == "f":
        return _delimited(_FLOAT, _delimited(1, numbers.astype("<f4").tobytes()))
    return _delimited(_INT64, _delimited(1, _encode_varints(numbers.astype(np.int64))))


def _delimited(number: int, data: bytes) -> bytes:
    head, length = bytearray([number << 3 | _DELIMITED]), len(data)
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    head.append(length)
    return bytes(head) + data
