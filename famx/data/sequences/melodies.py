"""A melody, and then other sounds."""

import dataclasses
import functools
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from famx.base.features import Feature
from famx.base.ranges import Amount, AtLeastTwo, NonNegative, Positive, Share
from famx.base.values import checked
from famx.data.sequences.log_mel import log_mel
from famx.data.sequences.task import SequenceTask

RATE, HOP, NOTES = 8000, 128, 4
_NAMES = (
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"),
    *("india", "juliet", "kilo", "lima", "mike", "november", "oscar", "papa"),
)
_LOWEST = 400.0  # Hz


@checked
@dataclasses.dataclass(frozen=True)
class MelodyTask(SequenceTask):
    """A melody of four tones and chirps in noise, then noise with chirps; at the end its name.

    The feature `frames` holds a log-mel frame and 1 at the last position, which asks. A melody is a row
    of four pitches, the same in every split; examples differ in key, loudness, the glide of each note,
    the noise and the chirps that follow.

    Attributes:
      melodies: number of melodies.
      melody_frames: frames that a melody takes, from the first one on.
      bands: number of mel bands.
      transpose: semitones by which a melody may be higher.
      noise: standard deviation of the noise; tones have an amplitude of 0.3 to 1.
      chirps: share of the time after the melody, in pieces of a note's length, in which there is a chirp.
    """

    melodies: Annotated[int, Ge(2), Le(len(_NAMES))] = 8
    melody_frames: Annotated[Positive, Ge(2 * NOTES)] = 16
    bands: AtLeastTwo = 16
    transpose: NonNegative = 2
    noise: Amount = 0.1
    chirps: Share = 0.25

    words = _NAMES

    @property
    def features(self):
        return (Feature("frames", self.bands + 1),)

    @property
    def min_length(self) -> int:
        return self.melody_frames + 1

    def row(self, rng, length):
        number = int(rng.integers(self.melodies))
        key, note = rng.integers(self.transpose + 1), self.melody_frames // NOTES * HOP
        sound = rng.normal(0, 1, length * HOP) * self.noise
        for i, pitch in enumerate(_pitches()[number]):
            glide = float(rng.choice([1.0, 1.0, 0.97, 1.03]))
            tone = _chirp(rng, _LOWEST * 2 ** ((pitch + key) / 12), glide, note)
            sound[i * note : (i + 1) * note] += tone
        for start in range(self.melody_frames * HOP, len(sound) - note + 1, note):
            if rng.random() < self.chirps:
                pitch, glide = rng.uniform(0, 24), rng.uniform(0.8, 1.25)
                sound[start : start + note] += _chirp(rng, _LOWEST * 2 ** (pitch / 12), glide, note)
        frames = np.zeros((length, self.bands + 1), np.float32)
        frames[:, :-1] = log_mel(sound, RATE, HOP, self.bands)
        frames[-1, -1] = 1
        return dict(features={"frames": frames}, answer=[_NAMES[number]])


@functools.cache
def _pitches() -> np.ndarray:
    """Four pitches of each melody, in semitones, all melodies different."""
    rng, found = np.random.default_rng(0), list[list[int]]()
    while len(found) < len(_NAMES):
        pitches = rng.choice([0, 4, 7, 12, 16, 19], NOTES).tolist()
        if pitches not in found:
            found.append(pitches)
    return np.array(found)


def _chirp(rng: np.random.Generator, hertz: float, glide: float, samples: int) -> np.ndarray:
    """A sine whose frequency goes from `hertz` to `glide` times that, faded in and out."""
    frequency = hertz * np.linspace(1, glide, samples)
    phase = 2 * np.pi * (np.cumsum(frequency) / RATE + rng.random())
    return rng.uniform(0.3, 1.0) * np.sin(phase) * np.hanning(samples) ** 0.25
