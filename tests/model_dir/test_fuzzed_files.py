"""Damaged memory files and model.json: what is read is what was written, or one sentence refuses it."""

import json

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from fuzzing import BYTE_EDITS, JSON_EDITS, ODD, as_text, damaged_bytes, damaged_json, ends_well, fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from test_memory_file import any_state, make_trained
from trained import write_model_dir

from famx.base.errors import ConfigError
from famx.data import ByteVocabulary
from famx.memories import Fam
from famx.model_dir import memory_file
from famx.model_dir.loading import check_model
from famx.model_dir.memory_file import Header, restore_memory, save_memory


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`(path, trained, content, header, arrays)` of a memory file."""
    path = tmp_path_factory.mktemp("memory") / "x.famem"
    trained = make_trained(ByteVocabulary(), memory=Fam(2))
    save_memory(path, trained, *any_state(trained, 2), ["book.txt"])
    with safetensors.safe_open(path, "np") as file:
        header = json.loads(file.metadata()["famem"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    return path, trained, path.read_bytes(), header, arrays


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_memory_files(saved):
    path, trained, content, *_ = saved
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    wanted = restore_memory(path, trained)

    @fuzz
    @given(BYTE_EDITS, st.booleans())
    def check(edits, in_header):
        damaged = damaged_bytes(content[:header_bytes], edits) + content[header_bytes:]
        path.write_bytes(damaged if in_header else damaged_bytes(content, edits))
        try:
            found = ends_well(lambda: restore_memory(path, trained))
            if found is not None:  # such as a change of the white space at the end of the header
                jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), found, wanted)
        finally:
            path.write_bytes(content)

    check()


CHANGES = st.one_of(
    st.tuples(st.just("drop"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("shape"), st.integers(0, 9), st.integers(0, 5)),
    st.tuples(st.just("dtype"), st.integers(0, 9), st.integers(0, 5)),
    st.tuples(st.just("add"), st.integers(0, 9), st.just(0)),
)


def test_memory_files_with_a_checksum_that_fits(saved):
    """A file whose author also computed its checksum holds a state of this model, or is refused."""
    path, trained, content, header, arrays = saved
    wanted = shapes(restore_memory(path, trained))
    dtypes = (np.float32, np.float16, np.int32, np.int64, np.uint8, np.float64)

    @fuzz
    @given(st.lists(CHANGES, max_size=2), st.lists(JSON_EDITS, max_size=1))
    @example([("add", 0, 0), ("drop", 1, 0)], [])
    def check(changes, edits):
        new = dict(arrays)
        for kind, which, how in changes:
            name = sorted(new)[which % len(new)]
            x = new.pop(name)
            if kind == "shape":
                new[name] = [x[None], x.ravel(), x[:1], np.repeat(x, 2, 0), x[..., :-1], x.T][how].copy()
            elif kind == "dtype":
                with np.errstate(all="ignore"):
                    new[name] = np.nan_to_num(x, posinf=0, neginf=0).astype(dtypes[how])
            elif kind == "add":
                new |= {name: x, f"{name}/more": x}
        fields = damaged_json(header, edits[0]) if edits else dict(header)
        try:
            made = Header(**fields)
            fields["sha256"] = memory_file._checksum(Header(**{**made.__dict__, "sha256": ""}), new)
            text = as_text(fields).decode()
        except (TypeError, ValueError):
            return  # no header, with which the other test deals
        path.write_bytes(safetensors.numpy.save(new, {"famem": text}))
        try:
            found = ends_well(lambda: restore_memory(path, trained))
            if found is not None and not edits:
                assert shapes(found[1]) == wanted[1] and found[0].shape == wanted[0][0]
                assert new.keys() == arrays.keys()
        finally:
            path.write_bytes(content)

    check()


@pytest.mark.parametrize("change", ["one row", "another width", "integers", "missing", "more"])
def test_a_state_of_another_shape_is_refused(saved, change):
    path, trained, content, header, arrays = saved
    new = dict(arrays)
    if change == "missing":
        del new["values"]
    else:
        keys = new["keys"]
        new["keys"] = {
            "one row": keys[:, :1], "another width": keys[..., :1], "integers": keys.astype(np.int32),
            "more": keys,
        }[change].copy()  # fmt: skip
        new |= {"other": keys} if change == "more" else {}
    fields = Header(**{**header, "sha256": ""})
    sha = memory_file._checksum(fields, new)
    path.write_bytes(safetensors.numpy.save(new, {"famem": json.dumps({**header, "sha256": sha})}))
    with pytest.raises(ConfigError, match="make the memory file again"):
        restore_memory(path, trained)
    path.write_bytes(content)


def test_model_json(tmp_path):
    trained = make_trained(memory=Fam(2))
    write_model_dir(tmp_path / "m", trained.model, trained.params, ByteVocabulary())
    file = tmp_path / "m" / "model.json"
    content = file.read_bytes()
    fields = json.loads(content) | {"rope_scaling": {"factor": 2.0}, "lora": {"rank": 4}}
    del fields["sha256"]  # as in a file that was edited by hand
    fields["rope_layers"] = ["global"] * fields["num_layers"]
    file.write_bytes(as_text(fields))
    assert check_model(tmp_path / "m").config.rope_scaling.factor == 2.0

    @fuzz
    @given(JSON_EDITS | BYTE_EDITS)
    def check(edits):
        in_json = isinstance(edits[0][0], int)
        text = as_text(damaged_json(fields, edits)) if in_json else damaged_bytes(content, edits)
        file.write_bytes(text)
        ends_well(lambda: check_model(tmp_path / "m"))

    check()
    for value in ODD[:-1]:  # every value for the field that loops and arrays are made of
        file.write_bytes(as_text(fields | {"num_layers": value}))
        ends_well(lambda: check_model(tmp_path / "m"))
