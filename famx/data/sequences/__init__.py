"""Generated sequences of other things than text: pixels, patches, frames of sound, edges of graphs.

A task is a frozen dataclass, a `SequenceTask`. An example is made from `(seed, split, index, length)`
alone; nothing is downloaded. Pictures are those of scikit-learn (`famx[digits]`), of which training and
evaluation have different ones; spoken digits are made by the program espeak-ng, with different voices.
All else needs numpy alone.

| name | at each position | at the end |
|---|---|---|
| `pixels` | a pixel of a handwritten digit, or a patch | the digit |
| `album_first` | a patch of one of many digits | the first digit |
| `album_same` | the same | whether the last digit is the first |
| `melody` | a log-mel frame | the name of the melody with which it began |
| `spoken_digit` | a log-mel frame | the digit with which it began |
| `reachable_tree`, `reachable_sparse` | an edge | whether a node leads to another, in how many steps |
| `key_then_images` | a word or a patch | the key that was told before the images |
| `image_then_text` | a patch or a word | the digit that was shown before the text |
"""

from famx.data.sequences.album import AlbumTask
from famx.data.sequences.catalogue import SEQUENCES
from famx.data.sequences.graphs import ReachableTask
from famx.data.sequences.melodies import MelodyTask
from famx.data.sequences.pixels import PixelsTask
from famx.data.sequences.several_kinds import ImageThenTextTask, KeyThenImagesTask
from famx.data.sequences.speech import SpokenDigitTask
from famx.data.sequences.task import SequenceTask

__all__ = [
    "AlbumTask",
    "ImageThenTextTask",
    "KeyThenImagesTask",
    "MelodyTask",
    "PixelsTask",
    "ReachableTask",
    "SEQUENCES",
    "SequenceTask",
    "SpokenDigitTask",
]
