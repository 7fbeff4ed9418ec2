"""Files that grow, on a disk and in a store."""

import time

import pytest

from famx.base import appending
from famx.base.appending import appended
from famx.base.errors import ConfigError
from famx.base.files import as_path


@pytest.mark.parametrize("where", ["disk", "store"])
def test_data_are_added_at_the_end(gcs, tmp_path, where):
    path = as_path("gs://bucket/run/log" if where == "store" else tmp_path / "log")
    for i in range(3):
        file = appended(path)
        file.append(b"%d\n" % i)
        file.flush()
        assert path.read_bytes() == b"0\n1\n2\n"[: 2 * i + 2]
        file.append(b"")
        file.close()
        file.close()
    assert path.read_bytes() == b"0\n1\n2\n"


def test_a_store_gets_the_data_by_themselves(gcs, monkeypatch):
    monkeypatch.setattr(appending, "_SECONDS", 0.01)
    path, file = as_path("gs://bucket/run/log"), appended(as_path("gs://bucket/run/log"))
    try:
        file.append(b"1\n")
        while not path.exists():
            time.sleep(0.01)
        assert path.read_bytes() == b"1\n"
    finally:
        file.close()


def test_nothing_is_written_without_new_data(gcs):
    file = appended(as_path("gs://bucket/run/log"))
    file.append(b"1")
    file.flush()
    before = len(gcs.requests)
    file.flush()
    file.close()
    assert len(gcs.requests) == before


def test_data_that_a_store_did_not_take_are_kept(gcs):
    path = as_path("gs://bucket/run/log")
    file = appended(path)
    file.append(b"1\n")
    gcs.refuse = lambda *_: 403
    with pytest.raises(ConfigError, match="^gs://bucket/run/log cannot be written: there is no access"):
        file.flush()
    gcs.refuse = lambda *_: None
    file.append(b"2\n")
    file.close()
    assert path.read_bytes() == b"1\n2\n"
