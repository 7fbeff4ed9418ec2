"""Model sizes and data shared by the compared implementations. Imports only numpy."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model and its batch, and how a training step is computed."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    feed_forward: int  # hidden width of a gated feed-forward, which has three matrices
    block: int  # S, tokens per block
    memory_length: int  # N, memory tokens
    batch: int
    length: int  # tokens per example
    dtype: str = "float32"  # of activations; parameters are float32
    device: str = "cpu"  # of PyTorch

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.width // self.heads

    @property
    def landmark(self) -> int:
        """A token id that occurs at the first position of each example and nowhere else.

        It shows whether training reaches across blocks: if the logits of the last block have a
        gradient with respect to the landmark's embedding, it came through all blocks in between. The
        landmark's own logit is excluded, because the embeddings may be tied to the output.
        """
        return self.vocabulary - 1

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Random inputs and targets, int64 `[batch, length]` each, identical in every process."""
        shape = (self.batch, self.length + 1)
        rows = np.random.default_rng(0).integers(0, self.landmark, shape)
        rows[:, 0] = self.landmark
        return rows[:, :-1], rows[:, 1:]
