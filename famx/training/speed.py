"""Speed of a run, and traces of some of its steps."""

import contextlib
import pathlib
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator

import jax

from famx.base.chips import peak_flops
from famx.base.errors import ConfigError
from famx.base.files import copy_directory, is_stored
from famx.base.progress import compilation_seconds
from famx.modules import DecoderConfig
from famx.training.flops import Learning, train_flops

# Names of the scalars that depend on the machine.
NAMES = ("tokens_per_second", "step_seconds", "data_wait", "mfu", "memory_gb")


class SpeedMeter:
    """Tokens, steps and waiting between two reports.

    Args:
      config: configuration of the model.
      from_start: whether examples begin with the prompt, see `train_flops`.
      learning: which parameters learn; the operations of the backward pass depend on it.
    """

    def __init__(self, config: DecoderConfig, from_start: bool, learning: Learning = Learning()):
        self._config, self._from_start, self._learning = config, from_start, learning
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self.restart()

    def restart(self) -> None:
        """Starts a new report now, as after an evaluation."""
        self._began, self._compiled = time.monotonic(), compilation_seconds()
        self._tokens, self._steps, self._flops, self._waited = 0, 0, 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context in which the loop waits for the next batch."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def count(self, batch: int, length: int, weighted: float = 1.0) -> None:
        """Counts a step over `batch` examples of `length` tokens, on all devices together.

        `weighted` is the share of the tokens that have a loss weight.
        """
        self._tokens += batch * length
        self._steps += 1
        if self._peak is not None:
            tokens = round(weighted * batch * length)
            done = train_flops(self._config, batch, length, self._from_start, self._learning, tokens)
            self._flops += sum(done.values())

    def report(self) -> dict[str, float]:
        """The scalars of `NAMES` that are known on this machine, since the last report.

        Compilations are left out of the time.
        Call it once the counted steps are done. `data_wait` is the share of the time that the loop waited
        for batches; the devices may have computed earlier steps meanwhile, so it is an upper bound on
        the share in which they were idle for lack of a batch. `mfu` is the share of the devices' peak
        that was used for the operations of `train_flops`. `memory_gb` is the peak memory use of this
        process's first device, or on CPUs of the process itself.
        """
        elapsed = time.monotonic() - self._began - (compilation_seconds() - self._compiled)
        figures = {
            "tokens_per_second": self._tokens / elapsed,
            "step_seconds": elapsed / max(self._steps, 1),
            "data_wait": self._waited / elapsed,
        }
        if self._peak is not None:
            figures["mfu"] = self._flops / elapsed / (self._peak * jax.device_count())
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            figures["memory_gb"] = memory["peak_bytes_in_use"] / 1e9
        elif jax.default_backend() == "cpu":
            unit = 1 if sys.platform == "darwin" else 1024
            figures["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        self.restart()
        return figures


class Profile:
    """A trace of the steps `first:last` (both included, counted from 1) for xprof.

    It is written to `MODEL_DIR/profile` and read with `tensorboard --logdir` or `xprof`.

    Raises:
      ConfigError: the steps are not written as "10:13", or the run does not have them.
    """

    def __init__(self, steps: str | None, model_dir: pathlib.Path, last: int):
        self.directory = model_dir / "profile"
        self.first = self.last = None
        self._running = False
        self._local: tempfile.TemporaryDirectory[str] | None = None
        if steps is None:
            return
        match = re.fullmatch(r"(\d+):(\d+)", str(steps))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(
                f"profile_steps must be the first and the last step to profile, such as 10:13, not"
                f" {steps}."
            )
        self.first, self.last = int(match[1]), int(match[2])
        if self.first > last:
            raise ConfigError(f"profile_steps {steps} come after the last step of the run, {last}.")

    def before(self, step: int) -> None:
        """Call before step `step`, counted from 1."""
        if step == self.first:
            if is_stored(self.directory):  # which jax cannot write to
                self._local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._local.name if self._local else str(self.directory))
            self._running = True

    def after(self, step: int, result) -> bool:
        """Call after step `step` with its result; returns whether the trace has just been written."""
        if not self._running or step < self.last:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Ends a running trace, as at the end of a run."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if self._local is not None:
                copy_directory(self._local.name, self.directory)
                self._local.cleanup()
