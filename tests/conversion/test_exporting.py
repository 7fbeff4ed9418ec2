"""Export to transformers and back; an export that fails leaves nothing."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
from exports import MEMORY, imported
from flax.traverse_util import flatten_dict, unflatten_dict
from reference_models import CONFIGS, TOKENS, draw, is_gemma, torch_logits, torch_model

from famx.base import files
from famx.base.errors import ConfigError
from famx.conversion import exporting, families, with_memory
from famx.conversion.commands import parse_size
from famx.conversion.exporting import export
from famx.conversion.importing import plan_import, write_model
from famx.conversion.sources import open_source
from famx.data.vocabularies import ByteVocabulary, open_vocabulary
from famx.lora import Lora
from famx.memories import Fam, Infini
from famx.model_dir.checkpointer import Checkpointer
from famx.model_dir.identity import check_same_model
from famx.model_dir.loading import TrainedModel, load_model
from famx.models import DecoderModel
from famx.modules import Decoder, Memory

ALL = sorted(CONFIGS)


def read_export(directory):
    """Name to array of every weight file, in the order of their names."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        arrays = safetensors.numpy.load_file(file)
        assert not arrays.keys() & found.keys()
        found |= arrays
    return found


def read_json(file):
    return json.loads(file.read_text())


def save(model, params, directory):
    """A MODEL_DIR with a checkpoint of step 5."""
    directory.mkdir()
    check_same_model(directory, model.describe())
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(5, {"target": params})


# ------------------------------------------------------------------ there and back


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", ALL)
def test_import_after_export_is_the_identity_on_every_leaf(name, tmp_path):
    trained = imported(name, tmp_path)
    done = export(trained, tmp_path / "out")
    again = convert(tmp_path / "out", tmp_path / "again")
    assert again.model.config == trained.model.config
    tiny.assert_identical(again.params, trained.params)
    assert done.architecture == "FamxForCausalLM" and done.files == ["model.safetensors"]
    full = read_json(tmp_path / "out/config.json")
    assert full["base"].items() >= CONFIGS[name].items()  # the original's, as it came
    assert read_json(tmp_path / "again/source/config.json") == full["base"]


def convert(source, directory, **fields):
    """Import an export as famx.convert does; return the loaded model."""
    write_model(plan_import(open_source(source), fields), directory)
    return load_model(directory)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["llama_biased", "gemma3", "smollm3"])
def test_a_directory_imported_exported_and_imported_is_the_same_model(name, tmp_path):
    hf, original = CONFIGS[name], tmp_path / "original"
    original.mkdir()
    (original / "config.json").write_text(json.dumps(hf))
    wanted = families.tensors(hf, families.decoder_config(hf))
    arrays = {tensor.name: draw(tensor.name, tensor.shape, is_gemma(hf)) for tensor in wanted}
    safetensors.numpy.save_file(arrays, original / "model.safetensors")
    first = convert(original, tmp_path / "first", **MEMORY)
    export(first, tmp_path / "out", max_shard_size=5000)
    second = convert(tmp_path / "out", tmp_path / "second")
    assert second.model.config == first.model.config
    tiny.assert_identical(second.params, first.params)
    found = read_export(tmp_path / "out")
    assert found.keys() == arrays.keys() | {"model.memory.prompt"}
    for key, array in arrays.items():
        np.testing.assert_allclose(found[key], array, 0, 3e-7 if is_gemma(hf) else 0)


@pytest.mark.slow
def test_parameters_of_the_memory_in_each_layer_come_back_and_its_adapters_are_refused(tmp_path):
    hf, original = CONFIGS["llama_biased"], tmp_path / "original"
    original.mkdir()
    (original / "config.json").write_text(json.dumps(hf))
    wanted = families.tensors(hf, families.decoder_config(hf))
    arrays = {tensor.name: draw(tensor.name, tensor.shape, False) for tensor in wanted}
    safetensors.numpy.save_file(arrays, original / "model.safetensors")
    memory = Fam(2, bias="minus_log_length", first_residual="ordinary")
    first = convert(original, tmp_path / "first", **{**MEMORY, "memory": memory})
    np.testing.assert_allclose(first.params["layers"]["memory"]["bias"], -np.log(2), rtol=1e-6)
    export(first, tmp_path / "out")
    second = convert(tmp_path / "out", tmp_path / "second")
    assert second.model.config == first.model.config
    tiny.assert_identical(second.params, first.params)
    with pytest.raises(ConfigError, match="no tokenizer to read it"):
        measured = {**MEMORY, "memory": Fam(2, normalize="measured")}
        convert(original, tmp_path / "third", **measured)
    with pytest.raises(ConfigError, match="does not implement Fam.adapter_rank: add --nomemory"):
        adapted = dataclasses.replace(memory, adapter_rank=1)
        export(convert(original, tmp_path / "fourth", **{**MEMORY, "memory": adapted}), tmp_path / "no")
    assert not (tmp_path / "third" / "model.json").exists()


@pytest.mark.parametrize("name", ["llama_biased", "gemma2"])
def test_what_came_in_bfloat16_goes_out_in_bfloat16_as_it_was(name, tmp_path):
    trained = imported(name, tmp_path, ml_dtypes.bfloat16)
    export(trained, tmp_path / "out", "bfloat16")
    found = read_export(tmp_path / "out")
    for tensor in families.tensors(CONFIGS[name], trained.model.config):
        original = draw(tensor.name, tensor.shape, is_gemma(CONFIGS[name])).astype(ml_dtypes.bfloat16)
        assert found[tensor.name].dtype == original.dtype
        assert found[tensor.name].tobytes() == original.tobytes()
    assert read_json(tmp_path / "out/config.json")["torch_dtype"] == "bfloat16"
    prompt = found["model.memory.prompt"]
    assert prompt.dtype == np.float32  # is trained, and small
    assert prompt.tobytes() == trained.params["memory"]["prompt"].tobytes()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", ALL)
def test_without_its_memory_transformers_loads_it_as_the_original(name, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    notes = export(imported(name, tmp_path), tmp_path / "out", max_shard_size=5000, memory=False).notes
    assert len(notes) == 1 and "The memory is left out" in notes[0]
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == CONFIGS[name]["architectures"][0]
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, theirs = torch_logits(model.eval(), TOKENS), torch_logits(torch_model(CONFIGS[name]), TOKENS)
    np.testing.assert_allclose(ours, theirs, 0, 1e-4 if is_gemma(CONFIGS[name]) else 0)


def test_adapters_go_out_merged(tmp_path):
    plain = tiny.make_model()
    model = DecoderModel(plain.module, lora=Lora(rank=2, alpha=6.0, targets=("layers/query",)))
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 16, 2), (1, 2, 2, 8)))
    params = unflatten_dict(flatten_dict(tiny.make_params(plain.module)))
    kernel = np.asarray(params["layers"]["query"]["kernel"])
    params["layers"]["query"] = {"kernel": kernel, "lora_a": a, "lora_b": b}
    save(model, params, tmp_path / "model")
    export(load_model(tmp_path / "model"), tmp_path / "out")
    found = read_export(tmp_path / "out")
    merged = kernel[0].reshape(16, 16) + 3.0 * a[0] @ b[0].reshape(2, 16)
    np.testing.assert_allclose(found["model.layers.0.self_attn.q_proj.weight"], merged.T, 1e-5, 1e-5)
    wanted = families.tensors(read_json(tmp_path / "out/config.json")["base"], model.config)
    assert found.keys() == {tensor.name for tensor in wanted} | {"model.memory.prompt"}


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("size", [1, 5000, 20_000])
def test_shards_keep_their_size_and_the_index_finds_every_tensor(tmp_path, size):
    trained = imported("llama", tmp_path)
    told = []
    done = export(trained, tmp_path / "out", max_shard_size=size, on_bytes=told.append)
    index = read_json(tmp_path / "out/model.safetensors.index.json")
    whole = export(trained, tmp_path / "whole")
    assert not (tmp_path / "whole/model.safetensors.index.json").exists()
    tiny.assert_identical(read_export(tmp_path / "out"), read_export(tmp_path / "whole"))
    modes = {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(modes) == 1  # who may read config.json may read the weights
    assert sum(told) == done.num_bytes == whole.num_bytes == index["metadata"]["total_size"]
    for file in done.files:
        arrays = safetensors.numpy.load_file(tmp_path / "out" / file)
        assert {name for name, its in index["weight_map"].items() if its == file} == arrays.keys()
        assert len(arrays) == 1 or sum(array.nbytes for array in arrays.values()) <= size
    assert done.files == [f"model-{i:05d}-of-{len(done.files):05d}.safetensors"
                          for i in range(1, len(done.files) + 1)]  # fmt: skip


def test_every_weight_file_has_a_checksum_that_an_import_verifies(tmp_path):
    export(imported("llama", tmp_path), tmp_path / "out", max_shard_size=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    content = files[-1].read_bytes()
    assert b"model.memory.prompt" in content
    files[-1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=f"{files[-1].name} is damaged: its SHA-256 is"):
        open_source(tmp_path / "out")


def test_a_model_without_memory_keeps_its_config_and_its_window(tmp_path):
    trained = imported("llama", tmp_path, memory=Memory(), memory_segments=2, window_mask=True)
    done = export(trained, tmp_path / "out")
    full = read_json(tmp_path / "out/config.json")
    assert done.architecture == "LlamaForCausalLM" and full.items() >= CONFIGS["llama"].items()
    assert not (tmp_path / "out/modeling_famx.py").exists() and "auto_map" not in full
    assert convert(tmp_path / "out", tmp_path / "again").model.config == trained.model.config
    assert "famx" not in read_json(tmp_path / "again/source/config.json")


class Squared(Fam):
    """A memory of a user's own."""

    kind = "squared"


@pytest.mark.parametrize("memory", [Infini(), Squared(2)])
def test_a_memory_that_the_code_does_not_have_is_refused(memory, tmp_path):
    trained = imported("llama", tmp_path)
    model = DecoderModel(Decoder(dataclasses.replace(trained.model.config, memory=memory)))
    trained = dataclasses.replace(trained, model=model)
    sentence = f"modeling_famx.py does not implement a memory of the kind '{memory.kind}': add --nomemory"
    with pytest.raises(ConfigError, match=sentence):
        export(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(trained, tmp_path / "out", memory=False)
    assert convert(tmp_path / "out", tmp_path / "again").model.config.memory == Memory()


def test_a_field_of_fam_that_the_code_does_not_have_is_refused(tmp_path, monkeypatch):
    without = with_memory._IMPLEMENTED - {"positions", "normalize"}
    monkeypatch.setattr(with_memory, "_IMPLEMENTED", without)
    trained = imported("llama", tmp_path)
    with pytest.raises(ConfigError, match="modeling_famx.py does not implement Fam.positions: add"):
        export(trained, tmp_path / "out")


def test_the_code_is_short_and_implements_what_fam_has():
    assert with_memory._IMPLEMENTED <= {field.name for field in dataclasses.fields(Fam)}
    assert len(with_memory.CODE.read_text().splitlines()) < 300


def test_how_transformers_reads_otherwise_is_noted(tmp_path):
    def notes(name, **memory):
        folder = tmp_path / f"{name}{len(memory)}"
        trained = imported(name, folder, memory=Memory(), memory_segments=2, **memory)
        return export(trained, folder / "out").notes

    assert notes("mistral_window", window_mask=True) == []
    assert "not only the last blocks" in notes("mistral_window")[0]
    assert "not only the last blocks" in notes("llama", window_mask=True)[0]


def test_a_damaged_config_is_told(tmp_path):
    export(imported("llama", tmp_path), tmp_path / "out")
    file = tmp_path / "out/config.json"
    whole = read_json(file)

    def refused(change, sentence):
        full = json.loads(json.dumps(whole))
        change(full)
        file.write_text(json.dumps(full))
        with pytest.raises(ConfigError, match=sentence):
            open_source(tmp_path / "out")

    refused(lambda full: full.pop("base"), "an export of famx has no base: copy it again")
    refused(lambda full: full["famx"].update(format=2), "has format 2; this famx reads format 1")
    refused(lambda full: full["famx"].pop("decoder"), "config.json is damaged: copy it again")
    refused(lambda full: full.update(famx=[]), "config.json is damaged: copy it again")
    refused(lambda full: full["famx"]["decoder"].update(memory={"kind": "x"}), "kind 'x', which is not")


def test_files_of_the_source_come_back_as_they_came(tmp_path):
    trained = imported("llama", tmp_path, vocabulary=ByteVocabulary())
    source = tmp_path / "model/source"
    files = {"generation_config.json": b"{ }", "tokenizer.json": b"{1}", "merges.txt": b"a b"}
    for name, content in files.items():
        (source / name).write_bytes(content)
    done = export(trained, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert done.notes == []
    assert not (tmp_path / "out/tokenizer_config.json").exists()


def test_no_weights_and_no_card_of_the_source_come_along(tmp_path):
    trained = imported("llama", tmp_path)
    source = tmp_path / "model/source"
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "README.md"):
        (source / name).write_text("the original's")
    export(trained, tmp_path / "out")
    tiny.assert_identical(convert(tmp_path / "out", tmp_path / "again").params, trained.params)
    assert "the original's" not in (tmp_path / "out/README.md").read_text()
    assert not (tmp_path / "out/model-00001-of-00002.safetensors").exists()


def test_a_source_may_be_named(tmp_path):
    trained = imported("mistral", tmp_path)
    (tmp_path / "model/source").rename(tmp_path / "elsewhere")
    export(trained, tmp_path / "made")
    export(trained, tmp_path / "kept", source=tmp_path / "elsewhere")
    assert read_json(tmp_path / "made/config.json")["base"]["architectures"] == ["LlamaForCausalLM"]
    assert read_json(tmp_path / "kept/config.json")["base"].items() >= CONFIGS["mistral"].items()


def byte_pair_file(folder):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["the cat sat on the mat, the hat"], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": "{{ 1 }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder / "tokenizer.json"


def scratch(vocabulary, **changes):
    """A model that was never imported."""
    return tiny.make_model(vocabulary=vocabulary, **changes)


@pytest.mark.slow
def test_a_model_from_scratch_goes_out_with_the_tokenizer_of_its_vocabulary(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    vocabulary = open_vocabulary(byte_pair_file(tmp_path / "tokenizer"))
    model = scratch(vocabulary, vocab_size=vocabulary.vocab_size, memory_segments=3)
    params = tiny.make_params(model.module)
    trained = TrainedModel(model, params, 3, tmp_path / "model/checkpoint_3")
    assert export(trained, tmp_path / "out").notes == []
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("the cat in the hat") == vocabulary.encode("the cat in the hat")
    assert tokenizer.convert_tokens_to_ids("</s>") == vocabulary.eos_id == tokenizer.eos_token_id
    assert tokenizer.chat_template == "{{ 1 }}"
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path / "out", trust_remote_code=True)
    assert loaded.config.eos_token_id == vocabulary.eos_id
    assert loaded.generation_config.pad_token_id == vocabulary.pad_id
    tokens = np.random.default_rng(0).integers(0, vocabulary.vocab_size, (1, 20))
    ours = model.module.apply({"params": params}, tokens)[0]
    np.testing.assert_allclose(torch_logits(loaded, tokens), ours, 0, 1e-4)


def test_a_sentencepiece_model_goes_out_as_a_tokenizer_of_llama(tmp_path):
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    content = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat, the hat"] * 9), model_writer=content,
        vocab_size=275, model_type="bpe", byte_fallback=True, pad_id=3, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(content.getvalue())
    vocabulary = open_vocabulary(tmp_path / "tokenizer.model")
    model = scratch(vocabulary, vocab_size=vocabulary.vocab_size)
    trained = TrainedModel(model, tiny.make_params(model.module), 3, tmp_path / "model/checkpoint_3")
    export(trained, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the cat in the hat", "a d\u00f6g!"):
        assert tokenizer.encode(text, add_special_tokens=False) == vocabulary.encode(text)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (vocabulary.eos_id, vocabulary.pad_id)


def test_a_vocabulary_that_transformers_does_not_know_is_noted(tmp_path):
    model = scratch(ByteVocabulary())
    trained = TrainedModel(model, tiny.make_params(model.module), 3, tmp_path / "model/checkpoint_3")
    notes = export(trained, tmp_path / "out").notes
    assert len(notes) == 1 and "no tokenizer for a vocabulary of bytes" in notes[0]


# ------------------------------------------------------------------ what goes wrong


def test_an_interrupted_export_leaves_nothing_and_may_be_repeated(tmp_path, monkeypatch):
    trained, save = imported("llama", tmp_path), safetensors.numpy.save_file
    calls = []

    def stop(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(*args, **kwargs)

    monkeypatch.setattr(safetensors.numpy, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        export(trained, tmp_path / "out", max_shard_size=5000)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    killed = tmp_path / ".out.partial"
    killed.mkdir()
    (killed / "model.safetensors").write_text("half")
    export(trained, tmp_path / "out", max_shard_size=5000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert not (tmp_path / "out/model.safetensors").exists()


def test_nothing_stands_at_the_destination_until_all_of_it_does(tmp_path, monkeypatch):
    seen, sync = {}, files._sync

    def look(path):
        seen[path.name] = (tmp_path / "out").exists()
        sync(path)

    trained = imported("llama", tmp_path)
    monkeypatch.setattr(files, "_sync", look)
    export(trained, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(written) == 6 and written <= seen.keys() and not any(seen.values())


def test_a_destination_that_is_taken_is_refused(tmp_path):
    trained = imported("llama", tmp_path)
    (tmp_path / "empty").mkdir()
    export(trained, tmp_path / "empty")
    with pytest.raises(ConfigError, match="empty is not empty: choose another --to"):
        export(trained, tmp_path / "empty")
    with pytest.raises(ConfigError, match="config.json is a file: choose another --to"):
        export(trained, tmp_path / "empty/config.json")
    with pytest.raises(ConfigError, match="config.json/x cannot be written: "):
        export(trained, tmp_path / "empty/config.json/x")


def test_a_disk_that_is_full_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = exporting.shutil.disk_usage(tmp_path)._replace(free=1234)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="has 1,234 bytes free and the export needs 10,0"):
        export(imported("llama", tmp_path), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_dtypes_that_cannot_be_are_refused(tmp_path):
    trained = imported("llama", tmp_path)
    with pytest.raises(ConfigError, match="as float32, bfloat16, float16, float64, not 'int4'"):
        export(trained, tmp_path / "out", "int4")
    trained.params["final_norm"]["scale"][3] = 1e6
    with pytest.raises(ConfigError, match="model.norm.weight has values that float16 cannot represent"):
        export(trained, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_sizes_of_shards():
    assert [parse_size(text) for text in ("5GB", "1.5 mb", "100", "7B")] == [5 * 10**9, 1_500_000, 100, 7]
    for text in ("", "GB", "5 apples", "0", "-1MB"):
        with pytest.raises(ConfigError, match="is not a size: write for example 5GB"):
            parse_size(text)


# ------------------------------------------------------------------ the main


def run_main(*args):
    return subprocess.run(
        [sys.executable, "-m", "famx.export", *map(str, args)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_main_exports_a_checkpoint_and_ends_bad_input_with_a_sentence(tmp_path):
    model = tiny.make_model()
    params = tiny.make_params(model.module)
    save(model, params, tmp_path / "model")
    done = run_main("--checkpoint", tmp_path / "model", "--to", tmp_path / "out", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert (
        "out: FamxForCausalLM, step 5, " in done.stdout and "bytes in model.safetensors" in done.stdout
    )
    head = read_export(tmp_path / "out")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(head, np.asarray(params["embedding"]).astype(ml_dtypes.bfloat16))
    kept = read_export(tmp_path / "out")["model.memory.prompt"]
    np.testing.assert_array_equal(kept, params["memory"]["prompt"])
    plain = run_main("--checkpoint", tmp_path / "model", "--to", tmp_path / "plain", "--nomemory")
    assert plain.returncode == 0 and "plain: LlamaForCausalLM, step 5" in plain.stdout, plain.stderr
    again = run_main("--checkpoint", tmp_path / "model", "--to", tmp_path / "out")
    assert again.returncode == 2 and "out is not empty: choose another --to" in again.stderr
    assert "Traceback" not in again.stderr
