"""RULER's and BABILong's probes: slow readers that parse the prompt find the references."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from famx.data.probes import (
    PROBES,
    BabiProbe,
    CodedWordsProbe,
    CommonWordsProbe,
    NeedleProbe,
    VariableProbe,
)
from famx.data.probes import words as word_lists
from famx.data.probes.babi import FACTS, FEWEST, Fact, ask, tell
from famx.data.probes.passkey_text import REPEATED_FILLER
from famx.data.probes.python_docs import python_docs_sentences

NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?=\s|$)")
LONGEST_UNIT = 1 + max(len(s) for s in python_docs_sentences(False))
KINDS = {
    "words": r"[a-z]+-[a-z]+",
    "numbers": r"[1-9]\d{6}",
    "uuids": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}
UNITS = {"noise": 1 + len(REPEATED_FILLER), "needles": 90, "python_docs": LONGEST_UNIT}


# Needles


def needle_probes():
    return st.builds(
        NeedleProbe,
        haystack=st.sampled_from(["noise", "python_docs", "needles"]),
        keys=st.sampled_from(list(KINDS)),
        values=st.sampled_from(list(KINDS)),
        num_keys=st.integers(1, 5),
        num_values=st.integers(1, 3),
        num_queries=st.integers(1, 4),
        depth=st.none() | st.floats(0, 1),
        split=st.sampled_from(["train", "eval"]),
    )


@settings(max_examples=150, deadline=None)
@given(needle_probes(), st.integers(0, 10**6), st.integers(0, 3000))
def test_a_reader_of_all_needles_finds_the_references(probe, index, extra):
    row = probe.example(index, probe.min_length + extra)
    question = row["inputs"].rsplit("\n", 1)[1]
    asked = re.search(r"for (.+?) mentioned", question)[1].replace(", and ", ", ").split(", ")
    needles = NEEDLE.findall(row["inputs"])
    values = [v for key in asked for _, k, v in needles if k == key]
    assert values == row["references"] and len(values) == len(asked) * probe.num_values
    assert probe.vocab.decode(row["answer"]) == " " + ", ".join(values)
    assert len(asked) == len(set(asked)) == probe.num_queries
    for kind, key, value in needles:
        assert kind == probe.values
        assert re.fullmatch(KINDS[probe.keys], key) and re.fullmatch(KINDS[probe.values], value)
    count = max(probe.num_keys, probe.num_queries) * probe.num_values
    assert len(row["positions"]) == count
    for start in row["positions"]:
        assert NEEDLE.match(probe.vocab.decode(row["tokens"][start + 1 :]))
    if probe.haystack != "needles":
        assert len(needles) == count and len({k for _, k, _ in needles}) * probe.num_values == count
    singular = len(values) == 1
    assert question.endswith("provided text is" if singular else "provided text are")
    assert row["inputs"].startswith("A special" if singular else "Some special")


@pytest.mark.parametrize("of_row", [True, False])
def test_the_text_of_the_first_variant_is_rulers(of_row):
    probe = PROBES["ruler_niah_single_1"](depth=0.5)
    noise = len(REPEATED_FILLER) + 1
    length = 1000 - probe.example(0, 1000)["filler_tokens"] + 4 * noise
    row = probe.example(0, length) if of_row else probe.prompt(0, length)
    [(_, key, value)] = NEEDLE.findall(row["inputs"])
    needle = f"One of the special magic numbers for {key} is: {value}."
    assert row["inputs"].split("\n") == [
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.",
        *[REPEATED_FILLER] * 2, needle, *[REPEATED_FILLER] * 2,
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, haystack, keys, values, needles, references",
    [
        ("single_1", "noise", "words", "numbers", 1, 1),
        ("single_2", "python_docs", "words", "numbers", 1, 1),
        ("single_3", "python_docs", "words", "uuids", 1, 1),
        ("multikey_1", "python_docs", "words", "numbers", 4, 1),
        ("multikey_2", "needles", "words", "numbers", 1, 1),
        ("multikey_3", "needles", "uuids", "uuids", 1, 1),
        ("multivalue", "python_docs", "words", "numbers", 4, 4),
        ("multiquery", "python_docs", "words", "numbers", 4, 4),
    ],
)
def test_the_eight_variants(name, haystack, keys, values, needles, references):
    probe = PROBES[f"ruler_niah_{name}"]()
    row = probe.example(0, 3000)
    assert (probe.haystack, probe.keys, probe.values) == (haystack, keys, values)
    assert (len(row["positions"]), len(row["references"])) == (needles, references)
    if haystack == "needles":
        assert len(NEEDLE.findall(row["inputs"])) > 15
    elif haystack == "noise":
        assert row["inputs"].count(REPEATED_FILLER) > 20


@pytest.mark.parametrize("haystack, unit", UNITS.items())
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.8, 1.0])
def test_depth_places_the_needle_that_is_asked_for(haystack, unit, depth):
    probe = NeedleProbe(haystack=haystack, num_keys=3, depth=depth)
    for index in range(10):
        row = probe.example(index, 20_000)
        asked = next(
            i for i, s in enumerate(row["positions"])
            if row["references"][0] in probe.vocab.decode(row["tokens"][s : s + 90])
        )  # fmt: skip
        header = len(row["inputs"].split("\n")[0]) + (haystack == "python_docs")
        start = row["positions"][asked]
        sizes = [len(NEEDLE.match(probe.vocab.decode(row["tokens"][s + 1 : s + 120]))[0]) + 1
                 for s in row["positions"][:asked]]  # fmt: skip
        before = start - header - sum(sizes)
        assert abs(before - depth * row["filler_tokens"]) <= unit / 2
        if depth in (0.0, 1.0):
            assert before == depth * row["filler_tokens"]


@pytest.mark.parametrize("name", ["single_2", "multikey_2"])
def test_a_prompt_begins_with_a_whole_sentence_and_joins_all_by_one_separator(name):
    probe = PROBES[f"ruler_niah_{name}"]()
    header, context, question = probe.prompt(0, 4000)["inputs"].split("\n", 1)[0], *(
        probe.prompt(0, 4000)["inputs"].split("\n", 1)[1].rsplit("\n", 1))  # fmt: skip
    assert header.endswith("quiz you about the number afterwards.") and question.startswith("What is")
    if name == "single_2":
        before, after = NEEDLE.sub("", context, count=1).split("  ")
        around = " ".join([*python_docs_sentences(False)] * 2) + " "
        assert f"{before} {after} " in around and "  " not in context.strip()
        assert any(context.startswith(sentence) for sentence in python_docs_sentences(False))
    else:
        assert all(NEEDLE.fullmatch(line) for line in context.split("\n"))


def test_drawn_depths_are_spread_evenly():
    probe = NeedleProbe()
    places = [probe.example(i, 10_000)["positions"][0] for i in range(300)]
    assert min(places) < 700 and max(places) > 9000 and abs(np.mean(places) - 5000) < 600


def test_needles_are_the_same_at_every_length_and_in_every_haystack():
    for index in range(10):
        found = [
            NeedleProbe(haystack=h, num_keys=3, num_values=2, depth=d).example(index, n)["references"]
            for h, d, n in (("noise", None, 1200), ("noise", None, 5000), ("python_docs", None, 5000))
        ]
        assert found[0] == found[1] == found[2]


def test_a_haystack_of_needles_never_repeats_what_is_asked_for(monkeypatch):
    monkeypatch.setattr(word_lists, "NUM_COMPOUNDS", 6)  # so that keys repeat often
    probe = NeedleProbe(haystack="needles", num_keys=3)
    for index in range(5):
        row = probe.example(index, 3000)
        keys = [key for _, key, _ in NEEDLE.findall(row["inputs"])]
        own = [NEEDLE.match(row["inputs"], s + 1)[2] for s in row["positions"]]
        assert len(set(own)) == 3 and len(set(keys)) == 6 and len(keys) > 20
        assert all(keys.count(key) == 1 for key in own)


# Variable tracking


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 6), st.booleans(), st.sampled_from(["noise", "python_docs"]),
    st.integers(0, 10**6), st.integers(0, 3000),
)  # fmt: skip
def test_following_all_assignments_finds_the_variables(chains, hops, shown, haystack, index, extra):
    probe = VariableProbe(num_chains=chains, num_hops=hops, demonstration=shown, haystack=haystack)
    row = probe.example(index, probe.min_length + extra)
    solved, text = ["", row["inputs"]]
    if shown:
        solved, text = row["inputs"].split("\n\nMemorize", 1)
    asked = re.search(r"assigned the value (\d+) in the text", text)[1]
    value_of = {}
    statements = re.findall(r"VAR (\w+) = (VAR )?(\w+)", text)
    for name, of_variable, source in statements:
        assert name not in value_of and re.fullmatch("[A-Z]{5}", name)
        value_of[name] = value_of[source] if of_variable else source  # a chain stands in its order
    assert [n for n, v in value_of.items() if v == asked] == row["references"]
    assert len(row["references"]) == hops + 1 and len(statements) == chains * (hops + 1)
    assert f"{hops + 1} variables are assigned the value {asked}, they are:" in text
    assert len(set(value_of.values())) == chains and len(row["positions"]) == len(statements)
    assert row["inputs"].endswith("they are: ") and probe.vocab.decode(row["answer"])[0] != " "
    if shown:  # the demonstration is right, about other variables and another value
        shown_value = re.search(r"assigned the value (\d+) in the text", solved)[1]
        names = solved.split("they are: ")[1].split()
        assert len(names) == hops + 1 and all(len(name) == 3 for name in names)
        assert f"VAR {names[0]} = {shown_value}\n" in solved and shown_value != asked
        assert all(f"VAR {b} = VAR {a} \n" in solved for a, b in zip(names, names[1:]))
        assert solved.endswith("they are:  " + " ".join(names))  # two spaces, as in RULER
        assert solved.count(REPEATED_FILLER) == 5  # the fewest; bytes are more than 500 tokens


def test_a_demonstration_has_about_500_tokens():
    class Words:
        """Three letters are one token, about as in a trained tokenizer."""

        pad_id, bos_id, eos_id, unk_id, vocab_size = 0, 1, 2, None, 1000

        def encode(self, text):
            return [3 + ord(text[i]) for i in range(0, len(text), 3)]

    probe = VariableProbe(vocabulary=Words())
    shown = probe._parts(0).header.rsplit("Memorize", 1)[0]
    assert 450 < len(probe.vocab.encode(shown)) <= 500 and shown.count(REPEATED_FILLER) > 5


def test_several_chains_interleave():
    texts = [VariableProbe(num_chains=2).example(i, 6000)["inputs"] for i in range(20)]
    orders = set()
    for text in texts:
        chain = {}
        for name, _, source in re.findall(r"VAR (\w{5}) = (VAR )?(\w+)", text):
            chain[name] = chain.get(source, source)
        first = next(iter(chain.values()))
        orders.add(tuple(value == first for value in chain.values()))
    assert len(orders) > 10


# Counting words


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([3500, 6000, 16_383, 16_384]), st.booleans())
def test_counting_the_list_finds_the_common_words(index, length, shown):
    probe = CommonWordsProbe(demonstration=shown)
    row = probe.example(index, length)
    *before, body = row["inputs"].split("Memorize the ones that appear most often.\n")
    listed, question = body.split("\nQuestion: ")
    entries = re.findall(r"(\d+)\. ([a-z-]+)", listed)
    assert [int(n) for n, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    common, others = (6, 1) if length < 16384 else (30, 3)
    assert {w for w, n in counts.items() if n == common} == set(row["references"])
    assert {n for w, n in counts.items() if w not in row["references"]} == {others}
    assert len(row["references"]) == 10 and "the 10 most common words" in question
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(row["references"], 1))
    assert probe.vocab.decode(row["answer"]) == " " + numbered
    assert row["filler_tokens"] < 3 * 30  # one more word would not have fitted
    # All are equally frequent: an order that the text determines.
    assert row["references"] == sorted(row["references"])
    assert probe.example(index, length + 5000)["references"] == row["references"]
    backwards = " ".join(f"{i}. {word}" for i, word in enumerate(row["references"][::-1], 1))
    assert probe.score([row], [backwards]) == {"string_match_all": 100.0}
    if shown:
        few, answer = before[1].split("\nQuestion: ")
        counts = Counter(re.findall(r"\d+\. ([a-z-]+)", few))
        most = [w for w, n in counts.items() if n == max(counts.values())]
        assert re.findall(r"\d+\. ([a-z-]+)", answer.split("are:")[1]) == sorted(most)
        assert len(most) == 10


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5000), st.sampled_from([1.5, 2.0, 3.0]))
def test_counting_the_coded_text_finds_the_frequent_words(index, extra, alpha):
    probe = CodedWordsProbe(alpha=alpha)
    row = probe.example(index, probe.min_length + extra)
    coded = row["inputs"].split("frequently appeared coded words. ", 1)[1].split("\nQuestion")[0]
    counts = Counter(coded.split())
    noise = counts["..."]
    ranked = [(w, n) for w, n in counts.most_common() if w.strip(".")]
    assert [w for w, _ in ranked[:3]] == row["references"]
    sizes = [n for _, n in ranked[:4]] + [0] * (4 - len(ranked))
    assert noise > sizes[0] > sizes[1] > sizes[2] > sizes[3]
    assert all(re.fullmatch("[a-z]{6}", w) for w, _ in ranked)
    counted = [n for _, n in ranked]
    ranks = np.arange(2, 2 + len(counted))
    assert counted in [  # of the dots that fill the row three may stand alone, like one more noise
        np.floor(n * ranks**-alpha).astype(int).tolist() for n in (noise, noise - 1)
    ]
    assert probe.example(index, probe.min_length)["references"] == row["references"]


def test_no_length_makes_two_coded_words_equally_frequent():
    probe = CodedWordsProbe()
    for length in range(probe.min_length, probe.min_length + 500, 7):
        row = probe.example(0, length)
        text = row["inputs"].split("appeared coded words. ", 1)[1].split("\nQuestion")[0]
        counts = [n for w, n in Counter(text.split()).most_common() if w.strip(".")][:4]
        assert len(set([*counts, 0][:4])) == 4


# Stories

FACT = re.compile(
    r"(Mary|John|Daniel|Sandra) "
    r"(moved to|went to|journeyed to|travelled to|went back to|took|got|grabbed|picked up|dropped|"
    r"discarded|left|put down) the (\w+)(?: there)?\."
)


def last(items):
    return items[-1] if items else None


def answer_by_reading(facts, question):
    """Answer by going through the sentences again for every moment."""

    def place(person, now):
        return last([thing for p, verb, thing in facts[: now + 1] if p == person and verb.endswith("to")])

    def place_of_object(thing, now):
        touched = [(i, p, verb) for i, (p, verb, t) in enumerate(facts[: now + 1]) if t == thing]
        if not touched:
            return None
        i, person, verb = touched[-1]
        dropped = verb in ("dropped", "discarded", "left", "put down")
        return place(person, i if dropped else now)

    end = len(facts) - 1
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        return place_of_object(match[1], end)
    if match := re.fullmatch(r"Where is (\w+)\?", question):
        return place(match[1], end)
    thing, then = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question).groups()
    places = [place_of_object(thing, now) for now in range(len(facts))]
    changes = [p for i, p in enumerate(places) if p and (not i or p != places[i - 1])]
    assert changes[-1] == then
    return changes[-2]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(FACTS)), st.sampled_from(["noise", "python_docs"]), st.integers(0, 10**6),
    st.integers(0, 3000),
)  # fmt: skip
def test_reading_the_facts_answers_the_question(task, haystack, index, extra):
    probe = BabiProbe(task=task, haystack=haystack)
    row = probe.example(index, probe.min_length + extra)
    story = row["inputs"].split("<context>\n")[1]
    facts = [match.groups() for match in FACT.finditer(story)]
    assert FACTS[task][0] <= len(facts) == len(row["positions"]) <= FACTS[task][-1]
    for start, fact in zip(row["positions"], facts):
        assert FACT.match(probe.vocab.decode(row["tokens"][start + 1 :])).groups() == fact
    question = re.search(r"\n</context>\n\nQuestion: (.+\?)$", row["inputs"])[1]
    answer = answer_by_reading(facts, question)
    assert row["references"] == [answer]
    if task == "qa1":  # bAbI asks about somebody of the last five facts
        assert question.split()[-1].rstrip("?") in {person for person, _, _ in facts[-5:]}
    written = probe.vocab.decode(row["answer"])
    _, _, *words = question.removesuffix("?").split()
    assert written == "\nAnswer: " + {
        "qa1": f"The most recent location of {words[0]} is {answer}.",
        "qa2": f"The {words[-1]} is in the {answer}.",
        "qa3": f"Before the {words[-1]} the {words[1 % len(words)]} was in the {answer}.",
    }[task]
    prompt = probe.prompt(index, len(row["tokens"]))
    assert probe.score([prompt], [written]) == {"accuracy": 100.0}
    plain = dataclasses.replace(probe, instructed=False)
    assert plain.prompt(index, len(row["tokens"]))["inputs"].startswith("<context>\n")
    assert plain.vocab.decode(plain.example(index, len(row["tokens"]))["answer"]) == f"\nAnswer: {answer}"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.booleans())
def test_nothing_impossible_happens_in_a_story(seed, number, objects):
    story = tell(np.random.default_rng(seed), number, objects)
    assert len(story) == number
    for now, (person, action, thing) in enumerate(story):
        earlier = story[:now]
        here = last([t for p, a, t in earlier if p == person and a == "move"])
        touched = [(i, p, a) for i, (p, a, t) in enumerate(earlier) if t == thing and a != "move"]
        if action == "move":
            assert thing != here
        elif action == "drop":
            assert touched[-1][1:] == (person, "take")
        else:
            assert here is not None and (not touched or touched[-1][2] == "drop")
            if touched:
                i, dropper, _ = touched[-1]
                assert last([t for p, a, t in story[:i] if p == dropper and a == "move"]) == here
        assert objects or action == "move"


def test_questions_are_about_the_present_stay():
    walk = [Fact("Mary", "move", "garden"), Fact("Mary", "take", "milk"), Fact("Mary", "move", "office")]
    back = [*walk, Fact("Mary", "move", "garden")]
    assert [q.answer for q in ask("qa3", walk)] == ["garden"]
    assert ask("qa3", back) == [("Where was the milk before the garden?", "office")]
    assert ask("qa3", walk[:2]) == []
    others = [Fact("John", "move", place) for place in ("office", "garden", "office", "garden", "office")]
    # Of five other facts none leads to the milk or to Mary.
    assert ask("qa2", [*walk, *others]) == ask("qa3", [*walk, *others]) == []
    assert ask("qa2", [*walk, *others[:4]]) == [("Where is the milk?", "office")]
    assert ask("qa1", [*walk, *others]) == [("Where is John?", "office")]
    assert ask("qa2", walk[:1]) == [] and ask("qa2", walk)[0] == ("Where is the milk?", "office")


def test_facts_lie_between_the_two_fractions_and_stay_the_same_at_every_length():
    probe = BabiProbe(task="qa2", haystack="noise", between=(0.4, 0.6))
    context = lambda row: row["inputs"].split("<context>\n")[1]
    for index in range(20):
        row = probe.example(index, 20_000)
        texts = [m[0] for m in FACT.finditer(context(row))]
        header = len(row["inputs"].partition("<context>")[0].encode()) + len("<context>")
        inserted = np.cumsum([0, *(1 + len(t) for t in texts[:-1])])
        before = np.array(row["positions"]) - header - inserted
        share = before / row["filler_tokens"]
        slack = 46 / row["filler_tokens"]
        assert 0.4 - slack <= share.min() and share.max() <= 0.6 + slack
        assert [m[0] for m in FACT.finditer(context(probe.example(index, 4000)))] == texts


@pytest.mark.parametrize("task, mean", [("qa1", 6.0), ("qa2", 15.6), ("qa3", 51.0)])
def test_stories_have_as_many_facts_as_babis(task, mean):
    probe = BabiProbe(task=task, haystack="noise")
    numbers = np.array([len(probe._parts(index).hidden) for index in range(500)])
    assert (numbers % 2 == 0).all() and abs(numbers.mean() / mean - 1) < 0.08
    assert numbers.min() >= FACTS[task][0] and numbers.max() <= FACTS[task][-1]
    few = BabiProbe(task=task, haystack="noise", facts=(FEWEST[task], FEWEST[task] + 1))
    assert {len(few._parts(i).hidden) for i in range(40)} == {FEWEST[task], FEWEST[task] + 1}


@pytest.mark.parametrize("task", list(FACTS))
def test_every_answer_occurs(task):
    probe = BabiProbe(task=task, haystack="noise")
    answers = Counter(probe.example(i, probe.min_length)["references"][0] for i in range(300))
    assert len(answers) == 6 and max(answers.values()) < 100


# Word lists and sentences


def test_the_word_lists_hold_different_plain_words():
    both = (*word_lists.ADJECTIVES, *word_lists.NOUNS)
    assert len(set(both)) == len(both) > 500 and all(re.fullmatch("[a-z]{2,}", w) for w in both)
    compounds = {word_lists.compound(i) for i in range(0, word_lists.NUM_COMPOUNDS, 97)}
    assert len(compounds) == -(-word_lists.NUM_COMPOUNDS // 97)
    assert max(map(len, compounds)) <= len(word_lists.LONGEST_COMPOUND)


@pytest.mark.parametrize(
    "make, options, sentence",
    [
        (NeedleProbe, dict(haystack="hay"), "one of 'noise', 'python_docs', 'needles'"),
        (NeedleProbe, dict(keys="letters"), "keys must be one of 'words', 'numbers', 'uuids'"),
        (NeedleProbe, dict(values="letters"), "one of 'words', 'numbers', 'uuids'"),
        (NeedleProbe, dict(num_keys=0), "NeedleProbe.num_keys must be a whole number of at least 1"),
        (NeedleProbe, dict(num_values=0), "num_values must be a whole number of at least 1"),
        (NeedleProbe, dict(num_queries=0), "num_queries must be a whole number of at least 1"),
        (NeedleProbe, dict(num_keys=1001), "more than 1000 needles"),
        (NeedleProbe, dict(depth=1.5), "depth must be a number from 0 to 1 or None, not 1.5"),
        (VariableProbe, dict(haystack="needles"), "one of 'noise', 'python_docs', not"),
        (VariableProbe, dict(num_chains=0), "num_chains must be a whole number of at least 1"),
        (VariableProbe, dict(num_hops=0), "num_hops must be a whole number of at least 1"),
        (VariableProbe, dict(num_chains=500), "more than 1000 variables"),
        (CommonWordsProbe, dict(num_common=0), "num_common must be a whole number from 1 to 100, not 0"),
        (CommonWordsProbe, dict(num_common=200), "from 1 to 100, not 200"),
        (CommonWordsProbe, dict(repeats=(3, 3)), "must appear more often"),
        (CommonWordsProbe, dict(short_repeats=(3, 0)), r"short_repeats\[1\] .* at least 1, not 0"),
        (CodedWordsProbe, dict(alpha=1.0), "alpha must be a number above 1 and at most 6, not 1"),
        (CodedWordsProbe, dict(letters=2), "letters must be a whole number from 4 to 12"),
        (BabiProbe, dict(task="qa4"), "task must be one of 'qa1', 'qa2', 'qa3'"),
        (BabiProbe, dict(task="qa2", facts=(1, 5)), "at least 2 facts"),
        (BabiProbe, dict(facts=(8, 5)), "give the smallest and the largest number"),
        (BabiProbe, dict(between=(0.2, 1.2)), r"between\[1\] must be a number from 0 to 1"),
        (BabiProbe, dict(between=(0.6, 0.4)), "lower fraction first"),
    ],
)
def test_bad_options_get_a_sentence(make, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**options)


def test_a_list_whose_words_appear_too_often_for_the_row_gets_a_sentence():
    with pytest.raises(ValueError, match="does not fit into 3000 tokens at its smallest"):
        CommonWordsProbe(short_below=0, demonstration=False).example(0, 3000)
