"""Writes a trained model as a directory that transformers loads.

    python -m famx.export --checkpoint /tmp/famx/model --to /tmp/famx/exported
    python -m famx.export --checkpoint /tmp/famx/model/checkpoint_5000 --to DIR --dtype bfloat16

Weights are merged. The prompt of the feedback attention memory and the memory's settings lie beside
them, and `python -m famx.convert --from DIR` takes all of it back.
"""

import pathlib
import re

from absl import flags

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.progress import Progress
from famx.base.signals import exit_on_interrupt
from famx.conversion.exporting import DTYPES, check_destination, export
from famx.model_dir.loading import load_model

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "MODEL_DIR, or MODEL_DIR/checkpoint_<step>.")
    flags.DEFINE_string("to", None, "The directory to write; missing or empty.")
    flags.DEFINE_string("adapter", None, "Directory of a saved adapter, to be merged too.")
    flags.DEFINE_string("source", None, "Directory with the config.json and the tokenizer that the model "
                        "had before its import; unset: MODEL_DIR/source, if it is there.")  # fmt: skip
    flags.DEFINE_enum("dtype", None, DTYPES, "Of the weights; unset: as trained.")
    flags.DEFINE_string("max_shard_size", "5GB", "Of one weight file: bytes, or KB, MB, GB, TB.")


def main():
    values = flags.FLAGS
    if not values.checkpoint:
        raise ConfigError("There is nothing to export: add --checkpoint=MODEL_DIR.")
    if not values.to:
        raise ConfigError("There is nowhere to write to: add --to=DIR.")
    size = parse_size(values.max_shard_size)
    check_destination(values.to)
    if values.source and not (pathlib.Path(values.source).expanduser() / "config.json").is_file():
        raise ConfigError(f"There is no config.json in --source {values.source}.")
    trained = load_model(values.checkpoint, adapter=values.adapter)
    progress = Progress("export", unit="B", keep_bar=False)
    with exit_on_interrupt("Stopped; nothing was left behind."), progress:
        done = export(trained, values.to, values.dtype, size, values.source, progress.add)
    files = f"{len(done.files)} files" if len(done.files) > 1 else done.files[0]
    print(
        f"{done.directory}: {done.architecture}, step {trained.step}, {done.num_bytes:,} bytes in {files}"
    )
    for note in done.notes:
        print(f"Note: {note}")


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" or "500 MB"; ConfigError if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip(), re.IGNORECASE)
    unit = ((found and found[2]) or "").upper()
    size = int(float(found[1]) * _UNITS.get(unit, 1)) if found else 0
    if size < 1:
        raise ConfigError(f"--max_shard_size {text} is no size: write for example 5GB or 500MB.")
    return size


if __name__ == "__main__":
    define_flags()
    gin_utils.run(main, gin_flags=False)
