"""What an annotation allows, in words: "a whole number of at least 1, or None"."""

import collections.abc
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen

from famx.base.ranges import Expected, OneOf
from famx.base.schemas import SEQUENCES, UNIONS

_PLAIN = {
    bool: ("True or False", "True or False"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    None: ("None", "None"),
    types.NoneType: ("None", "None"),
}


def expectation(annotation: Any) -> str:
    """What an annotation expects of a value, such as "a whole number of at least 1"."""
    return _phrase(annotation, 0)


def _phrase(annotation: Any, many: int) -> str:
    """The words for one value, or (`many` is 1) for several."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation][many]
    if origin is Annotated:
        return _annotated(args[0], args[1:], many)
    if origin in UNIONS:
        parts = sorted(args, key=lambda arg: arg is types.NoneType)
        return _either([_phrase(part, many) for part in parts])
    if origin is Literal:
        return _one_of(args)
    kind = origin or annotation
    if typing.is_typeddict(annotation):
        keys = ", ".join(typing.get_type_hints(annotation))
        return f"{('a dict', 'dicts')[many]} with keys among {keys}"
    if isinstance(kind, type) and issubclass(kind, collections.abc.Mapping):
        word = ("a dict", "dicts")[many]
        return f"{word} of {_phrase(args[1], 1)}" if args and args[1] is not Any else word
    if isinstance(kind, type) and issubclass(kind, tuple) and args and args[-1] is not Ellipsis:
        items = ", ".join(_phrase(arg, 0) for arg in args)
        return f"{('a tuple', 'tuples')[many]} of {len(args)}: {items}"
    if kind in SEQUENCES:
        word = ("a tuple or list", "tuples or lists")[many]
        return f"{word} of {_phrase(args[0], 1)}" if args and args[0] is not Any else word
    if kind in (collections.abc.Callable, type):
        return ("a function", "functions")[many]
    if isinstance(kind, type):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        one = f"{article} {kind.__name__} (@{kind.__name__}() makes one)"
        return (one, f"objects of the class {kind.__name__}")[many]
    return ("a value", "values")[many]


def _annotated(annotation: Any, metadata: Sequence[Any], many: int) -> str:
    for item in metadata:
        if isinstance(item, Expected):
            return item.text
        if isinstance(item, OneOf):
            return _one_of(item.choices)
    if any(isinstance(item, MinLen) for item in metadata) and annotation is str:
        return ("a text that is not empty", "texts that are not empty")[many]
    ends = {
        kind: next((getattr(item, key) for item in metadata if isinstance(item, kind)), None)
        for kind, key in ((Ge, "ge"), (Gt, "gt"), (Le, "le"), (Lt, "lt"))
    }
    words = []
    if ends[Ge] is not None and ends[Le] is not None:
        words.append(f"from {ends[Ge]} to {ends[Le]}")
    else:
        for kind, text in ((Ge, "of at least"), (Gt, "above"), (Le, "at most"), (Lt, "below")):
            if ends[kind] is not None:
                words.append(f"{text} {ends[kind]}")
    if words and words[0].startswith("at most"):
        words[0] = f"of {words[0]}"
    return " ".join(filter(None, [_phrase(annotation, many), " and ".join(words)]))


def _one_of(choices: Sequence[Any]) -> str:
    return f"one of {', '.join(map(repr, choices))}" if len(choices) > 1 else repr(choices[0])


def _either(parts: Sequence[str]) -> str:
    *first, last = dict.fromkeys(parts)
    if last == "None" and first and first[-1].endswith("or None"):
        *first, last = first
    if not first:
        return last
    comma = "," if any("," in part for part in first) else ""
    return f"{', '.join(first)}{comma} or {last}"
