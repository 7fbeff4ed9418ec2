"""Progress of a long task: a bar on a terminal, occasional plain lines elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from time import monotonic as _monotonic
from typing import IO, Any, Self, TypeVar

import tqdm

from famx.base.text import byte_size

_Item = TypeVar("_Item")
LINE_SECONDS = 10.0

_compiled = 0.0  # seconds that this process has spent compiling in the foreground
_compiling = False


@contextlib.contextmanager
def compilation() -> Iterator[None]:
    """A context in which the task stands still for a compilation, which no later unit needs."""
    global _compiled, _compiling
    if _compiling:
        yield
        return
    _compiling, began = True, _monotonic()
    try:
        yield
    finally:
        _compiling = False
        _compiled += _monotonic() - began


def compilation_seconds() -> float:
    """Seconds that this process has spent in `compilation`; two values tell those between them."""
    return _compiled


def say(text: str) -> None:
    """Print a line on standard error, above the bars of a terminal."""
    tqdm.tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """Progress of a task; a context manager that closes its bar.

    Args:
      name: shown in front of the bar.
      total: units of the whole task; None: unknown.
      start: units that were done before.
      unit: name of a unit; "B" counts bytes and shows them with prefixes.
      line_seconds: shortest time between two plain lines; 0: a line at every update.
      last_line: print the line of the completed task whatever the time since the last line.
      keep_bar: leave the bar on the terminal when it is complete.
      stream: standard error by default. A terminal gets a bar.

    Attributes:
      done, total: units.
    """

    def __init__(
        self,
        name: str,
        total: int | None = None,
        start: int = 0,
        unit: str = "it",
        line_seconds: float = LINE_SECONDS,
        last_line: bool = False,
        keep_bar: bool = True,
        stream: IO[str] | None = None,
    ):
        self.done, self.total = start, total
        self._start, self._line_seconds, self._last_line = start, line_seconds, last_line
        self._stream: IO[str] = sys.stderr if stream is None else stream
        self._began = self._now = self._printed = _monotonic()
        self._compiled, self._shown_compiled = compilation_seconds(), compilation_seconds()
        self._bar: Any = None
        if self._stream.isatty():
            self._bar = tqdm.tqdm(
                desc=name, total=total, initial=start, file=self._stream, unit=unit,
                unit_scale=unit == "B", leave=keep_bar,
            )  # fmt: skip

    @property
    def elapsed(self) -> float:
        """Seconds from the start to the last update."""
        return self._now - self._began

    @property
    def working(self) -> float:
        """Seconds from the start to the last update without those of compilations."""
        return max(self.elapsed - (compilation_seconds() - self._compiled), 0.0)

    @property
    def remaining(self) -> float | None:
        """Estimated seconds for the rest of the task, at the average speed; None: unknown.

        What was compiled so far is not compiled again, so its time does not count.
        """
        if self.total is None or self.done <= self._start:
            return None
        return self.working * (self.total - self.done) / (self.done - self._start)

    def update(
        self,
        done: int,
        note: Callable[[], str] | None = None,
        line: Callable[[], str] | None = None,
        total: int | None = None,
    ) -> None:
        """Show that `done` units are done.

        Args:
          done: units, `start` included.
          note: makes the text behind the bar.
          line: makes the plain line; None: there is no plain line.
          total: units of the whole task, if they were unknown until now.
        """
        self._now = _monotonic()
        step, self.done = done - self.done, done
        self.total = self.total if total is None else total
        if self._bar is not None:
            self._bar.total = self.total
            # The bar's speed is that since its last print.
            self._bar.last_print_t += compilation_seconds() - self._shown_compiled
            self._shown_compiled = compilation_seconds()
            if note is not None:
                self._bar.set_postfix_str(note(), refresh=False)
            self._bar.update(step)
        elif line is not None:
            due = self._now - self._printed >= self._line_seconds
            if due or (self._last_line and done == self.total):
                self._printed = self._now
                self.message(line())

    def add(self, count: int = 1) -> None:
        """Show that `count` more units are done, only on a terminal."""
        self.update(self.done + count)

    def each(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yield the items, one unit each."""
        for item in items:
            yield item
            self.add()

    def message(self, text: str) -> None:
        """Print a line; a bar stays below it."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Complete the bar; safe to call twice."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class ByteProgress(Progress):
    """Progress in bytes, with plain lines such as 'import: 3.0 MB of 4.0 MB'.

    The arguments are those of `Progress`, except for the unit.
    """

    def __init__(self, name: str, total: int | None = None, **options: Any):
        super().__init__(name, total, unit="B", **options)
        self._name = name

    def show(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are done."""
        line = lambda: f"{self._name}: {byte_size(done)} of {byte_size(total)}"
        self.update(done, line=line, total=total)

    def add(self, count: int = 1) -> None:
        """Show that `count` more bytes of the known total are done."""
        assert self.total is not None
        self.show(self.done + count, self.total)
