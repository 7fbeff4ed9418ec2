"""The run log: one history across resumes, and progress for terminals and files."""

import _multiprocessing
import errno
import io
import json
import os
import pathlib
import time

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from famx.base.errors import ConfigError
from famx.training import event_files
from famx.training.run_log import RunLog, read_metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


def events(directory):
    """Every event in the directory's event files, in order."""
    found = []
    for path in sorted(directory.rglob("events.out.tfevents.*")):
        blob, at = path.read_bytes(), 0
        while at < len(blob):  # record: length (8), crc (4), payload, crc (4)
            size = int.from_bytes(blob[at : at + 8], "little")
            found.append(Event.FromString(blob[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def scalars(directory):
    return [(e.step, v.tag, v.simple_value) for e in events(directory) for v in e.summary.value]


def test_write_reaches_both_files(tmp_path):
    log = RunLog(tmp_path, stream=io.StringIO())
    log.write(1, {"loss": 2.5, "accuracy": 0.25})
    log.write(1, {"accuracy": 0.5}, split="eval")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [(1, "train"), (1, "eval")]
    assert lines[0]["loss"] == 2.5 and lines[0]["time"] > 0
    assert read_metrics(tmp_path, "eval")[0]["accuracy"] == 0.5
    log.close()
    log.close()
    assert scalars(tmp_path / "tensorboard" / "train") == [
        (1, "train/loss", 2.5),
        (1, "train/accuracy", 0.25),
        (1, "eval/accuracy", 0.5),
    ]


class FullDisk(io.FileIO):
    """A file of a disk that has room for half of what is written, while `full`."""

    full = False

    def write(self, data):
        if not self.full:
            return super().write(data)
        super().write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_out_whole_events_and_stops_nothing(tmp_path, monkeypatch):
    opened = lambda path, *_, **__: FullDisk(path, "wb")  # noqa: E731
    monkeypatch.setattr(pathlib.Path, "open", opened)
    writer = event_files.summary_writer(tmp_path, flush_secs=0.01)
    monkeypatch.undo()
    for step in range(40):  # more than the writer's queue holds
        FullDisk.full = 10 <= step < 30
        writer.add_scalar("x", step, step)
        time.sleep(0.03)
    FullDisk.full = False
    writer.close()
    steps = [step for step, _, _ in scalars(tmp_path)]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 39 and len(steps) < 35


def test_a_line_that_cannot_be_written_is_a_sentence_or_left_out(tmp_path, monkeypatch):
    write = os.write

    def refuse(file, data):
        if b'"loss"' in data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    monkeypatch.setattr(os, "write", refuse)
    for name in "ab":
        (tmp_path / name).mkdir()
    with RunLog(tmp_path / "a", stream=io.StringIO()) as log:
        with pytest.raises(ConfigError, match="metrics.jsonl cannot be written: No space left"):
            log.write(1, {"loss": 2.5})
    with RunLog(tmp_path / "b", stream=io.StringIO(), skip_if_full=True) as log:
        log.write(1, {"loss": 2.5})
        log.write(2, {"accuracy": 0.5})
    assert [line["step"] for line in read_metrics(tmp_path / "b")] == [2]


def test_device_scalars_and_nan_are_written(tmp_path):
    import jax.numpy as jnp

    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.write(jnp.int32(2), {"loss": jnp.float32(float("nan"))})
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 2 and line["loss"] != line["loss"]


def test_resume_drops_what_was_never_checkpointed(tmp_path):
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        for step in range(1, 6):
            log.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    with RunLog(tmp_path, start_step=3, stream=io.StringIO()) as log:
        for step in range(4, 7):
            log.write(step, {"loss": 10 * step})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1, 2, 3, 40, 50, 60]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    started = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert started == [4]  # TensorBoard hides the first run's points from step 4 on


def test_new_run_starts_a_new_history(tmp_path):
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.write(5, {"loss": 1})
    RunLog(tmp_path, start_step=0, stream=io.StringIO()).close()
    assert read_metrics(tmp_path) == []


def test_plain_lines(tmp_path, monkeypatch):
    clock = iter([100.0, 100.0 + 75])
    monkeypatch.setattr("famx.base.progress._monotonic", lambda: next(clock))
    stream = io.StringIO()
    with RunLog(tmp_path, steps=40, start_step=10, stream=stream) as log:
        scalars = {"accuracy": 0.5, "gradient_norm": 2.0, "loss": 1.23456, "skipped": 0.0}
        log.progress(20, {**scalars, "tokens_per_second": 20480.0})
    assert stream.getvalue() == (
        "train step 20/40  loss 1.235  accuracy 0.5  20k tokens/s  eta 2:30\n"
    )


WIDE = {
    "accuracy": 0.123456, "exact_match": 0.654321, "gradient_norm": 1.0, "loss": 1.23456e-5,
    "skipped": 0.04, "tokens_per_second": 1234.5, "data_wait": 0.5, "blocks": 4096, "bad_records": 123456,
    "stage": 3,
}  # fmt: skip


def test_a_line_has_room_for_the_most_important_figures_alone(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path, steps=10**5, stream=stream) as log:
        log.progress(99_999, WIDE)
        log.write(99_999, WIDE)
    (line,) = stream.getvalue().splitlines()
    assert len(line) <= 80
    assert line.startswith("train step 99999/100000  loss 1.235e-05  skipped 0.04  ")
    assert "  1,234 tokens/s  eta 0:00" in line and "gradient_norm" not in line
    (kept,) = read_metrics(tmp_path)
    assert kept.items() >= WIDE.items()


def test_steps_without_targets_have_no_loss(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path, stream=stream) as log:
        log.progress(5, {"gradient_norm": 0.0, "tokens_per_second": 12.345})
        log.progress(6, {"tokens_per_second": 1_234_567})
        log.progress(7, {"skipped": 1.0})
    assert stream.getvalue().splitlines() == [
        "train step 5  no targets  12.3 tokens/s", "train step 6  no targets  1.2M tokens/s",
        "train step 7  skipped 1",
    ]  # fmt: skip


def test_bar_on_a_terminal(tmp_path):
    stream = Terminal()
    with RunLog(tmp_path, steps=40, start_step=10, stream=stream) as log:
        log.progress(20, {"loss": 1.5})
        log.message("saved")
    assert "20/40" in stream.getvalue() and "loss 1.5" in stream.getvalue()
    assert "\r" in stream.getvalue() and "saved\n" in stream.getvalue()


def test_message_without_a_terminal(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path, stream=stream) as log:
        log.message("saved")
    assert stream.getvalue() == "saved\n"


def test_disabled_writes_nothing(tmp_path):
    with RunLog(tmp_path, enabled=False) as log:
        log.write(1, {"loss": 1.0})
        log.progress(1, {"loss": 1.0})
        log.message("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["text", None])
def test_only_numbers(tmp_path, value):
    with RunLog(tmp_path, stream=io.StringIO()) as log, pytest.raises((TypeError, ValueError)):
        log.write(1, {"loss": value})


def test_locks_that_cannot_be_made_are_one_sentence(tmp_path, monkeypatch):
    """They are files of the system, which a full disk or a container without /dev/shm refuses."""

    def refused(*_, **__):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(_multiprocessing, "SemLock", refused)
    with pytest.raises(ConfigError, match="cannot be written: File too large. Make space .* /dev/shm"):
        event_files.summary_writer(tmp_path)
