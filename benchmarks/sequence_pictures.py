"""What the memory attends to in images and in sound: the pictures of docs/beyond_text.md.

    famx train album_tiny --gin.MODEL_DIR=/tmp/famx/album
    famx train melody_tiny --gin.MODEL_DIR=/tmp/famx/melody
    python -m benchmarks.sequence_pictures --album=/tmp/famx/album --melody=/tmp/famx/melody --to=docs

writes album_attention.png and melody_attention.png, each of the first example of the evaluation that the
model answers rightly.
"""

import argparse
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks import command
from famx.analysis import AttentionMaps, AttentionReader
from famx.analysis.figures import overlay_figure, series_figure
from famx.analysis.pictures import memory_on_grid
from famx.base.errors import ConfigError
from famx.data.sequences import AlbumTask, MelodyTask, SequenceTask
from famx.data.sequences.digits import SIDE, patch_count
from famx.model_dir.loading import TrainedModel, load_model

_TRIED = 64  # examples, of which one must be right


def right_answer(trained: TrainedModel, task: SequenceTask, length: int) -> tuple[dict, AttentionMaps]:
    """The first example of a task that the model answers rightly, with its maps.

    Raises:
      ConfigError: it answers none of the first ones rightly.
    """
    reader = AttentionReader(trained.model.module)
    for index in range(_TRIED):
        example = task.example(index, length)
        maps = reader.read(trained.params, [example["features"]])
        answer = trained.model.vocabulary.decode([int(maps.records.predicted[-1][-1])])
        if [answer] == example["references"]:
            return example, maps
    raise ConfigError(f"None of {_TRIED} examples is answered rightly: train the model to the end first.")


def album_figure(trained: TrainedModel) -> Figure:
    """The attention of each memory token of each layer on the first two images of an album of 16.

    Both images are in block 0, and are drawn one below the other.
    """
    config = trained.model.config
    task = AlbumTask(split="eval", seed=1)
    example, maps = right_answer(trained, task, 8 * config.block_size)
    side = SIDE // task.patch
    images = config.block_size // patch_count(task.patch)
    pixels = example["features"]["patches"][: config.block_size, : task.patch**2]
    tiled = pixels.reshape(images, side, side, task.patch, task.patch).swapaxes(2, 3)
    each = [memory_on_grid(maps, layer, 0, (images * side, side)) for layer in maps.layers]
    titles = [f"layer {layer}, F{i}" for layer, of in zip(maps.layers, each) for i in range(len(of))]
    image = tiled.reshape(images * SIDE, SIDE)
    return overlay_figure(image, np.concatenate(each), titles, across=len(each[0]))


def melody_figure(trained: TrainedModel) -> Figure:
    """The spectrogram of the first four blocks, and the attention of each memory token on its frames."""
    size, shown = trained.model.config.block_size, 4
    task = MelodyTask(split="eval", seed=1)
    example, maps = right_answer(trained, task, 2 * shown * size)
    of_layer = lambda layer: [memory_on_grid(maps, layer, block, (1, size)) for block in range(shown)]
    weights = np.stack([np.concatenate(of_layer(layer), axis=2)[:, 0] for layer in maps.layers])
    frames = example["features"]["frames"][: shown * size, : task.bands]
    titles = [f"layer {layer}: attention of the memory on the frames" for layer in maps.layers]
    return series_figure(frames, weights, titles, range(size, shown * size, size), "mel band")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--album", help="a run of album_tiny")
    parser.add_argument("--melody", help="a run of melody_tiny")
    parser.add_argument("--to", required=True, type=pathlib.Path, help="directory of the pictures")
    args = parser.parse_args(argv)
    if not (args.album or args.melody):
        parser.error("give --album or --melody")
    args.to.mkdir(parents=True, exist_ok=True)
    for run, make in ((args.album, album_figure), (args.melody, melody_figure)):
        if run:
            path = args.to / make.__name__.replace("figure", "attention.png")
            make(load_model(run)).savefig(path, dpi=110)
            print(path)


if __name__ == "__main__":
    with command.exit_on_bad_input():
        main()
