"""A log of cells survives a process that is killed, and keeps cells of different settings apart."""

import json

import pytest

from famx.base.cell_log import CellLog
from famx.base.errors import ConfigError

SETTINGS = {"probe": "passkey", "sizes": (1, 2)}


def open_log(path, settings=SETTINGS):
    return CellLog(path, settings, ("length", "seed"))


def cell(length, seed, score=1.0):
    return {"length": length, "seed": seed, "score": score}


def test_cells_are_read_back_and_added_to(tmp_path):
    path = tmp_path / "made" / "cells.jsonl"
    with open_log(path) as log:
        assert log.cells == {} and not path.parent.exists()  # nothing is made before the first cell
        log.add(cell(8, 1))
        log.add(cell(8, 2))
    with open_log(path) as log:
        assert log.cells == {(8, 1): cell(8, 1), (8, 2): cell(8, 2)}
        log.add(cell(8, 2, 0.5))  # a later cell counts
        log.add(cell(16, 1))
    found = open_log(path).cells
    assert found == {(8, 1): cell(8, 1), (8, 2): cell(8, 2, 0.5), (16, 1): cell(16, 1)}
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {"settings": {"probe": "passkey", "sizes": [1, 2]}}


@pytest.mark.parametrize("kept", range(0, 120, 7))
def test_a_line_that_was_cut_is_measured_again(tmp_path, kept):
    path = tmp_path / "cells.jsonl"
    with open_log(path) as log:
        for seed in range(3):
            log.add(cell(8, seed))
    data = path.read_bytes()
    kept = min(kept, len(data))
    path.write_bytes(data[:kept])
    complete = max(data[:kept].count(b"\n") - 1, 0)
    with open_log(path) as log:
        assert list(log.cells) == [(8, seed) for seed in range(complete)]
        for seed in range(3):
            if (8, seed) not in log.cells:
                log.add(cell(8, seed))
    assert path.read_bytes() == data


def test_other_settings_and_other_files_are_refused(tmp_path):
    path = tmp_path / "cells.jsonl"
    with open_log(path) as log:
        log.add(cell(8, 1))
    with pytest.raises(ConfigError, match=r"cells.jsonl has cells of other settings \(probe\): choose"):
        open_log(path, {**SETTINGS, "probe": "ruler_vt"})
    for text in ("no json\n", "[]\n", '{"settings": {}}\n[1]\n', '{"settings": 1}\n', '{"x": 1}\n'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is not a file of cells"):
            open_log(path, {})
    with pytest.raises(ConfigError, match="cannot be read"):
        open_log(tmp_path)


def test_two_processes_do_not_write_one_log(tmp_path):
    path = tmp_path / "cells.jsonl"
    with open_log(path) as one, open_log(path) as two:
        one.add(cell(8, 1))
        with pytest.raises(ConfigError, match="Another process is writing"):
            two.add(cell(8, 2))
        with pytest.raises(ConfigError, match="Another process is writing"):
            open_log(path)  # at once, before anything is measured
    assert list(open_log(path).cells) == [(8, 1)]
