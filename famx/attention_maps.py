"""Attention maps of a text: figures, an interactive page, the numbers and their summaries.

    python -m famx.attention_maps --checkpoint /tmp/famx/model --text book.txt --out /tmp/maps
    python -m famx.attention_maps --checkpoint /tmp/famx/model --text book.txt --out /tmp/maps \
        --layers 0,5 --heads 0,1 --blocks 0,1,-1

The text may have any length; `--blocks` names the blocks whose maps are kept, -1 being the last.
"""

import json
import math
import os
import pathlib
import warnings
from collections.abc import Iterator, Sequence

from absl import flags

from famx.analysis.attention_maps import AttentionMaps, read_maps
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.files import replace_file
from famx.inference.conversation import load_with_vocabulary
from famx.inference.reading import ReadProgress, encode_file

_MAX_FIGURES = 400  # of which each layer and block has three
_MAX_TOGETHER = 50_000_000  # cells of a figure of several blocks


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "MODEL_DIR, or MODEL_DIR/checkpoint_<step>.")
    flags.DEFINE_string("text", None, "The text file to read.")
    flags.DEFINE_string("out", None, "Directory to write to; made if missing.")
    flags.DEFINE_list("layers", None, "Layers whose maps are kept, such as 0,5; all by default.")
    flags.DEFINE_list("heads", None, "Heads whose maps are kept; all by default.")
    flags.DEFINE_list("blocks", ["0", "-1"], "Blocks whose maps are kept; -1 is the last.")
    flags.DEFINE_bool("overwrite", False, "Write into --out even if it holds maps.")


def main():
    values = flags.FLAGS
    choice = {name: _numbers(name, values[name].value) for name in ("layers", "heads", "blocks")}
    make_maps(values.checkpoint, values.text, values.out, overwrite=values.overwrite, **choice)


def _numbers(name: str, given: Sequence[str] | None) -> list[int] | None:
    try:
        return None if given is None else [int(value) for value in given]
    except ValueError:
        raise ConfigError(
            f"--{name}={','.join(given)} cannot be read: write numbers with commas between them."
        ) from None


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
      checkpoint: of the model that reads.
      text: the file.
      out: a directory.
      layers, heads, blocks: see `AttentionReader.read`; at least one block.
      overwrite: write there even if `out` holds maps.

    Raises:
      ConfigError: anything that is not as it should be, before the model is loaded where possible.
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error.strerror}.") from error

    def pieces(progress) -> Iterator[list[int]]:
        read = 0
        for done, ids in encode_file(text, trained.model.vocabulary):
            yield ids
            read += len(ids)
            progress(done, read)

    try:
        with ReadProgress(text) as progress:
            maps = read_maps(trained, pieces(progress), layers, heads, blocks)
    except OSError as error:
        raise ConfigError(f"{text} cannot be read: {error.strerror}.") from error
    try:
        count = write_maps(maps, folder)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}.") from error
    summary = maps.summary
    print(
        f"{out}: {count} figures, {summary.counts.sum():,} tokens in {len(summary.counts):,} blocks read,"
        f" maps of blocks {', '.join(map(str, maps.blocks))}"
    )


def write_maps(maps: AttentionMaps, folder: pathlib.Path) -> int:
    """Writes maps.npz, summary.json, attention.html and the figures; returns the number of figures.

    The page is left out, with a line that says why, where plotly is missing or the maps are too large.

    Raises:
      OSError: a file cannot be written.
    """
    from famx.analysis import figures  # slow to import
    from famx.analysis.interactive import attention_page

    maps.save(folder / "maps.npz")
    updated = [b for b in maps.blocks if maps.fam_length and maps.completed(b)]
    sources = {
        f"layer {layer}, block {block}": maps.sources(layer, block)
        for layer in maps.layers
        for block in updated
    }
    summary = maps.summary.to_dict() | {"sources": sources}
    data = json.dumps(summary, indent=1, ensure_ascii=False)
    replace_file(folder / "summary.json", f"{data}\n".encode())
    try:
        replace_file(folder / "attention.html", attention_page(maps).encode())
    except ConfigError as error:  # the rest does not need the page
        print(f"There is no attention.html: {error}")

    made = {
        "masses": lambda: figures.mass_figure(maps.summary),
        "entropy": lambda: figures.entropy_figure(maps.summary),
    }
    sizes = (len(maps.blocks) * n for n in (maps.fam_length + maps.block_size, maps.tokens.shape[-1]))
    together = len(maps.blocks) > 1 and math.prod(sizes) <= _MAX_TOGETHER
    for layer in maps.layers:
        if together:
            made[f"map_layer{layer}"] = lambda l=layer: figures.map_figure(maps.as_picture(l))
        if maps.fam_length:
            made[f"travel_layer{layer}"] = lambda l=layer: figures.travel_figure(maps.summary, l)
        for block in maps.blocks:
            name = f"layer{layer}_block{block}"
            made[f"map_{name}"] = lambda l=layer, b=block: figures.map_figure(
                maps.as_picture(l, blocks=b)
            )
            made[f"heads_{name}"] = lambda l=layer, b=block: figures.heads_figure(maps, l, b)
            if block in updated:
                made[f"sources_{name}"] = lambda l=layer, b=block: figures.sources_figure(maps, l, b)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of texts in other scripts
        for name, make in made.items():
            make().savefig(folder / f"{name}.png", dpi=130)
    return len(made)


if __name__ == "__main__":
    define_flags()
    gin_utils.run(main, gin_flags=False)
