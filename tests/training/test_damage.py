"""Training with damaged checkpoints, full disks and lost directories, in one sentence each."""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from processes import free_address, start_process
from tiny import assert_identical, make_run

import famx
from famx.base.errors import ConfigError
from famx.model_dir import commit
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.digests import DamagedCheckpoint
from famx.model_dir.lock import FILE, RunLock
from famx.training import loop
from famx.training.run import Every

ROOT = pathlib.Path(famx.__file__).parent.parent


def run(model_dir, steps=4, **changes):
    settings = dict(
        model_dir=str(model_dir), steps=steps, batch_size=2, optimizer=optax.adam(1e-2),
        every=Every(log=1, checkpoint=2), checkpoints_to_keep=None,
    )  # fmt: skip
    return loop.train(make_run(**{**settings, **changes}))


def steps_in(model_dir):
    return sorted(int(path.name[11:]) for path in pathlib.Path(model_dir).glob("checkpoint_*"))


def saved(model_dir, step):
    return ocp.PyTreeCheckpointer().restore(pathlib.Path(model_dir) / f"checkpoint_{step}" / "state")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps with checkpoints 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("trained")
    run(directory, steps=6)
    return directory


@pytest.fixture
def copy(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


def damage(model_dir, step, name="dataset/metadata"):
    path = model_dir / f"checkpoint_{step}" / name
    path.write_bytes(path.read_bytes().replace(b'"logged"', b'"logger"') + b" ")


def snapshot(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_training_falls_back_to_the_newest_whole_checkpoint(copy, trained, capsys):
    damage(copy, 6)
    damage(copy, 4, "state/_METADATA")
    run(copy, steps=6)
    text = capsys.readouterr().err
    assert f"{copy}/checkpoint_6 is damaged: dataset/metadata has " in text
    assert f"{copy}/checkpoint_4 is damaged: state/_METADATA has " in text
    assert "Resuming from step 2" in text
    assert f"Newer than step 2, moved to {copy}/set_aside: checkpoint_4, checkpoint_6." in text
    assert steps_in(copy) == [2, 4, 6]  # saved again, while the damaged ones are kept
    assert steps_in(copy / "set_aside") == [4, 6]
    assert_identical(saved(copy, 6), saved(trained, 6))
    damage(copy, 6)
    run(copy, steps=6)
    assert (copy / "set_aside" / "checkpoint_6.2").is_dir()


def test_without_a_whole_checkpoint_nothing_is_begun(copy):
    for step in (2, 4, 6):
        damage(copy, step)
    before = snapshot(copy)
    with pytest.raises(DamagedCheckpoint, match="No checkpoint in .* is whole; of the newest: .*_6 is"):
        run(copy, steps=6)
    assert snapshot(copy) == before


def test_resume_from_names_the_checkpoint(copy, trained, capsys):
    run(copy, steps=6, resume_from=4)
    assert "Resuming from step 4" in capsys.readouterr().err
    assert steps_in(copy) == [2, 4, 6] and steps_in(copy / "set_aside") == [6]
    assert_identical(saved(copy, 6), saved(trained, 6))
    run(copy, steps=8, resume_from=4)  # the same command, started again
    text = capsys.readouterr().err
    assert "Resuming from step 6" in text and "was resumed from step 4 before" in text
    assert steps_in(copy) == [2, 4, 6, 8] and steps_in(copy / "set_aside") == [6]


def test_resume_from_a_missing_or_damaged_checkpoint_is_refused(copy):
    with pytest.raises(ConfigError, match="no checkpoint of step 3 .* saved steps: 2, 4, 6"):
        run(copy, resume_from=3)
    damage(copy, 4)
    with pytest.raises(DamagedCheckpoint, match="checkpoint_4 is damaged: dataset/metadata"):
        run(copy, resume_from=4)
    assert steps_in(copy) == [2, 4, 6] and not (copy / "set_aside").exists()


def test_a_second_run_in_the_directory_writes_nothing(copy):
    lock = RunLock(copy)
    lock.acquire()
    before = snapshot(copy)
    with pytest.raises(ConfigError, match="in use by the run of process"):
        run(copy, random_seed=1)
    assert {**snapshot(copy), FILE: before[FILE]} == before
    lock.release()


@pytest.mark.parametrize("keep", [0, -1])
def test_no_run_deletes_its_last_checkpoint(tmp_path, keep):
    for call in (lambda: run(tmp_path / "a", checkpoints_to_keep=keep),
                 lambda: Checkpointer(tmp_path / "a", keep=keep)):  # fmt: skip
        sentence = rf"checkpoints_to_keep must be .*at least 1.* None.*, not {keep}"
        with pytest.raises(ConfigError, match=sentence):
            call()


def full(monkeypatch, which):
    """The disk is full in the saves whose numbers, from 1, are in `which`."""
    write, number = commit.digests.write_digests, itertools.count(1)

    def fail(directory):
        if next(number) in which:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
        write(directory)

    monkeypatch.setattr(commit.digests, "write_digests", fail)


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_kept(tmp_path, monkeypatch):
    full(monkeypatch, {2, 3})
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, steps=6, checkpoints_to_keep=1)
    sentence = f"{tmp_path}/checkpoint_4 cannot be written: No space left on device."
    assert str(caught.value).split("\n")[0] == sentence
    assert steps_in(tmp_path) == [2]
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.verify(2)
    assert not list(tmp_path.glob("*tmp*"))


def test_a_full_disk_is_tried_again_if_so_configured(tmp_path, monkeypatch, capsys, trained):
    full(monkeypatch, {2})
    run(tmp_path, steps=6, checkpoints_to_keep=2, retry_full_disk=True)
    assert "checkpoint_4 cannot be written: No space left on device. The run continues" in (
        capsys.readouterr().err
    )
    assert steps_in(tmp_path) == [2, 6]
    assert_identical(saved(tmp_path, 6), saved(trained, 6))


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_an_error(tmp_path, monkeypatch):
    full(monkeypatch, {2, 3, 4})
    with pytest.raises(ConfigError, match="checkpoint_6 cannot be written: No space left on device"):
        run(tmp_path, steps=6, retry_full_disk=True)
    assert steps_in(tmp_path) == [2]


def test_a_failed_save_is_reported_before_the_next_one(tmp_path, monkeypatch):
    full(monkeypatch, {1})
    with pytest.raises(ConfigError, match="checkpoint_400 cannot be written"):
        run(tmp_path, steps=900, every=Every(log=10, checkpoint=400))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] < 800


def test_a_removed_directory_is_a_sentence(tmp_path):
    with Checkpointer(tmp_path / "run") as checkpointer:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(ConfigError, match="checkpoint_1 cannot be written: .* was removed"):
            checkpointer.save(1, {"x": optax.adam(1e-3).init({"w": 1.0})})
    assert not (tmp_path / "run").exists()


def test_a_path_that_is_too_long_is_a_sentence(tmp_path):
    """The directory can be made, but not what orbax makes in it."""
    directory = tmp_path
    while len(str(directory)) < 3900:
        directory = directory / ("x" * min(200, 4000 - len(str(directory))))
    directory.mkdir(parents=True)
    with Checkpointer(directory) as checkpointer:
        with pytest.raises(ConfigError, match="checkpoint_1 cannot be written: File name too long"):
            checkpointer.save(1, {"x": np.ones(4)}, {"i": 1})
            checkpointer.wait()
    assert not list(directory.iterdir())


def test_a_directory_that_became_read_only_is_a_sentence(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": np.ones(4)})
        checkpointer.wait()

        def refuse(*_):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(commit.os, "rename", refuse)
        checkpointer.save(2, {"x": np.ones(4)})
        with pytest.raises(ConfigError, match="checkpoint_2 cannot be written: Read-only file system"):
            checkpointer.wait()
        assert checkpointer.all_steps() == [1]
        monkeypatch.undo()
        assert checkpointer.save(2, {"x": np.ones(4)})
    assert steps_in(tmp_path) == [1, 2]


LIMITED = """
import resource, sys
import jax.numpy as jnp
from famx.model_dir.checkpointer import Checkpointer
from famx.base.errors import ConfigError
directory, small, large = sys.argv[1], jnp.ones(8), jnp.arange(1 << 20, dtype=jnp.float32)
with Checkpointer(directory, keep=1) as saver:
    saver.save(1, {"x": small}, {"i": 1})
    saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    saver.save(2, {"x": large}, {"i": 2})
    try:
        saver.wait()
    except ConfigError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saver.save(2, {"x": large}, {"i": 2})
    saver.wait()
    print(saver.all_steps(), saver.verify(2))
"""


def test_a_limit_below_orbax_is_a_sentence_and_the_next_save_works(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True,
    )  # fmt: skip
    sentence, after = result.stdout.splitlines()
    assert sentence == f"{tmp_path}/checkpoint_2 cannot be written: File too large."
    assert after == "[2] True" and "Traceback" not in result.stderr


TWO = """
import pathlib, shutil, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from famx.base import distributed
from famx.base.errors import ConfigError
from famx.model_dir import digests
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.lock import FILE, run_lock
from famx.training.fallback import choose
address, index, directory = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
distributed.initialize(coordinator_address=address, num_processes=2, process_id=index)
assert distributed.agreed(None) is None
assert distributed.agreed("second" if index else None) == "second"
assert distributed.agreed("first é" if index == 0 else "second") == "first é"
digests._SMALL = 64  # so that the tiny files are shared among the processes
place = NamedSharding(Mesh(np.array(jax.devices()), "x"), P("x"))
make = lambda start: jax.make_array_from_callback((8, 64), place, lambda i: np.full((8, 64), start)[i])
want = {"x": jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=place)}
with run_lock(directory) as lock, Checkpointer(directory, keep=None) as saver:
    lock.check()
    for step in (1, 2, 3):
        saver.save(step, {"x": make(np.float32(step))}, {"i": step})
    saver.wait()
    assert (directory / FILE).exists()
    for step, name in ((3, "state/**/d/*"), (2, "dataset/metadata")):
        if index == 0:
            path = max((directory / f"checkpoint_{step}").glob(name), key=lambda x: x.stat().st_size)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        distributed.agreed(None)
        try:
            saver.restore(step, want)
        except digests.DamagedCheckpoint as error:
            print("refused", step, str(error).split(": ")[1].split()[0])
    choice = choose(saver, None)
    notes = choice.set_newer_aside(saver)
    got, data, step = saver.restore(choice.step, want)
    assert all((shard.data == 1).all() for shard in got["x"].addressable_shards)
    saver.save(2, {"x": make(np.float32(9))}, {"i": 9})
    saver.wait()
    print(choice.step, choice.newer, len(notes), data, saver.all_steps(), flush=True)
distributed.agreed(None)
# Another run has the directory: both processes are refused.
if index == 0:
    from famx.model_dir.lock import RunLock
    other = RunLock(directory)
    other.acquire()
distributed.agreed(None)
try:
    with run_lock(directory):
        pass
except ConfigError as error:
    print("in use" in str(error), flush=True)
distributed.agreed(None)
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    address = free_address()
    command = lambda index: [sys.executable, "-c", TWO, address, str(index), str(tmp_path)]
    both = [
        start_process(command(index), cwd=ROOT, stdout=subprocess.PIPE, text=True,
                      env={**os.environ, "JAX_PLATFORMS": "cpu"})
        for index in range(2)
    ]  # fmt: skip
    texts = [process.communicate(timeout=300)[0] for process in both]
    outputs = [[line for line in text.splitlines() if "Gloo" not in line] for text in texts]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1]
    third, second, chosen, refused = outputs[0]
    assert re.fullmatch("refused 3 state/.*d/[0-9a-f]{32}", third)
    assert second == "refused 2 dataset/metadata"
    assert chosen == "1 (2, 3) 3 {'i': 1} [1, 2]" and refused == "True"
    assert steps_in(tmp_path) == [1, 2] and steps_in(tmp_path / "set_aside") == [2, 3]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 6 MB, where the test may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


class Filler:
    """An evaluation that fills the disk at one step and frees it at another."""

    def __init__(self, disk, fill, free):
        self.path, self.fill, self.free = disk / "filler", fill, free

    def __call__(self, model, params, step):
        if step == self.fill:
            with contextlib.suppress(OSError), self.path.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 10))
        if step == self.free:
            self.path.unlink()
        return {"score": 1.0}


def test_a_disk_that_fills_up(small_disk):
    """The save of step 2 is complete when that of step 4 begins, which may itself find no space."""
    every = Every(log=1, checkpoint=2, evaluation=1)
    ends, goes_on = small_disk / "ends", small_disk / "goes_on"
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        run(ends, 8, every=every, evaluation=Filler(small_disk, 5, None))
    assert 2 in steps_in(ends) and max(steps_in(ends)) <= 4
    (small_disk / "filler").unlink()
    run(goes_on, 8, every=every, evaluation=Filler(small_disk, 5, 7), retry_full_disk=True)
    assert {2, 8} <= set(steps_in(goes_on)) < {2, 4, 6, 8}
    for directory in (ends, goes_on):
        with Checkpointer(directory, read_only=True) as checkpointer:
            assert all(map(checkpointer.verify, checkpointer.all_steps()))
