"""Checkpoints over orbax: `MODEL_DIR/checkpoint_<step>/state`, the layout that t5x reads.

A checkpoint is written to a temporary name and renamed when complete, so a kill at any moment leaves
the previous one as it was. Trees are stored as nested dicts of arrays (optax's named tuples by position
and field, as flax's `to_state_dict` names them) and are restored bit for bit, in the structure, placement
and dtypes that the caller describes. Orbax refuses empty arrays, so `restore` creates them.
"""

import copy
import os
import pathlib
import shutil
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import serialization, traverse_util

from famx.base.errors import ConfigError
from famx.base.files import check_writable
from famx.base.text import byte_size

_STATE, _DATASET = "state", "dataset"


class _Newest:
    """Orbax's policy of preservation: the newest checkpoints, and those that are protected."""

    def __init__(self, number: int | None):
        self.number, self.protected = number, frozenset()

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = sorted(info.step for info in checkpoints)
        kept = {*(steps if self.number is None else steps[-self.number :]), *self.protected}
        return [info.step in kept for info in checkpoints]


class Checkpointer:
    """Saves and restores `(tree, data_state)` by step, and deletes all but the newest checkpoints.

    `tree` is any pytree that flax can turn into a state dict (dicts, tuples, optax states, flax
    dataclasses) with array leaves: jax.Array, sharded or not, or numpy; random keys as
    `jax.random.key_data`. `data_state` is what the data iterator needs to continue: anything that
    JSON can hold, or None.

    Args:
        model_dir: absolute directory; made if missing.
        keep: number of checkpoints to keep; None keeps all.
        save_interval: `save` ignores steps that are not multiples of it, unless forced.
        async_: return from `save` once the arrays are copied, and write in the background.
        read_only: change nothing in `model_dir`, which another run may be writing to.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike,
        keep: int | None = 3,
        save_interval: int = 1,
        async_: bool = True,
        read_only: bool = False,
    ):
        self.model_dir = pathlib.Path(model_dir)
        self._newest = _Newest(None if read_only else keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._newest,
            step_prefix="checkpoint",
            save_interval_steps=0 if read_only else save_interval,
            create=not read_only,
            enable_async_checkpointing=async_,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        handlers = {
            _STATE: ocp.PyTreeCheckpointHandler(),
            _DATASET: ocp.JsonCheckpointHandler(),
        }
        verbosity = logging.get_verbosity()
        try:
            if read_only:  # orbax warns that it is
                logging.set_verbosity(logging.ERROR)
            self._manager = ocp.CheckpointManager(self.model_dir, options=options, item_handlers=handlers)
        finally:
            logging.set_verbosity(verbosity)

    def save(self, step: int, tree: Any, data_state: Any = None, force: bool = False) -> bool:
        """Save if `step` is due (or forced) and not saved yet; returns whether it saves.

        Arrays and data state may be donated or changed as soon as this returns.
        """
        step = int(step)
        if step in self._manager.all_steps():
            return False
        items = {_STATE: ocp.args.PyTreeSave(_nest(_flatten(tree)))}
        if data_state is not None:
            items[_DATASET] = ocp.args.JsonSave(copy.deepcopy(data_state))  # written later
        return self._manager.save(step, args=ocp.args.Composite(**items), force=force)

    def protect(self, steps: Collection[int]) -> None:
        """Keep the checkpoints of these steps however old they are, and no longer those named before."""
        self._newest.protected = frozenset(steps)

    def restore(
        self, step: int | None, abstract_tree: Any, partial: bool = False
    ) -> tuple[Any, Any, int]:
        """Restore `(tree, data_state, step)` of a checkpoint.

        Args:
            step: a step of `all_steps()`; None: the newest.
            abstract_tree: the tree to restore, with jax.ShapeDtypeStruct or array leaves. A leaf with
                a sharding is restored as a jax.Array with it, any other as a numpy array.
            partial: ignore further entries at the top of the checkpoint's tree, such as optimiser
                states.

        Raises:
            ConfigError: there is no such checkpoint, or its leaves differ in name, shape or dtype.
        """
        step = self.find(step)
        wanted = _flatten(abstract_tree)
        stored = self.leaves(step)
        if partial:
            top = {path[0] for path in wanted}
            stored = {path: leaf for path, leaf in stored.items() if path[0] in top}
        _check_same_leaves(self.model_dir / f"checkpoint_{step}", stored, wanted)

        items = {
            _STATE: ocp.args.PyTreeRestore(
                _nest(wanted),
                restore_args=_nest({path: _restore_args(leaf) for path, leaf in wanted.items()}),
                partial_restore=partial,
            )
        }
        if self._has_data_state(step):
            items[_DATASET] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        leaves = traverse_util.flatten_dict(restored[_STATE])
        tree = _unflatten(abstract_tree, leaves)
        return tree, restored.get(_DATASET), step

    def data_state(self, step: int | None = None) -> Any:
        """The data state of a checkpoint alone, None if it has none; by default of the newest.

        Raises:
            ConfigError: there is no such checkpoint.
        """
        step = self.find(step)
        if not self._has_data_state(step):
            return None
        items = ocp.args.Composite(**{_DATASET: ocp.args.JsonRestore()})
        return self._manager.restore(step, args=items)[_DATASET]

    def _has_data_state(self, step: int) -> bool:
        return (self.model_dir / f"checkpoint_{step}" / _DATASET / "metadata").exists()

    def find(self, step: int | None) -> int:
        """`step`, or the newest step for None; ConfigError if it is not saved."""
        self.wait()
        steps = self.all_steps()
        if not steps:
            raise ConfigError(f"There is no checkpoint in {self.model_dir}.")
        if step is not None and step not in steps:
            saved = ", ".join(map(str, steps))
            raise ConfigError(
                f"There is no checkpoint of step {step} in {self.model_dir}; saved steps: {saved}."
            )
        return steps[-1] if step is None else int(step)

    def leaves(self, step: int) -> dict[tuple[str, ...], Any]:
        """Metadata with `shape` and `dtype` of every leaf of a checkpoint, by path; loads nothing."""
        return traverse_util.flatten_dict(self._manager.item_metadata(step)[_STATE].tree)

    def latest_step(self) -> int | None:
        """The newest saved step, or None."""
        return max(self.all_steps(), default=None)

    def all_steps(self) -> list[int]:
        """The saved steps in ascending order; one that is still being written may be missing."""
        return sorted(self._manager.all_steps())

    def reload(self) -> None:
        """Look for checkpoints that another process has written since."""
        self._manager.reload()

    def wait(self) -> None:
        """Block until background writing is done; raises its errors."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish background writing and end the threads."""
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    """Leaves by path, without Nones and empty arrays."""
    flat = traverse_util.flatten_dict({"": serialization.to_state_dict(tree)})
    return {path[1:]: leaf for path, leaf in flat.items() if leaf is not None and leaf.size}


def _nest(flat: dict[tuple[str, ...], Any]) -> Any:
    return traverse_util.unflatten_dict(flat)


def _unflatten(tree: Any, leaves: dict[tuple[str, ...], Any]) -> Any:
    """`tree` with the leaves that `_flatten` lists replaced."""
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


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=sharding, dtype=leaf.dtype, global_shape=leaf.shape)


def _check_same_leaves(directory: pathlib.Path, stored: dict, wanted: dict) -> None:
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


# ---------------------------------------------------------------- checks before anything expensive


def check_model_dir(path: str | os.PathLike, need_bytes: int = 0) -> pathlib.Path:
    """Make MODEL_DIR if it is missing, and return it as a Path.

    Raises ConfigError if the path is relative, is no directory or cannot be written, or if its disk has
    fewer than `need_bytes` free.
    """
    directory = pathlib.Path(path)
    if not directory.is_absolute():
        raise ConfigError(
            f"MODEL_DIR must be an absolute path, not {path}: write {directory.absolute()}."
        )
    existing = directory
    while not os.path.exists(existing):  # Path.exists raises if a parent directory may not be read
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"MODEL_DIR {path} cannot be used: {existing} is not a directory.")
    try:
        check_writable(directory)
    except OSError as error:
        raise ConfigError(f"MODEL_DIR {path} is not writable: {error.strerror}.") from error
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise ConfigError(
            f"MODEL_DIR {path} has {byte_size(free, 0)} free and this run needs"
            f" {byte_size(need_bytes, 0)}: free some space, keep fewer checkpoints or choose another"
            " disk."
        )
    return directory
