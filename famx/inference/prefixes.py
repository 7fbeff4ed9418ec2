"""Log-likelihoods and continuations of many texts; what several of them begin with is read once."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from famx.base.distributed import on_host
from famx.decoding import Sampling, Streamer
from famx.modules import DecoderState

T = TypeVar("T")

_PIECE = 32  # tokens that are written before the host looks whether a text has ended


class Family(NamedTuple):
    """Texts with a common beginning.

    Attributes:
      shared: number of tokens that are read once for all of them; of a single text all tokens.
      numbers: indices of the texts.
    """

    shared: int
    numbers: list[int]


class PrefixReader:
    """Read token sequences of any lengths in batches, with a state of constant size.

    Programs are compiled for `batch_size` rows; a smaller batch is padded. Texts of similar length share
    a batch, the longest first. A beginning that several texts share, such as a long document with many
    questions, or the examples of a few-shot prompt, is read once, and its state is copied.

    Args:
      streamer: runs the model's decoder.
      batch_size: largest number of texts in a batch.
      start: `DecoderState` of batch size 1 that every text starts from; None: the model's initial state.
    """

    def __init__(self, streamer: Streamer, batch_size: int, start: DecoderState | None = None):
        self.streamer, self.batch_size, self._start = streamer, batch_size, start

    def start(self, params) -> DecoderState:
        """State of `batch_size` rows before the first token."""
        if self._start is None:
            return self.streamer.initial_state(params, self.batch_size)
        return self._start.take(np.zeros(self.batch_size, np.int32))

    def pad(self, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Pad to `batch_size` rows: tokens int32 `[batch_size, L]`, lengths int64 `[batch_size]`."""
        lengths = np.zeros(self.batch_size, np.int64)
        lengths[: len(texts)] = [len(text) for text in texts]
        tokens = np.zeros((self.batch_size, lengths.max()), np.int32)
        for i, text in enumerate(texts):
            tokens[i, : len(text)] = text
        return tokens, lengths

    def log_likelihoods(
        self, params, pairs: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[int, float, bool]]:
        """Score continuations; those of equal contexts share one reading of the context.

        Args:
          params: the decoder's parameters.
          pairs: `(context, continuation)`, int32 `[n]` and `[m]`, each of at least one token.

        Yields:
          `(number of the pair, log-likelihood of its continuation in nats, whether every token of the
          continuation is the likeliest one)`, in any order, as soon as they are known.
        """
        groups: dict[bytes, list[int]] = {}
        for number, (context, _) in enumerate(pairs):
            groups.setdefault(context.tobytes(), []).append(number)
        members = list(groups.values())
        # The last token of a context predicts the first one of every continuation, and is therefore read
        # again in front of each.
        contexts = [pairs[numbers[0]][0][:-1] for numbers in members]
        for found, _, state in self._read(params, contexts):
            todo = [(row, number) for row, i in enumerate(found) for number in members[i]]
            inputs = [np.append(pairs[i][0][-1:], pairs[i][1][:-1]) for _, i in todo]
            rows = [row for row, _ in todo]
            for part, branch in self._branches(state, rows, inputs):
                tokens, lengths = self.pad([inputs[k] for k in part])
                targets, _ = self.pad([pairs[todo[k][1]][1] for k in part])
                (log_p, best), _ = self.streamer.score(params, branch, tokens, targets, lengths)
                sums = log_p.sum(axis=1, dtype=np.float64)
                for row, k in enumerate(part):
                    yield todo[k][1], float(sums[row]), bool(best[row, : lengths[row]].all())

    def continuations(
        self,
        params,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        seed: int = 0,
        ended: Callable[[list[int]], bool] = lambda ids: False,
    ) -> Iterator[tuple[int, list[int]]]:
        """Write a continuation of each prompt.

        Args:
          params: the decoder's parameters.
          prompts: token ids, int32 `[n]` with `n >= 1`.
          sampling: how tokens are chosen, and what ends a text.
          seed: seed of all draws; a draw depends only on it, the prompt's number and the token's index.
          ended: called with the tokens of a text after each few dozen; True ends the text, which may
            then hold some tokens after its end.

        Yields:
          `(number of the prompt, tokens)`, in any order; a stop token that ended a text is part of it.
        """
        for numbers, logits, state in self._read(params, prompts):
            written: list[list[int]] = [[] for _ in numbers]
            limit, done, active = sampling.max_new_tokens, 0, set(range(len(numbers)))
            piece = dataclasses.replace(sampling, max_new_tokens=min(_PIECE, limit))
            while active:
                seeds, room = np.zeros((2, self.batch_size), np.int64)
                for row in active:
                    entropy = (seed, numbers[row], done)
                    seeds[row] = np.random.SeedSequence(entropy).generate_state(1)[0]
                    room[row] = min(piece.max_new_tokens, limit - done)
                out = self.streamer.generate(params, logits, state, piece, seeds, room=room)
                logits, state = out.logits, out.state
                tokens, lengths = on_host(out.tokens), on_host(out.lengths)
                done += piece.max_new_tokens
                for row in sorted(active):
                    text = written[row]
                    text += tokens[row, : lengths[row]].tolist()
                    if text[-1] in sampling.stop_tokens or done >= limit or ended(text):
                        active.remove(row)
            yield from zip(numbers, written)

    def _read(
        self, params, texts: Sequence[np.ndarray]
    ) -> Iterator[tuple[list[int], jax.Array | None, DecoderState]]:
        """Read all texts.

        Yields:
          `(numbers, logits, state)`: row `i` belongs to text `numbers[i]`; further rows are padding. The
          logits `[batch_size, V]` follow the last token, and mean nothing after a text without tokens.
        """
        found = families(texts, self.streamer.module.config.block_size)
        alone = [family.numbers[0] for family in found if len(family.numbers) == 1]
        for part in self._in_batches(alone, lambda number: len(texts[number])):
            yield part, *self._advance(params, self.start(params), [texts[i] for i in part])
        related = [family for family in found if len(family.numbers) > 1]
        for stems in self._in_batches(related, lambda family: family.shared):
            beginnings = [texts[family.numbers[0]][: family.shared] for family in stems]
            _, state = self._advance(params, self.start(params), beginnings)
            todo = [(row, family, i) for row, family in enumerate(stems) for i in family.numbers]
            rests = [texts[i][family.shared :] for _, family, i in todo]
            for part, branch in self._branches(state, [row for row, *_ in todo], rests):
                numbers = [todo[k][2] for k in part]
                yield numbers, *self._advance(params, branch, [rests[k] for k in part])

    def _advance(self, params, state: DecoderState, texts: Sequence[np.ndarray]):
        """`(logits, state)` after the texts; logits None and the state unchanged if none has a token."""
        tokens, lengths = self.pad(texts)
        return self.streamer.read(params, state, tokens, lengths) if lengths.any() else (None, state)

    def _branches(
        self, state: DecoderState, rows: Sequence[int], texts: Sequence[np.ndarray]
    ) -> Iterator[tuple[list[int], DecoderState]]:
        """Batches of texts that continue rows of a state: indices of texts, and copies of their rows."""
        for part in self._in_batches(range(len(texts)), lambda k: len(texts[k])):
            picked = np.zeros(self.batch_size, np.int32)
            picked[: len(part)] = [rows[k] for k in part]
            yield part, state.take(picked)

    def _in_batches(self, items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
        ordered = sorted(items, key=length, reverse=True)
        for i in range(0, len(ordered), self.batch_size):
            yield ordered[i : i + self.batch_size]


def families(texts: Sequence[np.ndarray], least: int) -> list[Family]:
    """Group texts so that few tokens are read.

    Texts are grouped in the order of their tokens, as long as reading the shared beginning once saves
    tokens. Every text of a group has at least one token after it.

    Args:
      texts: token ids, int32 `[n]`.
      least: smallest number of tokens that is worth a reading of its own.
    """
    # The order of big-endian bytes is that of the ids, which are not negative.
    order = sorted(range(len(texts)), key=lambda i: texts[i].astype(">i4").tobytes())
    found: list[Family] = []
    for number in order:
        text = texts[number]
        if found:
            shared, numbers = found[-1]
            first = texts[numbers[0]]
            common = min(_common(texts[numbers[-1]], text), shared, len(first) - 1, len(text) - 1)
            saved = common - len(numbers) * (shared - common)
            if common >= least and saved > 0:
                found[-1] = Family(common, [*numbers, number])
                continue
        found.append(Family(len(text), [number]))
    return found


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Number of tokens with which both texts begin."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
