"""Log-mel frames of sound."""

import functools

import numpy as np


def log_mel(samples: np.ndarray, rate: int, hop: int, bands: int) -> np.ndarray:
    """Log-mel frames float32 `[len(samples) // hop, bands]`, of the order of 1.

    A frame is the spectrum of `2 * hop` samples under a Hann window, whose centre moves on by `hop`. The
    energy of each band is averaged before its logarithm is taken.

    Args:
      samples: sound from -1 to 1.
      rate: samples per second.
      hop: samples from frame to frame.
      bands: number of triangular bands, evenly spaced on the mel scale from 0 to half the rate.
    """
    count = len(samples) // hop
    padded = np.pad(np.asarray(samples, np.float64)[: count * hop], (hop // 2, 2 * hop))
    index = np.arange(count)[:, None] * hop + np.arange(2 * hop)
    spectra = np.abs(np.fft.rfft(padded[index] * np.hanning(2 * hop), axis=1)) ** 2 / hop
    energy = spectra @ _filters(rate, hop, bands)
    return ((np.log(energy + 1e-4) + 4) / 4).astype(np.float32)


@functools.cache
def _filters(rate: int, hop: int, bands: int) -> np.ndarray:
    """Triangular filters `[hop + 1, bands]`, each of which sums to 1."""
    mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)
    edges = 700 * (10 ** (np.linspace(0, mel(rate / 2), bands + 2) / 2595) - 1)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    frequency = np.linspace(0, rate / 2, hop + 1)[:, None]
    rising, falling = (frequency - low) / (middle - low), (high - frequency) / (high - middle)
    filters = np.maximum(np.minimum(rising, falling), 0)
    nearest = np.abs(frequency - middle).argmin(axis=0)  # for bands narrower than a line of the spectrum
    filters[nearest, np.arange(bands)] += 1e-3
    return filters / filters.sum(axis=0)
