"""Reads texts of any length into a memory file of constant size.

    python -m famx.memory --checkpoint /tmp/famx/model --read book.txt --out book.famem
    python -m famx.memory --checkpoint /tmp/famx/model --memory book.famem --read more.txt --out two.famem
    python -m famx.memory --show book.famem

`python -m famx.chat --memory book.famem` answers questions from it.
"""

import os
import time
from collections.abc import Sequence

from absl import flags

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.inference.conversation import Conversation, load_with_vocabulary
from famx.inference.reading import ReadProgress
from famx.model_dir.memory_file import read_header


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "MODEL_DIR, or MODEL_DIR/checkpoint_<step>.")
    flags.DEFINE_string("adapter", None, "A saved adapter for the checkpoint.")
    flags.DEFINE_multi_string("read", [], "A text file; repeat it to read several, one after another.")
    flags.DEFINE_string("out", None, "The memory file to write.")
    flags.DEFINE_string("memory", None, "A memory file to go on from.")
    flags.DEFINE_bool("overwrite", False, "Replace --out if it exists.")
    flags.DEFINE_string("show", None, "Print what a memory file says about itself, and do no more.")


def main():
    values = flags.FLAGS
    if values.show:
        print(describe(values.show))
        return
    make_memory(
        values.checkpoint, values.read, values.out, values.memory, values.overwrite, values.adapter
    )


def make_memory(
    checkpoint: str | None,
    texts: Sequence[str],
    out: str | None,
    memory: str | None = None,
    overwrite: bool = False,
    adapter: str | None = None,
) -> None:
    """Reads `texts` one after another, nothing between them, and writes and prints what came of it.

    Args:
      checkpoint: of the model that reads.
      texts: files.
      out: the memory file; it may be `memory`, which then is replaced at the end.
      memory: a memory file to go on from; None: from nothing.
      overwrite: replace `out` whatever it is, as long as it is not one of the texts.
      adapter: of the model, see `famx.model_dir.loading.load_model`.

    Raises:
      ConfigError: anything that is not as it should be, before the model is loaded where possible.
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
    began, read = time.monotonic(), 0
    for path in texts:
        with ReadProgress(path) as progress:
            count = conversation.read_file(path, progress)
        print(f"{path}: {count:,} tokens", flush=True)
        read += count
    conversation.save(out, overwrite=True)
    rate = read / (time.monotonic() - began)
    print(
        f"{out}: {conversation.tokens:,} tokens read, {conversation.updates:,} memory updates,"
        f" {conversation.num_bytes:,} bytes of state, {rate:,.0f} tokens/s"
    )


def describe(path: str) -> str:
    """What the header of a memory file says, a line for each thing."""
    header = read_header(path)
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


if __name__ == "__main__":
    define_flags()
    gin_utils.run(main, gin_flags=False)
