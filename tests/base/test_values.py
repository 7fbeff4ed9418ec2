"""Values and annotations: what is allowed, what the sentence says, and what takes part."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypedDict

import gin
import jax.numpy as jnp
import numpy as np
import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.ranges import (
    Amount,
    Directory,
    Expected,
    Name,
    NonNegative,
    Object,
    OneOf,
    OptionalObject,
    Path,
    Paths,
    Positive,
    Rate,
    Share,
)
from famx.base.values import SettingError, annotations, check, check_arguments, checked

NAN, INFINITY = float("nan"), float("inf")
LENGTHS = Annotated[Mapping[Name, Positive], Expected("a dict of lengths")]


class Line(TypedDict, total=False):
    steps: Positive
    until: Mapping[Name, Share]


class Spoken(Protocol):
    def speak(self) -> str: ...


@dataclasses.dataclass
class Thing:
    size: int = 1


ALLOWED = [
    (Positive, [1, 2**70, np.int64(3), np.array(3), jnp.int32(3)]),
    (Positive | None, [None, 1]),
    (NonNegative, [0]),
    (float, [1, -1.5, np.float32(2), np.float64(2), jnp.float32(1), np.int32(4)]),
    (Rate, [1e-300, 1]),
    (Share, [0, 1, 0.5]),
    (bool, [True, False, np.bool_(True)]),
    (str, ["", "a"]),
    (Name, ["a"]),
    (Literal["a", True], ["a", True]),
    (bool | Literal["measured"], [True, "measured"]),
    (Annotated[str, OneOf(("rms", "layer"))], ["rms"]),
    (Sequence[Positive], [(), [1, 2], (1, 2), range(1, 3), np.arange(1, 3)]),
    (tuple[Positive, ...], [[1], (1, 2)]),
    (tuple[int, float], [(1, 2), [1, 2.5]]),
    (list[str], [["a"], ("a",)]),
    (Mapping[str, Positive], [{}, {"a": 1}, collections.OrderedDict(a=1)]),
    (Sequence[Line], [[{}], ({"steps": 1, "until": {"a": 1}},)]),
    (Callable[..., Any], [len, Thing]),
    (Thing, [Thing()]),
    (Spoken, [Thing(), 1]),
    (Object, [Thing(), len, np.zeros(2)]),
    (OptionalObject, [None, Thing()]),
    (Path, ["/a", "a/b", pathlib.Path("/a"), "C:\\a", "a:b"]),
    (Directory, ["/a", "gs://bucket/run", "gs://my-bucket/a/b/", pathlib.Path("/a")]),
    (Paths, ["/a/*", pathlib.Path("/a"), ["/a", "/b"], ["/a", "gs://b/c"], "s3://b/*.txt"]),
    (Any, [None, Thing()]),
]
REFUSED = [
    (Positive, [0, -1, 4.0, 1.5, "4", True, None, [1], {}, np.float64(4), np.array([3]), jnp.float32(1)]),
    (Positive | None, [0, "None", False]),
    (float, ["1e-3", True, None, NAN, INFINITY, -INFINITY, np.float32("nan"), jnp.float32("inf"), [1.0]]),
    (Rate, [0, -1, NAN]),
    (Share, [1.01, -0.1]),
    (bool, [0, 1, "True", None, 1.0]),
    (str, [1, None, b"a", ["a"]]),
    (Name, [""]),
    (Literal["a", True], ["b", 1, False]),
    (Annotated[str, OneOf(("rms", "layer"))], ["RMS", None, 1]),
    (Sequence[Positive], ["12", {1}, {1: 1}, 1, (0,), [1.0], None]),
    (tuple[int, float], [(1,), (1, 2, 3), (1.0, 2)]),
    (list[str], ["a", [1]]),
    (Mapping[str, Positive], [{"a": 0}, {1: 1}, [("a", 1)], "a"]),
    (Sequence[Line], [{"steps": 1}, [{"stps": 1}], [{"steps": 0}], [{"until": {"a": 2}}]]),
    (Callable[..., Any], [1, "len"]),
    (Thing, [Thing, {"size": 1}, None]),
    (Object, [1, "a", None, True, {}, [1], Thing]),
    (Path, ["", "gs://bucket/run", "https://a/b", "s3:/a", 1, None]),
    (Directory, ["", "gs://bucket", "gs://bucket/", "gs:/bucket/run", "gs://b/a//b", "s3://buc/run", 1]),
    (Paths, ["", [], ["/a", "gs:/b"], 1]),
]  # fmt: skip


@pytest.mark.parametrize("annotation, values", ALLOWED, ids=lambda x: str(x)[:40])
def test_values_that_an_annotation_allows(annotation, values):
    for value in values:
        assert check("X", value, annotation) is value


@pytest.mark.parametrize("annotation, values", REFUSED, ids=lambda x: str(x)[:40])
def test_values_that_an_annotation_refuses(annotation, values):
    for value in values:
        with pytest.raises(SettingError, match=r"^X(\[.+\])* (must be|is|has) .+\.") as caught:
            check("X", value, annotation)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "annotation, value, sentence",
    [
        (Positive, "4", "X must be a whole number of at least 1, not '4'."),
        (Rate | None, 0, "X must be a number above 0 or None, not 0."),
        (Share, 2, "X must be a number from 0 to 1, not 2."),
        (Annotated[float, Gt(1), Lt(6)], 6, "X must be a number above 1 and below 6, not 6."),
        (Annotated[int, Le(4)], 5, "X must be a whole number of at most 4, not 5."),
        (LENGTHS, {"a": 1.0}, "X must be a dict of lengths, not {'a': 1.0}."),
        (Mapping[str, Positive], {"a": 1.0}, "X['a'] must be a whole number of at least 1, not 1.0."),
        (Mapping[str, Amount], 3, "X must be a dict of numbers of at least 0, not 3."),
        (Sequence[Positive] | None, (1, 0), "X[1] must be a whole number of at least 1, not 0."),
        (Sequence[Line], [{}, {"stps": 1}],
         "X[1] has no 'stps'; choose from steps, until. Did you mean steps?"),
        (Line | Thing | None, {"stps": 1},
         "X has no 'stps'; choose from steps, until. Did you mean steps?"),
        (Annotated[str, OneOf(("rms", "layer"))], "rns",
         "X must be one of 'rms', 'layer', not 'rns'. Did you mean rms?"),
        (OptionalObject | None, 5,
         "X must be an object that a call such as @name() makes, or None, not 5."),
        (Thing | None, 5, "X must be a Thing (@Thing() makes one) or None, not 5."),
        (Annotated[tuple[int, ...], MaxLen(1), Expected("one number")], (1, 2),
         "X must be one number, not (1, 2)."),
        (Path | None, "", "X is an empty text: give a path, such as '/some/path'."),
        (Path,
         "gs://b/c", "X is the URL gs://b/c, and famx reads and writes files of mounted file systems"
         " only: mount what gs:// names, and give the path of the mount."),
        (Directory, "gs://bucket",
         "X is gs://bucket, which is no directory of a bucket: write it as gs://bucket/name."),
        (Paths, ["/a", ""], "X must be a path or glob pattern, such as '/some/dir/*.txt', or several of"
         " them, not ['/a', '']."),
    ],
)  # fmt: skip
def test_the_sentence(annotation, value, sentence):
    with pytest.raises(SettingError) as caught:
        check("X", value, annotation)
    assert str(caught.value) == sentence


def test_a_long_value_is_cut():
    with pytest.raises(SettingError) as caught:
        check("X", "a\n" * 10_000, Positive)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_the_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert check("X", "~/runs", Path | None) == "/home/me/runs"
    assert check("X", pathlib.Path("~/runs"), Path) == "/home/me/runs"
    assert check("X", "a/~", Path) == "a/~"

    @checked
    def place(path: Path, *, other: Path | None = None) -> tuple[Any, Any]:
        return path, other

    assert place("~/a", other="~") == ("/home/me/a", "/home/me")


def test_checked_functions_and_classes():
    @checked
    def add(a: Positive, b: Share = 0.5, *rest: Any, **more: Any) -> float:
        return a + b

    @checked
    @dataclasses.dataclass(frozen=True)
    class Box:
        size: Positive
        names: tuple[Name, ...] = ()

    assert (add(1), add(1, 1), add(1, b=0, c="free")) == (1.5, 2, 1)
    assert add.__name__ == "add"
    with pytest.raises(SettingError, match=r"add\.b must be a number from 0 to 1, not 2"):
        add(1, 2)
    with pytest.raises(TypeError, match=r"add\(\) missing 1 required positional argument: 'a'"):
        add()
    box = Box(2, ["a"])
    assert box.names == ["a"] and dataclasses.replace(box, size=3).size == 3
    with pytest.raises(SettingError, match=r"Box\.names\[1\] must be a text that is not empty, not ''"):
        dataclasses.replace(box, names=["a", ""])


def test_a_dataclass_below_a_checked_one_checks_its_fields_when_it_is_checked_too():
    @checked
    @dataclasses.dataclass
    class Below(Thing):
        length: Positive = 1

    with pytest.raises(SettingError, match=r"Below\.size must be a whole number, not 'a'"):
        Below(size="a")


def test_annotations():
    def function(a, b: Any, c: Positive = None, *, d: "Share" = 0, **rest: int):
        del a, b, c, d, rest

    found = annotations(function)
    assert list(found) == ["c", "d"]  # None is allowed where it is the default
    assert check("c", None, found["c"]) is None
    with pytest.raises(SettingError):
        check("c", 0, found["c"])
    with pytest.raises(SettingError):
        check("d", 2, found["d"])
    check_arguments(function, {"a": object(), "unknown": object()})


# ---------------------------------------------------------------- gin


@gin.configurable(module="famx_values")
def configured(
    size: Positive = 1,
    lengths: LENGTHS | None = None,
    parts: Mapping[str, Positive] | None = None,
    thing: "ConfiguredThing | None" = None,
    sizes: Sequence[Positive] = (),
    anything=None,
):
    del size, lengths, parts, thing, sizes, anything


@gin.configurable(module="famx_values")
class ConfiguredThing:
    pass


@gin.configurable(module="famx_values")
def make_thing() -> ConfiguredThing:
    return ConfiguredThing()


@gin.configurable(module="famx_values")
def make_text() -> str:
    return ""


@gin.configurable(module="famx_values")
def make_something():
    return 1


@pytest.fixture(autouse=True)
def clean_gin():
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.mark.parametrize(
    "bindings, sentence",
    [
        (["configured.size=0"], "configured.size must be a whole number of at least 1, not 0."),
        (["a/configured.size=0"], "a/configured.size must be a whole number of at least 1, not 0."),
        (["configured.size=%N", "N='4'"], "N must be a whole number of at least 1, not '4'."),
        (["configured.size=%A", "A=%B", "B=1.5"], "B must be a whole number of at least 1, not 1.5."),
        (["configured.lengths=%L",
         "L={'a': 1.0}"], "L must be a dict of lengths or None, not {'a': 1.0}."),
        (["configured.parts=%L", "L={'a': %N}", "N=0"], "N must be a whole number of at least 1, not 0."),
        (["configured.parts=%L", "L={'a': 0}"], "L['a'] must be a whole number of at least 1, not 0."),
        (["configured.sizes=(1, @make_text())"],
         "configured.sizes[1] must be a whole number of at least 1, not @make_text()."),
        (["configured.thing=@make_text()"],
         "configured.thing must be a ConfiguredThing (@ConfiguredThing() makes one) or None, not"
         " @make_text()."),
        (["configured.thing=@ConfiguredThing"],
         "configured.thing must be a ConfiguredThing (@ConfiguredThing() makes one) or None, not"
         " @ConfiguredThing. With parentheses, @ConfiguredThing(), it is what that makes."),
    ],
)  # fmt: skip
def test_gin_bindings_are_refused_under_the_name_that_the_user_wrote(bindings, sentence):
    with pytest.raises(ConfigError) as caught:
        gin_utils.parse_gin([], bindings)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("binding", [
    *("thing=@ConfiguredThing()", "thing=@a/ConfiguredThing()", "thing=@make_thing()", "thing=None"),
    *("size=@make_something()", "sizes=@make_something()", "sizes=[@make_something(), 2]"),
    *("anything=@ConfiguredThing", "anything={'a': [1.5]}"),
])  # fmt: skip
def test_gin_bindings_that_pass(binding):
    gin_utils.parse_gin([], [f"configured.{binding}"])


def test_settings_from_python_are_checked():
    with pytest.raises(ConfigError, match="configured.size must be a whole number of at least 1, not"):
        gin_utils.call_with(configured, [], {"configured.size": 4.0})
    gin_utils.call_with(configured, [], {"configured.size": 4})


def test_a_path_may_be_a_path_object(tmp_path):
    assert os.fspath(check("X", tmp_path, Path)) == str(tmp_path)


def test_bounds_of_a_range_are_kept_apart():
    for value, allowed in ((0, False), (1, True), (4, True), (5, False)):
        annotation = Annotated[int, Ge(1), Le(4)]
        if allowed:
            check("X", value, annotation)
        else:
            with pytest.raises(SettingError, match="from 1 to 4"):
                check("X", value, annotation)
