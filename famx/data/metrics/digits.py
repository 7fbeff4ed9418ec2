"""Accuracy of digits that a model predicts as token ids."""

import numpy as np


def exact_match(predicted: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Float32 `[B]`: 1 if all digits of int `[B, digits]` `predicted` equal those of `answer`, else 0."""
    return np.asarray(_hits(predicted, answer).all(axis=-1), np.float32)


def digit_accuracy(predicted: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Float32 `[B]`: share of the digits of int `[B, digits]` `predicted` that are right."""
    return np.asarray(_hits(predicted, answer).mean(axis=-1, dtype=np.float32))


def _hits(predicted: np.ndarray, answer: np.ndarray) -> np.ndarray:
    predicted, answer = np.asarray(predicted), np.asarray(answer)
    if predicted.ndim != 2 or predicted.shape != answer.shape:
        raise ValueError(
            f"Predicted digits of shape {predicted.shape} cannot be compared with answers of shape "
            f"{answer.shape}; both must be [batch, digits]."
        )
    return predicted == answer
