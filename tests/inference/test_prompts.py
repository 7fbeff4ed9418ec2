"""Prompts: how fields become tokens, which lines are batched together, and what is rejected."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from famx.base.errors import ConfigError
from famx.data.probes.passkey_text import passkey_words
from famx.data.vocabularies import ByteVocabulary
from famx.inference.prompts import Example, Lines, batches

VOCAB = ByteVocabulary()


def ids(text):
    return [VOCAB.bos_id, *VOCAB.encode(text)]


def put(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines(path, mode="predict", template="{inputs}", begin=True):
    return Lines(str(path), mode, template, VOCAB, 259, begin)


def test_how_a_line_becomes_tokens(tmp_path):
    path = tmp_path / "in.jsonl"
    put(path, [
        {"inputs": "ab", "targets": "c", "q": "d"},
        {"input_ids": [100, 101], "targets": ["e", "fg"]},
        {"input_ids": [VOCAB.bos_id, 100], "targets": "c"},
    ])  # fmt: skip
    plain, several, begun = lines(path, "score").read()
    assert plain.prompt.tolist() == ids("ab") and begun.prompt.tolist() == [VOCAB.bos_id, 100]
    assert several.prompt.tolist() == [VOCAB.bos_id, 100, 101]
    assert [t.tolist() for t in several.targets] == [VOCAB.encode("e"), VOCAB.encode("fg")]
    assert [t.tolist() for t in plain.targets] == [VOCAB.encode("c")]
    first = next(lines(path, template="{{{q}}}: {inputs}\n{q}").read())
    assert first.prompt.tolist() == ids("{d}: ab\nd")
    assert [e.prompt.tolist() for e in lines(path, begin=False).read()] == [
        VOCAB.encode("ab"), [100, 101], [VOCAB.bos_id, 100],
    ]  # fmt: skip
    assert [e.line for e in lines(path).read(1)] == [1, 2]
    assert lines(path).check() == 3


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 9))
def test_batches_hold_each_line_once_and_begin_with_the_oldest(lengths, size):
    some = [Example(line, {}, np.zeros(n)) for line, n in enumerate(lengths)]
    found = batches(some, size)
    assert sorted(example.line for batch in found for example in batch) == list(range(len(some)))
    assert max(map(len, found)) <= size and len(found) == -(-len(some) // size)
    left = set(range(len(some)))
    for batch in found:
        assert min(left) in {example.line for example in batch}  # so every batch completes a line
        left -= {example.line for example in batch}
    spans = sorted((min(len(e.prompt) for e in b), max(len(e.prompt) for e in b)) for b in found)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))


def test_text_that_makes_no_token(tmp_path):
    path = tmp_path / "in.jsonl"
    for text in (" ", "\n\t "):
        put(path, [{"inputs": text}])
        with pytest.raises(ConfigError, match="Line 1 of .* has an empty prompt"):
            Lines(str(path), "predict", "{inputs}", passkey_words(), 128, True).check()
        assert lines(path).check() == 1  # spaces are bytes like others
    put(path, [{"inputs": "key"}])
    with pytest.raises(ConfigError, match="Line 1 of .* encodes to the token id .* has only 5 ids."):
        list(Lines(str(path), "predict", "{inputs}", passkey_words(), 5, True).read())


@pytest.mark.parametrize("template", ["", "text", "{}", "{0}", "{a.b}", "{a!r}", "{a:>9}", "{inputs"])
def test_a_template_that_is_none(tmp_path, template):
    with pytest.raises(ConfigError, match="PROMPT_TEMPLATE .* must contain names of fields in braces"):
        lines(tmp_path, template=template)
