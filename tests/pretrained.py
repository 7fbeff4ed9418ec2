"""Tiny tokenizers of the usual kinds, and directories like those of imported models."""

import io
import json
import os
import pathlib

from tiny import make_model, make_params
from trained import write_model_dir

from famx.conversion.gin_file import model_gin
from famx.data.probes.passkey_text import FILLER_WORDS, HEADER, QUESTION, REPEATED_FILLER, STATEMENT
from famx.data.vocabularies import Vocabulary, open_vocabulary

SENTENCES = [
    HEADER, *STATEMENT, QUESTION, REPEATED_FILLER, " ".join(FILLER_WORDS),
    *(f"Of the {a} and the {b} in it, {i} or {97 * i} remain to be found; return the value."
      for i in range(3, 60) for a, b in (("list", "string"), ("class", "function"))),
]  # fmt: skip
# As GPT-2, Llama 3 and SmolLM split text, and one that does not split it at all.
SPLITTINGS = ("numbers", "three_digits", "digits", "none")
TOKENIZERS = (*(f"byte_pair_{name}" for name in SPLITTINGS), "sentencepiece")
_WORDS_OF_THREE_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_byte_pair(folder: str | os.PathLike, splitting: str = "digits", size: int = 600) -> str:
    """Writes tokenizer.json and tokenizer_config.json of a byte-level BPE; returns the folder."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words, characters = (pre_tokenizers.ByteLevel(False, use_regex=x) for x in (True, False))
    three = pre_tokenizers.Split(tokenizers.Regex(_WORDS_OF_THREE_DIGITS), "isolated")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = {
        "numbers": words,
        "three_digits": pre_tokenizers.Sequence([three, characters]),
        "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), words]),
        "none": characters,
    }[splitting]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos")}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return str(folder)


def write_sentencepiece(folder: str | os.PathLike) -> str:
    """Writes tokenizer.model of SentencePiece, as Llama's; returns the folder."""
    import sentencepiece

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=content, model_type="bpe", vocab_size=480,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(content.getvalue())
    return str(folder)


def write_tokenizer(folder: str | os.PathLike, name: str) -> str:
    """The folder of one of `TOKENIZERS`."""
    if name == "sentencepiece":
        return write_sentencepiece(folder)
    return write_byte_pair(folder, name.removeprefix("byte_pair_"))


def write_pretrained(directory: str | os.PathLike, **sizes) -> tuple[str, Vocabulary]:
    """A MODEL_DIR of random weights with a BPE vocabulary and model.gin, and the vocabulary."""
    directory = pathlib.Path(directory)
    folder = write_byte_pair(directory / "source")
    vocabulary = open_vocabulary(pathlib.Path(folder) / "tokenizer.json")
    model = make_model(vocab_size=vocabulary.vocab_size, **sizes)
    write_model_dir(directory, model, make_params(model.module), vocabulary, step=0)
    (directory / "model.gin").write_text(model_gin(model.config, "random weights"))
    return str(directory), vocabulary
