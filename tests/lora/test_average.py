"""`famx average`: the mean of adapters, and what cannot be averaged."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from modules.helpers import config, random_params
from trees import LORA, adapters_of

from famx.base.errors import ConfigError
from famx.lora import average_adapters, combine, load_adapter, save_adapter
from famx.lora.files import check_adapter

BASE = random_params(config())
MEMORY = {"block_size": 4}


def save(path, seed, lora=LORA, fingerprint="f" * 64, dtype="float32", memory=MEMORY, base=BASE):
    """Writes an adapter with random values, the prompt's too: its directory, as text."""
    tree = combine(base, adapters_of(base, lora, seed))
    if "memory" in tree:
        tree = combine(tree, {"memory": jax.tree.map(lambda x: x + seed, tree["memory"])})
    save_adapter(path, tree, lora, fingerprint, f"base {seed}", memory, dtype=dtype)
    return str(path)


def loaded(path):
    return load_adapter(path, BASE)[0]


@settings(max_examples=20)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=4))
def test_the_mean_of_every_parameter_has_these_weights(tmp_path_factory, weights):
    here = tmp_path_factory.mktemp("adapters")
    paths = [save(here / str(seed), seed) for seed in range(len(weights))]
    average_adapters(here / "mean", paths, weights)
    trees = [loaded(path) for path in paths]
    mean = lambda *xs: np.average([np.float64(x) for x in xs], axis=0, weights=weights)
    near = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, loaded(here / "mean"), jax.tree.map(mean, *trees))
    assert load_adapter(here / "mean", BASE)[1] == LORA
    assert check_adapter(here / "mean")


def test_the_command_keeps_dtypes_and_the_first_ones_description(tmp_path):
    paths = [save(tmp_path / "1", 1, dtype="bfloat16"), save(tmp_path / "3", 3)]
    flags = [f"--adapter={paths[0]}", f"--adapter={paths[1]}", "--weight=3", "--weight=1"]
    command = [sys.executable, "-m", "famx", "average", *flags, f"--to={tmp_path}/a"]
    assert "2 adapters" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    with safetensors.safe_open(tmp_path / "a" / "adapter_model.safetensors", "np") as file:
        for name in file.keys():
            wanted = np.float32 if name.startswith("famx.") else jnp.bfloat16
            assert file.get_tensor(name).dtype == wanted, name
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("1", "a")]
    assert configs[0] == configs[1]
    prompts = [loaded(path)["memory"]["prompt"] for path in (*paths, tmp_path / "a")]
    np.testing.assert_allclose(prompts[2], prompts[0] * 0.75 + prompts[1] * 0.25, rtol=1e-6)
    with pytest.raises(ConfigError, match="another base model"):  # the fingerprint came along
        load_adapter(tmp_path / "a", BASE, "0" * 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": dataclasses.replace(LORA, rank=2)}, "r of adapter_config.json is 3 .* 2 in the other"),
        ({"lora": dataclasses.replace(LORA, alpha=9.0)}, "lora_alpha"),
        ({"lora": dataclasses.replace(LORA, targets=("attention",))}, "only the first has .*mlp"),
        ({"memory": {"block_size": 8}}, "famx_memory"),
        ({"fingerprint": "0" * 64}, "fingerprints ffffffffffff and 000000000000"),
        ({"base": random_params(config(mlp_dim=20))}, "has the shape"),
    ],
)
def test_adapters_that_do_not_fit_together(tmp_path, changes, words):
    paths = [save(tmp_path / "a", 0), save(tmp_path / "b", 1, **changes)]
    with pytest.raises(ConfigError, match=f"{tmp_path}/a and {tmp_path}/b cannot be averaged.*{words}"):
        average_adapters(tmp_path / "mean", paths)
    assert not (tmp_path / "mean").exists()


def test_the_mean_belongs_to_the_base_that_any_of_them_names(tmp_path):
    paths = [save(tmp_path / "a", 0, fingerprint=None), save(tmp_path / "b", 0)]
    average_adapters(tmp_path / "mean", paths)
    jax.tree.map(np.testing.assert_array_equal, loaded(tmp_path / "mean"), loaded(paths[0]))
    with pytest.raises(ConfigError, match="another base model"):
        load_adapter(tmp_path / "mean", BASE, "0" * 64)
