"""`famx.convert`: what it writes and refuses, and the program as a user runs it."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import ClassVar

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st
from processes import start_process
from published import LLAMA, MEMORY, make_weights, train_bpe, train_sentencepiece, write_source
from reference_models import CONFIGS
from tiny import assert_identical

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.progress import ByteProgress
from famx.base.text import byte_size
from famx.conversion import commands, importing
from famx.conversion.families import SUPPORTED, decoder_config, tensors
from famx.conversion.gin_file import model_gin
from famx.conversion.importing import plan_import, write_model
from famx.conversion.sources import open_source
from famx.conversion.tensor_source import TensorInfo
from famx.conversion.vocabulary import fitting_vocabulary
from famx.conversion.with_memory import full_config
from famx.data.vocabularies import load_vocabulary, open_vocabulary
from famx.memories import BlockRecurrent, Fam
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.loading import load_model
from famx.models.memory_start import MemoryStart
from famx.modules import DecoderConfig, Memory, RopeScaling

CONFIG = decoder_config(LLAMA, **MEMORY)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama in a directory without a tokenizer."""
    return write_source(tmp_path_factory.mktemp("source") / "llama")


# The digests have that of the file of orbax's.
WITH_TIMES = ("_CHECKPOINT_METADATA", "commit_success.txt", "digests.json")


def files(directory) -> dict[str, bytes]:
    """All files below a directory, without the times that orbax records."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(pathlib.Path(directory).rglob("*"))
        if path.is_file() and path.name not in WITH_TIMES
    }


def run_convert(source, directory, **options):
    return commands.convert(str(source), str(directory), MEMORY, **options)


def stored(directory, plan) -> dict[tuple[str, ...], np.ndarray]:
    """The leaves of the checkpoint that was written as planned."""
    wanted = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in plan.leaves.items()}
    with Checkpointer(directory, read_only=True) as checkpointer:
        tree, _, _ = checkpointer.restore(0, {"target": traverse_util.unflatten_dict(wanted)})
    return traverse_util.flatten_dict(tree["target"])


shapes_once = functools.cache(importing.leaf_shapes)


@pytest.fixture(autouse=True)
def trace_once(monkeypatch):
    """Decoders are traced once for the shapes of their parameters, which takes most of an import."""
    monkeypatch.setattr(importing, "leaf_shapes", shapes_once)


# --------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ("llama", "llama_biased", "gemma3", "qwen3_biased"))
def test_every_leaf_holds_its_tensors_layer_by_layer(tmp_path, name):
    hf = CONFIGS[name]
    weights = make_weights(hf)
    plan = plan_import(open_source(write_source(tmp_path / "x", hf, weights)), MEMORY)
    leaves = stored(write_model(plan, tmp_path / "y"), plan)
    for tensor in tensors(hf, plan.config):
        leaf = leaves[tensor.path] if tensor.layer is None else leaves[tensor.path][tensor.layer]
        np.testing.assert_array_equal(leaf, tensor.to_ours(weights[tensor.name]))
    assert {t.path for t in plan.tensors} | {("memory", "prompt")} == leaves.keys()


def test_of_a_multimodal_model_the_text_part_is_taken(tmp_path):
    text, weights = CONFIGS["gemma3"], make_weights(CONFIGS["gemma3"])
    hf = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    hf["text_config"] = text
    theirs = {f"language_model.{name}": x for name, x in weights.items()}
    theirs["vision_tower.embeddings.weight"] = np.zeros(3, np.float32)
    plan = plan_import(open_source(write_source(tmp_path / "x", hf, theirs)), MEMORY)
    whole = stored(write_model(plan, tmp_path / "y"), plan)
    plan = plan_import(open_source(write_source(tmp_path / "text", text, weights)), MEMORY)
    alone = stored(write_model(plan, tmp_path / "z"), plan)
    assert_identical(whole, alone)


def test_shards_make_no_difference(tmp_path, source, capsys):
    run_convert(source, tmp_path / "one")
    sharded = write_source(tmp_path / "sharded" / "llama", shards=4)
    run_convert(sharded, tmp_path / "four")
    assert files(tmp_path / "one") == files(tmp_path / "four")
    out = capsys.readouterr().out
    assert f"Written: {tmp_path / 'one'}. Next:" in out and "Note: There is no tokenizer" in out


def test_the_model_is_ready_for_every_program(tmp_path, source):
    run_convert(source, tmp_path / "model")
    trained = load_model(str(tmp_path / "model"))
    assert trained.step == 0 and trained.model.config == CONFIG
    assert json.loads((tmp_path / "model" / "source" / "config.json").read_text()) == LLAMA
    assert not (tmp_path / "model" / ".importing").exists()


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_weights_are_cast_once(tmp_path, dtype):
    weights = make_weights(LLAMA, dtype)
    plan = plan_import(
        open_source(write_source(tmp_path / "x", weights=weights)), {**MEMORY, "param_dtype": "bfloat16"}
    )
    embedding = stored(write_model(plan, tmp_path / "y"), plan)[("embedding",)]
    expected = weights["model.embed_tokens.weight"].astype("bfloat16")
    assert embedding.dtype == "bfloat16" and embedding.tobytes() == expected.tobytes()


def test_a_source_that_is_no_directory_leaves_its_config_alone(tmp_path):
    weights = make_weights(LLAMA)
    memory_only = SimpleNamespace(
        name="x", config=LLAMA, memory_fields={}, tokenizer=None, read=weights.__getitem__,
        tensors={name: TensorInfo(x.shape, "float32") for name, x in weights.items()},
    )  # fmt: skip
    write_model(plan_import(memory_only, MEMORY), tmp_path / "y")
    assert os.listdir(tmp_path / "y" / "source") == ["config.json"]
    assert json.loads((tmp_path / "y" / "source" / "config.json").read_text()) == LLAMA


# --------------------------------------------------------------------------- tensors that do not fit


def planned_sentence(directory, **weights) -> str:
    """The error for a Llama with other tensors; None removes a tensor."""
    changed = {k: v for k, v in {**make_weights(LLAMA), **weights}.items() if v is not None}
    with pytest.raises(ConfigError) as caught:
        plan_import(open_source(write_source(directory / "x", weights=changed)), MEMORY)
    return str(caught.value)


def test_tensors_that_are_missing_superfluous_or_of_another_kind_are_named(tmp_path):
    said = planned_sentence(
        tmp_path,
        **{
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": None,
            "model.layers.3.mlp.up_proj.weight": np.zeros((24, 16), np.float32),
            "model.embed_tokens.weight": np.zeros((299, 16), np.float32),
            "model.layers.0.self_attn.q_proj.weight": np.zeros((16, 16), np.int8),
        },
    )
    assert said == (
        "The tensors of x are not those that its config.json asks for; it lacks 2:"
        " model.layers.1.mlp.up_proj.weight, model.norm.weight; it has, beyond the model, 1:"
        " model.layers.3.mlp.up_proj.weight; it has in another shape 1: model.embed_tokens.weight"
        " ([299, 16], not [300, 16]); it has in a type that is not read 1:"
        " model.layers.0.self_attn.q_proj.weight (I8)."
    )


def test_many_tensors_are_counted(tmp_path):
    missing = {name: None for name in make_weights(LLAMA) if "norm" in name}
    assert "it lacks 7: " in planned_sentence(tmp_path, **missing)
    assert " and 1 more." in planned_sentence(tmp_path / "again", **missing)


def test_tensors_that_mean_nothing_are_left_out(tmp_path):
    weights = {
        **make_weights(LLAMA),
        "lm_head.weight": np.zeros((300, 16), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
    }
    assert plan_import(open_source(write_source(tmp_path / "x", weights=weights)), MEMORY)


def test_an_architecture_that_is_not_supported_names_those_that_are(tmp_path):
    directory = write_source(tmp_path / "x")
    (directory / "config.json").write_text(json.dumps({**LLAMA, "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ConfigError, match="GPT2LMHeadModel is not supported") as caught:
        run_convert(directory, tmp_path / "y")
    assert all(name in str(caught.value) for name in SUPPORTED)
    assert not (tmp_path / "y").exists()


# --------------------------------------------------------------------------- the memory's prompt


def test_the_prompt_is_drawn_as_in_a_new_model():
    config = decoder_config(LLAMA, block_size=300, memory=Fam(256))
    draw = lambda shape=(256, 16), seed=0: MemoryStart("normal").draw_prompt(config, shape, seed, None)
    prompt = draw()
    assert prompt.shape == (256, 16) and prompt.dtype == np.float32
    assert abs(prompt.std() * 4 - 1) < 0.05 and abs(prompt.mean()) < 0.02
    np.testing.assert_array_equal(prompt, draw())
    assert (prompt != draw(seed=1)).all()
    assert draw((3, 256, 16)).shape == (3, 256, 16)


def test_the_prompt_may_be_embeddings_of_tokens():
    table = np.arange(300.0)[:, None].repeat(16, axis=1).astype("float16")
    config = decoder_config(LLAMA, block_size=300, memory=Fam(100))
    draw = lambda config, shape: MemoryStart("tokens").draw_prompt(config, shape, 0, lambda: table)
    prompt = draw(config, (100, 16))
    rows = prompt[:, 0].astype(int)
    assert len(set(rows)) == 100 and prompt.dtype == np.float32
    np.testing.assert_array_equal(prompt, table[rows])
    gemma = dataclasses.replace(config, scale_embeddings=True)
    np.testing.assert_array_equal(draw(gemma, (100, 16)), 4 * prompt)
    assert draw(config, (3, 200, 16)).shape == (3, 200, 16), "some come twice"
    with pytest.raises(ConfigError, match="one of 'normal', 'tokens', 'text', 'bos', or None, not"):
        MemoryStart("zeros")


@pytest.mark.parametrize(
    "special, id", [(("<|end|>", "<s>", "<|pad|>"), 1), (("<|end|>", "<|pad|>"), None)]
)
def test_the_memory_of_an_import_that_names_none(tmp_path, special, id):
    directory = write_source(tmp_path / "x")
    train_bpe(directory / "tokenizer.json", special)
    config = {"eos_token": special[0]} | ({} if id is None else {"bos_token": special[id]})
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    pad = special.index("<|pad|>")
    plan = plan_import(open_source(directory), pad_id=pad)
    assert plan.config.memory == Fam(64, first_residual="ordinary")
    leaves = stored(write_model(plan, tmp_path / "y"), plan)
    prompt = leaves[("memory", "prompt")]
    rows = prompt if id is None else np.tile(leaves[("embedding",)][id], (64, 1))
    np.testing.assert_array_equal(prompt, rows)
    assert (len(np.unique(prompt, axis=0)) == 1) == (id is not None)
    without = plan_import(open_source(directory), {"memory": Memory()}, pad_id=pad)
    write_model(without, tmp_path / "z")


def test_an_export_brings_its_prompt_and_its_memory(tmp_path):
    directory = write_source(tmp_path / "x")
    config = dataclasses.replace(CONFIG, memory=Fam(3, normalize=True), memory_segments=2)
    prompt = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    file, settings = directory / "model.safetensors", directory / "config.json"
    weights = {**safetensors.numpy.load_file(file), "model.memory.prompt": prompt}
    safetensors.numpy.save_file(weights, file)
    full = full_config(json.loads(settings.read_text()), config, 5, [])
    settings.write_text(json.dumps(full))

    plan = plan_import(open_source(directory))
    assert plan.config == config
    kept = stored(write_model(plan, tmp_path / "same"), plan)[("memory", "prompt")]
    np.testing.assert_array_equal(kept, prompt)
    written = write_model(plan, tmp_path / "drawn", MemoryStart("normal"))
    drawn = stored(written, plan)[("memory", "prompt")]
    np.testing.assert_array_equal(drawn, MemoryStart().draw_prompt(config, (3, 16), 0, None))

    other = plan_import(open_source(directory), {"memory": Fam(2)})
    assert other.config == dataclasses.replace(config, memory=Fam(2)) and not other.memory
    assert any("parameters of the export are left out" in note for note in other.notes)


# --------------------------------------------------------------------------- vocabulary


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A Llama with a byte-level BPE that has a pad."""
    pytest.importorskip("tokenizers")
    directory = write_source(tmp_path_factory.mktemp("source") / "instruct")
    train_bpe(directory / "tokenizer.json")
    return directory


def test_the_vocabulary_comes_along(tmp_path, instruct, capsys):
    run_convert(instruct, tmp_path / "model")
    vocabulary = load_vocabulary(tmp_path / "model")
    assert vocabulary == open_vocabulary(instruct / "tokenizer.json", pad_id=1)
    assert load_model(str(tmp_path / "model")).model.vocabulary == vocabulary
    kept = files(tmp_path / "model" / "source")
    assert kept == {k: v for k, v in files(instruct).items() if k != "model.safetensors"}
    out = capsys.readouterr().out
    assert "Vocabulary: 300 ids (byte_pair), pad 1, end 0." in out
    assert f"famx chat --checkpoint {tmp_path / 'model'}\n" in out


@pytest.mark.parametrize(
    "special, chosen",
    [
        (("<|end|>", "<|role|>", "<|file|>"), 2),  # role is in the chat template
        (("<|end|>", "<|role|>", "<|file|>", "<|reserved_3|>"), 3),
        (("<|end|>", "<|role|>", "<|reserved_3|>", "<|right_PAD|>"), 3),
    ],
)
def test_a_control_token_that_nothing_needs_becomes_the_pad(tmp_path, special, chosen):
    pytest.importorskip("tokenizers")
    train_bpe(tmp_path / "tokenizer.json", special)
    (tmp_path / "chat_template.jinja").write_text("<|role|>{{ messages }}")
    assert open_vocabulary(tmp_path / "tokenizer.json").vocab_size == 301, "it has no pad of its own"
    vocabulary = fitting_vocabulary(tmp_path / "tokenizer.json", 300)
    assert (vocabulary.pad_id, vocabulary.vocab_size) == (chosen, 300)
    wide = fitting_vocabulary(tmp_path / "tokenizer.json", 301)
    assert (wide.pad_id, wide.vocab_size) == (300, 301), "a model with a row to spare uses that"
    assert fitting_vocabulary(tmp_path / "tokenizer.json", 300, pad_id=1).pad_id == 1


def test_a_sentencepiece_model_without_a_pad_needs_a_row_for_it(tmp_path):
    pytest.importorskip("sentencepiece")
    directory = write_source(tmp_path / "x")
    train_sentencepiece(directory / "tokenizer.model")
    with pytest.raises(ConfigError, match="has 301 ids, the model 300: the last is for padding"):
        run_convert(directory, tmp_path / "y")
    plan = run_convert(directory, tmp_path / "y", pad_id=300)
    assert plan.config.vocab_size == load_vocabulary(tmp_path / "y").vocab_size == 301
    embedding = stored(tmp_path / "y", plan)[("embedding",)]
    np.testing.assert_array_equal(embedding[:300], make_weights(LLAMA)["model.embed_tokens.weight"])
    assert embedding.shape == (301, 16) and not embedding[300].any()

    untied = write_source(tmp_path / "untied", {**LLAMA, "tie_word_embeddings": False})
    shutil.copy(directory / "tokenizer.model", untied)
    plan = run_convert(untied, tmp_path / "z", pad_id=300)
    head = stored(tmp_path / "z", plan)[("head",)]
    assert head.shape == (16, 301) and head[:, :300].any(axis=0).all() and not head[:, 300].any()


def test_an_unused_piece_of_sentencepiece_becomes_the_pad(tmp_path):
    pytest.importorskip("sentencepiece")
    train_sentencepiece(tmp_path / "tokenizer.model", control_symbols=["<turn>", "<unused0>"])
    assert fitting_vocabulary(tmp_path / "tokenizer.model", 300).pad_id == 4


def test_tokenizers_that_do_not_fit(tmp_path, instruct, source):
    with pytest.raises(ConfigError, match="has 301 ids, the model 299: pass the tokenizer of this"):
        fitting_vocabulary(instruct / "tokenizer.json", 299)
    with pytest.raises(ConfigError, match="pad_id 40 is not free"):
        fitting_vocabulary(instruct / "tokenizer.json", 300, pad_id=40)
    with pytest.raises(ConfigError, match="There is no tokenizer file"):
        plan_import(open_source(source), MEMORY, tokenizer=tmp_path / "x")
    with pytest.raises(ConfigError, match="llama has no tokenizer for --pad_id"):
        plan_import(open_source(source), MEMORY, pad_id=3)
    given = plan_import(open_source(source), MEMORY, tokenizer=instruct / "tokenizer.json")
    assert given.vocabulary.vocab_size == 300 and not given.notes


# --------------------------------------------------------------------------- the directory


def test_what_is_in_the_way_stays(tmp_path, source):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file is a file: choose another --to."):
        run_convert(source, tmp_path / "file")
    with pytest.raises(ConfigError, match="is not empty, it holds file: choose another --to"):
        run_convert(source, tmp_path)
    run_convert(source, tmp_path / "model")
    before = files(tmp_path / "model")
    with pytest.raises(ConfigError, match="is not empty, it holds checkpoint_0, model.gin, model"):
        run_convert(source, tmp_path / "model")
    assert files(tmp_path / "model") == before


def test_a_disk_without_room_is_noticed_first(tmp_path, source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match="has 1 kB free and this run needs 43 kB"):
        run_convert(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


STEPS = ("check_same_model", "model_gin", "save_vocabulary", "_keep_side_files", "write_checkpoint")


@pytest.mark.parametrize("step", STEPS)
def test_an_import_that_fails_at_any_step_is_no_model_and_begins_from_nothing(
    tmp_path, instruct, monkeypatch, step
):
    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(importing, step, fail)
        with pytest.raises(ConfigError, match="model cannot be written: No space left on device. The s"):
            run_convert(instruct, tmp_path / "model", seed=1)
    with pytest.raises(ConfigError):
        load_model(str(tmp_path / "model"))
    (tmp_path / "model" / "notes.txt").write_text("mine")
    run_convert(instruct, tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    (tmp_path / "model" / "notes.txt").unlink()
    run_convert(instruct, tmp_path / "other")
    assert files(tmp_path / "model") == files(tmp_path / "other")


# --------------------------------------------------------------------------- flags


@given(st.data())
def test_settings_are_fields_of_the_decoder(data):
    values = {
        "block_size": 16, "memory_segments": 2, "window_mask": True,
        "blocks_per_chunk": 4, "remat": "full",
    }  # fmt: skip
    names = data.draw(st.lists(st.sampled_from(sorted(values)), unique=True))
    given = {name: values[name] for name in names}
    spell = lambda value: data.draw(st.sampled_from((str(value), repr(value))))
    settings = [f"{name} = {spell(value)}" for name, value in given.items()]
    assert commands.read_fields(settings) == given
    assert decoder_config(LLAMA, **{"block_size": 16, **given})


@pytest.mark.parametrize(
    "setting, said",
    [
        ("block_size", "--set=block_size sets nothing: write it as --set=FIELD=VALUE."),
        ("block_size=", "--set=block_size= sets nothing"),
        ("block=3", "block is no field of a decoder. Did you mean block_size?"),
        ("num_layers=3", "num_layers belongs to the pretrained model."),
        ("block_size=big", "block_size takes a value such as 1024, not 'big'."),
        ("block_size=1.5", "block_size takes a value such as 1024, not 1.5."),
        ("block_size=True", "block_size takes a value such as 1024, not True."),
        ("window_mask=1", "window_mask takes a value such as False, not 1."),
        ("remat=3", "remat takes a value such as 'none', not 3."),
        ("blocks_per_chunk=all", "blocks_per_chunk takes a value such as 4 or None, not 'all'."),
        ("memory=fam", "the memory has a flag of its own, --memory=KIND."),
    ],
)
def test_settings_that_make_no_sense(setting, said):
    with pytest.raises(ConfigError) as caught:
        commands.read_fields([setting])
    assert said in str(caught.value)


def test_numbers_and_none_where_they_belong():
    fields = commands.read_fields(["memory_segments=1", "blocks_per_chunk=None"])
    assert fields == {"memory_segments": 1, "blocks_per_chunk": None}


def test_memories_by_kind_and_fields():
    assert commands.read_memory("none") == Memory() and commands.read_memory("fam") == Fam()
    gated = commands.read_memory("fam:length=8, update=gated,normalize=True")
    assert gated == Fam(8, update="gated", normalize=True)
    assert commands.read_memory("fam:update_scale=1") == Fam(update_scale=1)
    recurrent = BlockRecurrent(8, layers=(0, 1))
    assert commands.read_memory("block_recurrent:layers=(0, 1), length=8") == recurrent
    for text, said in (
        ("famm", "is of the kind 'famm', which is not known here"),
        ("fam:lenght=8", "has no field lenght; it has .*, length, normalize"),
        ("fam:8", "8 sets nothing"),
        ("fam:length=8.5", "Fam.length must be a whole number of at least 1 .*, not 8.5"),
        ("fam:length=long", "Fam.length must be a whole number of at least 1 .*, not 'long'"),
        ("fam:normalize=1", "Fam.normalize must be True or False or 'measured', not 1"),
        ("landmark:top=0", "Landmark.top must be a whole number of at least 1 or None, not 0"),
        ("own:length=0", "Own.length must be a whole number of at least 1 .*, not 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            commands.read_memory(text)


def test_meshes():
    assert commands.read_mesh("fsdp=8, tensor=2") == {"fsdp": 8, "tensor": 2}
    assert commands.read_mesh("") == {}
    with pytest.raises(ConfigError, match="--mesh=fsdp is not understood"):
        commands.read_mesh("fsdp")


def test_progress_is_told_in_bytes(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("famx.base.progress._monotonic", lambda: next(clock))
    with ByteProgress("import", 4_000_000, last_line=True) as progress:
        for _ in range(4):
            progress.add(1_000_000)
    assert capsys.readouterr().err == "import: 3.0 MB of 4.0 MB\nimport: 4.0 MB of 4.0 MB\n"
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with ByteProgress("import", 4_000_000, stream=terminal) as progress:
        progress.add(3_000_000)
    assert "import:  75%" in terminal.getvalue() and "3.00M/4.00M" in terminal.getvalue()
    sizes = {999: "999 bytes", 1500: "1.5 kB", 2.5e9: "2.5 GB", 7e12: "7.00 TB"}
    assert {count: byte_size(count) for count in sizes} == sizes


# --------------------------------------------------------------------------- programs


def run(module, *args, stdin=""):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=gin_utils.gin_root(), input=stdin, capture_output=True, text=True,
    )  # fmt: skip


GIN = """if True:
    import json, sys
    import gin
    from famx import models, modules
    from famx.base import gin_utils

    @gin.configurable
    def use(model):
        print(json.dumps(model.config.to_dict()))

    for line in sys.stdin:
        gin.clear_config()
        gin_utils.parse_gin([line.strip()], ["use.model = %MODEL"])
        use()
"""


@pytest.mark.slow
def test_the_gin_file_makes_the_same_decoder(tmp_path):
    configs = [decoder_config(hf) for hf in CONFIGS.values()]
    configs.append(DecoderConfig(
        vocab_size=9, num_layers=70, embed_dim=24, num_heads=4, head_dim=10, rope_base=1e6,
        rope_layers=("local",) * 69 + ("none",), local_rope_base=123.25, dtype="bfloat16",
        rope_scaling=RopeScaling(8.0, 1.5, 4.5, 8192), attention_softcap=50.0, window_mask=True,
        memory=Fam(2, update="gated", update_scale=1 / 3), blocks_per_chunk=2))  # fmt: skip
    paths = [tmp_path / f"{i}.gin" for i in range(len(configs))]
    for path, config in zip(paths, configs):
        path.write_text(model_gin(config, "a\nmodel"))
    result = subprocess.run(
        [sys.executable, "-c", GIN], cwd=gin_utils.gin_root(), capture_output=True, text=True,
        input="".join(f"{path}\n" for path in paths),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    made = [DecoderConfig.from_dict(json.loads(line)) for line in result.stdout.splitlines()]
    assert made == configs


@dataclasses.dataclass(frozen=True)
class Own(Fam):
    """A memory of a module outside famx."""

    kind: ClassVar[str] = "own"


def test_a_memory_may_be_of_a_module_without_a_package():
    sizes = dict(vocab_size=9, num_layers=1, embed_dim=8, num_heads=2)
    text = model_gin(DecoderConfig(**sizes, memory=Own(3), blocks_per_chunk=1), "a model")
    assert f"\nimport {__name__}\n" in text and f"\n  memory = @{__name__}.Own()\n" in text
    assert f"\n{__name__}.Own:\n" in text and "\n  length = 3\n" in text


@pytest.mark.slow
def test_an_imported_model_answers_and_talks(tmp_path, instruct):
    model = tmp_path / "model"
    flags = (
        "--block_size=8", "--memory_segments=1", "--memory=fam:length=2,update=gated",
        "--set=window_mask=True", "--param_dtype=bfloat16", "--mesh=fsdp=2", "--prompt=tokens",
        "--seed=3", "--pad_id=1", f"--tokenizer={instruct / 'tokenizer.json'}",
    )  # fmt: skip
    result = run("famx.convert", "--from", instruct, "--to", model, *flags)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "import: 21.4 kB of 21.4 kB\n"
    trained, changes = load_model(str(model)), dict(window_mask=True, param_dtype="bfloat16")
    assert trained.model.config == dataclasses.replace(CONFIG, memory=Fam(2, update="gated"), **changes)
    assert trained.model.vocabulary.pad_id == 1
    table = lambda: make_weights(LLAMA)["model.embed_tokens.weight"]
    drawn = MemoryStart("tokens").draw_prompt(CONFIG, (2, 16), 3, table)
    np.testing.assert_array_equal(trained.params["memory"]["prompt"], drawn.astype("bfloat16"))
    array = model / "checkpoint_0" / "state" / "target.embedding" / ".zarray"
    assert json.loads(array.read_text())["chunks"] == [300, 8]

    (tmp_path / "in.jsonl").write_text('{"inputs": "The grey cat sits"}\n{"inputs": "The old dog"}\n')
    paths = {"CHECKPOINT_PATH": model, "INPUT_FILE": tmp_path / "in.jsonl",
             "OUTPUT_FILE": tmp_path / "out.jsonl"}  # fmt: skip
    bindings = [f"--gin.{name}='{path}'" for name, path in paths.items()]
    infer = ("--gin_file=gin_configs/runs/infer.gin", f"--gin_file={model}/model.gin")
    result = run("famx.infer", *infer, *bindings, "--gin.MAX_NEW_TOKENS=12")
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [type(answer["prediction"]) for answer in answers] == [str, str]

    result = run("famx.chat", "--checkpoint", model, "--max_new_tokens=12", stdin="The cat\n/state\n")
    assert result.returncode == 0 and "memory updates" in result.stdout, result.stderr


@pytest.mark.slow
def test_bad_flags_end_in_one_sentence(tmp_path, source):
    for flags, said in (
        ([], "There is nothing to import: add --from=DIRECTORY or --from=FILE.gguf."),
        (["--from", source], "There is nowhere to write to: add --to=DIRECTORY."),
        (["--from", tmp_path / "x", "--to", tmp_path / "y"],
         f"There is no model {tmp_path / 'x'}: give a directory or a GGUF file that is here."),
    ):  # fmt: skip
        result = run("famx.convert", *flags)
        assert (result.returncode, result.stderr) == (2, f"famx: error: {said}\n")


@pytest.mark.slow
@pytest.mark.parametrize("by, code", [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_an_import_that_is_killed_leaves_no_model_and_begins_from_nothing(tmp_path, by, code):
    hf = {**LLAMA, "num_hidden_layers": 60, "hidden_size": 64}
    source, model = write_source(tmp_path / "x", hf), tmp_path / "model"
    args = ("--from", str(source), "--to", str(model), "--block_size=8", "--memory=fam:length=2")
    command = [sys.executable, "-m", "famx.convert", *args]
    process = start_process(command, cwd=gin_utils.gin_root(), stderr=subprocess.PIPE, text=True)
    written = lambda: len(list(model.glob("checkpoint_0*/state*/*/*")))
    while process.poll() is None and written() < 40:
        time.sleep(0.002)
    process.send_signal(by)
    _, err = process.communicate()
    assert process.returncode == code
    assert err == ("Stopped; the same command starts over.\n" if by == signal.SIGINT else "")
    with pytest.raises(ConfigError, match="There is no checkpoint in"):
        load_model(str(model))
    if by == signal.SIGKILL:
        result = run("famx.convert", *args)
        assert result.returncode == 0, result.stderr
        assert sorted(os.listdir(model)) == ["checkpoint_0", "model.gin", "model.json", "source"]
        with contextlib.redirect_stdout(None):
            commands.convert(str(source), str(tmp_path / "other"), {"block_size": 8, "memory": Fam(2)})
        assert files(model) == files(tmp_path / "other")
