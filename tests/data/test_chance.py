"""Trivial answers to the probes: by hand on small texts, and the table of docs/data.md again."""

import pathlib

import numpy as np
import pytest

from famx.data.probes import PROBES, Probe
from famx.data.probes.chance import chance, strategies

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "data.md"
EXAMPLES = 500
# RULER's and BABILong's probes at 8,192 bytes, with the room that the benchmark gives the answer; the
# others at 1,024 tokens of their own vocabulary.
LENGTHS = {True: 8192, False: 1024}


def measured(name):
    """Scores of the trivial strategies on the first examples of the evaluation split."""
    probe = PROBES[name](split="eval", seed=1)
    published = name.startswith(("ruler", "babilong"))
    room = probe.written_tokens if published else 0
    return chance(probe, [probe.prompt(i, LENGTHS[published], room) for i in range(EXAMPLES)])


def row(name):
    """The row of a probe in the table of docs/data.md."""
    found = measured(name)
    blind = found.pop("blind")
    others = ", ".join(f"{name} {score:.1f}" for name, score in found.items())
    return f"| `{name}` | {blind:.1f} | {others} |"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", PROBES)
def test_the_documented_chance_levels_are_what_is_measured(name):
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert lines == [row(name)]


@pytest.mark.parametrize(
    "name, text, strategy, answer",
    [
        ("ruler_niah_single_1", "One of the special magic numbers for a-b is: 12.\n"
         "One of the special magic numbers for c-d is: 34.\nWhat", "the first value", "12"),
        ("ruler_niah_single_1", "One of the special magic numbers for a-b is: 12.\n"
         "One of the special magic numbers for c-d is: 34.\nWhat", "the last value", "34"),
        ("ruler_vt", "Memorize and track x VAR QQQ = 1\n\nMemorize and track VAR A = 2 VAR B = VAR A ",
         "all variables", "A B"),
        ("ruler_cwe", "Below is a numbered list 1. no\nBelow is a numbered list 1. a 2. b\nQuestion",
         "the last words", "a b"),
        ("ruler_fwe", "appeared coded words. abcdef ... ghijkl abcdef mnopqr\nQuestion: what",
         "the first words", "abcdef ghijkl mnopqr"),
        ("babilong_qa1", "in the office <context>\nto the garden. of the garden. in the kitchen.\n"
         "</context>\n\nthe bathroom?", "the most frequent place", "garden"),
        ("babilong_qa1", "in the office <context>\nto the garden. of the garden. in the kitchen.\n"
         "</context>\n\nthe bathroom?", "the place before the last", "garden"),
        ("passkey", "1234 12345 678901 54321 is", "the last number", "54321"),
        ("associative_recall", "remember Ada is q, Bo is z. recall Ada is", "the first letter", "q"),
        ("associative_recall", "remember Ada=q Bo=z . recall Ada", "the last letter", "z"),
    ],
)  # fmt: skip
def test_strategies_name_what_they_say(name, text, strategy, answer):
    prompt = {"inputs": text}
    assert strategies(PROBES[name]())[strategy](prompt, np.random.default_rng(0)) == answer


def test_a_strategy_that_finds_nothing_says_nothing():
    assert strategies(PROBES["ruler_vt"]())["all variables"]({"inputs": "x"}, None) == ""


def test_a_probe_of_another_class_has_no_strategies():
    assert strategies(Probe.__new__(Probe)) == {}
