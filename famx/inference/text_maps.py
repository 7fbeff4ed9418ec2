"""Attention maps of a text file: reads it with a model and writes maps, figures and a summary."""

import os
import pathlib
from collections.abc import Iterator, Sequence

from famx.analysis.attention_maps import read_maps
from famx.analysis.map_files import write_maps
from famx.base.errors import ConfigError
from famx.base.files import nearest_existing
from famx.inference.conversation import load_with_vocabulary
from famx.inference.reading import ReadProgress, encode_file

_MAX_FIGURES = 400  # three for each layer and block


def make_maps(
    checkpoint: str | None,
    text: str | None,
    out: str | None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    blocks: Sequence[int] = (0, -1),
    overwrite: bool = False,
) -> None:
    """Reads a text file and writes maps.npz, summary.json, attention.html and figures into `out`.

    Args:
      checkpoint: model that reads, `MODEL_DIR` or `MODEL_DIR/checkpoint_<step>`.
      text: file to read.
      out: directory to write to; created if missing.
      layers, heads, blocks: selection of the maps, see `AttentionReader.read`; at least one block.
      overwrite: whether to write into `out` if it contains maps.

    Raises:
      ConfigError: a file or setting is not valid; known before the model is loaded where possible.
    """
    if not text:
        raise ConfigError("There is nothing to read: add --text=FILE.")
    if not out:
        raise ConfigError("There is nowhere to write to: add --out=DIR.")
    if not os.path.isfile(text) or not os.access(text, os.R_OK):
        raise ConfigError(f"{text} is not a file that can be read.")
    if not blocks:
        raise ConfigError("No block is named: add --blocks, such as --blocks=0,-1.")
    folder = pathlib.Path(out)
    if (folder / "maps.npz").exists() and not overwrite:
        raise ConfigError(f"{out} holds maps already: choose another directory, or add --overwrite.")
    trained = load_with_vocabulary(checkpoint)
    layer_count = trained.model.config.num_layers if layers is None else len(layers)
    if 3 * layer_count * len(blocks) > _MAX_FIGURES:
        raise ConfigError(
            f"{layer_count} layers of {len(blocks)} blocks are too many figures: name fewer of them."
        )
    existing = nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"{out} cannot be made: {existing} must be a folder where you may write.")

    def pieces(progress) -> Iterator[list[int]]:
        tokens = 0
        for done, ids in encode_file(text, trained.model.vocabulary):
            yield ids
            tokens += len(ids)
            progress(done, tokens)
        if not tokens:
            raise ConfigError(f"{text} contains no text.")

    try:
        with ReadProgress(text) as progress:
            maps = read_maps(trained, pieces(progress), layers, heads, blocks)
    except OSError as error:
        raise ConfigError(f"{text} cannot be read: {error.strerror}.") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        count = write_maps(maps, folder)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}.") from error
    summary = maps.summary
    print(
        f"{out}: {count} figures, {summary.counts.sum():,} tokens in {len(summary.counts):,} blocks read,"
        f" maps of blocks {', '.join(map(str, maps.blocks))}"
    )
