"""Records of blocks: tokens, predictions, and what the memory attended to in its updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from famx.modules import Decoder

_LOGITS = 1 << 24  # number of logits that `predict` holds at once


@dataclasses.dataclass(frozen=True)
class BlockRecords:
    """Records of the blocks whose maps are kept and of the newest blocks; there may be gaps.

    `R` is the number of blocks. Floating-point arrays are float32, or float64 if the model computes so.

    Attributes:
      blocks: indices of the blocks, ascending.
      slots: first slot that was read of each block, and the one after the last, int32 `[R, 2]`.
      ids: token ids, int32 `[R, S]`; `NO_TOKEN` in slots that were not read.
      predicted: the token that the model takes for the most probable next one, int32 `[R, S]`;
        `NO_TOKEN` in slots that were not read.
      probability: its probability `[R, S]`.
      rank: rank of the token that does follow, 1 for the most probable, int32 `[R, S]`; 0 for the last
        token of the text, and where features are read in place of tokens.
      next_probability: probability of the token that does follow `[R, S]`; 0 for the last token.
      updates: attention of the memory while it compresses the block, mean over heads,
        `[R, layers, N, N + S]`; 0 for an incomplete block. No rows if the memory does not attend.
      shares: share of each new memory token that comes from this attention, `[R, layers, N]`; the rest
        is what it was before (`Memory.attention_share`).
    """

    blocks: tuple[int, ...]
    slots: np.ndarray
    ids: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    rank: np.ndarray
    next_probability: np.ndarray
    updates: np.ndarray
    shares: np.ndarray

    def completed(self, block: int) -> bool:
        """Whether a block is among these and was read to its end, so that it updated the memory."""
        if block not in self.blocks:
            return False
        return bool(self.slots[self.blocks.index(block), 1] == self.ids.shape[1])


FIELDS = tuple(field.name for field in dataclasses.fields(BlockRecords)[1:])


def predict(decoder: Decoder, params, hidden, targets):
    """What the model expects after each token, and how it ranks the token that follows.

    Args:
      decoder: the decoder, unbound.
      params: its parameters.
      hidden: output of the last layer `[L, D]`.
      targets: token that follows each token, int32 `[L]`; negative where there is none.

    Returns:
      `predicted`, `probability`, `rank` and `next_probability` as in `BlockRecords`, each `[L]`. Among
      tokens of equal probability the one that follows has the best rank.
    """

    def of_token(token):
        x, target = token
        logits = decoder.apply({"params": params}, x[None], method="logits")[0]
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        probabilities = jax.nn.softmax(logits)
        follows, index = target >= 0, jnp.maximum(target, 0)
        rank = 1 + jnp.sum(logits > logits[index], dtype=jnp.int32)
        return {
            "predicted": jnp.argmax(logits).astype(jnp.int32),
            "probability": jnp.max(probabilities),
            "rank": jnp.where(follows, rank, 0),
            "next_probability": jnp.where(follows, probabilities[index], 0),
        }

    together = max(1, min(len(hidden), _LOGITS // decoder.config.vocab_size))
    return jax.lax.map(of_token, (hidden, targets), batch_size=together)
