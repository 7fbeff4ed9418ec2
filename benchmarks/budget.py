"""Time budget of a benchmark: which measurements still fit, and an orderly end when it is spent."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping

from famx.base.signals import STOP_SIGNALS, handling

_WRITING = 1.0  # seconds that are reserved for writing the tables


class Budget:
    """Seconds that are left, and what each kind of measurement needs.

    Args:
      seconds: whole budget.
      needs: estimated seconds of a measurement (compilation and repeats) by its kind; `learn` replaces
        them by what a measurement of this kind took.
      spent: seconds that the process has already taken.

    Attributes:
      at_end: closed when the budget ends, also if the process is cut off; for temporary directories.
    """

    def __init__(self, seconds: float, needs: Mapping[str, float], spent: float = 0.0):
        self.seconds = seconds
        self._end = time.monotonic() + seconds - spent - _WRITING
        self._needs = dict(needs)
        self.at_end = contextlib.ExitStack()

    @property
    def remaining(self) -> float:
        """Seconds that are left; negative if the budget is overspent."""
        return self._end - time.monotonic()

    def allows(self, kind: str) -> bool:
        """Whether a measurement of this kind is expected to end in time."""
        return self._needs[kind] <= self.remaining

    def learn(self, kind: str, seconds: float) -> None:
        """Notes what a measurement of this kind took."""
        self._needs[kind] = seconds

    @contextlib.contextmanager
    def enforced(self, cut_off: Callable[[str], None]) -> Iterator[None]:
        """A context in which the process ends when the budget is spent, or on SIGTERM or SIGINT.

        A thread waits for either, because the main thread may be in a compilation, where Python handles
        no signal. Only the main thread may enter the context.

        Args:
          cut_off: called before the process ends, with a reason such as "SIGTERM".
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(reader, cut_off), daemon=True)
        thread.start()
        try:
            with self.at_end, handling(lambda number, frame: None):  # Python must have a handler
                yield
        finally:
            signal.set_wakeup_fd(before)
            os.write(writer, b"\0")
            thread.join()
            os.close(reader)
            os.close(writer)

    def _watch(self, reader: int, cut_off: Callable[[str], None]) -> None:
        number = -1  # other signals, such as SIGALRM, are not for us
        while number not in STOP_SIGNALS:
            if not select.select([reader], [], [], max(0.0, self.remaining))[0]:
                break
            number = os.read(reader, 1)[0]
            if number == 0:
                return
        stopped = number in STOP_SIGNALS
        reason = signal.Signals(number).name if stopped else f"{self.seconds:g} seconds are spent"
        try:
            cut_off(reason)
            self.at_end.close()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + number if stopped else 0)


def process_seconds() -> float:
    """Seconds since this process started; 0 where the system does not tell."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0
