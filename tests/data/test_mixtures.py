"""Mixtures: every example at its rate, one order in every process."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from famx.base.errors import ConfigError
from famx.data import Mixture, TextTask, WordVocabulary
from famx.data.metrics import accuracy
from famx.data.rows.packing import PackedRows


def task(name, size, **options):
    def open_split(folder, split):
        return [{"inputs": f"{name} {i} ", "targets": f"{name}{i}", "references": [f"{name}{i}"]}
                for i in range(size)]  # fmt: skip

    return TextTask(name, "generation", open_split, dict, (accuracy,), folders=("/",), **options)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_example_occurs_and_tasks_at_their_rates(data):
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    rates = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    tasks = tuple(task(f"t{k}", size) for k, size in enumerate(sizes))
    named = rates and {f"t{k}": rate for k, rate in enumerate(rates)}
    mixture = Mixture("m", tasks, named, seed=data.draw(st.integers(0, 3)))
    which, examples = mixture.order("train")
    counts = collections.Counter(zip(which.tolist(), examples.tolist()))
    assert set(counts) == {(k, i) for k, size in enumerate(sizes) for i in range(size)}
    for k, size in enumerate(sizes):
        own = [counts[k, i] for i in range(size)]
        assert max(own) - min(own) <= 1  # passes
        shares = np.array(rates if rates else sizes) / sum(rates if rates else sizes)
        assert abs(sum(own) - len(which) * shares[k]) < 1 + 1e-9
    if rates is None:
        assert set(counts.values()) == {1}
    again = Mixture("m", tasks, named, seed=mixture.seed).order("train")
    assert (again[0] == which).all() and (again[1] == examples).all()


def test_rates_may_be_a_function_of_the_size_and_the_length_may_be_given():
    tasks = (task("a", 100), task("b", 10))
    which, _ = Mixture("m", tasks, lambda count: min(count, 20), size=300).order("train")
    assert np.bincount(which).tolist() == [200, 100]
    first, _ = Mixture("m", tasks, size=11).order("validation")
    assert np.bincount(first, minlength=2).tolist() == [10, 1]
    orders = [Mixture("m", tasks, seed=seed).order("train")[0].tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_a_mixture_is_documents_and_examples_in_one_order():
    mixture = Mixture("m", (task("a", 7), task("b", 3)))
    assert len(mixture) == 10
    for i, example in enumerate(mixture.examples("train")):
        tokens, weights = mixture[i]
        assert mixture.vocab.decode(tokens) == example["inputs"] + example["targets"]
        assert weights.sum() == len(example["targets"]) + 1
    total = sum(len(tokens) for tokens, _ in mixture)
    row = next(PackedRows(mixture, batch_size=1, length=total))
    assert row["decoder_loss_weights"].sum() == sum(w.sum() for _, w in mixture)
    assert len(mixture.documents("train", max_tokens=4)[0][0]) == 4
    with pytest.raises(IndexError):
        mixture.examples("train")[10]


def test_scores_of_each_task_and_over_all_items():
    mixture = Mixture("m", (task("a", 6), task("b", 2)))
    examples = mixture.examples("train")
    predictions = ["wrong" if x["targets"] in ("a0", "b1") else x["targets"] for x in examples]
    found = mixture.evaluate("train", predictions)
    assert found == pytest.approx({"a/accuracy": 500 / 6, "b/accuracy": 50, "accuracy": 75})
    first_a = next(i for i, x in enumerate(examples) if x["targets"] == "a0")
    assert mixture.evaluate("train", ["a0"], [first_a]) == {"a/accuracy": 100, "accuracy": 100}
    with pytest.raises(ValueError, match="1 predictions were given for 8 items"):
        mixture.evaluate("train", ["x"])


def test_bad_mixtures_get_a_sentence():
    a, b = task("a", 2), task("b", 2)
    with pytest.raises(ConfigError, match="needs tasks, each once"):
        Mixture("m", (a, a))
    with pytest.raises(ConfigError, match="needs tasks, each once"):
        Mixture("m", ())
    with pytest.raises(ConfigError, match="must have the same vocabulary"):
        Mixture("m", (a, dataclasses.replace(b, vocabulary=WordVocabulary(["x"]))))
    with pytest.raises(ConfigError, match="no rate for 'b'"):
        Mixture("m", (a, b), {"a": 1})
    with pytest.raises(ConfigError, match="rate for 'bb', which is not one .* nearest name is 'b'"):
        Mixture("m", (a, b), {"a": 1, "b": 1, "bb": 2})
    with pytest.raises(ConfigError, match="must be a number above 0, not 0"):
        Mixture("m", (a, b), {"a": 1, "b": 0}).order("train")
    with pytest.raises(ConfigError, match="at least 1"):
        Mixture("m", (a, b), size=0)
    with pytest.raises(ConfigError, match="at least 0"):
        Mixture("m", (a, b), seed=-1)
