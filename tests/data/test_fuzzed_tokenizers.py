"""Damaged tokenizer files and those next to them: each is opened, or refused in one sentence, quickly."""

import json

import pytest
from fuzzing import BYTE_EDITS, JSON_EDITS, as_text, damaged_bytes, damaged_json, ends_well, fuzz
from hypothesis import example, given
from hypothesis import strategies as st

sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

from test_tokenizer_files import (  # noqa: E402
    BYTES,
    CONTROL,
    MERGES,
    NORMAL,
    USER_DEFINED,
    train_bpe,
    train_sentencepiece,
    write_gguf,
)

from famx.base.errors import ConfigError  # noqa: E402
from famx.data.vocabularies import load_vocabulary, open_vocabulary, save_vocabulary  # noqa: E402

TEXT = "The grey cat <|end|> says <|new|> 12\n [INST]"
CONFIG = {
    "bos_token": {"content": "<|role|>", "special": True}, "eos_token": "<|end|>", "pad_token": "<|pad|>",
    "added_tokens_decoder": {
        "0": {"content": "<|pad|>", "special": True}, "300": {"content": "<|new|>", "rstrip": True},
    },
    "chat_template": [{"name": "default", "template": "{{ messages }}"}], "legacy": False,
    "additional_special_tokens": ["<|role|>"], "add_prefix_space": True,
}  # fmt: skip
SIDE_FILES = {
    "tokenizer_config.json": CONFIG,
    "added_tokens.json": {"<|new|>": 300, "<|other|>": 302},
    "special_tokens_map.json": {"eos_token": "<|end|>", "unk_token": {"content": "<|pad|>"}},
}


def used(vocabulary):
    """The vocabulary, after it has encoded and decoded a text."""
    for ids in (vocabulary.encode(TEXT), vocabulary.encode(TEXT, special=True)):
        assert all(0 <= i < vocabulary.vocab_size for i in ids)
        vocabulary.decode(ids)
    controls = set(vocabulary.special_tokens.values())
    assert not controls & set(vocabulary.encode(TEXT)), "a text spells a control token"
    assert all(0 <= i < vocabulary.vocab_size for i in vocabulary.end_ids)
    return vocabulary


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(folder / "tokenizer.json")
    for name, value in SIDE_FILES.items():
        (folder / name).write_text(json.dumps(value))
    assert used(open_vocabulary(folder / "tokenizer.json")).eos_id == 1
    return folder


@pytest.mark.parametrize("name", ["tokenizer.json", *SIDE_FILES])
def test_json_files(bpe, name):
    file = bpe / name
    content = file.read_bytes()

    @fuzz
    @given(JSON_EDITS | BYTE_EDITS)
    @example([(3163, 3)])  # a token of text with the id of a control token
    def check(edits):
        in_json = isinstance(edits[0][0], int)
        text = as_text(damaged_json(json.loads(content), edits)) if in_json else None
        file.write_bytes(damaged_bytes(content, edits) if text is None else text)
        try:
            ends_well(lambda: used(open_vocabulary(bpe / "tokenizer.json")))
        finally:
            file.write_bytes(content)

    check()


def test_sentencepiece_models(tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model", user_defined_symbols=["[INST]", "  "])
    content = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "added_tokens.json").write_text('{"<|new|>": 330}')
    used(open_vocabulary(tmp_path / "tokenizer.model"))

    @fuzz
    @given(BYTE_EDITS)
    def check(edits):
        (tmp_path / "tokenizer.model").write_bytes(damaged_bytes(content, edits))
        ends_well(lambda: used(open_vocabulary(tmp_path / "tokenizer.model")))

    check()


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_gguf_tokenizers(tmp_path, model):
    if model == "gpt2":
        tokens = ["<|end|>", "<|new|>", *BYTES, "~~"]
        fields = dict(pre="llama-bpe", merges=MERGES, types=[CONTROL, USER_DEFINED] + [NORMAL] * 257)
    else:
        processor = train_sentencepiece(tmp_path / "x.model")
        tokens = [processor.id_to_piece(i) for i in range(330)] + ["<|end|>", "<|new|>"]
        types = [2, 3, 3, *[6] * 256, *[NORMAL] * 71, CONTROL, USER_DEFINED]
        fields = dict(scores=[0.0] * 332, types=types)
    path = write_gguf(tmp_path / "m.gguf", model, tokens, ids={"eos": 1}, **fields,
                      more={"chat_template": "{{ messages }}"})  # fmt: skip
    content = path.read_bytes()
    used(open_vocabulary(path))

    @fuzz
    @given(BYTE_EDITS)
    @example([("size", 0.75, 0)])  # a token of the type 0
    def check(edits):
        path.write_bytes(damaged_bytes(content, edits))
        ends_well(lambda: used(open_vocabulary(path)))

    check()


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_saved_vocabularies(tmp_path, bpe, kind):
    if kind == "tokenizer.model":
        train_sentencepiece(tmp_path / kind)
        (tmp_path / "added_tokens.json").write_text('{"<|new|>": 330}')
    vocabulary = open_vocabulary((bpe if kind == "tokenizer.json" else tmp_path) / kind)
    vocabulary.set_more_end_ids([5, 7])
    save_vocabulary(vocabulary, tmp_path / "saved")
    again = load_vocabulary(tmp_path / "saved")
    assert again == vocabulary and again.end_ids == vocabulary.end_ids
    assert again.encode(TEXT, special=True) == vocabulary.encode(TEXT, special=True)
    file = tmp_path / "saved" / "vocabulary.json"
    content = file.read_bytes()

    @fuzz
    @given(JSON_EDITS | BYTE_EDITS)
    @example([(0, 22)])
    def check(edits):
        in_json = isinstance(edits[0][0], int)
        text = as_text(damaged_json(json.loads(content), edits)) if in_json else None
        file.write_bytes(damaged_bytes(content, edits) if text is None else text)
        ends_well(lambda: used(load_vocabulary(tmp_path / "saved")))

    check()


def test_tokens_of_an_undefined_type_are_ordinary(tmp_path):
    types = [CONTROL, USER_DEFINED] + [0] * 257
    path = write_gguf(tmp_path / "m.gguf", "gpt2", ["<|end|>", "<|new|>", *BYTES, "~~"], types, MERGES,
                      pre="llama-bpe")  # fmt: skip
    assert open_vocabulary(path).encode("~~") == [258]


@pytest.mark.parametrize("length", [5000, 20_000_000])
def test_a_token_that_is_longer_than_any_is_refused(tmp_path, length):
    tokens, types = [*BYTES, "~~", "x" * length], [NORMAL] * 257 + [CONTROL]
    path = write_gguf(tmp_path / "m.gguf", "gpt2", tokens, types, MERGES, pre="llama-bpe")
    assert ends_well(lambda: open_vocabulary(path)) is None
    train_bpe(tmp_path / "tokenizer.json")
    config = {"added_tokens_decoder": {"300": {"content": "x" * length, "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="added_tokens_decoder.300.content is 'xxx"):
        open_vocabulary(tmp_path / "tokenizer.json")


def test_very_many_special_tokens(tmp_path):
    train_bpe(tmp_path / "tokenizer.json")
    for count, refused in ((20_000, False), (100_000, True)):
        added = {str(300 + i): {"content": f"<|{i}|>", "special": True} for i in range(count)}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        vocabulary = ends_well(lambda: open_vocabulary(tmp_path / "tokenizer.json"))
        assert (vocabulary is None) == refused
        if not refused:
            assert used(vocabulary).encode("a<|19999|>" * 5000, special=True).count(20_299) == 5000


@pytest.mark.parametrize("name", ["../tokenizer.json", "/etc/passwd", "x/tokenizer.json"])
def test_no_name_in_a_saved_vocabulary_is_followed(bpe, tmp_path, name):
    save_vocabulary(open_vocabulary(bpe / "tokenizer.json"), tmp_path / "saved")
    file = tmp_path / "saved" / "vocabulary.json"
    (tmp_path / "tokenizer.json").write_bytes((tmp_path / "saved" / "tokenizer.json").read_bytes())
    file.write_text(json.dumps({**json.loads(file.read_text()), "file": name}))
    with pytest.raises(ConfigError, match="The tokenizer file 'tokenizer.json' .* is missing"):
        load_vocabulary(tmp_path / "saved")


@given(st.lists(st.sampled_from(["<|new|>", "<|", "new", "|>", "<", " ", "[INST]", "a"]), max_size=8))
def test_no_text_spells_a_control_token(bpe, parts):
    used(open_vocabulary(bpe / "tokenizer.json")).encode("".join(parts))
