"""Progress: bars on terminals, plain lines elsewhere."""

import io

import pytest

from famx.base import progress as progress_module
from famx.base.progress import ByteProgress, Progress, compilation, say
from famx.base.text import byte_size, clock, some


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("famx.base.progress._monotonic", lambda: now[0])
    return now


def test_lines_come_now_and_then(now):
    stream = io.StringIO()
    with Progress("x", 10, stream=stream) as progress:
        for done in range(1, 11):
            now[0] += 4
            progress.update(done, line=lambda: f"{progress.done} {progress.elapsed:g}")
    assert stream.getvalue() == "3 12\n6 24\n9 36\n"


def test_the_last_line_may_come_early(now):
    stream = io.StringIO()
    with Progress("x", 2, last_line=True, stream=stream) as progress:
        progress.update(1, line=lambda: "one")
        progress.update(2, line=lambda: "two")
    assert stream.getvalue() == "two\n"


def test_the_rest_takes_as_long_as_the_part_of_this_run(now):
    progress = Progress("x", 40, start=10, stream=io.StringIO())
    assert progress.remaining is None
    now[0] += 75
    progress.update(20)
    assert progress.remaining == 150 and progress.elapsed == 75
    assert Progress("x", stream=io.StringIO()).remaining is None


def test_a_bar_shows_figures_and_messages():
    stream = Terminal()
    with Progress("name", 4, start=1, stream=stream) as progress:
        progress._bar.mininterval = 0
        progress.update(3, note=lambda: "loss=1", line=lambda: "never")
        progress.message("said")
    text = stream.getvalue()
    assert "name:  75%" in text and "3/4" in text and "loss=1" in text and "said\n" in text
    assert "never" not in text


def test_items_are_counted_on_a_terminal_and_silent_elsewhere():
    for stream in (Terminal(), io.StringIO()):
        with Progress("items", 3, stream=stream) as progress:
            assert list(progress.each("abc")) == ["a", "b", "c"] and progress.done == 3
        assert ("items: 100%" in stream.getvalue()) == stream.isatty()


def test_bytes_whose_total_is_known_later(now):
    stream = io.StringIO()
    with ByteProgress("checksum", stream=stream) as progress:
        for done in (1_000_000, 2_000_000):
            now[0] += 10
            progress.show(done, 4_000_000)
    assert stream.getvalue() == "checksum: 1.0 MB of 4.0 MB\nchecksum: 2.0 MB of 4.0 MB\n"


def test_texts():
    assert [clock(seconds) for seconds in (0.4, 75, 7384)] == ["0:00", "1:15", "2:03:04"]
    assert byte_size(999) == "999 bytes" and byte_size(2.5e9) == "2.5 GB"
    assert byte_size(42_700, 0) == "43 kB" and byte_size(7e12, 0) == "7.0 TB"
    assert some(["a", "b"]) == "a, b" and some(["a", "b", "c", "d"], 2) == "a, b and 2 more"


def test_what_was_compiled_does_not_count_for_the_rest(now):
    progress = Progress("x", 40, stream=io.StringIO())
    with compilation():
        with compilation():  # counted once
            now[0] += 30
    now[0] += 10
    progress.update(10)
    assert progress.elapsed == 40 and progress.working == 10 and progress.remaining == 30
    later = Progress("y", 40, stream=io.StringIO())
    now[0] += 10
    later.update(10)
    assert later.working == 10 and later.remaining == 30


def test_a_bar_leaves_a_compilation_out_of_its_speed():
    stream = Terminal()
    with Progress("name", 100, stream=stream) as progress:
        clock = [0.0]
        progress._bar._time = lambda: clock[0]
        progress._bar.start_t = progress._bar.last_print_t = 0.0
        progress._bar.mininterval = 0
        with compilation():
            progress_module._compiled += 50
        clock[0] = 60.0
        progress.update(10)
    assert "1.00it/s" in stream.getvalue()


def test_a_message_to_standard_error(capsys):
    say("busy")
    assert capsys.readouterr().err == "busy\n"
