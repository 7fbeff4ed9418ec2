"""Tiny pretrained models in published formats, drawn from a seed."""

import json
import pathlib

import ml_dtypes  # noqa: F401, gives numpy bfloat16 by name
import numpy as np
from reference_models import draw
from safetensors.numpy import save_file

from famx.conversion.families import decoder_config, tensors
from famx.memories import Fam

SENTENCES = [f"The {a} {b} in {i} wide rooms, isn't it?" for i in range(20, 60)
             for a in ("grey cat", "old dog") for b in ("sits", "sleeps", "waits")]  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
MEMORY = {"block_size": 8, "memory_segments": 1, "memory": Fam(2)}


def make_weights(hf, dtype="float32") -> dict[str, np.ndarray]:
    """All tensors of a model, by name."""
    gemma = hf["model_type"].startswith("gemma")
    return {
        tensor.name: draw(tensor.name, tensor.shape, gemma).astype(dtype)
        for tensor in tensors(hf, decoder_config(hf))
    }


def write_source(directory, hf=LLAMA, weights=None, shards=1, dtype="float32") -> pathlib.Path:
    """A directory of Hugging Face; with several shards it has an index."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf))
    weights = make_weights(hf, dtype) if weights is None else weights
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return directory
    index = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in sorted(weights)[i::shards]}
        save_file(part, directory / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


def train_bpe(path, special=("<|end|>", "<|pad|>")):
    """A byte-level BPE of 300 tokens, `special` from 0 on, with `<|end|>` in its config."""
    import tokenizers

    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(path))
    config = {"eos_token": special[0]}
    (pathlib.Path(path).parent / "tokenizer_config.json").write_text(json.dumps(config))


def train_sentencepiece(path, **options):
    """A SentencePiece model of 300 pieces, without a pad as in Llama's."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, **options})  # fmt: skip
    pathlib.Path(path).write_bytes(model.getvalue())
