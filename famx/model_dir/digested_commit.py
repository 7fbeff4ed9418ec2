"""How orbax commits a checkpoint of famx: with its digests. Its own file, as orbax is slow to import."""

import asyncio
import os
import pathlib
import time
from collections.abc import Iterator

from orbax.checkpoint.path import atomicity
from orbax.checkpoint.path import step as steps

from famx.base.files import as_path
from famx.model_dir import digests


class CommitWithDigests(atomicity.AtomicRenameTemporaryPath):
    """The temporary directory of a checkpoint, which takes its final name once its digests are written.

    Orbax calls `finalize` in process 0, after all processes have written their files, and, for a save
    in the background, on the thread of that save. It also does so for each item of a checkpoint, which
    has no digests of its own.
    """

    async def finalize(self) -> None:
        if atomicity.TMP_DIR_SUFFIX in self.get_final().parent.name:
            await super().finalize()
            return
        temporary = await _with_its_time(self)
        (temporary / atomicity.COMMIT_SUCCESS_FILE).write_text(_success(self))
        await asyncio.to_thread(digests.write_digests, temporary)
        os.rename(temporary, self.get_final())


class StoredCommit(atomicity.CommitFileTemporaryPath):
    """The directory of a checkpoint in a store, which counts once it has a file of success, its last one.

    Orbax calls `finalize` as for `CommitWithDigests`.
    """

    async def finalize(self) -> None:
        if not digests.STEP.fullmatch(self.get_final().name):
            await super().finalize()
            return
        directory = await _with_its_time(self)
        await asyncio.to_thread(digests.write_digests, directory)
        await asyncio.to_thread((directory / atomicity.COMMIT_SUCCESS_FILE).write_text, _success(self))
        await asyncio.to_thread(_end, directory)


def _end(directory: pathlib.Path) -> None:
    from famx.model_dir import stored  # slow to import, as it talks to a store

    stored.end(directory)


async def _with_its_time(path: atomicity.TemporaryPathBase) -> pathlib.Path:
    """The temporary directory, in whose metadata the time of the commit now is."""
    store, directory = path._checkpoint_metadata_store, as_path(path.get())
    if store:
        await asyncio.to_thread(store.wait_until_finished)
        file = directory / digests.METADATA
        await asyncio.to_thread(store.update, file_path=file, commit_timestamp_nsecs=time.time_ns())
        await asyncio.to_thread(store.wait_until_finished)
    return directory


def _success(path: atomicity.TemporaryPathBase) -> str:
    return f"Checkpoint commit was successful to {path.get_final()}"  # as orbax writes it


class StoredSteps(steps.NameFormat):
    """The checkpoints of a directory in a store: those with a file of success.

    Orbax' own class asks further services of the store, which need packages and permissions of their own.
    """

    def build_name(self, step: int) -> str:
        """The name of the directory of a step."""
        return f"checkpoint_{step}"

    def find_all(self, base_path) -> Iterator[steps.Metadata]:
        """Step and path of every checkpoint that counts."""
        directory = as_path(base_path)
        for name in directory.names():
            folder, _, file = name.partition("/")
            match = digests.STEP.fullmatch(folder)
            if match and file == atomicity.COMMIT_SUCCESS_FILE:
                yield steps.Metadata(step=int(match[1]), path=directory / folder)

    def find_step(self, base_path, step: int) -> steps.Metadata:
        """Step and path of one that counts; ValueError if there is none."""
        for found in self.find_all(base_path):
            if found.step == step:
                return found
        raise ValueError(f"There is no checkpoint of step {step} in {base_path}.")
