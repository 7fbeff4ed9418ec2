"""Trees of arrays as a checkpoint stores them: nested dicts of leaves, without Nones and empty arrays."""

import pathlib
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import serialization, traverse_util

from famx.base.errors import ConfigError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


def flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    """Leaves by path, without Nones and empty arrays."""
    flat = traverse_util.flatten_dict({"": serialization.to_state_dict(tree)})
    return {path[1:]: leaf for path, leaf in flat.items() if leaf is not None and leaf.size}


def nest(flat: dict[tuple[str, ...], Any]) -> Any:
    """The nested dict of the leaves that `flatten` lists."""
    return traverse_util.unflatten_dict(flat)


def unflatten(tree: Any, leaves: dict[tuple[str, ...], Any]) -> Any:
    """`tree` with the leaves that `flatten` lists replaced."""
    flat = traverse_util.flatten_dict({"": serialization.to_state_dict(tree)}, keep_empty_nodes=True)
    filled = {path: leaves.get(path[1:], _fill(leaf)) for path, leaf in flat.items()}
    return serialization.from_state_dict(tree, traverse_util.unflatten_dict(filled)[""])


def _fill(leaf: Any) -> Any:
    """An empty array for an empty leaf, which is not stored; any other leaf as it is."""
    if getattr(leaf, "size", None) != 0:
        return leaf
    empty = np.zeros(leaf.shape, leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    return empty if sharding is None else jax.device_put(empty, sharding)


def restore_args(leaf: Any) -> "ocp.RestoreArgs":
    """How orbax restores a leaf: a jax.Array for one with a sharding, else a numpy array."""
    import orbax.checkpoint as ocp

    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=sharding, dtype=leaf.dtype, global_shape=leaf.shape)


def check_same_leaves(directory: pathlib.Path, stored: dict, wanted: dict) -> None:
    """Raise ConfigError unless stored and wanted leaves have equal names, shapes and dtypes."""
    for path in sorted(stored.keys() | wanted.keys()):
        name = "/".join(path)
        if path not in stored:
            raise ConfigError(f"{directory} holds another model: it has no {name}.")
        if path not in wanted:
            raise ConfigError(f"{directory} holds another model: this model has no {name}.")
        shape, expected = _describe(stored[path]), _describe(wanted[path])
        if shape != expected:
            raise ConfigError(
                f"{directory} holds another model: {name} is {shape} there and {expected} here."
            )


def _describe(leaf: Any) -> str:
    """Dtype and shape of an array: 'float32[3, 4]'."""
    return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
