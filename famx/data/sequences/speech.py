"""Spoken digits, which the program espeak-ng says."""

import dataclasses
import functools
import io
import shutil
import subprocess
import wave

import numpy as np

from famx.base.errors import ConfigError
from famx.base.features import Feature
from famx.base.ranges import Amount, AtLeastTwo
from famx.base.values import checked
from famx.data.sequences.log_mel import log_mel
from famx.data.sequences.task import DIGITS, SequenceTask

PUBLISHED = PROGRAM = "espeak-ng"
VOICES = {
    "train": ("en-us", "en-gb", "en-gb-scotland", "en-us+m3", "en-us+f2", "en-gb+m5", "en-gb+f3"),
    "eval": ("en-gb-x-rp", "en-us+m7", "en-us+f4"),
}
RATES = (130, 160, 190)  # words per minute
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FRAMES_PER_SECOND = 43  # near 23 ms for each
_LONGEST = 36  # frames of an utterance that are kept
_SECONDS = 30  # for the program to say a word


@checked
@dataclasses.dataclass(frozen=True)
class SpokenDigitTask(SequenceTask):
    """A spoken digit in noise, then noise alone; at the end the digit is named.

    The feature `frames` holds a log-mel frame and 1 at the last position, which asks. Voices of the
    evaluation are never heard in training.

    Attributes:
      bands: number of mel bands.
      noise: standard deviation of the noise; speech goes from -1 to 1.

    Raises:
      ConfigError: espeak-ng is not installed.
    """

    bands: AtLeastTwo = 20
    noise: Amount = 0.01

    words = DIGITS

    def __post_init__(self):
        if shutil.which(PROGRAM) is None:
            raise ConfigError(
                f"Spoken digits are made by the program {PROGRAM}, which is not installed: run apt-get"
                f" install {PROGRAM}, or choose another task, such as melody."
            )

    @property
    def features(self):
        return (Feature("frames", self.bands + 1),)

    @property
    def min_length(self) -> int:
        return _LONGEST + 1

    def row(self, rng, length):
        label = int(rng.integers(10))
        sound, rate = spoken(label, str(rng.choice(VOICES[self.split])), int(rng.choice(RATES)))
        hop = rate // _FRAMES_PER_SECOND
        samples = rng.normal(0, 1, length * hop) * self.noise
        sound = sound[: _LONGEST * hop]
        start = int(rng.integers(_LONGEST * hop - len(sound) + 1))
        samples[start : start + len(sound)] += rng.uniform(0.5, 1.0) * sound
        frames = np.zeros((length, self.bands + 1), np.float32)
        frames[:, :-1] = log_mel(samples, rate, hop, self.bands)
        frames[-1, -1] = 1
        return dict(features={"frames": frames}, answer=[str(label)])


@functools.lru_cache(maxsize=1024)
def spoken(digit: int, voice: str, rate: int) -> tuple[np.ndarray, int]:
    """A digit as float32 samples from -1 to 1, silence at both ends left out, and samples per second.

    Raises:
      ConfigError: the program fails.
    """
    command = [PROGRAM, "-v", voice, "-s", str(rate), "--stdout", _NAMES[digit]]
    try:
        said = subprocess.run(command, capture_output=True, check=True, timeout=_SECONDS).stdout
        with wave.open(io.BytesIO(said)) as file:
            per_second = file.getframerate()
            data = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    except (OSError, subprocess.SubprocessError, wave.Error, EOFError) as error:
        raise ConfigError(f"{' '.join(command)} failed: {error}.") from error
    samples = data.astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    if not len(loud):
        raise ConfigError(f"{' '.join(command)} said nothing.")
    return samples[loud[0] : loud[-1] + 1], per_second
