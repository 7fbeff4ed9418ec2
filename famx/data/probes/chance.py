"""Trivial answers to a probe's question, which need no memory of what was asked for.

Their scores are the chance level above which a score says something. A strategy either does not read
the text ("blind"), or reads it and ignores the question: it names what stands first or last, say. A score
should be read beside them, since metrics that look for strings in the answer forgive an answer that names
everything.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from famx.data.probes import words
from famx.data.probes.babi import LOCATIONS, BabiProbe
from famx.data.probes.counting import CodedWordsProbe, CommonWordsProbe
from famx.data.probes.needles import NeedleProbe, distinct
from famx.data.probes.passkey import PasskeyTask
from famx.data.probes.probe import Probe
from famx.data.probes.recall import SYMBOLS, CopyProbe, RecallProbe
from famx.data.probes.tracing import VariableProbe

Strategy = Callable[[Mapping[str, Any], np.random.Generator], str]


def chance(probe: Probe, prompts: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, float]:
    """Scores, 0 to 100, of all trivial strategies on these prompts of the probe, by name of the strategy.

    Args:
      probe: the probe.
      prompts: as its `prompt` makes them.
      seed: seed of what blind strategies draw.
    """
    scores = {}
    for name, strategy in strategies(probe).items():
        rng = np.random.default_rng(seed)
        answers = [strategy(prompt, rng) for prompt in prompts]
        (scores[name],) = probe.score(prompts, answers).values()
    return scores


def strategies(probe: Probe) -> dict[str, Strategy]:
    """The trivial strategies of a probe, by name; none for a probe of another class."""
    for kind, make in _STRATEGIES.items():
        if isinstance(probe, kind):
            return dict(make(probe))
    return {}


def _of_text(choose: Callable[[list[str]], str], pattern: str, after: str = "") -> Strategy:
    """Chooses among the matches of `pattern` in the prompt, from the last `after` on."""

    def strategy(prompt: Mapping[str, Any], rng: np.random.Generator) -> str:
        found = re.findall(pattern, prompt["inputs"].rpartition(after)[2] if after else prompt["inputs"])
        return choose(found) if found else ""

    return strategy


_first = lambda found: found[0]
_last = lambda found: found[-1]
_most = lambda found: Counter(found).most_common(1)[0][0]
_all = lambda found: " ".join(dict.fromkeys(found))


def _needles(probe: NeedleProbe) -> Iterator[tuple[str, Strategy]]:
    count = probe.num_values * probe.num_queries
    yield "blind", lambda _, rng: " ".join(distinct(rng, probe.values, count))
    value = r"One of the special magic \w+ for \S+ is: (\S+)\.(?=\s|$)"
    yield "the first value", _of_text(_first, value)
    yield "the last value", _of_text(_last, value)


def _variables(probe: VariableProbe) -> Iterator[tuple[str, Strategy]]:
    count = probe.num_hops + 1
    letters = list(string.ascii_uppercase)
    yield "blind", lambda _, rng: " ".join("".join(rng.choice(letters, 5)) for _ in range(count))
    name, start = r"VAR (\w+) =", "Memorize and track"
    yield "the first variable", _of_text(_first, name, start)
    yield "the last variable", _of_text(_last, name, start)
    yield "all variables", _of_text(_all, name, start)


def _common_words(probe: CommonWordsProbe) -> Iterator[tuple[str, Strategy]]:
    compound = lambda rng: words.compound(rng.integers(words.NUM_COMPOUNDS))
    yield "blind", lambda _, rng: " ".join(compound(rng) for _ in range(probe.num_common))
    entry, start = r"\d+\. (\S+)", "Below is a numbered list"
    yield "the first words", _of_text(lambda x: " ".join(x[: probe.num_common]), entry, start)
    yield "the last words", _of_text(lambda x: " ".join(x[-probe.num_common :]), entry, start)


def _coded_words(probe: CodedWordsProbe) -> Iterator[tuple[str, Strategy]]:
    letters = list(string.ascii_lowercase)
    word = lambda rng: "".join(rng.choice(letters, probe.letters))
    yield "blind", lambda _, rng: " ".join(word(rng) for _ in range(3))
    coded = rf"(?<= )[a-z]{{{probe.letters}}}(?= )"
    context = lambda prompt: prompt["inputs"].partition(" coded words. ")[2].partition("\nQuestion:")[0]
    named = lambda choose: lambda prompt, _: " ".join(choose(re.findall(coded, f" {context(prompt)} ")))
    yield "the first words", named(lambda found: list(dict.fromkeys(found))[:3])
    yield "the last words", named(lambda found: list(dict.fromkeys(found[::-1]))[:3])


def _places(probe: BabiProbe) -> Iterator[tuple[str, Strategy]]:
    del probe
    yield "blind", lambda _, rng: LOCATIONS[rng.integers(len(LOCATIONS))]
    # Of the story alone, not of examples and question.
    place = rf"\b({'|'.join(LOCATIONS)})\b(?=.*</context>)"
    story = lambda choose: _of_text(choose, f"(?s){place}", "<context>")
    yield "the first place", story(_first)
    yield "the last place", story(_last)
    yield "the place before the last", story(lambda found: found[-2] if len(found) > 1 else "")
    yield "the most frequent place", story(_most)


def _keys(probe: PasskeyTask) -> Iterator[tuple[str, Strategy]]:
    yield "blind", lambda _, rng: "".join(map(str, rng.integers(0, 10, probe.digits)))
    key = rf"(?<!\d)\d{{{probe.digits}}}(?!\d)"
    yield "the first number", _of_text(_first, key)
    yield "the last number", _of_text(_last, key)


def _letters(probe: CopyProbe | RecallProbe) -> Iterator[tuple[str, Strategy]]:
    count = getattr(probe, "num_symbols", 1)
    yield "blind", lambda _, rng: " ".join(SYMBOLS[i] for i in rng.integers(len(SYMBOLS), size=count))
    if isinstance(probe, RecallProbe):
        letter = r"\w+(?: is |=)([a-z])\b"
        yield "the first letter", _of_text(_first, letter)
        yield "the last letter", _of_text(_last, letter)
    else:
        yield "the last letters", _of_text(_last, r"remember ([a-z](?: [a-z])*) ?\.")


_STRATEGIES: dict[type, Callable[[Any], Iterator[tuple[str, Strategy]]]] = {
    NeedleProbe: _needles,
    VariableProbe: _variables,
    CommonWordsProbe: _common_words,
    CodedWordsProbe: _coded_words,
    BabiProbe: _places,
    PasskeyTask: _keys,
    CopyProbe: _letters,
    RecallProbe: _letters,
}
