"""The generated sequences by name: `SEQUENCES[name](**options)` makes one."""

import functools
from collections.abc import Callable

from famx.data.sequences.album import AlbumTask
from famx.data.sequences.graphs import ReachableTask
from famx.data.sequences.melodies import MelodyTask
from famx.data.sequences.pixels import PixelsTask
from famx.data.sequences.several_kinds import ImageThenTextTask, KeyThenImagesTask
from famx.data.sequences.speech import SpokenDigitTask
from famx.data.sequences.task import SequenceTask

SEQUENCES: dict[str, Callable[..., SequenceTask]] = {
    "pixels": PixelsTask,
    "album_first": functools.partial(AlbumTask, question="first"),
    "album_same": functools.partial(AlbumTask, question="same"),
    "melody": MelodyTask,
    "spoken_digit": SpokenDigitTask,
    "reachable_tree": functools.partial(ReachableTask, graph="tree"),
    "reachable_sparse": functools.partial(ReachableTask, graph="sparse"),
    "key_then_images": KeyThenImagesTask,
    "image_then_text": ImageThenTextTask,
}
