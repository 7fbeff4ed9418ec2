"""Settings as JSON values: what is described, and what counts as a difference."""

import dataclasses
import enum
import json
import pathlib

import gin
import numpy as np
import optax
import pytest

from famx.base.describe import UNSET, Difference, describe, differences, names_in, remembers, shown
from famx.data import ByteVocabulary
from famx.training import optimizers, schedules


@remembers
def power(exponent, scale=1.0):
    return lambda x: scale * x**exponent


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Box:
    width: int
    inside: object = None
    hidden: int = dataclasses.field(default=0, repr=False)


def test_values_become_json():
    value = {
        "box": Box(3, (Box(4), [1.5, None])), 2: {"b", "a"}, "path": pathlib.Path("/x"),
        "colour": Colour.RED, "numpy": np.float32(0.5), "whole": np.int64(7), "infinite": float("inf"),
        "class": Box, "object": object(),
    }  # fmt: skip
    described = describe(value)
    assert json.loads(json.dumps(described)) == described == {
        "box": {"type": "Box", "width": 3, "inside": [
            {"type": "Box", "width": 4, "inside": None}, [1.5, None]]},
        "2": ["a", "b"], "path": "/x", "colour": "RED", "numpy": 0.5, "whole": 7, "infinite": "inf",
        "class": "Box", "object": "object",
    }  # fmt: skip


def test_arrays_and_vocabularies_have_digests():
    one, other = describe(np.zeros(3)), describe(np.ones(3))
    assert one.startswith("float64[3], ") and one != other
    assert describe(ByteVocabulary()).startswith("bytes, 259 ids, ")
    with_template = ByteVocabulary()
    with_template.chat_template = "{{ messages }}"
    assert describe(with_template) != describe(ByteVocabulary())


def test_what_holds_itself_and_long_lists_end():
    box = Box(1)
    box.inside = [box]
    assert describe(box)["inside"] == ["Box"]
    assert describe([0] * 20_000) == "20000 items"


def test_a_remembered_function_is_its_name_and_arguments():
    assert power(3)(2.0) == 8.0
    assert describe(power(3)) == {"type": "power", "exponent": 3, "scale": 1.0}
    (change,) = differences(describe(power(2, 0.5)), describe(power(2, scale=0.25)))
    assert change == ("scale", 0.5, 0.25)


def test_closures_tell_their_variables():
    make = lambda rate: lambda step: rate * step
    (change,) = differences(describe(make(1.0)), describe(make(2.0)))
    assert change.name == "rate"
    assert not list(differences(describe(optax.adam(1e-3)), describe(optax.adam(1e-3))))
    found = [str(x) for x in differences(describe(optax.adam(1e-3)), describe(optax.adam(1e-3, b1=0.8)))]
    assert len(found) == 1 and found[0].endswith("b1 was 0.9 and is now 0.8")


def test_optimizers_and_schedules_are_remembered_and_stay_what_they_are():
    optimizer = optimizers.adamw(schedules.warmup_cosine(1e-3, steps=10), weight_decay=0.1)
    assert isinstance(optimizer, optax.GradientTransformation)
    described = describe(optimizer)
    assert described["type"] == "adamw" and described["weight_decay"] == 0.1
    assert described["mask"] == "decay_mask" and described["learning_rate"]["steps"] == 10


def test_what_gin_binds_of_a_function_that_is_handed_in_counts():
    before = describe(optimizers.adamw(1e-3))
    try:
        gin.parse_config("famx.training.optimizers.decay_mask.not_decayed = ('norm',)")
        (change,) = differences(before, describe(optimizers.adamw(1e-3)))
    finally:
        gin.clear_config()
    assert change.name == "mask" and change.now == {"type": "decay_mask", "not_decayed": ["norm"]}


@pytest.mark.parametrize(
    "was, now, expected",
    [
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": 1}, {"a": 1, "b": 2}, [("b", UNSET, 2)]),
        ({"a": 1}, {}, [("a", 1, UNSET)]),
        ({"a": {"type": "x", "b": 1}}, {"a": {"type": "x", "b": 2}}, [("a.b", 1, 2)]),
        ({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}, [("a.1.b", 2, 3)]),
        ({"a": [1, 2]}, {"a": [1, 3]}, [("a", [1, 2], [1, 3])]),
        ({"a": {"b": 1}}, {"a": 2}, [("a", {"b": 1}, 2)]),
    ],
)
def test_differences(was, now, expected):
    assert list(differences(was, now)) == expected


def test_a_difference_of_types_is_one_difference():
    was, now = {"type": "x", "a": 1, "b": 2}, {"type": "y", "c": 3}
    (change,) = differences({"o": was}, {"o": now})
    assert str(change) == "o was x and is now y"
    assert str(Difference("z", UNSET, "text")) == "z was unset and is now 'text'"
    assert len(shown("a" * 500)) == 80


def test_names_in_a_description():
    assert list(names_in({"a": {"type": "x", "b": [{"c": 1}]}})) == [
        "a", "a.type", "a.b", "a.b.0", "a.b.0.c",
    ]  # fmt: skip
