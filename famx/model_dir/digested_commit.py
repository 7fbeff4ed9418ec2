"""How orbax commits a checkpoint of famx: with its digests. Its own file, as orbax is slow to import."""

import asyncio
import os
import pathlib
import time

from orbax.checkpoint.path import atomicity

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
        store, temporary = self._checkpoint_metadata_store, pathlib.Path(self.get())
        if store:
            await asyncio.to_thread(store.wait_until_finished)
            path = temporary / digests.METADATA
            await asyncio.to_thread(store.update, file_path=path, commit_timestamp_nsecs=time.time_ns())
            await asyncio.to_thread(store.wait_until_finished)
        text = f"Checkpoint commit was successful to {self.get_final()}"  # as orbax writes it
        (temporary / atomicity.COMMIT_SUCCESS_FILE).write_text(text)
        await asyncio.to_thread(digests.write_digests, temporary)
        os.rename(temporary, self.get_final())
