"""Metrics of answers that are a fixed number of tokens, such as pass keys."""

import numpy as np


def exact_match(predicted: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """float32 [B]: 1 where all digits of int [B, digits] `predicted` equal those of `answer`."""
    return _hits(predicted, answer).all(axis=-1).astype(np.float32)


def digit_accuracy(predicted: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """float32 [B]: the share of right digits of int [B, digits] `predicted`."""
    return _hits(predicted, answer).mean(axis=-1, dtype=np.float32)


def _hits(predicted: np.ndarray, answer: np.ndarray) -> np.ndarray:
    predicted, answer = np.asarray(predicted), np.asarray(answer)
    if predicted.ndim != 2 or predicted.shape != answer.shape:
        raise ValueError(
            f"Predicted digits of shape {predicted.shape} cannot be compared with answers of shape "
            f"{answer.shape}; both must be [batch, digits]."
        )
    return predicted == answer
