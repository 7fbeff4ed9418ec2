"""Log of a run: scalars in TensorBoard and metrics.jsonl, progress in the terminal."""

import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import IO

from famx.base.appending import appended
from famx.base.errors import ConfigError
from famx.base.files import NO_SPACE, as_path, write_text
from famx.base.progress import Progress
from famx.base.text import clock
from famx.training.event_files import summary_writer

_FILE, _EVENT = "metrics.jsonl", "event"
_FLUSH_SECONDS = 5
COLUMNS = 80  # of a line in the terminal
# Scalars that a line shows as far as it has room, in this order; metrics.jsonl has them all.
_LOSS = "loss"
_ALARMS = ("skipped", "bad_records")  # only if they are not 0
_SHOWN = ("accuracy", "exact_match", "blocks", "stage")


class RunLog:
    """Writes `MODEL_DIR/metrics.jsonl`, TensorBoard events, and a bar or plain lines.

    metrics.jsonl has one JSON object per `write`: step, split, time (seconds since the epoch) and the
    scalars. A run that resumes at `start_step` first drops the lines of later steps, which an interrupted
    run may have written after its last checkpoint, so that no step occurs twice.

    Args:
        model_dir: existing directory.
        name: name of the TensorBoard run `MODEL_DIR/tensorboard/<name>` and of the progress bar.
        steps: number of steps of the run, for the bar and the remaining time; None if unknown.
        start_step: number of steps already taken; 0 for a new run.
        stream: stream for progress, standard error by default; a terminal gets a bar.
        enabled: whether methods do anything; False in all processes but the first.
        skip_if_full: leave out lines for which the disk has no space, rather than raise.
        event_delay: number of steps that a run takes before it knows the events of a step, so that one
            that resumes at `start_step` writes the events of that many steps before it again.
    """

    def __init__(
        self,
        model_dir: str,
        name: str = "train",
        steps: int | None = None,
        start_step: int = 0,
        stream: IO[str] | None = None,
        enabled: bool = True,
        skip_if_full: bool = False,
        event_delay: int = 0,
    ):
        self._enabled, self._skip_if_full = enabled, skip_if_full
        if not enabled:
            return
        self._name = name
        self._progress = Progress(name, steps, start_step, line_seconds=0, stream=stream)
        directory = as_path(model_dir)
        self._path = path = directory / _FILE
        _drop_later_lines(path, start_step, event_delay)
        self._file = appended(path)
        self._writer = summary_writer(
            directory / "tensorboard" / name,
            purge_step=start_step + 1 if start_step else None,
            flush_secs=_FLUSH_SECONDS,
        )

    def write(self, step: int, scalars: Mapping[str, float], split: str = "train") -> None:
        """Records `scalars` at `step`, in TensorBoard as `<split>/<name>`.

        The line in metrics.jsonl is on disk on return, TensorBoard's event within seconds. In a store,
        both are there within seconds, and the line at `flush`.

        Raises:
            ConfigError: the line cannot be written.
        """
        if not self._enabled:
            return
        step, scalars = int(step), {key: float(value) for key, value in scalars.items()}
        line = {"step": step, "split": split, "time": time.time(), **scalars}
        try:
            self._file.append((json.dumps(line) + "\n").encode())
        except OSError as error:
            if not (self._skip_if_full and error.errno in NO_SPACE):
                raise ConfigError(f"{self._path} cannot be written: {error.strerror}.") from error
        for key, value in scalars.items():
            self._writer.add_scalar(f"{split}/{key}", value, step)

    def progress(self, step: int, scalars: Mapping[str, float]) -> None:
        """Moves the bar to `step`, or prints one line: step, loss and a few more figures, time left.

        The line has at most `COLUMNS` characters. Steps without a loss are said to have no targets.
        """
        if not self._enabled:
            return
        figures = _figures(scalars)
        note = lambda: ", ".join(figures[:3])
        self._progress.update(int(step), note, lambda: self._line(figures, scalars))

    def _line(self, figures: Sequence[str], scalars: Mapping[str, float]) -> str:
        progress = self._progress
        place = f"{self._name} step {progress.done}" + (f"/{progress.total}" if progress.total else "")
        speed = scalars.get("tokens_per_second")
        end = [] if speed is None else [f"{_count(float(speed))} tokens/s"]
        if progress.remaining is not None:
            end.append(f"eta {clock(progress.remaining)}")
        room = COLUMNS - len("  ".join([place, *end]))
        shown: list[str] = []
        for figure in figures:
            if len(figure) + 2 <= room:
                shown.append(figure)
                room -= len(figure) + 2
        return "  ".join([place, *shown, *end])

    def message(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self._enabled:
            self._progress.message(text)

    def event(self, step: int, sentence: str, values: Mapping[str, float]) -> None:
        """Records something unusual of a step: a line for the reader, `values` in the split "event"."""
        self.message(sentence)
        self.write(step, values, split=_EVENT)

    def flush(self) -> None:
        """Makes sure that all lines are in the files; ConfigError if they cannot be written."""
        if self._enabled:
            self._file.flush()

    def close(self) -> None:
        """Closes the files and the bar; safe to call twice."""
        if not self._enabled:
            return
        self._progress.close()
        self._writer.close()
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _figures(scalars: Mapping[str, float]) -> list[str]:
    """The scalars that a line shows, as text, the most important first."""
    text = lambda name: f"{name} {float(scalars[name]):.4g}"
    alarms = [text(name) for name in _ALARMS if scalars.get(name)]
    if _LOSS in scalars:
        loss = [text(_LOSS)]
    else:  # there were no targets, unless no step had a finite gradient
        loss = [] if scalars.get("skipped") == 1 else ["no targets"]
    return [*loss, *alarms, *(text(name) for name in _SHOWN if name in scalars)]


def _count(value: float) -> str:
    """'3,177', '12k' or '1.2M'."""
    if value < 9999.5:
        return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"
    return f"{value / 1e6:.1f}M" if value >= 999_500 else f"{value / 1e3:.0f}k"


def read_metrics(model_dir: str, split: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl, of one split or all; a line that a kill left incomplete is skipped."""
    path = as_path(model_dir) / _FILE
    if not path.exists():
        return []
    lines = [_parse(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and split in (None, line["split"])]


def _parse(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _drop_later_lines(path: pathlib.Path, step: int, event_delay: int) -> None:
    last = lambda line: step - event_delay if line["split"] == _EVENT else step
    kept = [line for line in read_metrics(str(path.parent)) if line["step"] <= last(line)]
    if path.exists():
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
