"""Checkpoints over orbax: `MODEL_DIR/checkpoint_<step>/state`, the layout that t5x reads.

A checkpoint is written to a temporary name and renamed when complete, so a kill at any moment leaves
the previous one as it was. Each has digests of its files (`famx.model_dir.digests`), with which they are
compared when it is loaded; one without digests is read as it is. Trees are stored as nested dicts of
arrays (optax's named tuples by position and field, as flax's `to_state_dict` names them) and are restored
bit for bit, in the structure, placement and dtypes that the caller describes. Orbax refuses empty arrays,
so `restore` creates them.
"""

import contextlib
import copy
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

import jax
from absl import logging
from flax import traverse_util

from famx.base import peers
from famx.base.distributed import agreed
from famx.base.errors import ConfigError
from famx.base.files import as_path, check_writable, is_stored, nearest_existing
from famx.base.text import byte_size
from famx.model_dir import digests
from famx.model_dir.commit import CUSTOM_METADATA, LAST_THREAD, SaveError, quiet_orbax, save_errors
from famx.model_dir.digests import DamagedCheckpoint
from famx.model_dir.trees import check_same_leaves, flatten, nest, restore_args, unflatten
from famx.model_dir.unreadable import reading_errors

SET_ASIDE = "set_aside"  # folder of a MODEL_DIR for checkpoints that are kept but not used
_STATE, _DATASET = "state", "dataset"


class _Newest:
    """Orbax's policy of preservation: the newest checkpoints, and those that are protected.

    In a store orbax preserves all, and the `Checkpointer` removes those that are not `kept`.
    """

    def __init__(self, number: int | None, stored: bool):
        self.number, self.stored = number, stored
        self.protected: frozenset[int] = frozenset()

    def kept(self, steps: Collection[int]) -> set[int]:
        newest = sorted(steps) if self.number is None else sorted(steps)[-self.number :]
        return {*newest, *self.protected}

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        kept = self.kept([info.step for info in checkpoints])
        return [self.stored or info.step in kept for info in checkpoints]


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

    Raises:
        ConfigError: `keep` is less than 1, so that no checkpoint would be left.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike,
        keep: int | None = 3,
        save_interval: int = 1,
        async_: bool = True,
        read_only: bool = False,
    ):
        import orbax.checkpoint as ocp  # slow to import: a run that is refused does without

        from famx.model_dir.digested_commit import CommitWithDigests, StoredCommit, StoredSteps
        from famx.model_dir.save_barrier import SaveBarrier

        check_keep(keep)
        quiet_orbax()
        self.model_dir = as_path(model_dir)
        stored = is_stored(model_dir)
        self._barrier = SaveBarrier(self._part_failed)
        self._verified: set[int] = set()  # steps whose files were compared with their digests
        self._saving: int | None = None  # step of a save that may not be complete
        self._newest = _Newest(None if read_only else keep, stored)
        self._removed: set[int] = set()  # steps of a store, which orbax does not remove
        if stored and not read_only and jax.process_index() == 0:
            with save_errors(self.model_dir):
                _stored().remove_unfinished(self.model_dir)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._newest,
            step_prefix=None if stored else "checkpoint",
            step_name_format=StoredSteps() if stored else None,
            save_interval_steps=0 if read_only else save_interval,
            create=not read_only,
            enable_async_checkpointing=async_,
            async_options=ocp.AsyncOptions(barrier_sync_fn=self._barrier),
            cleanup_tmp_directories=not read_only and not stored,
            read_only=read_only,
            lightweight_initialize=True,  # reads nothing from checkpoints, of which one may be damaged
            temporary_path_class=StoredCommit if stored else CommitWithDigests,
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

        Raises:
            SaveError: this checkpoint or the one before cannot be written; nothing else was changed.
        """
        import orbax.checkpoint as ocp

        step = int(step)
        self.wait()
        if step in self.all_steps():
            return False
        items = {_STATE: ocp.args.PyTreeSave(nest(flatten(tree)))}
        if data_state is not None:
            items[_DATASET] = ocp.args.JsonSave(copy.deepcopy(data_state))  # written later
        if not is_stored(self.model_dir) and not self.model_dir.is_dir():  # orbax would make it again
            raise SaveError(f"{self._path(step)} cannot be written: {self.model_dir} was removed.")
        if is_stored(self.model_dir) and self._path(step).is_dir():
            raise SaveError(
                f"{self._path(step)} cannot be written: it is there, without commit_success.txt, and no"
                " run has left it. Remove it, or choose another MODEL_DIR."
            )
        self._saving = step
        args = ocp.args.Composite(**items)
        marks = is_stored(self.model_dir) and jax.process_index() == 0
        with self._saves():
            if marks:
                _stored().begin(self._path(step))
            saves = self._manager.save(step, args=args, force=force, custom_metadata=CUSTOM_METADATA)
            if marks and not saves:
                _stored().end(self._path(step))
        return saves

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
            DamagedCheckpoint: what is read is not as it was written, or cannot be read.
            ConfigError: there is no such checkpoint, or its leaves differ in name, shape or dtype.
        """
        import orbax.checkpoint as ocp

        step = self.find(step)
        wanted = flatten(abstract_tree)
        stored, top = self.leaves(step), {path[0] for path in wanted}
        if partial:
            stored = {path: leaf for path, leaf in stored.items() if path[0] in top}
        check_same_leaves(self._path(step), stored, wanted)

        items = {
            _STATE: ocp.args.PyTreeRestore(
                nest(wanted),
                restore_args=nest({path: restore_args(leaf) for path, leaf in wanted.items()}),
                partial_restore=partial,
            )
        }
        if self._has_data_state(step):
            items[_DATASET] = ocp.args.JsonRestore()
        with self._whole(step, top if partial else None):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        leaves = traverse_util.flatten_dict(restored[_STATE])
        tree = unflatten(abstract_tree, leaves)
        return tree, restored.get(_DATASET), step

    def verify(self, step: int) -> bool:
        """Compare all files of a checkpoint with its digests, once; returns whether it has any.

        Of one without digests, metadata and data state are read. Several processes share the work.

        Raises:
            DamagedCheckpoint: it is not as it was written, or cannot be read.
        """
        step = self.find(step)
        with self._whole(step, None) as found:
            pass
        if found:
            self._verified.add(step)
        else:
            self.leaves(step)
            self.data_state(step)
        return found

    def data_state(self, step: int | None = None) -> Any:
        """The data state of a checkpoint alone, None if it has none; by default of the newest.

        Raises:
            DamagedCheckpoint: the checkpoint is not as it was written, or the data state cannot be read.
            ConfigError: there is no such checkpoint.
        """
        import orbax.checkpoint as ocp

        step = self.find(step)
        with self._whole(step, ()):
            if not self._has_data_state(step):
                return None
            items = ocp.args.Composite(**{_DATASET: ocp.args.JsonRestore()})
            return self._manager.restore(step, args=items)[_DATASET]

    def _has_data_state(self, step: int) -> bool:
        return (self._path(step) / _DATASET / "metadata").exists()

    def _path(self, step: int) -> pathlib.Path:
        return self.model_dir / f"checkpoint_{step}"

    @contextlib.contextmanager
    def _whole(self, step: int, tops: Collection[str] | None) -> Iterator[bool]:
        """A context that reads a checkpoint; what it read is as it was written when the context ends.

        Its value is whether the checkpoint has digests; `tops` as for `digests.verified`. Several
        processes, which wait for each other while they read, share the comparison and make it first;
        all of them raise the same error.
        """
        directory, processes = self._path(step), jax.process_count()
        if step in self._verified:
            yield True
            return
        if processes == 1:
            with digests.verified(directory, tops) as found, reading_errors(directory):
                yield found
            return
        found, sentence = False, None
        try:
            with digests.verified(directory, tops, (jax.process_index(), processes)) as found:
                pass
        except DamagedCheckpoint as error:
            sentence = str(error)
        if (sentence := agreed(sentence)) is not None:
            raise DamagedCheckpoint(sentence)
        with reading_errors(directory):
            try:
                yield found
            except Exception:
                with digests.verified(directory):  # raises if the cause is damage
                    raise

    def find(self, step: int | None) -> int:
        """`step`, or the newest step for None; ConfigError if it is not saved."""
        self.wait()
        steps = self.all_steps()
        if not steps:
            wanted = "" if step is None else f", so none of step {step}"
            raise ConfigError(f"There is no checkpoint in {self.model_dir}{wanted}.")
        if step is not None and step not in steps:
            saved = ", ".join(map(str, steps))
            raise ConfigError(
                f"There is no checkpoint of step {step} in {self.model_dir}; saved steps: {saved}."
            )
        return steps[-1] if step is None else int(step)

    def leaves(self, step: int) -> dict[tuple[str, ...], Any]:
        """Metadata with `shape` and `dtype` of every leaf of a checkpoint, by path; loads nothing.

        Raises:
            DamagedCheckpoint: the checkpoint is not as it was written, or its metadata cannot be read.
        """
        with self._whole(step, ()):
            return traverse_util.flatten_dict(self._manager.item_metadata(step)[_STATE].tree)

    def latest_step(self) -> int | None:
        """The newest saved step, or None."""
        return max(self.all_steps(), default=None)

    def all_steps(self) -> list[int]:
        """The saved steps in ascending order; one that is still being written may be missing."""
        return sorted(set(self._manager.all_steps()) - self._removed)

    def reload(self) -> None:
        """Look for checkpoints that another process has written since."""
        self._manager.reload()
        self._removed &= set(self._manager.all_steps())

    def set_aside(self, steps: Collection[int]) -> list[pathlib.Path]:
        """Move checkpoints to `MODEL_DIR/set_aside`, so that these steps can be saved again.

        With several processes all must call it. Returns the new paths.

        Raises:
            SaveError: one cannot be moved.
        """
        moved = [_free_name(self.model_dir / SET_ASIDE / f"checkpoint_{step}") for step in sorted(steps)]
        sentence = None
        if jax.process_index() == 0:
            try:
                for step, path in zip(sorted(steps), moved, strict=True):
                    with save_errors(path):
                        path.parent.mkdir(exist_ok=True)
                        move = _stored().move if is_stored(path) else os.rename
                        move(self._path(step), path)
            except SaveError as error:
                sentence = str(error)
        self._verified.difference_update(steps)
        # Now all have chosen the paths, and the directories are moved.
        if (sentence := agreed(sentence)) is not None:
            raise SaveError(sentence)
        self.reload()
        return moved

    def wait(self) -> None:
        """Block until background writing is done.

        Raises:
            SaveError: the last checkpoint could not be written; those before are as they were.
        """
        with self._saves():
            self._manager.wait_until_finished()
        if self._saving is not None and is_stored(self.model_dir):
            self._remove_old()
        self._saving = None

    def _remove_old(self) -> None:
        """Removes old checkpoints of a store; all processes know them as removed."""
        for step in set(self.all_steps()) - self._newest.kept(self.all_steps()):
            self._removed.add(step)
            if jax.process_index() == 0:
                with save_errors(self._path(step)):
                    _stored().remove(self._path(step))

    def check(self) -> None:
        """Raise the error of a save in the background that has failed; does not wait.

        Raises:
            SaveError: see `wait`.
        """
        if self._saving is None:
            return
        if not self._is_saving():
            self.wait()

    def _is_saving(self) -> bool:
        return any(thread.name == LAST_THREAD for thread in threading.enumerate())

    @contextlib.contextmanager
    def _saves(self) -> Iterator[None]:
        """A context in which a failed save raises SaveError and leaves no files."""
        step = self._saving
        try:
            with save_errors(self._path(step) if step is not None else self.model_dir):
                yield
        except Exception:
            if jax.process_index() == 0 and step is not None:
                if is_stored(self.model_dir):
                    with contextlib.suppress(OSError):
                        _stored().remove(self._path(step))
                for left in self.model_dir.glob(f"checkpoint_{step}.orbax-checkpoint-tmp*"):
                    shutil.rmtree(left, ignore_errors=True)
            self._saving = None
            self.reload()  # orbax has forgotten the steps that it would have deleted
            raise

    def _part_failed(self, error: BaseException) -> None:
        """Tells the other processes at once that the part of this one in a save has failed."""
        if peers.of_a_lost_peer(error):
            return
        try:
            with save_errors(self._path(self._saving or 0)):
                raise error
        except SaveError as known:
            peers.tell(str(known))
        except BaseException as unknown:
            peers.tell(f"{type(unknown).__name__}: {unknown}", code=1)

    def close(self) -> None:
        """Finish background writing and end the threads.

        Raises:
            SaveError: see `wait`.
        """
        try:
            self.wait()
        finally:
            with save_errors(self.model_dir):
                self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if peers.of_a_lost_peer(error):
            while self._is_saving() and not self._barrier.waits:  # for one that is gone
                time.sleep(0.05)
            return
        with contextlib.suppress(SaveError) if kind is not None else contextlib.nullcontext():
            self.close()


def _stored():
    from famx.model_dir import stored  # slow to import, as it talks to a store

    return stored


def _free_name(path: pathlib.Path) -> pathlib.Path:
    """`path`, or if it exists the first of `path.2`, `path.3`, ... that does not."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


# ---------------------------------------------------------------- checks before anything expensive


def check_keep(keep: int | None) -> None:
    """Raise ConfigError for a number of checkpoints that would leave none."""
    if keep is not None and keep < 1:
        raise ConfigError(
            f"checkpoints_to_keep must be at least 1, or None to keep all checkpoints, not {keep}."
        )


def check_model_dir(path: str | os.PathLike, need_bytes: int = 0) -> pathlib.Path:
    """Make MODEL_DIR if it is missing, and return it as a Path.

    Raises ConfigError if the path is relative, is no directory or cannot be written, or if its disk has
    fewer than `need_bytes` free.
    """
    if is_stored(path):
        try:
            check_writable(path)
        except OSError as error:
            raise ConfigError(f"MODEL_DIR {path} is not writable: {error.strerror}.") from error
        return as_path(path)
    directory = pathlib.Path(path)
    if not directory.is_absolute():
        raise ConfigError(
            f"MODEL_DIR must be an absolute path, not {path}: write {directory.absolute()}."
        )
    existing = nearest_existing(directory)
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
