"""Texts that begin alike are read once, and their scores and continuations are those of each alone."""

import functools

import jax
import numpy as np
import pytest
from tiny import BLOCK, make_model, make_params

from famx.decoding import Sampling, Streamer
from famx.inference.prefixes import Family, PrefixReader, families
from famx.modules import Memory

VOCAB = 260


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def parts(memory=True):
    sizes = {} if memory else {"memory": Memory()}
    model = make_model(dtype="float64", param_dtype="float64", **sizes)
    return Streamer(model.module), make_params(model.module)


def draw(length, seed):
    return np.random.default_rng(seed).integers(3, VOCAB, length).astype(np.int32)


def join(*texts):
    return np.concatenate(texts).astype(np.int32)


class Counting:
    """A streamer that counts the tokens of whole texts, each row of which is one."""

    def __init__(self, streamer):
        self.streamer, self.module, self.read_tokens, self.scored_tokens = streamer, streamer.module, 0, 0

    def read(self, params, state, tokens, lengths):
        self.read_tokens += int(lengths.sum())
        return self.streamer.read(params, state, tokens, lengths)

    def score(self, params, state, tokens, targets, lengths):
        self.scored_tokens += int(lengths.sum())
        return self.streamer.score(params, state, tokens, targets, lengths)

    def __getattr__(self, name):
        return getattr(self.streamer, name)


def alone(context, continuation, memory=True):
    """Log-likelihood and greediness by one pass over one text."""
    streamer, params = parts(memory)
    whole = join(context, continuation)
    state = streamer.initial_state(params, 1)
    (log_p, best), _ = streamer.score(params, state, whole[None, :-1], whole[None, 1:])
    n = len(continuation)
    return log_p[0, -n:].sum(), bool(best[0, -n:].all())


DOCUMENT = draw(5 * BLOCK + 3, 0)  # with three questions
PAIRS = [
    *((join(DOCUMENT, draw(n, 10 + n)), draw(m, 20 + m)) for n in (2, 5, 11) for m in (1, 4)),
    (DOCUMENT, draw(3, 30)),
    (draw(1, 31), draw(7, 32)),  # as of an empty context
    (draw(1, 31), draw(40, 33)),
    (draw(2 * BLOCK, 34), draw(2, 35)),
]  # fmt: skip


@pytest.mark.sampled(6)
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_each_pair_alone(batch_size, memory):
    streamer, params = parts(memory)
    scores = PrefixReader(streamer, batch_size).log_likelihoods(params, PAIRS)
    found = {i: (score, greedy) for i, score, greedy in scores}
    assert sorted(found) == list(range(len(PAIRS)))
    for i, (score, greedy) in found.items():
        expected = alone(*PAIRS[i], memory)
        np.testing.assert_allclose(score, expected[0], rtol=1e-9)
        assert greedy == expected[1]


def test_a_greedy_continuation_is_found_greedy():
    streamer, params = parts()
    reader, prompt = PrefixReader(streamer, 2), draw(20, 40)
    ((_, written),) = reader.continuations(params, [prompt], Sampling(6))
    other = [*written[:-1], 3 + written[-1] % 100]
    pairs = [(prompt, np.array(ids, np.int32)) for ids in (written, other)]
    found = {i: greedy for i, _, greedy in reader.log_likelihoods(params, pairs)}
    assert found == {0: True, 1: False}


def test_what_texts_begin_with_is_read_once():
    streamer, params = parts()
    counting = Counting(streamer)
    list(PrefixReader(counting, 4).log_likelihoods(params, PAIRS))
    # The document once, then three questions and its last token without the ends that are scored.
    rest = 2 + 5 + 11
    assert counting.read_tokens == len(DOCUMENT) - 2 + (1 + 3 * 1 + rest) + (2 * BLOCK - 1)
    assert counting.scored_tokens == sum(len(continuation) for _, continuation in PAIRS)


def test_continuations_are_those_of_each_prompt_alone():
    streamer, params = parts()
    prompts = [join(DOCUMENT, draw(n, 50 + n)) for n in (1, 2, 9)]
    prompts += [draw(4, 60), draw(4, 60), draw(33, 61)]
    for sampling in (Sampling(40), Sampling(40, temperature=1.0)):
        one, many = PrefixReader(streamer, 1), PrefixReader(streamer, 4)
        expected = dict(one.continuations(params, prompts, sampling, seed=3))
        found = dict(many.continuations(params, prompts, sampling, seed=3))
        assert found == expected and all(len(ids) == 40 for ids in found.values())
    assert found[3] != found[4], "equal prompts have draws of their own"
    assert dict(many.continuations(params, prompts, sampling, seed=4)) != found
    # Greedily, as the streamer writes them without pieces.
    state = streamer.initial_state(params, 1)
    logits, state = streamer.read(params, state, prompts[5][None])
    out = streamer.generate(params, logits, state, Sampling(40))
    greedy = dict(many.continuations(params, prompts, Sampling(40)))
    assert greedy[5] == np.asarray(out.tokens)[0].tolist()


def test_what_ends_a_continuation():
    streamer, params = parts()
    prompts = [draw(7, seed) for seed in (70, 71, 72)]
    reader = PrefixReader(streamer, 2)
    free = dict(reader.continuations(params, prompts, Sampling(80)))
    stop = free[1][5]
    stopped = dict(reader.continuations(params, prompts, Sampling(80, stop_tokens=(stop,))))
    for i, ids in stopped.items():
        assert ids == free[i][: free[i].index(stop) + 1 if stop in free[i] else 80]
    ended = dict(reader.continuations(params, prompts, Sampling(80), ended=lambda ids: free[2][3] in ids))
    assert len(ended[2]) < 80 and ended[2] == free[2][: len(ended[2])]
    assert len(dict(reader.continuations(params, prompts, Sampling(3)))[0]) == 3


def test_texts_start_from_a_state():
    streamer, params = parts()
    before, context, continuation = draw(30, 80), draw(9, 81), draw(4, 82)
    _, state = streamer.read(params, streamer.initial_state(params, 1), before[None])
    reader = PrefixReader(streamer, 2, state)
    for _ in range(2):  # the state is not used up
        ((_, score, _),) = reader.log_likelihoods(params, [(context, continuation)])
        np.testing.assert_allclose(score, alone(join(before, context), continuation)[0], rtol=1e-9)


def test_families():
    text = lambda *ids: np.array(ids, np.int32)
    a, b = text(*range(10), 1, 2), text(*range(10), 7)
    assert families([a, b], 8) == [Family(10, [0, 1])]
    assert families([b, text(5, 5), a], 8) == [Family(10, [2, 0]), Family(2, [1])]
    assert families([a, b], 11) == [Family(12, [0]), Family(11, [1])], "too short to be worth a reading"
    assert families([a, a], 8) == [Family(11, [0, 1])], "a token is left to be read"
    assert families([text(*range(20)), text(0, 1, 2, 9)], 2) == [
        Family(20, [0]),
        Family(4, [1]),
    ], "the first text would be read again from the third token on"
    assert families([], 8) == [] and families([text()], 8) == [Family(0, [0])]
    large = [text(300, *range(9)), text(2, *range(9)), text(300, *range(8))]
    assert families(large, 4) == [Family(10, [1]), Family(8, [2, 0])], "ordered by ids, not by bytes"
