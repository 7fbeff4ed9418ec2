"""Annotations as schemas of pydantic's core, and references of gin files in place of values."""

import collections.abc
import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen

from famx.base.ranges import Built, OneOf, Test, one_of

SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable)
MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
UNIONS = (Union, types.UnionType)


@dataclasses.dataclass(frozen=True)
class Unbuilt:
    """A reference in a gin file, in place of the value that it stands for.

    Attributes:
      text: as the file has it, such as "@modules.Decoder()".
      kind: type of the value; None: unknown.
      called: whether it stands for a result, and not for the function or class itself.
    """

    text: str
    kind: type | None
    called: bool = True

    def __repr__(self) -> str:
        return self.text

    def may_be(self, kind: Any) -> bool:
        """Whether the value may have the type `kind`; a function, if that is `Callable`."""
        if not self.called:
            return kind in (Callable, object)
        if self.kind is None or kind is object:
            return True
        if kind is Callable:
            return callable(getattr(self.kind, "__call__", None))  # noqa: B004, of instances
        if kind is float and issubclass(self.kind, int):
            return True
        return issubclass(self.kind, kind) or issubclass(kind, self.kind)


def fits(annotation: Any, value: Any) -> bool:
    """Whether an annotation allows a value."""
    try:
        validator = _validator(annotation)
    except TypeError:  # an annotation that cannot be hashed
        validator = _validator.__wrapped__(annotation)
    return validator.isinstance_python(value)


@functools.cache
def _validator(annotation: Any) -> Any:
    from pydantic_core import SchemaValidator  # a compiled library, which --help does not need

    return SchemaValidator(_schema(annotation))


def _schema(annotation: Any, ranges: Mapping[str, Any] | None = None) -> Any:
    """The schema of pydantic's core for an annotation; `ranges`: of a number in it."""
    from pydantic_core import core_schema as core

    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any or annotation is object or isinstance(annotation, str | TypeVar):
        return core.any_schema()
    if origin is Annotated:
        return _annotated(args[0], args[1:])
    if origin in UNIONS:
        return core.union_schema([_schema(arg, ranges) for arg in args])
    if annotation is None or annotation is types.NoneType:
        return core.none_schema()
    if origin is Literal:
        return _test(core.any_schema(), lambda value: one_of(value, args))
    if annotation in (bool, int, float, str):
        finite = {"allow_inf_nan": False} if annotation is float else {}
        kind = {"type": annotation.__name__, "strict": True, **finite, **(ranges or {})}
        return _leaf(kind, annotation)
    if typing.is_typeddict(annotation):
        hints = typing.get_type_hints(annotation, include_extras=True)
        required = annotation.__required_keys__
        fields = {
            key: core.typed_dict_field(_schema(hint), required=key in required)
            for key, hint in hints.items()
        }
        typed_dict = core.typed_dict_schema(fields, extra_behavior="forbid")
        return _container(typed_dict, dict, collections.abc.Mapping)
    if (origin or annotation) in MAPPINGS:
        key, item = args or (Any, Any)
        schema = core.dict_schema(_schema(key), _schema(item))
        return _container(schema, dict, collections.abc.Mapping)
    if (origin or annotation) in SEQUENCES:
        if (origin or annotation) is tuple and args and args[-1] is not Ellipsis:
            return _container(core.tuple_schema([_schema(arg) for arg in args]), tuple, is_sequence)
        return _container(core.list_schema(_schema(args[0]) if args else None), list, is_sequence)
    if (origin or annotation) in (Callable, collections.abc.Callable, type):
        return _leaf(core.callable_schema(), Callable)
    kind = origin or annotation
    if isinstance(kind, type) and not getattr(kind, "_is_protocol", False):
        return _leaf(core.is_instance_schema(kind), kind)
    return core.any_schema()


def _annotated(annotation: Any, metadata: tuple[Any, ...]) -> Any:
    ranges: dict[str, Any] = {}
    tests: list[Callable[[Any], bool]] = []
    built = any(isinstance(item, Built) for item in metadata)
    for item in metadata:
        for kind, key in ((Ge, "ge"), (Gt, "gt"), (Le, "le"), (Lt, "lt")):
            if isinstance(item, kind):
                ranges[key] = getattr(item, key)
        if (test := _test_of(item)) is not None:
            tests.append(test)
    schema = _schema(annotation, ranges)
    if built:
        schema = _test(schema, lambda value: not isinstance(value, Unbuilt) or value.called)
    return _test(schema, lambda value: isinstance(value, Unbuilt) or all(test(value) for test in tests))


def _test_of(item: Any) -> Callable[[Any], bool] | None:
    """The test of an item of an annotation that pydantic's core has no word for."""
    if isinstance(item, MinLen):
        return lambda value: len(value) >= item.min_length
    if isinstance(item, MaxLen):
        return lambda value: len(value) <= item.max_length
    if isinstance(item, OneOf):
        return lambda value: one_of(value, item.choices)
    if isinstance(item, Test):
        return lambda value: item.complaint(value) is None
    return None


def _leaf(schema: Any, kind: Any) -> Any:
    """`schema`, which also allows references that may become such a value, and scalars of numpy."""
    from pydantic_core import core_schema as core

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(value, Unbuilt):
            if not value.may_be(kind):
                raise ValueError
            return value
        if kind in (int, float, bool) and getattr(value, "shape", None) == () and hasattr(value, "item"):
            try:
                return handler(value.item())
            except TypeError:  # an array that is traced
                return value
        return handler(value)

    return core.no_info_wrap_validator_function(validate, schema)


def _test(schema: Any, test: Callable[[Any], bool]) -> Any:
    from pydantic_core import core_schema as core

    def validate(value: Any) -> Any:
        if not test(value):
            raise ValueError
        return value

    return core.no_info_after_validator_function(validate, schema)


def _container(schema: Any, plain: Callable[[Any], Any], kind: Any) -> Any:
    """A schema for all containers of a kind, which reads them as a `plain` one."""
    from pydantic_core import core_schema as core

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(value, Unbuilt):
            if value.called and value.may_be(collections.abc.Collection):
                return value
            raise ValueError
        if not (isinstance(value, kind) if isinstance(kind, type) else kind(value)):
            raise ValueError
        return handler(plain(value))

    return core.no_info_wrap_validator_function(validate, schema)


def is_sequence(value: Any) -> bool:
    """Whether a value can stand for a list: a sequence that is no text, or an array."""
    if isinstance(value, str | bytes | collections.abc.Mapping | collections.abc.Set):
        return False
    return isinstance(value, collections.abc.Sequence) or bool(getattr(value, "shape", None))
