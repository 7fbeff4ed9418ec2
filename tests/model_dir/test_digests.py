"""Damage of any file of a checkpoint is one sentence that names it, or changes nothing."""

import json
import pathlib
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from famx.base.errors import ConfigError
from famx.conversion.writer import LeafShape, write_checkpoint
from famx.model_dir import digests
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.digests import DamagedCheckpoint

DATA = {"feed": {"lengths": [1, 2]}, "logged": 10}


def _tree():
    key = jax.random.key(0)
    params = {"layers": {"kernel": jax.random.normal(key, (2, 64, 32))}, "scale": jnp.ones(5)}
    return {"target": params, "state": {"mu": jax.random.normal(key, (64, 64)), "step": jnp.int32(3)}}


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _read(directory, partial=False):
    """What a program loads from a checkpoint: the parameters, or everything with the data state."""
    tree = _abstract(_tree())
    if (directory / "checkpoint_0").exists():
        partial = True
    with Checkpointer(directory, read_only=True) as checkpointer:
        wanted = {"target": tree["target"]} if partial else tree
        got, data, _ = checkpointer.restore(None, wanted, partial=partial)
        if not partial:
            assert checkpointer.data_state() == data
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), got), data


@pytest.fixture(scope="module", params=["native", "imported"])
def checkpoint(request, tmp_path_factory):
    """A tiny checkpoint of each kind, and what is loaded from it."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "native":
        with Checkpointer(directory) as checkpointer:
            checkpointer.save(3, _tree(), DATA)
        return directory / "checkpoint_3", _read(directory)
    leaves, pieces = {}, {}
    for path, x in (("layers/kernel", _tree()["target"]["layers"]["kernel"]), ("scale", np.ones(5))):
        x = np.asarray(x, np.float32)
        leaves[tuple(path.split("/"))] = LeafShape(x.shape, x.dtype, (1, *x.shape[1:]))
        pieces[tuple(path.split("/"))] = [(None, lambda x=x: x)]
    write_checkpoint(directory, leaves, pieces)
    return directory / "checkpoint_0", _read(directory)


@pytest.fixture(params=[1 << 20, 64], ids=["small", "large"])
def limit(request, monkeypatch):
    """With the lower limit, most files of the tiny checkpoint count as large."""
    monkeypatch.setattr(digests, "_SMALL", request.param)


def _files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def _copy(checkpoint, tmp_path):
    directory = tmp_path / "run"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(checkpoint, directory / checkpoint.name)
    return directory


def _sentence(directory, partial=False):
    """The sentence of loading a damaged checkpoint, or None if it loads."""
    try:
        with _alarm(60):
            got = _read(directory, partial)
    except ConfigError as error:
        assert "\n" not in str(error) and str(directory) in str(error)
        return str(error), None
    return None, got


class _alarm:
    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        signal.alarm(self.seconds)

    def __exit__(self, *_):
        signal.alarm(0)


def test_every_file_has_a_digest(checkpoint):
    path, _ = checkpoint
    found = digests.read_digests(path)
    names = {file.relative_to(path).as_posix() for file in _files(path)}
    assert set(found.files) == names - {digests.NAME}
    assert all(size == (path / name).stat().st_size for name, (size, _) in found.files.items())


def test_a_flipped_byte_of_any_file_is_a_sentence_with_its_name(checkpoint, tmp_path, limit):
    path, _ = checkpoint
    rng = np.random.default_rng(0)
    for file in _files(path):
        name, size = file.relative_to(path).as_posix(), file.stat().st_size
        for offset in {0, size // 2, size - 1, int(rng.integers(size))}:
            directory = _copy(path, tmp_path)
            data = bytearray(file.read_bytes())
            data[offset] ^= 1 << int(rng.integers(8))
            (directory / path.name / name).write_bytes(data)
            sentence, _ = _sentence(directory)
            assert sentence and f"checkpoint_{path.name[-1]} is damaged: {name} " in sentence, name


@pytest.mark.parametrize("how", ["cut", "emptied", "deleted", "longer"])
def test_a_file_of_another_size_or_none_is_a_sentence_with_its_name(checkpoint, tmp_path, how):
    path, _ = checkpoint
    for file in _files(path):
        directory = _copy(path, tmp_path)
        name = file.relative_to(path).as_posix()
        target, data = directory / path.name / name, file.read_bytes()
        if how == "deleted":
            target.unlink()
        else:
            target.write_bytes({"cut": data[:-1], "emptied": b"", "longer": data + b"\0"}[how])
        sentence, _ = _sentence(directory)
        assert sentence and name in sentence, name


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), partial=st.booleans())
def test_any_flipped_bit_is_found_or_harmless(checkpoint, tmp_path, position, bit, partial):
    path, whole = checkpoint
    files = _files(path)
    offset = int(position * sum(file.stat().st_size for file in files))
    for file in files:
        if offset < file.stat().st_size:
            break
        offset -= file.stat().st_size
    directory = _copy(path, tmp_path)
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << bit
    (directory / path.name / file.relative_to(path)).write_bytes(data)
    sentence, got = _sentence(directory, partial)
    if sentence is None:
        assert partial and got[0]["target"] == whole[0]["target"]


def test_parameters_alone_are_compared_array_by_array(checkpoint, tmp_path, monkeypatch):
    """A damaged moment does not keep a program from the parameters; a damaged parameter does."""
    path, whole = checkpoint
    if path.name == "checkpoint_0":
        pytest.skip("an imported checkpoint has parameters alone")
    monkeypatch.setattr(digests, "_SMALL", 600)  # so that the files with values count as large
    outcomes = set()
    for file in _files(path):
        if file.parent.name != "d" or file.stat().st_size <= 600:
            continue
        for offset in range(0, file.stat().st_size, 997):
            directory = _copy(path, tmp_path)
            data = bytearray(file.read_bytes())
            data[offset] ^= 1
            (directory / path.name / file.relative_to(path)).write_bytes(data)
            sentence, got = _sentence(directory, partial=True)
            assert sentence is not None or got[0]["target"] == whole[0]["target"]
            if sentence is not None:
                assert file.name in sentence
            assert _sentence(directory)[0] is not None
            outcomes.add(sentence is None)
    assert outcomes == {True, False}


def test_an_added_file_is_a_sentence(checkpoint, tmp_path):
    directory = _copy(checkpoint[0], tmp_path)
    folder = directory / checkpoint[0].name / "state"
    (folder / ".DS_Store").write_bytes(b"of the system")
    assert _sentence(directory)[0] is None
    (folder / "target.scale").mkdir(exist_ok=True)
    (folder / "target.scale" / "9.9").write_bytes(b"0")
    assert "state/target.scale/9.9 was added to it" in _sentence(directory)[0]


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"xxh3_128": 1, "files": 3}']
)
def test_other_content_of_the_digests_is_a_sentence(checkpoint, tmp_path, content):
    directory = _copy(checkpoint[0], tmp_path)
    (directory / checkpoint[0].name / digests.NAME).write_bytes(content)
    assert "digests.json is not what was written" in _sentence(directory)[0]


def _without_digests(directory):
    """Removes the digests and the word of them, as in a checkpoint of another program."""
    (checkpoint,) = directory.glob("checkpoint_*")
    (checkpoint / digests.NAME).unlink()
    path = checkpoint / digests.METADATA
    path.write_text(json.dumps({**json.loads(path.read_text()), "custom_metadata": {}}))
    return checkpoint


def test_a_checkpoint_without_digests_is_read(checkpoint, tmp_path):
    directory = _copy(checkpoint[0], tmp_path)
    _without_digests(directory)
    assert _sentence(directory) == (None, checkpoint[1])


@pytest.mark.parametrize("how", ["deleted", "emptied", "cut", "garbage"])
def test_a_damaged_file_without_digests_is_a_sentence_or_harmless(checkpoint, tmp_path, how):
    path, whole = checkpoint
    failed = set()
    for file in _files(path):
        name = file.relative_to(path)
        if name.name == digests.NAME:
            continue
        directory = _copy(path, tmp_path)
        target = _without_digests(directory) / name
        data = target.read_bytes()
        if how == "deleted":
            target.unlink()
        else:
            target.write_bytes({"emptied": b"", "cut": data[: len(data) // 2], "garbage": b"\x00"}[how])
        sentence, got = _sentence(directory)
        assert sentence is not None or got[0] == whole[0], (how, str(name))
        if sentence:
            failed.add(name.name)
    assert failed & {"_METADATA", ".zarray", "manifest.ocdbt"}


def test_plain_orbax_reads_a_checkpoint_with_digests(checkpoint):
    path, _ = checkpoint
    plain = ocp.PyTreeCheckpointer().restore(path / "state")
    kernel = _tree()["target"]["layers"]["kernel"]
    np.testing.assert_array_equal(plain["target"]["layers"]["kernel"], kernel)
    options = ocp.CheckpointManagerOptions(step_prefix="checkpoint", create=False)
    with ocp.CheckpointManager(path.parent, options=options) as manager:
        step = int(path.name.rsplit("_", 1)[-1])
        assert manager.all_steps() == [step]
        assert manager.metadata(step).custom_metadata == {"digests": "digests.json"}
    # As t5x's OrbaxCheckpointManagerInterface does it, which also writes to the directory.
    handlers = {"state": ocp.PyTreeCheckpointHandler(use_ocdbt=True)}
    options = ocp.CheckpointManagerOptions(step_prefix="checkpoint", cleanup_tmp_directories=True)
    with ocp.CheckpointManager(path.parent, options=options, item_handlers=handlers) as manager:
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore())
        got = manager.restore(step, args=args)["state"]["target"]
        np.testing.assert_array_equal(got["layers"]["kernel"], kernel)


def test_files_are_compared_in_several_threads_and_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_PIECE", 4096)
    monkeypatch.setattr(digests, "_SMALL", 100)
    monkeypatch.setattr(digests, "_threads", lambda: 4)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, _tree(), DATA)
    found = digests.read_digests(tmp_path / "checkpoint_3")
    size, pieces = max(found.files.values())
    assert len(pieces) == -(-size // 4096) > 2
    threads, piece = set(), digests._piece

    def note(*args):
        threads.add(threading.current_thread().name)
        return piece(*args)

    monkeypatch.setattr(digests, "_piece", note)
    _read(tmp_path)
    assert len(threads) > 2


def test_an_error_of_reading_a_whole_checkpoint_is_passed_on(checkpoint, tmp_path):
    with pytest.raises(ZeroDivisionError), digests.verified(checkpoint[0]):
        raise ZeroDivisionError
    directory = _copy(checkpoint[0], tmp_path)
    (directory / checkpoint[0].name / "state" / "_METADATA").write_bytes(b"{}")
    with pytest.raises(DamagedCheckpoint):
        with digests.verified(directory / checkpoint[0].name):
            raise AssertionError("entered with a damaged small file")


def test_digests_name_no_file_outside(checkpoint, tmp_path):
    """Names come from the directory's listing: one that leads outside is a missing file."""
    directory = _copy(checkpoint[0], tmp_path)
    path = directory / checkpoint[0].name / digests.NAME
    content = json.loads(path.read_bytes())
    del content["xxh3_128"]
    content["files"]["../../secret"] = {"bytes": 6, "xxh3_128": ["0"]}
    path.write_bytes(digests._rendered(content))
    pathlib.Path(tmp_path / "secret").write_bytes(b"secret")
    assert "../../secret is missing" in _sentence(directory)[0]
