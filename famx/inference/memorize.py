"""Reads texts of any length into a memory file of constant size."""

import os
import time
from collections.abc import Sequence

from famx.base.errors import ConfigError
from famx.inference.conversation import Conversation, load_with_vocabulary
from famx.inference.reading import ReadProgress
from famx.model_dir.memory_file import check_memory, read_header


def make_memory(
    checkpoint: str | None,
    texts: Sequence[str],
    out: str | None,
    memory: str | None = None,
    overwrite: bool = False,
    adapter: str | None = None,
) -> None:
    """Reads text files in order, with nothing between them, writes a memory file and prints its sizes.

    Args:
      checkpoint: model that reads, `MODEL_DIR` or `MODEL_DIR/checkpoint_<step>`.
      texts: files to read.
      out: memory file to write; may be `memory`, which is then replaced at the end.
      memory: memory file whose state reading starts from; None: an empty state.
      overwrite: whether to replace `out` if it exists; a file of `texts` is never replaced.
      adapter: saved adapter, see `famx.model_dir.loading.load_model`.

    Raises:
      ConfigError: a file or setting is not valid; known before the model is loaded where possible.
    """
    if not texts:
        raise ConfigError("There is nothing to read: add --read=FILE.")
    if not out:
        raise ConfigError("There is nowhere to write to: add --out=FILE.famem.")
    for path in texts:
        if not os.path.exists(path):
            raise ConfigError(f"There is no file {path}.")
        if os.path.isdir(path) or not os.access(path, os.R_OK):
            raise ConfigError(f"{path} is not a file that can be read.")
    folder = os.path.dirname(os.path.abspath(out))
    if os.path.isdir(out) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ConfigError(f"{out} cannot be written: {folder} must be a folder where you may write.")
    real = os.path.realpath(out)
    if real in map(os.path.realpath, texts):
        raise ConfigError(f"{out} is itself one of the texts to read: choose another --out.")
    if os.path.exists(out) and not overwrite and real != os.path.realpath(memory or ""):
        raise ConfigError(f"{out} exists: choose another name, or add --overwrite.")
    if memory:
        read_header(memory)

    conversation = Conversation(load_with_vocabulary(checkpoint, adapter))
    if memory:
        conversation.load(memory)
    began, tokens = time.monotonic(), 0
    for path in texts:
        with ReadProgress(path) as progress:
            count = conversation.read_file(path, progress)
        print(f"{path}: {count:,} tokens", flush=True)
        tokens += count
    conversation.save(out, overwrite=True)
    rate = tokens / (time.monotonic() - began)
    print(
        f"{out}: {conversation.tokens:,} tokens read, {conversation.updates:,} memory updates,"
        f" {conversation.num_bytes:,} bytes of state, {rate:,.0f} tokens/s"
    )


def describe(path: str) -> str:
    """Header of a memory file as text, one entry per line.

    Raises:
      ConfigError: there is no such file, it was cut or altered, or it is of another format.
    """
    header = check_memory(path)
    numbers = lambda values: ", ".join(f"{value:,}" for value in values)
    lines = {
        "texts": ", ".join(header.sources),
        "tokens read": numbers(header.position),
        "memory updates": numbers(header.updates),
        "state": f"{header.num_bytes:,} bytes",
        "written by": f"famx {header.famx}, format {header.format}",
        "model": header.model_fingerprint,
        "vocabulary": header.vocabulary_fingerprint or "none",
        "checksum": header.sha256,
        **{name: value for name, value in header.model.items() if value is not None},
    }
    return "\n".join([f"{path}", *(f"  {name}: {value}" for name, value in lines.items())])
