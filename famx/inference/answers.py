"""Continuations of prompts and log-likelihoods of targets, batch by batch."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from famx.base.distributed import on_host
from famx.base.waiting import Announced
from famx.data.vocabularies import Vocabulary
from famx.decoding import Sampling, Streamer, generate
from famx.inference.prefixes import PrefixReader
from famx.inference.prompts import Example
from famx.modules import DecoderState


class Answers:
    """Continue or score batches of examples with one model.

    Programs are compiled for `batch_size` rows; a smaller batch is padded.

    Args:
      streamer: runs the model's decoder.
      vocabulary: the model's vocabulary.
      memory: `DecoderState` of batch size 1 that every prompt starts from; None: the model's initial
        state.
      batch_size: largest number of examples in a batch.
      sampling: how tokens are chosen and what ends a continuation.
      num_samples: number of continuations per prompt.
      random_seed: seed of all draws. The key of a token depends only on the seed, the line, the sample
        and the token's index, so that a result does not depend on the batch that a line is in.
    """

    def __init__(
        self,
        streamer: Streamer,
        vocabulary: Vocabulary,
        memory: DecoderState | None,
        batch_size: int,
        sampling: Sampling,
        num_samples: int,
        random_seed: int,
    ):
        self.streamer, self.vocabulary = streamer, vocabulary
        self._reader = PrefixReader(streamer, batch_size, memory)
        self._from_memory_file = memory is not None
        self.batch_size, self.sampling, self.num_samples = batch_size, sampling, num_samples

        @functools.partial(jax.jit, donate_argnums=2 if num_samples == 1 else ())
        def write(params, logits, state, lines, max_tokens):
            rows = jnp.repeat(jnp.arange(batch_size), num_samples)
            samples = jnp.tile(jnp.arange(num_samples), batch_size)
            draw = lambda line, sample: jax.random.fold_in(jax.random.fold_in(seed, line), sample)
            seed = jax.random.key(random_seed)
            keys = jax.vmap(draw)(lines[rows], samples)
            if num_samples > 1:
                logits, state = logits[rows], state.take(rows)
            return generate(self.streamer.module, params, logits, state, sampling, keys, max_tokens[rows])

        self._write = Announced(write, "the writing of text")

    def predict(self, params, batch: Sequence[Example]) -> tuple[list[dict[str, Any]], int]:
        """Continue each prompt.

        Returns:
          `(answers, num_tokens)`: a dict with `prediction` and `aux` per example, as in the output lines
          of `famx.inference`, and the number of tokens read and written.
        """
        prompts = [example.prompt for example in batch]
        start, skipped = self._reader.start(params), self._out_of_reach(prompts)
        if skipped.any():
            start = start.replace(position=start.position + skipped)
        near = self._reader.pad([prompt[count:] for prompt, count in zip(prompts, skipped)])
        logits, state = self.streamer.read(params, start, *near)
        lines, max_tokens = np.zeros((2, self.batch_size), np.int32)
        lines[: len(batch)] = [example.line for example in batch]
        max_tokens[: len(batch)] = self.sampling.max_new_tokens  # 0 for padding rows: they end at once
        out = self._write(params, logits, state, lines, max_tokens)
        tokens, lengths, scores = map(on_host, (out.tokens, out.lengths, out.log_likelihood))
        answers = []
        for i in range(len(batch)):
            rows = range(i * self.num_samples, (i + 1) * self.num_samples)
            written = [tokens[row, : lengths[row]].tolist() for row in rows]
            finished = [ids[-1] in self.sampling.stop_tokens for ids in written]
            texts = [self._text(ids[: len(ids) - end]) for ids, end in zip(written, finished)]
            aux = {
                "scores": scores[rows.start : rows.stop].tolist(),
                "tokens": written,
                "num_tokens": [len(ids) for ids in written],
                "finished": finished,
            }
            if self.num_samples == 1:
                texts, aux = texts[0], {name: value[0] for name, value in aux.items()}
            answers.append({"prediction": texts, "aux": aux})
        return answers, sum(map(len, prompts)) + int(lengths.sum())

    def score(self, params, batch: Sequence[Example]) -> tuple[list[dict[str, Any]], int]:
        """Score the targets of each example.

        Returns:
          `(scores, num_tokens)`: a dict with `score` and `num_tokens` per example, as in the output lines
          of `famx.inference`, and the number of tokens read.
        """
        pairs = [(row, k) for row, example in enumerate(batch) for k in range(len(example.targets))]
        texts = [(batch[row].prompt, batch[row].targets[k]) for row, k in pairs]
        scores = {pairs[i]: score for i, score, _ in self._reader.log_likelihoods(params, texts)}
        results = []
        for row, example in enumerate(batch):
            score = [scores[row, k] for k in range(len(example.targets))]
            count = [len(target) for target in example.targets]
            if isinstance(example.fields["targets"], str):
                score, count = score[0], count[0]
            results.append({"score": score, "num_tokens": count})
        return results, sum(len(e.prompt) + sum(map(len, e.targets)) for e in batch)

    def _out_of_reach(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """Number of first tokens of each prompt that no continuation depends on, int32 `[batch_size]`.

        They are whole blocks, beyond the reach of the stacked windows. With a memory there are none.
        """
        skipped, config = np.zeros(self.batch_size, np.int32), self.streamer.module.config
        if not self._from_memory_file and config.reach is not None:
            last = np.array([len(prompt) - 1 for prompt in prompts]) // config.block_size
            skipped[: len(prompts)] = np.maximum(last * config.block_size - config.reach, 0)
        return skipped

    def _text(self, ids: Sequence[int]) -> str:
        # A model may have more ids than its vocabulary; those have no text.
        return self.vocabulary.decode([i for i in ids if i < self.vocabulary.vocab_size])
