"""Damaged and hostile adapters: each is loaded as what it says, or refused in one sentence."""

import json

import jax
import numpy as np
import pytest
from fuzzing import BYTE_EDITS, JSON_EDITS, as_text, damaged_bytes, damaged_json, ends_well, fuzz
from hypothesis import given
from test_adapter_files import saved

from famx.lora import adapter_memory, load_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    params, _ = saved(path)
    return path, params


def read(path, params):
    tree, lora = load_adapter(path, params)
    adapter_memory(path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree)) and np.isfinite(lora.scale)
    return tree


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters(adapter, name):
    path, params = adapter
    file, wanted = path / name, jax.tree.map(np.shape, read(*adapter))
    content = file.read_bytes()

    @fuzz
    @given(JSON_EDITS | BYTE_EDITS)
    def check(edits):
        in_json = isinstance(edits[0][0], int)
        if name.endswith(".json"):
            text = as_text(damaged_json(json.loads(content), edits)) if in_json else None
            file.write_bytes(damaged_bytes(content, edits) if text is None else text)
        else:
            length = int.from_bytes(content[:8], "little")
            if in_json:
                text = as_text(damaged_json(json.loads(content[8 : 8 + length]), edits))
                file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
            else:
                file.write_bytes(damaged_bytes(content, edits))
        try:
            tree = ends_well(lambda: read(path, params))
            if tree is not None:
                for key in tree.keys() & wanted.keys():
                    assert jax.tree.map(np.shape, tree[key]).keys() <= wanted[key].keys()
        finally:
            file.write_bytes(content)

    check()
