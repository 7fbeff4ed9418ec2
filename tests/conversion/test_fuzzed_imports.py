"""Damaged files of pretrained models: each is imported, or refused in one sentence, and quickly."""

import json

import numpy as np
import pytest
from fuzzing import BYTE_EDITS, JSON_EDITS, as_text, damaged_bytes, damaged_json, ends_well, fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from published import LLAMA, MEMORY, make_weights, write_source

from famx.conversion.families import decoder_config, notes, tensors
from famx.conversion.importing import check_tensors
from famx.conversion.sources import CONFIG, INDEX, HuggingFaceSource

GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106],
    "text_config": {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16,
        "query_pre_attn_scalar": 8, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 3,
    },
}  # fmt: skip
LLAMA3 = LLAMA | {
    "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu", "rope_theta": 5e5, "head_dim": 4,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
SMOLLM3 = LLAMA | {
    "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layers": [1, 1, 0],
    "no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "attention_bias": False,
}  # fmt: skip


def describe(hf):
    config = decoder_config(hf, **MEMORY)
    return tensors(hf, config), notes(hf, config)


@pytest.mark.parametrize("hf", [LLAMA3, GEMMA3, SMOLLM3], ids=["llama3", "gemma3", "smollm3"])
def test_config_json(hf):
    assert describe(hf)

    @fuzz
    @given(JSON_EDITS)
    @example([(7, 9)])
    def check(edits):
        damaged = damaged_json(hf, edits)
        ends_well(lambda: describe(damaged))

    check()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = write_source(tmp_path_factory.mktemp("fuzz") / "model", hf=LLAMA3, shards=2)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.6}')
    return directory


def opened(directory):
    source = HuggingFaceSource(directory)
    check_tensors(source, tensors(source.config, decoder_config(source.config, **MEMORY)))
    for name, x in make_weights(LLAMA3).items():
        assert source.read(name).shape == x.shape
    return source


@pytest.mark.parametrize("name", [CONFIG, INDEX, "generation_config.json"])
def test_json_files_of_a_directory(whole, name):
    file = whole / name
    content = file.read_bytes()
    assert opened(whole).end_ids == (2, 3)

    @fuzz
    @given(JSON_EDITS | BYTE_EDITS)
    def check(edits):
        whole_value = isinstance(edits[0][0], int)
        text = as_text(damaged_json(json.loads(content), edits)) if whole_value else None
        file.write_bytes(damaged_bytes(content, edits) if text is None else text)
        try:
            ends_well(lambda: opened(whole))
        finally:
            file.write_bytes(content)

    check()


def test_safetensors(whole):
    file = sorted(whole.glob("*.safetensors"))[0]
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])

    @fuzz
    @given(st.booleans(), JSON_EDITS, BYTE_EDITS)
    def check(in_json, edits, flips):
        if in_json:
            text = as_text(damaged_json(header, edits))
            damaged = len(text).to_bytes(8, "little") + text + content[8 + length :]
        else:  # most of the places are in the header
            damaged = damaged_bytes(content[: 8 + length], flips) + content[8 + length :]
        file.write_bytes(damaged)
        try:
            source = ends_well(lambda: opened(whole))
            if source is not None and in_json and text != as_text(header):
                sizes = {name: info.shape for name, info in source.tensors.items()}
                assert sizes == {name: x.shape for name, x in make_weights(LLAMA3).items()}
        finally:
            file.write_bytes(content)

    check()


def test_gguf(tmp_path):
    pytest.importorskip("gguf")
    from test_gguf_source import KEYS, write

    from famx.conversion.gguf_source import GgufSource

    keys = {
        **KEYS, "rope.freq_base": 1e5, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0,
        "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.eos_token_id": 1,
        "attention.sliding_window": 8,
    }  # fmt: skip
    arrays = {"token_embd.weight": np.zeros((40, 32), np.float32), "rope_freqs.weight": np.ones(8, "f4")}
    content = write(tmp_path / "m.gguf", "llama", arrays, keys).read_bytes()
    header = len(content) - sum(x.nbytes for x in arrays.values())

    def read():
        source = GgufSource(tmp_path / "m.gguf")
        return [source.read(name) for name in source.tensors], describe(source.config)

    read()

    @fuzz
    @given(BYTE_EDITS, st.booleans())
    def check(edits, in_header):
        damaged = damaged_bytes(content[:header], edits) + content[header:]
        (tmp_path / "m.gguf").write_bytes(damaged if in_header else damaged_bytes(content, edits))
        ends_well(read)

    check()
