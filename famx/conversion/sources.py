"""Opens a pretrained model: a Hugging Face directory, or a GGUF file."""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401, gives numpy bfloat16 by name
import numpy as np

from famx.base.errors import ConfigError
from famx.base.text import some
from famx.conversion.gguf_source import GgufSource
from famx.conversion.tensor_source import READABLE, Source, TensorInfo
from famx.conversion.with_memory import base_config, memory_fields

CONFIG = "config.json"
SIDE_FILES = (  # files that an export returns unchanged
    *("generation_config.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt"),
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_BLOCK = 1 << 20


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
        full = self._read_config()
        self.config, self.memory_fields = base_config(full), memory_fields(full, self.directory / CONFIG)
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
        return _read_object(file)

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
            try:
                claimed = {str(k): str(v) for k, v in _read_object(index)["weight_map"].items()}
            except (KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{index} has no weight_map; download it again.") from error
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
        text = stream.read(length) if 8 + length <= size else b""
    if len(start) < 8 or not text:
        raise ConfigError(
            f"{file} is not whole: it has {size:,} bytes, and its header alone would have"
            f" {8 + length:,}; download it again."
        )
    tensors, expected = {}, 8 + length
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            info = TensorInfo(tuple(entry["shape"]), _DTYPES.get(entry["dtype"], entry["dtype"]))
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            size_of = np.dtype(info.dtype).itemsize if info.dtype in READABLE else None
            if size_of and end - start != math.prod(info.shape) * size_of:
                raise ValueError(f"{name} has another length")
            tensors[name], expected = (info, start), max(expected, end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no safetensors file, or damaged: download it again.") from error
    if size != expected:
        raise ConfigError(
            f"{file} is not whole: it has {size:,} bytes and should have {expected:,}; download it again."
        )
    return tensors


def known_sha256(file: pathlib.Path) -> str | None:
    """The SHA-256 that `file` should have, from a file next to it or its cache entry; None: unknown."""
    checksum_file = file.with_name(f"{file.name}.sha256")
    note = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    words = [pathlib.Path(os.path.realpath(file)).name]  # Hugging Face's cache: a link to <SHA-256>
    with contextlib.suppress(OSError, UnicodeDecodeError):
        words = checksum_file.read_text().split()[:1] or words
    with contextlib.suppress(OSError, UnicodeDecodeError):
        words += note.read_text().split()[1:2]  # commit, etag, time
    matches = (re.fullmatch(r"[0-9a-f]{64}", word.strip('"').lower()) for word in words)
    return next((match[0] for match in matches if match), None)


def _is_byte_level(spec: pathlib.Path) -> bool:
    content = _read_object(spec)
    parts = [content.get(name) for name in ("pre_tokenizer", "decoder")]
    return '"ByteLevel"' in json.dumps(parts)


def _read_object(file: pathlib.Path) -> dict[str, Any]:
    try:
        with _readable(file):
            content = json.loads(file.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} is damaged: it is not readable as JSON; download it again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is damaged: it must hold a JSON object; download it again.")
    return content


@contextlib.contextmanager
def _readable(file: pathlib.Path) -> Iterator[None]:
    """Turns an OSError about a file into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
