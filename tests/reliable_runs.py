"""Tiny training runs in forked processes, for `tests.reliability` and `tests.soak`.

Importing jax and famx takes far longer than the runs, so a process imports them once and forks one child
for each start of a run. That is sound as long as the parent has no other thread and no device of jax,
which `Child` checks. A child ends with its parent.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))
if "numpy" not in sys.modules:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # each would be a thread of the parent

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import orbax.checkpoint  # noqa: E402, F401, so that the children need not
import xla_flags  # noqa: E402
from flax.traverse_util import flatten_dict, unflatten_dict  # noqa: E402
from processes import free_address  # noqa: E402
from tiny import BLOCK, make_model, make_run  # noqa: E402

from famx.base import distributed, peers  # noqa: E402
from famx.base.errors import ConfigError  # noqa: E402
from famx.memories import Rmt  # noqa: E402
from famx.model_dir.checkpointer import Checkpointer  # noqa: E402
from famx.training import loop, speed  # noqa: E402
from famx.training.curriculum import Curriculum  # noqa: E402
from famx.training.run import Every, Run  # noqa: E402
from famx.training.run_log import read_metrics  # noqa: E402
from famx.training.state_passing import Aged, Fresh, Lanes, Random  # noqa: E402

_LANES = Lanes(document_length=9 * BLOCK, num_documents=10)
MODES: dict[str, dict[str, Any]] = {
    "none": dict(state_passing=Fresh()),
    "random": dict(state_passing=Random(0.5, start_step=2)),
    "continuous": dict(state_passing=_LANES),
    "aged": dict(
        state_passing=Aged(groups=2, refresh_period=3),
        curriculum=Curriculum((4, 5, 7), unlock=0.0, newest=0.6),
    ),
    "rmt": dict(state_passing=_LANES, model=make_model(memory=Rmt(2))),
}
# Of its own: a process that is killed may leave an entry that is not complete.
_CACHE = os.path.join(tempfile.gettempdir(), f"famx-reliability-jax-{os.getuid()}")
_PR_SET_PDEATHSIG = 1
_CHECKPOINT = re.compile(r"checkpoint_(\d+)")


def tiny_run(
    folder: pathlib.Path,
    mode: str,
    steps: int,
    checkpoint: int = 7,
    log: int = 3,
    learning_rate: float = 1e-2,
) -> Run:
    """The run of a mode; `checkpoint` and `log` are its periods in steps."""
    settings = dict(
        model_dir=str(folder), steps=steps, batch_size=4, optimizer=optax.adam(learning_rate),
        every=Every(log=log, checkpoint=checkpoint), checkpoints_to_keep=3,
    )  # fmt: skip
    return make_run(**settings, **MODES[mode])


# ---------------------------------------------------------------- processes


class Child:
    """A forked process that calls a function; its output goes to a file.

    It writes to a pipe, so that its output is complete even where it may write no files.

    Args:
      log: file that standard output and error are appended to, whenever a method is called.
      function: what it calls; its exit code is 0, 2 for a ConfigError, 1 for any other exception.
    """

    def __init__(self, log: pathlib.Path, function: Callable[[], Any]):
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"A process of {threads} threads must not fork."
        from jax._src import xla_bridge

        assert not xla_bridge._backends, "A process that uses devices must not fork."
        self.code: int | None = None
        self._log, (self._output, output) = log, os.pipe()
        os.set_blocking(self._output, False)
        sys.stdout.flush()
        parent, self.pid = os.getpid(), os.fork()
        if self.pid:
            os.close(output)
            return
        try:  # in the child, which never returns from here
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(3)
            os.dup2(output, 1)
            os.dup2(output, 2)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            code = _code_of(function)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        except BaseException:
            os._exit(4)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._drain()
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                os.close(self._output)
        return self.code

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError), self._log.open("ab") as file:
            while data := os.read(self._output, 1 << 16):
                file.write(data)

    def wait(self, seconds: float) -> int | None:
        """As `poll`, after waiting for the end, at most this time."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        return self.code

    def send(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it and waits for its end."""
        self.send(signal.SIGKILL)
        self.wait(60)


def _code_of(function: Callable[[], Any]) -> int:
    if "optimization_level" not in os.environ.get("XLA_FLAGS", ""):  # small programs compile long
        flags = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags.FAST}"
        os.environ["XLA_FLAGS"] = flags.strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", _CACHE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        function()
        return 0
    except ConfigError as error:
        print(f"famx: error: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1


def start(
    run: Callable[[], Run], processes: int, log: pathlib.Path, devices: int = 1
) -> list[Child]:
    """Starts the processes of a run, each of `devices`; the log of process `i` is `<log>.<i>`."""
    address = free_address()

    def train(index: int) -> None:
        jax.config.update("jax_num_cpu_devices", devices)
        if processes > 1:
            distributed.initialize(
                coordinator_address=address, num_processes=processes, process_id=index
            )
        with peers.together():
            loop.train(run())
        if processes > 1:
            jax.distributed.shutdown()  # waits for the others, as the end of a program does

    return [
        Child(pathlib.Path(f"{log}.{index}"), lambda index=index: train(index))
        for index in range(processes)
    ]


# ---------------------------------------------------------------- what a run has left


def committed(folder: pathlib.Path) -> list[int]:
    """Steps of the checkpoints that have their final name, in order."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name)))


def being_saved(folder: pathlib.Path) -> bool:
    """Whether a checkpoint is being written."""
    names = os.listdir(folder) if folder.is_dir() else []
    return any(name.startswith("checkpoint_") and not _CHECKPOINT.fullmatch(name) for name in names)


def last_step(log: pathlib.Path, offset: int = 0) -> int:
    """The last step that process 0 has logged after `offset` bytes of its log; 0: none."""
    path = pathlib.Path(f"{log}.0")
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(offset)
        steps = re.findall(rb"train step (\d+)/", file.read())
    return int(steps[-1]) if steps else 0


def history(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    times = ("time", *speed.NAMES)
    return [{k: v for k, v in line.items() if k not in times} for line in read_metrics(str(folder))]


def digest(folder: pathlib.Path, step: int) -> str:
    """Hash of all arrays of a checkpoint and of its position in the data."""
    found = hashlib.sha256()
    with Checkpointer(folder, read_only=True) as checkpointer:
        leaves = checkpointer.leaves(step)
        abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in leaves.items()}
        tree, position, _ = checkpointer.restore(step, unflatten_dict(abstract))
    for path, leaf in sorted(flatten_dict(tree).items()):
        found.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.asarray(leaf).tobytes())
    found.update(json.dumps(position, sort_keys=True).encode())
    return found.hexdigest()


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run is compared by.

    Attributes:
      digest: `digest` of its last checkpoint.
      history: hash of its metrics.
    """

    digest: str
    history: str


def result(folder: pathlib.Path, step: int, log: pathlib.Path) -> Result:
    """The result of a finished run, computed in a child."""
    path = folder.with_name(f"{folder.name}.digest")
    child = Child(log, lambda: path.write_text(digest(folder, step)))
    if child.wait(300) != 0:
        child.kill()
        raise RuntimeError(f"The last checkpoint of {folder} cannot be read; see {log}.")
    lines = json.dumps(history(folder), sort_keys=True).encode()
    return Result(path.read_text(), hashlib.sha256(lines).hexdigest())


def files_below(folder: pathlib.Path) -> int:
    """Number of files of a run."""
    return sum(len(files) for _, _, files in os.walk(folder))


def finish(children: Sequence[Child], seconds: float) -> list[int | None]:
    """Exit codes of processes after at most this time; None for one that still runs."""
    end = time.monotonic() + seconds
    return [child.wait(max(end - time.monotonic(), 0)) for child in children]
