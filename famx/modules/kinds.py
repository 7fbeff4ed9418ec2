"""Classes by the `kind` with which a model's description names them."""

import dataclasses
from collections.abc import Mapping
from typing import Any


def described(
    kinds: Mapping[str, type], what: str, fields: Mapping[str, Any]
) -> tuple[type, dict[str, Any]]:
    """The class that a description names by its `kind`, and its other fields.

    Args:
      kinds: the dataclasses that are known, by kind.
      what: what they are, in sentences: "memory".
      fields: the description.

    Raises:
      ValueError: no imported module defines such a class, or it has other fields.
    """
    fields = dict(fields)
    kind = fields.pop("kind", None)
    if kind not in kinds:
        raise ValueError(
            f"{what} is of the kind {kind!r}, which is not known here: import the module that defines"
            f" it (--import=my_module), or choose from {', '.join(kinds)}."
        )
    names = {field.name for field in dataclasses.fields(kinds[kind])}
    unknown = ", ".join(sorted(fields.keys() - names))
    if unknown:
        known = ", ".join(sorted(names)) or "none"
        raise ValueError(f"A {what} of the kind {kind!r} has no field {unknown}; it has {known}.")
    return kinds[kind], fields
