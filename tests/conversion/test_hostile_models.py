"""Models whose author means harm: nothing is executed, and no path leads out of a directory."""

import json
import os
import pickle

import pytest
import safetensors.numpy
from published import LLAMA, make_weights, write_source

from famx.base.errors import ConfigError
from famx.conversion.commands import convert
from famx.conversion.sources import INDEX, open_source
from famx.model_dir.loading import load_model
from famx.modules import Memory


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "model.safetensors", "adapter_model.bin"])
def test_nothing_is_unpickled(tmp_path, name):
    folder = write_source(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "harm")))
    with pytest.raises(ConfigError):
        open_source(folder)
    assert not (tmp_path / "harm").exists()


def test_no_code_of_a_model_is_run(tmp_path):
    code = f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\n"
    remote = {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    folder = write_source(tmp_path / "model", LLAMA | {"auto_map": remote})
    for name in ("modeling_x.py", "conftest.py", "sitecustomize.py", "tokenization_x.py"):
        (folder / name).write_text(code)
    model = tmp_path / "famx"
    convert(str(folder), str(model), {"memory": Memory(), "block_size": 8})
    load_model(str(model))
    assert not (tmp_path / "harm").exists()
    assert not list(model.rglob("*.py")), "nor is it copied"


OUTSIDE = "outside.safetensors"


@pytest.mark.parametrize("name", [f"../{OUTSIDE}", f"/{{}}/{OUTSIDE}", f"a/../../{OUTSIDE}"])
def test_an_index_names_no_file_of_another_directory(tmp_path, name):
    folder = write_source(tmp_path / "model", shards=2)
    safetensors.numpy.save_file(make_weights(LLAMA), tmp_path / OUTSIDE)
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name.format(str(tmp_path).strip("/"))
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"lacks .*outside.safetensors, which {INDEX} lists"):
        open_source(folder)


def test_names_of_tensors_are_no_paths(tmp_path):
    """A tensor goes to the place that its name has in the table, and any other name is refused."""
    weights = make_weights(LLAMA)
    weights["../../harm"] = weights["model.norm.weight"]
    folder = write_source(tmp_path / "model", weights=weights)
    with pytest.raises(ConfigError, match="has, beyond the model, 1: ../../harm"):
        convert(str(folder), str(tmp_path / "famx"), {"memory": Memory(), "block_size": 8})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    hf = LLAMA | {"architectures": ["\x1b[2J\x1b]0;x\x07Llama"]}
    folder = write_source(tmp_path / "model", hf, make_weights(LLAMA))
    with pytest.raises(ConfigError) as caught:
        open_source(folder)
        convert(str(folder), str(tmp_path / "famx"), {"memory": Memory(), "block_size": 8})
    assert "\x1b" not in str(caught.value) and "\x07" not in str(caught.value)
