"""Checkpoints in a bucket: whole or not counted, whatever ends a run; damage is found."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famx.base.errors import ConfigError
from famx.base.files import as_path
from famx.base.store_errors import StoreError
from famx.model_dir import digests
from famx.model_dir.checkpointer import Checkpointer, check_model_dir
from famx.model_dir.commit import SaveError
from famx.model_dir.soundness import check

RUN = "gs://bucket/run"
LAST = "commit_success.txt"


def make_tree(seed=0, large=0):
    rng = np.random.default_rng(seed)
    return {
        "target": {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "x": rng.normal(size=large)},
        "state": {"m": jnp.asarray(rng.normal(size=7), jnp.bfloat16), "empty": jnp.zeros((0, 3))},
    }


def save(*steps, keep=None, **options):
    with Checkpointer(RUN, keep=keep, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_tree(step), {"at": step}, force=True)


def read(step=None, partial=False):
    with Checkpointer(RUN, read_only=True) as checkpointer:
        tree = make_tree() if not partial else {"target": make_tree()["target"]}
        return checkpointer.restore(step, tree, partial=partial)


def whole_steps():
    """The steps that count, each of which must be as it was saved."""
    with Checkpointer(RUN, read_only=True) as checkpointer:
        steps = checkpointer.all_steps()
        assert all(checkpointer.verify(step) for step in steps)
    for step in steps:
        assert_is_saved(step)
    return steps


def assert_is_saved(step):
    tree, data, found = read(step)
    assert (data, found) == ({"at": step}, step)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(make_tree(step)), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("async_", [True, False])
def test_round_trip_is_exact(gcs, async_):
    save(3, 7, async_=async_)
    assert whole_steps() == [3, 7]
    assert read()[2] == 7 and read(3, partial=True)[1] == {"at": 3}
    names = gcs.names("bucket", "run/checkpoint_7/")
    last = [name for method, name in gcs.requests if method == "POST"][-1:]
    assert f"run/checkpoint_7/{digests.NAME}" in names and f"run/checkpoint_7/{LAST}" in names and last


def test_digests_and_then_the_file_of_success_are_written_last(gcs):
    order = []
    gcs.refuse = lambda method, bucket, name: order.append(name) if method == "POST" else None
    save(1)
    assert order[0] == "run/checkpoint_1.unfinished" not in gcs.names("bucket")
    assert order[-2:] == [f"run/checkpoint_1/{digests.NAME}", f"run/checkpoint_1/{LAST}"]


def test_reading_changes_nothing(gcs):
    save(1, 2)
    gcs.requests.clear()
    before = dict(gcs.objects)
    whole_steps()
    assert all(finding.sound for finding in check(RUN))
    assert all(finding.sound for finding in check(f"{RUN}/checkpoint_2"))
    assert {method for method, _ in gcs.requests} == {"GET"} and gcs.objects == before


def test_the_oldest_are_removed_and_the_protected_kept(gcs):
    with Checkpointer(RUN, keep=2) as checkpointer:
        for step in range(1, 6):
            checkpointer.protect([2])
            checkpointer.save(step, make_tree(step), {"at": step})
            checkpointer.wait()
            assert checkpointer.all_steps() == sorted({2, step - 1, step} & set(range(1, step + 1)))
        assert not checkpointer.save(5, make_tree(), force=True), "it is saved already"
    assert whole_steps() == [2, 4, 5]
    assert {name.split("/")[1] for name in gcs.names("bucket")} == {
        "checkpoint_2", "checkpoint_4", "checkpoint_5"
    }  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_wherever_a_run_ends_what_counts_is_whole(gcs, method):
    """The store refuses everything after the n-th write or removal, as if the process had been killed."""
    save(1)
    number, left, ended = 0, gcs.objects, True
    while ended:
        gcs.objects, ended = dict(left), False
        left_over = iter(range(number))

        def refuse(asked, bucket, name, left_over=left_over):
            nonlocal ended
            if asked == method:
                ended = next(left_over, None) is None or ended
            return 403 if ended and asked != "GET" else None

        gcs.refuse = refuse
        try:
            save(2, keep=1)
        except SaveError as error:
            assert "there is no access" in str(error)
        gcs.refuse = lambda *_: None
        steps = whole_steps()
        assert steps in ([1], [1, 2], [2]), steps
        if number % 4 == 0:
            save(2, 3)  # removes what was left, and can save the same step
            assert whole_steps() == sorted({*steps, 2, 3})
        number += 1
    assert number > 5


def test_what_is_not_of_a_run_is_left_alone(gcs):
    save(1)
    gcs.put("bucket", "run/checkpoint_5/theirs", b"1")  # such as a copy that is not complete
    gcs.put("bucket", f"run/checkpoint_6/{digests.METADATA}", b'{"commit_timestamp_nsecs": 5}')
    gcs.put("bucket", "run/source/config.json", b"{}")
    gcs.put("bucket", "run/checkpoint_x/y", b"{}")
    before = gcs.names("bucket")
    with Checkpointer(RUN) as checkpointer:
        assert checkpointer.all_steps() == [1]
        for step in (5, 6):
            with pytest.raises(SaveError, match=f"checkpoint_{step} cannot be written: it is there"):
                checkpointer.save(step, make_tree())
    assert gcs.names("bucket") == before


def test_a_flipped_byte_of_any_object_is_found(gcs):
    save(1)
    for name in gcs.names("bucket", "run/checkpoint_1/"):
        content, kept = gcs.content("bucket", name), gcs.objects["bucket", name]
        if name.endswith(f"checkpoint_1/{LAST}"):  # it only has to be there
            continue
        for changed in (bytes([content[0] ^ 1]) + content[1:], content[:-1], content + b"\0", None):
            if changed is None:
                del gcs.objects["bucket", name]
            else:
                gcs.put("bucket", name, changed)
            with pytest.raises(digests.DamagedCheckpoint) as caught:
                with Checkpointer(RUN, read_only=True) as checkpointer:
                    checkpointer.verify(1)
            assert name.removeprefix("run/checkpoint_1/") in str(caught.value)
            found = [finding for finding in check(RUN) if not finding.sound]
            assert len(found) == 1
        gcs.objects["bucket", name] = kept
    gcs.put("bucket", "run/checkpoint_1/state/more", b"1")
    with pytest.raises(digests.DamagedCheckpoint, match="state/more was added"):
        read()


def test_large_files_are_compared_in_pieces(gcs, monkeypatch):
    monkeypatch.setattr(digests, "_PIECE", 1 << 16)
    monkeypatch.setattr(digests, "_STORED_PART", 1 << 14)
    monkeypatch.setattr(digests, "_SMALL", 1 << 10)
    tree = make_tree(0, large=100_000)
    with Checkpointer(RUN) as checkpointer:
        checkpointer.save(1, tree)
    name = max(gcs.names("bucket", "run/checkpoint_1/"), key=lambda n: len(gcs.content("bucket", n)))
    content = gcs.content("bucket", name)
    files = digests.read_digests(as_path(f"{RUN}/checkpoint_1")).files
    size, pieces = files[name.removeprefix("run/checkpoint_1/")]
    assert size == len(content) and len(pieces) == -(-size // (1 << 16)) > 5
    for place in (0, size // 2, size - 1):
        gcs.put("bucket", name, content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with Checkpointer(RUN, read_only=True) as checkpointer:
            with pytest.raises(digests.DamagedCheckpoint, match="is not what was written"):
                checkpointer.restore(1, tree)
    # An object whose size is a multiple of a piece, and a longer one.
    aligned = content[: 1 << 17]
    gcs.put("bucket", "other/state/x", aligned)
    digests.write_digests(as_path("gs://bucket/other"))
    with digests.verified(as_path("gs://bucket/other")):
        pass
    gcs.put("bucket", "other/state/x", aligned + b"1")
    with pytest.raises(digests.DamagedCheckpoint, match="state/x is not what was written"):
        with digests.verified(as_path("gs://bucket/other")):
            pass


def test_a_store_that_refuses_is_not_damage(gcs):
    save(1)
    with Checkpointer(RUN, read_only=True) as checkpointer:
        gcs.refuse = lambda *_: 403
        for call in (lambda: checkpointer.verify(1), lambda: checkpointer.restore(1, make_tree())):
            with pytest.raises(StoreError, match="there is no access"):
                call()
    with pytest.raises(ConfigError, match="there is no access"):
        read()


def test_a_checkpoint_is_the_same_on_a_disk(gcs, tmp_path):
    """Copied in either direction, it is read and verified."""
    save(4)
    for name in gcs.names("bucket", "run/"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gcs.content("bucket", name))
    with Checkpointer(tmp_path / "run") as checkpointer:
        assert checkpointer.verify(4) and checkpointer.restore(4, make_tree())[1] == {"at": 4}
        checkpointer.save(6, make_tree(6), {"at": 6})
    for path in (tmp_path / "run" / "checkpoint_6").rglob("*"):
        if path.is_file():
            gcs.put("bucket", path.relative_to(tmp_path).as_posix(), path.read_bytes())
    assert whole_steps() == [4, 6]
    shutil.rmtree(tmp_path / "run")


def test_checkpoints_are_set_aside(gcs):
    save(1, 2, 3)
    with Checkpointer(RUN) as checkpointer:
        moved = checkpointer.set_aside([2, 3])
        assert list(map(str, moved)) == [f"{RUN}/set_aside/checkpoint_{step}" for step in (2, 3)]
        assert checkpointer.all_steps() == [1]
        checkpointer.save(2, make_tree(2), {"at": 2})
        checkpointer.wait()
        assert list(map(str, checkpointer.set_aside([2]))) == [f"{RUN}/set_aside/checkpoint_2.2"]
    assert whole_steps() == [1]
    with Checkpointer(f"{RUN}/set_aside", read_only=True) as checkpointer:
        assert checkpointer.all_steps() == [2, 3] and checkpointer.verify(3)
        assert checkpointer.data_state(3) == {"at": 3}


def test_checks_of_the_directory(gcs):
    assert check_model_dir(RUN, need_bytes=1 << 60) == as_path(RUN)  # a bucket is never full
    assert not gcs.objects
    with pytest.raises(ConfigError, match="MODEL_DIR gs://other/run is not writable: there is no such"):
        check_model_dir("gs://other/run")
    gcs.refuse = lambda method, *_: 403 if method == "POST" else None
    with pytest.raises(ConfigError, match="^MODEL_DIR gs://bucket/run is not writable: there is no acc"):
        check_model_dir(RUN)


def test_a_plain_orbax_reads_it(gcs):
    import orbax.checkpoint as ocp

    save(1)
    plain = ocp.PyTreeCheckpointer().restore(f"{RUN}/checkpoint_1/state")
    np.testing.assert_array_equal(plain["target"]["w"], make_tree(1)["target"]["w"])
    metadata = json.loads(gcs.content("bucket", f"run/checkpoint_1/{digests.METADATA}"))
    assert metadata["commit_timestamp_nsecs"] > metadata["init_timestamp_nsecs"]
