"""A save of two processes of which one fails or is gone: neither waits for what cannot come."""

import os
import signal
import subprocess
import sys

import pytest
from processes import free_address, start_process

from famx.base import gin_utils, peers

PROGRAM = """
import os, pathlib, resource, signal, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from famx.base import distributed, peers
from famx.model_dir import save_barrier
from famx.model_dir.checkpointer import Checkpointer
address, index, directory, victim, moment = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
fails = index == int(victim)
LIMIT = 3600.0  # no process is noticed by its silence
distributed.initialize(False, address, 2, index, LIMIT, 120.0)

class Deadly(save_barrier.SaveBarrier):
    def __call__(self, *, key, timeout_ms):
        if "async_write_complete" in key and (pathlib.Path(directory) / "checkpoint_1").exists():
            print("saving", flush=True)
            while not (pathlib.Path(directory) / "saves").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        super().__call__(key=key, timeout_ms=timeout_ms)

if fails and moment == "killed":
    save_barrier.SaveBarrier = Deadly

with peers.together(LIMIT):
    place = NamedSharding(Mesh(np.array(jax.devices()), "x"), P("x"))
    whole = np.random.default_rng(0).standard_normal((8, 1 << 13), np.float32)
    make = lambda: {"x": jax.make_array_from_callback(whole.shape, place, lambda i: whole[i])}
    with Checkpointer(directory, keep=None) as saver:
        saver.save(1, make())
        saver.wait()
        if fails and moment != "killed":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, resource.RLIM_INFINITY))
        saver.save(2, make())
        if not fails:
            (pathlib.Path(directory) / "saves").touch()
        if moment == "killed" and fails:
            time.sleep(600)
        if moment == "one computes" and fails or moment == "killed":
            multihost_utils.process_allgather(np.int32(0))  # the other one does not come
        saver.wait()
        multihost_utils.process_allgather(np.int32(1))
print("not reached")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit on the size of files")
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["both wait", "one computes", "killed"])
def test_both_processes_end_with_a_sentence(tmp_path, victim, moment):
    address = free_address()
    both = [
        start_process(
            [sys.executable, "-c", PROGRAM, address, str(i), str(tmp_path), str(victim), moment],
            cwd=gin_utils.gin_root(), env={**os.environ, "JAX_PLATFORMS": "cpu"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) for i in range(2)
    ]  # fmt: skip
    texts = [process.communicate(timeout=240) for process in both]
    errors = [[x for x in text.splitlines() if "[Gloo]" not in x] for _, text in texts]
    codes = [process.returncode for process in both]
    if moment == "killed":
        assert codes[victim] == -signal.SIGKILL and "saving" in texts[victim][0]
        assert codes[1 - victim] == peers.LOST
        (line,) = errors[1 - victim]
        assert f"Process {victim} of this run is gone" in line
    else:
        assert codes == [peers.BAD_INPUT] * 2
        sentence = f"{tmp_path}/checkpoint_2 cannot be written: File too large."
        assert errors[victim] == [f"famx: error: {sentence}"]
        # Process 0 removes what there is of the checkpoint, which process 1 may notice first.
        own = sentence.replace("File too large", "No such file or directory")
        told = f"Process {victim} of this run ended: {sentence}"
        assert errors[1 - victim] in ([f"famx: error: {told}"], [f"famx: error: {own}"])
    assert not any("reached" in text for text, _ in texts)
    assert (tmp_path / "checkpoint_1").is_dir() and not (tmp_path / "checkpoint_2").exists()
