"""Adapter files: round trips, PEFT's layout, and damaged files or those of another base."""

import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from modules.helpers import config, random_params
from trees import LORA, adapters_of

from famx.base.errors import ConfigError
from famx.lora import Lora, combine, files, load_adapter, save_adapter, split
from famx.lora.adapter_config import read_adapter_config
from famx.memories import Fam
from famx.modules import Memory

GQA = dict(num_heads=4, num_kv_heads=2, head_dim=4)


def saved(path, lora=LORA, fingerprint=None, **changes):
    """Writes random adapters: `(base parameters, combined tree with a trained prompt)`."""
    params = random_params(config(**GQA, **changes))
    tree = combine(params, adapters_of(params, lora))
    if "memory" in tree:
        tree = combine(tree, {"memory": jax.tree.map(lambda x: x + 1, tree["memory"])})
    save_adapter(path, tree, lora, fingerprint, "tiny")
    return params, tree


def edit(path, **changes):
    """Changes entries of adapter_config.json."""
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def weights(path):
    return safetensors.numpy.load_file(path / "adapter_model.safetensors")


def replace_weights(path, tensors):
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        Lora(rank=2, dropout=0.1),
        Lora(rank=4, targets=("attention",)),
        Lora(rank=1, alpha=7.0, targets=("feed_forward", "layers/query")),
    ],
)
def test_what_is_saved_is_loaded(tmp_path, lora):
    params, tree = saved(tmp_path / "adapter", lora)
    adapters, found = load_adapter(tmp_path / "adapter", params)
    assert found == lora
    loaded = combine(params, adapters)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)


def test_bfloat16_bases_boxes_and_shapes_serve_as_base(tmp_path):
    _, tree = saved(tmp_path)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), split(tree)[0])
    adapters, _ = load_adapter(str(tmp_path), shapes)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(adapters))
    np.testing.assert_array_equal(adapters["memory"]["prompt"], tree["memory"]["prompt"])


def test_names_and_layout_are_those_of_peft(tmp_path):
    _, tree = saved(tmp_path)
    tensors, layers = weights(tmp_path), tree["layers"]
    name = "base_model.model.model.layers.1."
    assert len(tensors) == 2 * 7 * 2 + 1
    np.testing.assert_array_equal(tensors["famx.memory/prompt"], tree["memory"]["prompt"])
    for place, a, b in (
        ("self_attn.q_proj", (8, 3), (3, 16)),
        ("self_attn.v_proj", (8, 3), (3, 8)),
        ("self_attn.o_proj", (16, 3), (3, 8)),
        ("mlp.down_proj", (12, 3), (3, 8)),
    ):
        ours = {"q_proj": "query", "v_proj": "value", "o_proj": "output"}.get(place.split(".")[1])
        part = layers[ours] if ours else layers["mlp"]["down"]
        low, high = (tensors[f"{name}{place}.lora_{x}.weight"] for x in "AB")
        np.testing.assert_array_equal(low, part["lora_a"][1].reshape(a).T)
        np.testing.assert_array_equal(high, part["lora_b"][1].reshape(b).T)
    saved_config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved_config["r"] == 3 and saved_config["lora_alpha"] == 4.5
    assert saved_config["target_modules"] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert saved_config["base_model_name_or_path"] == "tiny"


def test_adapters_in_bfloat16_are_half_as_large_and_load_as_float32(tmp_path):
    params, tree = saved(tmp_path / "float32")
    save_adapter(tmp_path / "bfloat16", tree, LORA, dtype="bfloat16")
    wide, narrow = weights(tmp_path / "float32"), weights(tmp_path / "bfloat16")
    assert wide.keys() == narrow.keys()
    for name, tensor in narrow.items():
        assert tensor.dtype == (np.float32 if name.startswith("famx.") else jnp.bfloat16), name
        np.testing.assert_array_equal(tensor, wide[name].astype(tensor.dtype))
    adapters, _ = load_adapter(tmp_path / "bfloat16", params)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(adapters))


def test_a_base_without_memory_has_no_prompt_in_the_file(tmp_path):
    params, tree = saved(tmp_path, memory=Memory())
    assert "famx.fam" not in weights(tmp_path)
    assert "memory" not in load_adapter(tmp_path, params)[0]
    with_memory = random_params(config(**GQA))
    assert "memory" not in load_adapter(tmp_path, with_memory)[0]


def test_scale_of_rslora_is_kept(tmp_path):
    params, _ = saved(tmp_path, Lora(rank=4, alpha=6.0))
    edit(tmp_path, use_rslora=True)
    assert load_adapter(tmp_path, params)[1].scale == pytest.approx(6 / 2)


def test_an_adapter_is_replaced_and_a_failed_write_keeps_the_old(tmp_path, monkeypatch):
    saved(tmp_path, Lora(rank=2))
    params, tree = saved(tmp_path, Lora(rank=3))
    assert load_adapter(tmp_path, params)[1].rank == 3

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ConfigError, match="cannot be written.*No space left"):
        save_adapter(tmp_path, tree, LORA)
    assert load_adapter(tmp_path, params)[1].rank == 3


def test_parameters_without_adapters_are_not_saved(tmp_path):
    with pytest.raises(ConfigError, match="no LoRA adapters"):
        save_adapter(tmp_path, random_params(config()), LORA)
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused_by_its_fingerprint(tmp_path):
    params, _ = saved(tmp_path, fingerprint="a" * 64)
    load_adapter(tmp_path, params)
    load_adapter(tmp_path, params, "a" * 64)
    with pytest.raises(ConfigError, match="trained on another base model"):
        load_adapter(tmp_path, params, "b" * 64)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(num_layers=1), "is for 2 layers, but the base has 1"),
        (dict(num_layers=3), "for layer 2: the base has more layers"),
        (dict(embed_dim=16), r"lora_. of shape .*, where the base needs .*16.*: it belongs to another"),
        (dict(num_kv_heads=4), r"k_proj has a lora_B of shape \[8, 3\].*needs \[16, 3\]"),
        (dict(gated_mlp=False), "gate_proj.*which the base does not have"),
        (dict(memory=Memory()), "memory/prompt, a parameter of its memory, but the base has no such m"),
        (dict(memory=Fam(4)), r"has shape \[2, 8\], but that of the base \[4, 8\]: give the base"),
    ],
)
def test_another_base_is_refused_by_its_shapes(tmp_path, changes, sentence):
    saved(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        load_adapter(tmp_path, random_params(config(**{**GQA, **changes})))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("keep", [0, 7, 0.5, -2])  # a line end may be missing
def test_a_damaged_file_is_refused(tmp_path, file, keep):
    params, _ = saved(tmp_path)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: keep if isinstance(keep, int) else len(data) // 2])
    with pytest.raises(ConfigError, match="is damaged(:| and cannot be read)"):
        load_adapter(tmp_path, params)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_is_named(tmp_path, file):
    params, _ = saved(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ConfigError, match="There is no adapter in .* it must contain"):
        load_adapter(tmp_path, params)


def test_an_adapter_that_comes_with_famx_has_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    params, tree = saved(tmp_path / "shipped" / "small")
    loaded = combine(params, load_adapter("small", params)[0])
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    with pytest.raises(ConfigError, match="There is no adapter in smal: .* by their names: small"):
        load_adapter("smal", params)
    (tmp_path / "small").mkdir()  # the user's own
    with pytest.raises(ConfigError, match="There is no adapter in small"):
        load_adapter("small", params)


def test_the_adapters_that_come_with_famx_are_whole_and_small():
    assert files._shipped() == ["smollm2_passkey"]
    for name in files._shipped():
        assert files.check_adapter(name)
        directory = files.adapter_directory(name)
        assert sum(path.stat().st_size for path in directory.iterdir()) < 8_000_000
        assert (directory / "README.md").exists()
        config = json.loads((directory / "adapter_config.json").read_text())
        assert not config["base_model_name_or_path"].startswith("/")


@pytest.mark.parametrize("changes", [dict(r="8"), dict(r=0), dict(r=True), dict(lora_alpha=None)])
def test_nonsense_in_the_config_is_refused(tmp_path, changes):
    params, _ = saved(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ConfigError, match=f"is not valid: {next(iter(changes))} is"):
        load_adapter(tmp_path, params)


@pytest.mark.parametrize(
    "changes",
    [
        dict(use_dora=True), dict(bias="all"), dict(peft_type="LOHA"), dict(rank_pattern={"q_proj": 2}),
        dict(init_lora_weights="pissa"), dict(init_lora_weights="pissa_niter_4"),
        dict(init_lora_weights="olora"), dict(init_lora_weights="corda"),
        dict(init_lora_weights="loftq"), dict(init_lora_weights="lora_ga"),
        dict(layers_to_transform=[0]), dict(lora_bias=True), dict(modules_to_save=["lm_head"]),
        dict(loftq_config={"loftq_bits": 4}), dict(task_type="SEQ_CLS"), dict(use_rslora="yes"),
        dict(a_setting_of_a_later_version=1), dict(another=[0]), dict(a_third={"x": None}),
    ],
)  # fmt: skip
def test_what_only_peft_can_do_is_refused(tmp_path, changes):
    params, _ = saved(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ConfigError, match=f"has {next(iter(changes))}.*only LoRA with a single rank"):
        load_adapter(tmp_path, params)


# What PEFT 0.21.2 writes into adapter_config.json for LoraConfig(target_modules=["q_proj", "v_proj"]).
WRITTEN_BY_PEFT = {
    **dict.fromkeys((
        "alora_invocation_tokens", "arrow_config", "auto_mapping", "base_model_name_or_path",
        "corda_config", "eva_config", "exclude_modules", "kasa_config", "layer_replication",
        "layers_pattern", "layers_to_transform", "lora_ga_config", "megatron_config", "modules_to_save",
        "monteclora_config", "revision", "target_parameters", "trainable_token_indices", "use_bdlora",
        "velora_config",
    )),
    **dict.fromkeys((
        "ensure_weight_tying", "fan_in_fan_out", "inference_mode", "lora_bias", "use_dora", "use_qalora",
        "use_rslora",
    ), False),
    **{"alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}},
    **{"bias": "none", "init_lora_weights": True, "lora_alpha": 8, "lora_dropout": 0.0, "r": 8},
    **{"megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": "0.21.2"},
    **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["v_proj", "q_proj"]},
}  # fmt: skip


def test_what_peft_writes_for_plain_lora_is_understood(tmp_path):
    params, tree = saved(tmp_path)
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    names = ("r", "lora_alpha", "target_modules")
    edit(tmp_path, **{**WRITTEN_BY_PEFT, **{name: ours[name] for name in names}})
    adapters, lora = load_adapter(tmp_path, params)
    assert lora == dataclasses.replace(LORA, dropout=0.0)
    assert jax.tree.structure(combine(params, adapters)) == jax.tree.structure(tree)
    for off in (None, False, "", [], {}):
        edit(tmp_path, a_setting_of_a_later_version=off)
        load_adapter(tmp_path, params)
    for start in ("gaussian", "eva", "orthogonal", False):
        edit(tmp_path, init_lora_weights=start)
        load_adapter(tmp_path, params)


def test_the_installed_peft_writes_nothing_else(tmp_path):
    peft = pytest.importorskip("peft", reason="peft, which writes such files, is missing")
    peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    read_adapter_config(tmp_path)
    same = ("target_modules", "peft_version")
    if written["peft_version"] == WRITTEN_BY_PEFT["peft_version"]:
        for name in same:
            written.pop(name)
        assert written == {k: v for k, v in WRITTEN_BY_PEFT.items() if k not in same}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    params, _ = saved(tmp_path)
    tensors = weights(tmp_path)
    name = next(iter(tensors))
    tensors[name][0, 0] = value
    replace_weights(tmp_path, tensors)
    with pytest.raises(ConfigError, match="values that are not finite"):
        load_adapter(tmp_path, params)


def test_a_missing_and_a_superfluous_tensor_are_named(tmp_path):
    params, _ = saved(tmp_path)
    tensors = weights(tmp_path)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    replace_weights(tmp_path, {key: x for key, x in tensors.items() if key != name})
    with pytest.raises(ConfigError, match="mlp.up_proj has no lora_B for layer 0"):
        load_adapter(tmp_path, params)
    replace_weights(tmp_path, {**tensors, "base_model.model.lm_head.lora_A.weight": tensors[name]})
    with pytest.raises(ConfigError, match="has base_model.model.lm_head.lora_A.weight, which"):
        load_adapter(tmp_path, params)


def test_a_file_is_as_small_as_its_adapters(tmp_path):
    _, tree = saved(tmp_path, num_layers=4)
    numbers = sum(x.size for x in jax.tree.leaves(split(tree)[1])) + tree["memory"]["prompt"].size
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 4 * numbers < size < 4 * numbers + 200 * 60


def test_the_prompt_may_be_one_for_every_layer(tmp_path):
    params, tree = saved(tmp_path, memory=Fam(2, start_from="prefix"))
    loaded = load_adapter(tmp_path, params)[0]["layers"]["memory"]["prefix"]
    assert loaded.shape == (2, 2, 8)
    np.testing.assert_array_equal(loaded, tree["layers"]["memory"]["prefix"])


def test_loras_are_equal_where_their_numbers_are():
    assert dataclasses.replace(LORA, alpha=4.5) == LORA
    assert Lora(targets=["attention"]) == Lora(targets="attention")
