"""Opens a pretrained model: a Hugging Face directory, or a GGUF file."""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import ml_dtypes  # noqa: F401, gives numpy bfloat16 by name
import numpy as np
from pydantic import Field

from famx.base.errors import ConfigError
from famx.base.text import some
from famx.base.untrusted import Fields, Name, parse_object, parsed, read_object, shown
from famx.conversion.config_file import check_config, generation_end_ids, ids_of
from famx.conversion.gguf_source import GgufSource
from famx.conversion.tensor_source import READABLE, Source, TensorInfo
from famx.conversion.with_memory import base_config, memory_fields
from famx.data.vocabularies.tokenizer_files import MOST_TOKENIZER_BYTES

CONFIG = "config.json"
SIDE_FILES = (  # files that an export returns unchanged
    *("generation_config.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt"),
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_BLOCK = 1 << 20
_MOST_HEADER_BYTES = 100_000_000  # of a safetensors header, as in its own library
_MOST_TENSORS = 1 << 20


_Offset = Annotated[int, Field(ge=0, lt=1 << 60)]


class _Entry(Fields):
    """A tensor in the header of a safetensors file."""

    dtype: Annotated[str, Field(max_length=16)]
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 48)]], Field(max_length=16)]
    data_offsets: Annotated[list[_Offset], Field(min_length=2, max_length=2)]


class _Header(Fields):
    tensors: dict[Name, _Entry]


class _Index(Fields):
    """`model.safetensors.index.json`: the file, a name in the same directory, that holds each tensor."""

    weight_map: Annotated[dict[Name, Name], Field(max_length=_MOST_TENSORS)]


def open_source(path: str | os.PathLike, on_bytes: Callable[[int, int], None] | None = None) -> Source:
    """The source at `path`; reads only headers, and the files that a checksum is known for.

    Args:
      path: a directory with `config.json` and safetensors, or a GGUF file.
      on_bytes: called as `on_bytes(bytes, total bytes)` while checksums are computed.

    Raises:
      ConfigError: it is neither, or something in it is missing, truncated or damaged.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if path.is_dir():
        return HuggingFaceSource(path, on_bytes)
    if not path.exists():
        raise ConfigError(f"There is no model {path}: give a directory or a GGUF file that is here.")
    with _readable(path), path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return GgufSource(path)
    if (path.parent / "config.json").is_file():
        raise ConfigError(f"{path} is a file of a model: give its directory {path.parent}.")
    raise ConfigError(f"{path} is neither a Hugging Face directory nor a GGUF file.")


class HuggingFaceSource:
    """`config.json` and safetensors, one file or several with an index; see `Source`.

    Construction checks that every file exists and is as long as its header says, and its SHA-256 if that
    is known: from a `.sha256` file next to it, or from the metadata of a Hugging Face download.

    Raises:
      ConfigError: on construction, if a file is missing, truncated or damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        on_bytes: Callable[[int, int], None] | None = None,
    ):
        self.directory = pathlib.Path(path).expanduser().absolute()
        self.name = self.directory.name
        full, file = self._read_config(), self.directory / CONFIG
        self.config, self.memory_fields = base_config(full), memory_fields(full, file)
        check_config(self.config, file)
        if isinstance(inner := self.config.get("text_config"), dict):
            check_config(inner, f"{file} (text_config)")
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[pathlib.Path, int]] = {}
        names, claimed = self._weight_files()
        for name in names:
            file = self.directory / name
            for tensor, (info, start) in read_header(file).items():
                if claimed.get(tensor, name) == name:
                    self.tensors[tensor], self._places[tensor] = info, (file, start)
        for tensor, name in claimed.items():
            if tensor not in self.tensors:
                raise ConfigError(
                    f"{self.directory / name} does not hold {tensor}, though {INDEX} says so: the"
                    " files are not of one download; download them again."
                )
        self._check_sums([self.directory / name for name in names], on_bytes)
        self.end_ids = self._end_ids()
        self.tokenizer = self._tokenizer()

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is stored, as a read-only memory map of the file.

        Raises:
          ConfigError: the file can no longer be read.
        """
        (file, start), info = self._places[name], self.tensors[name]
        with _readable(file):
            return np.asarray(np.memmap(file, np.dtype(info.dtype), "r", start, info.shape))

    def _read_config(self) -> dict[str, Any]:
        file = self.directory / CONFIG
        if not file.is_file():
            raise ConfigError(f"{self.directory} holds no model of Hugging Face: {self._what_instead()}")
        return read_object(file)

    def _what_instead(self) -> str:
        """Description of a directory without `config.json`, as the end of a sentence."""
        names = sorted(os.listdir(self.directory))
        if "model.json" in names:
            return "it is a MODEL_DIR of famx, which needs no import."
        if "adapter_config.json" in names:
            return "it is an adapter; give the model that it was trained on."
        if gguf := [name for name in names if name.endswith(".gguf")]:
            return f"give the file {self.directory / gguf[0]} itself."
        return "there is no config.json in it."

    def _weight_files(self) -> tuple[list[str], dict[str, str]]:
        """`(names of the weight files, {tensor: file} according to the index, if any)`."""
        names = sorted(path.name for path in self.directory.glob("*.safetensors"))
        names = [name for name in names if not name.startswith("adapter_")]
        if SINGLE in names:
            return [SINGLE], {}
        index = self.directory / INDEX
        if index.is_file():
            claimed = parsed(_Index, read_object(index, _MOST_HEADER_BYTES), index).weight_map
            missing = sorted(set(claimed.values()) - set(names))
            if missing:
                raise ConfigError(
                    f"{self.directory} lacks {some(missing, 4)}, which {INDEX} lists: download"
                    f" {'it' if len(missing) == 1 else 'them'} again."
                )
            return sorted(set(claimed.values())), claimed
        if len(names) == 1 and not re.search(r"-of-\d+\.", names[0]):
            return names, {}
        if names:
            raise ConfigError(f"{self.directory} has {some(names, 4)} but no {INDEX}: download it too.")
        if list(self.directory.glob("*.bin")) or list(self.directory.glob("*.pt*")):
            raise ConfigError(
                f"{self.directory} holds its weights only as pickled PyTorch files, which are not read:"
                " convert them to safetensors, with save_pretrained of transformers."
            )
        raise ConfigError(f"{self.directory} has a config.json but no weights: there is no {SINGLE}.")

    def _check_sums(self, files: list[pathlib.Path], on_bytes) -> None:
        known = {file: digest for file in files if (digest := known_sha256(file))}
        total = sum(file.stat().st_size for file in known)
        done = 0
        for file, wanted in known.items():
            digest = hashlib.sha256()
            with _readable(file), file.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
                    done += len(block)
                    if on_bytes:
                        on_bytes(done, total)
            if digest.hexdigest() != wanted:
                raise ConfigError(
                    f"{file} is damaged: its SHA-256 is {digest.hexdigest()[:12]}... and should be"
                    f" {wanted[:12]}...; download it again."
                )

    def _end_ids(self) -> tuple[int, ...]:
        """Ids of `eos_token_id` in config.json and in generation_config.json, which often has more."""
        configs = [self.config, self.config.get("text_config") or {}]
        ids = [i for config in configs for i in ids_of(config.get("eos_token_id"))]
        if (file := self.directory / "generation_config.json").is_file():
            ids += generation_end_ids(read_object(file), file)
        return tuple(dict.fromkeys(ids))

    def _tokenizer(self) -> pathlib.Path | None:
        """The SentencePiece model, unless a `tokenizer.json` next to it is byte-level BPE."""
        model, spec = self.directory / "tokenizer.model", self.directory / "tokenizer.json"
        if model.is_file() and not (spec.is_file() and _is_byte_level(spec)):
            return model
        return spec if spec.is_file() else None


def read_header(file: pathlib.Path) -> dict[str, tuple[TensorInfo, int]]:
    """The tensors of a safetensors file by name, each with the offset in bytes at which it begins.

    Raises:
      ConfigError: it is not a safetensors file, or not as long as its header says.
    """
    with _readable(file), file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if (start + stream.read(40)).startswith(b"version https://git-lfs"):
            raise ConfigError(f"{file} is a pointer of Git LFS, not the file itself: run git lfs pull.")
        stream.seek(8)
        text = stream.read(length) if 8 + length <= min(size, _MOST_HEADER_BYTES) else b""
    if length > _MOST_HEADER_BYTES:
        raise ConfigError(
            f"{file} is no safetensors file, or damaged: its header would have {length:,} bytes; download"
            " it again."
        )
    if len(start) < 8 or not text:
        raise ConfigError(
            f"{file} is not whole: it has {size:,} bytes, and its header alone would have"
            f" {8 + length:,}; download it again."
        )
    tensors, expected = {}, 8 + length
    for name, entry in _entries(text, file).items():
        info = TensorInfo(tuple(entry.shape), _DTYPES.get(entry.dtype, entry.dtype))
        start, end = (8 + length + offset for offset in entry.data_offsets)
        size_of = np.dtype(info.dtype).itemsize if info.dtype in READABLE else None
        num_bytes = math.prod(info.shape) * size_of if size_of else end - start
        # In order of their places the tensors must follow each other without a gap or an overlap.
        if start != expected or end < start or end - start != num_bytes:
            raise ConfigError(
                f"{file} is no safetensors file, or damaged: the place of {shown(name)} does not fit its"
                " shape; download it again."
            )
        tensors[name], expected = (info, start), end
    if size != expected:
        raise ConfigError(
            f"{file} is not whole: it has {size:,} bytes and should have {expected:,}; download it again."
        )
    return tensors


def _entries(text: bytes, file: pathlib.Path) -> dict[str, "_Entry"]:
    """The tensors of a safetensors header, in the order of their places in the file."""
    header = parse_object(text, file)
    header.pop("__metadata__", None)
    if len(header) > _MOST_TENSORS:
        raise ConfigError(f"{file} lists {len(header):,} tensors; at most {_MOST_TENSORS:,} are read.")
    entries = parsed(_Header, {"tensors": header}, file).tensors
    return dict(sorted(entries.items(), key=lambda item: item[1].data_offsets))


def known_sha256(file: pathlib.Path) -> str | None:
    """The SHA-256 that `file` should have, from a file next to it or its cache entry; None: unknown."""
    checksum_file = file.with_name(f"{file.name}.sha256")
    note = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    words = [pathlib.Path(os.path.realpath(file)).name]  # Hugging Face's cache: a link to <SHA-256>
    with contextlib.suppress(OSError, UnicodeDecodeError):
        words = _beginning(checksum_file).split()[:1] or words
    with contextlib.suppress(OSError, UnicodeDecodeError):
        words += _beginning(note).split()[1:2]  # commit, etag, time
    matches = (re.fullmatch(r"[0-9a-f]{64}", word.strip('"').lower()) for word in words)
    return next((match[0] for match in matches if match), None)


def _beginning(file: pathlib.Path) -> str:
    with file.open(encoding="utf-8") as stream:
        return stream.read(4096)


def _is_byte_level(spec: pathlib.Path) -> bool:
    content = read_object(spec, MOST_TOKENIZER_BYTES)
    parts = [content.get(name) for name in ("pre_tokenizer", "decoder")]
    return '"ByteLevel"' in json.dumps(parts)


@contextlib.contextmanager
def _readable(file: pathlib.Path) -> Iterator[None]:
    """Turns an OSError about a file into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
