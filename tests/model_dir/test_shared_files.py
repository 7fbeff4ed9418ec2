"""Where arrays lie in shared files, against what tensorstore reads."""

import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from famx.model_dir.shared_files import LISTING, stored_arrays, stored_values

NAMES = st.text("ab:%/.é ", min_size=1, max_size=6).filter(lambda name: name.split("/")[0])


def content(directory, value):
    if not value.name:
        return value.content
    with (directory / value.name).open("rb") as file:
        file.seek(value.start)
        return file.read(value.size)


def listed(directory):
    """`{key: bytes}` by `stored_arrays`; each value is below the name of its array."""
    found = {}
    for array, values in stored_arrays(directory).items():
        assert [value.key for value in values] == sorted(value.key for value in values)
        for value in values:
            assert value.key.split(b"/")[0] == array.encode()
            found[value.key] = content(directory, value)
    return found


@settings(max_examples=20)
@given(
    values=st.dictionaries(NAMES, st.binary(max_size=60), min_size=1, max_size=40),
    node_bytes=st.sampled_from([120, 300, 10**8]),  # small ones make trees of several levels
    inline=st.sampled_from([0, 20]),
)
def test_every_value_is_where_it_is_said_to_be(tmp_path_factory, values, node_bytes, inline):
    directory = tmp_path_factory.mktemp("store")
    config = {"max_decoded_node_bytes": node_bytes, "max_inline_value_bytes": inline}
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}, "config": config}
    store = tensorstore.KvStore.open(spec).result()
    for part in (0, 1):  # two commits: the index has two versions
        with tensorstore.Transaction() as transaction:
            for key in list(values)[part::2]:
                store.with_transaction(transaction)[key] = values[key]
    wanted = {key.encode(): value for key, value in values.items()}
    assert listed(directory) == wanted
    contents = {array: list(found) for array, found in stored_values(directory).items()}
    assert {array: [value.key for value in found] for array, found in contents.items()} == {
        array: [value.key for value in found] for array, found in stored_arrays(directory).items()
    }
    assert {value.key: value.content for found in contents.values() for value in found} == wanted


def test_an_empty_index_and_a_damaged_one(tmp_path):
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/"}}
    store = tensorstore.KvStore.open(spec).result()
    store["a/0"] = b"x" * 100
    del store["a/0"]
    assert stored_arrays(tmp_path) == stored_values(tmp_path) == {}
    (tmp_path / LISTING).write_bytes(b"no index")
    for function in (stored_arrays, stored_values):
        with pytest.raises((ValueError, OSError)):
            function(tmp_path)


def test_contents_are_read_without_the_json_that_tensorstore_never_frees(tmp_path, monkeypatch):
    store = tensorstore.KvStore.open(f"file://{tmp_path}/|ocdbt:").result()
    store["a/0"] = b"x" * 100
    monkeypatch.setattr(tensorstore.ocdbt, "dump", None)
    assert [value.content for value in stored_values(tmp_path)["a"]] == [b"x" * 100]
