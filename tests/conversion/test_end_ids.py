"""Every id of eos_token_id, of config.json and of generation_config.json, ends an answer."""

import json
import shutil

import numpy as np
import pytest
from published import write_source

tokenizers = pytest.importorskip("tokenizers")

from famx.conversion.commands import convert, export_checkpoint  # noqa: E402
from famx.conversion.families import decoder_config, tensors  # noqa: E402
from famx.conversion.sources import open_source  # noqa: E402
from famx.data.vocabularies import load_vocabulary  # noqa: E402
from famx.decoding import Sampling  # noqa: E402
from famx.evaluation.text_answers import answers_of, in_batches  # noqa: E402
from famx.inference.conversation import Conversation  # noqa: E402
from famx.inference.lines import infer  # noqa: E402
from famx.inference.prompts import Example  # noqa: E402
from famx.model_dir.loading import load_model  # noqa: E402
from famx.modules import Memory  # noqa: E402

SPECIAL = ["<|begin|>", "<|text_end|>", "<|turn_end|>", "<|call_end|>", "<|pad|>"]


def write_tokenizer(folder):
    """Bytes and special tokens; returns the id of each token by its text."""
    tokens = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": "<|text_end|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ids


def bigram(ids, after):
    """config.json and weights of a model whose next token is `after[token]`, or else "z"."""
    size = len(ids)
    hf = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": size, "hidden_size": size + size % 2,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    shapes = {tensor.name: tensor.shape for tensor in tensors(hf, decoder_config(hf))}
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for name, x in weights.items():
        x[...] = 1 if "norm" in name else 0
    np.fill_diagonal(weights["model.embed_tokens.weight"], 1)
    for token, i in ids.items():
        weights["lm_head.weight"][ids[after.get(token, "z")], i] = 1
    return hf, weights


@pytest.mark.sampled(3)
@pytest.mark.parametrize("end", ["<|text_end|>", "<|turn_end|>", "<|call_end|>"])
def test_each_of_them_ends_an_answer(tmp_path, end):
    ids = write_tokenizer(tmp_path)
    hf, weights = bigram(ids, {"?": "o", "o": "k", "k": end, end: "x", "x": end})
    hf["eos_token_id"] = [ids["<|text_end|>"], ids["<|turn_end|>"]]
    folder = write_source(tmp_path / "hf", hf, weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).rename(folder / name)
    generation = {"eos_token_id": [ids["<|text_end|>"], ids["<|call_end|>"]], "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    model = str(tmp_path / "model")
    convert(str(folder), model, {"memory": Memory(), "block_size": 32})
    vocabulary = load_vocabulary(model)
    assert set(vocabulary.end_ids) == {ids[text] for text in SPECIAL[1:4]}
    assert vocabulary.end_ids[0] == vocabulary.eos_id == ids["<|text_end|>"]

    shutil.rmtree(tmp_path / "model" / "source")  # as in the directory of a run that began from it
    export_checkpoint(model, str(tmp_path / "exported"))
    assert set(open_source(tmp_path / "exported").end_ids) == set(vocabulary.end_ids)

    (tmp_path / "in.jsonl").write_text('{"inputs": "?"}\n')
    infer(model, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), batch_size=1,
          sampling=Sampling(16))  # fmt: skip
    assert json.loads((tmp_path / "out.jsonl").read_text())["prediction"] == "ok"
    trained = load_model(model)
    assert Conversation(trained, Sampling(16)).exchange("?", lambda text: None) == "ok"
    answers = answers_of(trained.model.module, vocabulary, 1, 16)
    prompt = Example(0, {}, np.array([vocabulary.bos_id, ids["?"]], np.int32))
    row = in_batches(lambda batch: answers.predict(trained.params, batch), [prompt], 1)[0]
    assert row["prediction"] == "ok" and row["aux"]["finished"]
    batch = {"decoder_input_tokens": np.array([[vocabulary.bos_id, ids["?"]] + [vocabulary.pad_id] * 14])}
    written = np.asarray(trained.model.predict(trained.params, batch)[0])[0]
    assert written[:3].tolist() == [ids["o"], ids["k"], ids[end]]
    assert set(written[3:].tolist()) == {vocabulary.pad_id}
