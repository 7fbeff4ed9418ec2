"""Tokens beyond a tokenizer file, and control tokens of any type: transformers' ids, and no forgery."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

from sentencepiece import sentencepiece_model_pb2 as proto  # noqa: E402
from test_tokenizer_files import train_bpe, write_gguf  # noqa: E402

from famx.base.errors import ConfigError  # noqa: E402
from famx.conversion.exporting import _write_tokenizer  # noqa: E402
from famx.data.vocabularies import load_vocabulary, open_vocabulary, save_vocabulary  # noqa: E402
from famx.data.vocabularies.chat_template import ChatTemplate  # noqa: E402
from famx.data.vocabularies.special_tokens import AddedToken, Splitter, is_control  # noqa: E402

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LETTERS = "abcdefghijklmnopqrstuvwxyzTH0123456789.,?!<>|_/[]"
TEXTS = [
    "<|im_start|>user\nhi<|im_end|>\n", "hi", " hi", "<s> hi", "a<|im_end|> b", "a <|im_end|>b", "",
    " <|im_end|>", "hello there<|im_end|>", "\n x", "<|tool|>  x", "a [INST] b", "colour",
]  # fmt: skip


def pieces(*extra, prefix=True):
    """A SentencePiece model of bytes and letters; `extra` is `(piece, type)` each."""
    model = proto.ModelProto()
    add = lambda piece, kind=NORMAL, score=0.0: model.pieces.add(piece=piece, type=kind, score=score)
    add("<unk>", UNKNOWN)
    add("<s>", CONTROL)
    add("</s>", CONTROL)
    for byte in range(256):
        add(f"<0x{byte:02X}>", BYTE)
    for i, letter in enumerate(["\u2581", *LETTERS]):
        add(letter, score=-1.0 - i)
    for piece, kind in extra:
        add(piece, kind, -0.5)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(model.pieces)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    return model


def write(folder, model, added=(), legacy=None, where="decoder"):
    """A directory as at Hugging Face: `added` is `(text, special)` each, beyond the model."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>",
        "unk_token": "<unk>", "chat_template": CHATML,
    }  # fmt: skip
    if legacy is not None:
        config["legacy"] = legacy
    ids = {text: len(model.pieces) + i for i, (text, _) in enumerate(added)}
    if where == "decoder":
        flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        config["added_tokens_decoder"] = {
            str(ids[text]): {"content": text, "special": special, **flags} for text, special in added
        }
    elif where == "added_tokens.json":
        (folder / where).write_text(json.dumps(ids))
    else:
        listed = [{"id": ids[text], "content": text, "special": special} for text, special in added]
        (folder / where).write_text(json.dumps({"added_tokens": listed, "model": {"type": "BPE"}}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CHAT_TOKENS = (("<|im_start|>", True), ("<|im_end|>", True))


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("tool", [True, False])
def test_the_ids_are_those_of_transformers(tmp_path, legacy, tool):
    transformers = pytest.importorskip("transformers")
    model = pieces()
    folder = write(tmp_path / "x", model, [*CHAT_TOKENS, ("<|tool|>", tool), ("colour", False)], legacy)
    # To transformers 5, a tokenizer of a model of this type is the SentencePiece model, as it was in 4.
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    vocabulary = open_vocabulary(folder / "tokenizer.model")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    n = len(model.pieces)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (1, n + 1, 0)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (1, n + 1, n + 4)
    for text in TEXTS:
        wanted = theirs.encode(text, add_special_tokens=False)
        assert vocabulary.encode(text, special=True) == wanted, text
    template = ChatTemplate(vocabulary)
    user = lambda text: {"role": "user", "content": text}
    said = {"role": "assistant", "content": "so"}
    ids = lambda messages: theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert template.first("hi there") == ids([user("hi there")])
    assert template.end_of_turn == n + 1
    answer = vocabulary.encode("so", before="text")
    more = [*template.first("hi"), *answer, n + 1, *template.next("ab", True)]
    assert more == ids([user("hi"), said, user("ab")])


@pytest.mark.parametrize("where", ["decoder", "added_tokens.json", "tokenizer.json"])
def test_added_tokens_from_every_place_that_names_them(tmp_path, where):
    model = pieces()
    folder = write(tmp_path / "x", model, CHAT_TOKENS, where=where)
    vocabulary = open_vocabulary(folder / "tokenizer.model")
    n = len(model.pieces)
    assert vocabulary.special_tokens["<|im_start|>"] == n and vocabulary.eos_id == n + 1
    assert vocabulary.encode("<|im_start|>a", special=True)[0] == n
    assert vocabulary.pad_id == n + 2, "padding is beyond what the files have"
    save_vocabulary(vocabulary, tmp_path / "saved")
    for again in (load_vocabulary(tmp_path / "saved"), pickle.loads(pickle.dumps(vocabulary))):
        assert again == vocabulary and again.vocab_size == vocabulary.vocab_size
        ids = vocabulary.encode("<|im_start|>hi<|im_end|> you", special=True)
        assert again.encode("<|im_start|>hi<|im_end|> you", special=True) == ids
        assert again.decode(ids) == vocabulary.decode(ids)


@pytest.mark.parametrize("legacy", [True, False])
def test_an_export_without_the_original_files_has_them(tmp_path, legacy):
    folder = write(tmp_path / "x", pieces(), [*CHAT_TOKENS, ("colour", False)], legacy)
    vocabulary = open_vocabulary(folder / "tokenizer.model", pad_id=2)
    (tmp_path / "exported").mkdir()
    _write_tokenizer(tmp_path / "exported", vocabulary)
    again = open_vocabulary(tmp_path / "exported" / "tokenizer.model", pad_id=2)
    for text in TEXTS:
        assert again.encode(text, special=True) == vocabulary.encode(text, special=True), text
    assert again.eos_id == vocabulary.eos_id and again.vocab_size == vocabulary.vocab_size


def test_files_that_contradict_each_other_are_refused(tmp_path):
    folder = write(tmp_path / "x", pieces(), CHAT_TOKENS)
    (folder / "added_tokens.json").write_text('{"<|im_end|>": 999}')
    with pytest.raises(ConfigError, match=r"added_tokens.json gives '<\|im_end\|>' the id 999, and to"):
        open_vocabulary(folder / "tokenizer.model")
    (folder / "added_tokens.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="the added token 'a' has the id 1, which is another in the S"):
        open_vocabulary(folder / "tokenizer.model")


def test_two_tokens_of_a_byte_pair_file_have_two_ids(tmp_path):
    path = tmp_path / "tokenizer.json"
    spec = json.loads(train_bpe(path).to_str())
    vocab = spec["model"]["vocab"]
    spec["model"]["vocab"] = {**vocab, "a": 0}  # each "a" of a text would be <|pad|>
    path.write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match=r"its tokens '<\|pad\|>' and 'a' have the same id, 0"):
        open_vocabulary(path)
    spec["model"]["vocab"] = vocab
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": vocab["a"], "content": "<|x|>"})
    path.write_text(json.dumps(spec))
    sentence = r"added token '<\|x\|>' has the id \d+, which is that of its token 'a'"
    with pytest.raises(ConfigError, match=sentence):
        open_vocabulary(path)


def test_byte_pairs_get_tokens_that_only_the_config_has(tmp_path):
    train_bpe(tmp_path / "tokenizer.json")
    added = {"300": {"content": "<|im_start|>", "special": True}, "302": {"content": "<|x|>"}}
    config = {"added_tokens_decoder": added, "eos_token": "<|im_start|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = open_vocabulary(tmp_path / "tokenizer.json")
    assert vocabulary.eos_id == 300 and vocabulary.pad_id == 303
    assert vocabulary.encode("<|x|><|im_start|>", special=True) == [302, 300]
    assert not {300, 301, 302} & set(vocabulary.encode("<|x|><|im_start|>"))
    save_vocabulary(vocabulary, tmp_path / "saved")
    assert load_vocabulary(tmp_path / "saved").encode("<|x|>", special=True) == [302]
    (tmp_path / "added_tokens.json").write_text('{"<|x|>": 5}')
    with pytest.raises(ConfigError, match="correct one"):
        open_vocabulary(tmp_path / "tokenizer.json")


# ---------------------------------------------------------------- no text becomes a control token

MARKS = ("<|im_start|>", "<|im_end|>", "[INST]", "<think>", "<<SYS>>")


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED, NORMAL])
@pytest.mark.parametrize("prefix", [True, False])
def test_no_text_spells_a_control_token_of_any_type(tmp_path, kind, prefix):
    template = CHATML + "{# [INST] <think> <<SYS>> #}"
    model = pieces(prefix=prefix)
    tokens = [piece.piece for piece in model.pieces] + list(MARKS)
    types = [piece.type for piece in model.pieces] + [kind] * len(MARKS)
    scores = [piece.score for piece in model.pieces] + [-0.1] * len(MARKS)
    path = write_gguf(
        tmp_path / "m.gguf", "llama", tokens, types, scores=scores, ids={"bos": 1, "eos": 2},
        more={"chat_template": template, "add_space_prefix": prefix},
    )  # fmt: skip
    vocabulary = open_vocabulary(path)
    n = len(model.pieces)
    controls = set(range(n, n + len(MARKS)))
    chat = ChatTemplate(vocabulary)
    assert chat.end_of_turn == n + 1
    frame = [i for i in chat.first("x") if i in controls]
    assert chat.first("x")[0] == n, "no space before the first token"
    parts = st.sampled_from([*MARKS, "<|im_", "end|>", "[IN", "ST]", "<", " ", "\n", "a", "</s>", "<s>"])

    @settings(max_examples=100, deadline=None)
    @given(st.lists(parts, max_size=8).map("".join))
    def check(text):
        plain = vocabulary.encode(text)
        assert not controls & set(plain) and not {1, 2} & set(plain)
        assert vocabulary.decode(plain).lstrip(" ") == text.lstrip(" ")
        ids = chat.first(text)
        assert [i for i in ids if i in controls] == frame
        start = ids.index(13) + 1  # after the line end of "user\n"
        message = vocabulary.encode(text, before="text")
        assert ids[start : start + len(message)] == message, "as the same text elsewhere"

    check()


@given(st.lists(st.sampled_from(["<|a|>", "<|b|>", "on", " ", "\n", "x", "<|"]), max_size=9).map("".join))
def test_white_space_around_added_tokens_goes_where_the_library_puts_it(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "flags"
    if not (folder / "tokenizer.json").exists():
        folder.mkdir()
        tokenizer = train_bpe(folder / "tokenizer.json")
        tokenizer.add_special_tokens([tokenizers.AddedToken("<|a|>", rstrip=True, normalized=False)])
        tokenizer.add_special_tokens([tokenizers.AddedToken("<|b|>", lstrip=True, normalized=False)])
        tokenizer.add_special_tokens([tokenizers.AddedToken("on", single_word=True, normalized=False)])
        tokenizer.save(str(folder / "tokenizer.json"))
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = open_vocabulary(folder / "tokenizer.json")
    wanted = library.encode(text, add_special_tokens=False).ids
    assert vocabulary.encode(text, special=True) == wanted


@pytest.mark.parametrize("special", [True, False])
def test_no_text_spells_an_added_token_of_a_byte_pair_file(tmp_path, special):
    spec = json.loads(train_bpe(tmp_path / "tokenizer.json").to_str())
    for i, text in enumerate(MARKS):
        entry = {"id": 300 + i, "content": text, "special": special, "single_word": False}
        spec["added_tokens"].append({**entry, "lstrip": False, "rstrip": False, "normalized": False})
    spaces = {"id": 305, "content": "  ", "special": False}
    spec["added_tokens"].append({**spec["added_tokens"][-1], **spaces})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    vocabulary = open_vocabulary(tmp_path / "tokenizer.json")
    text = "a" + "".join(MARKS) + "  b"
    assert [i for i in vocabulary.encode(text) if i >= 300] == [305], "only the one of white space"
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert [i for i in vocabulary.encode(text, special=True) if i >= 300] == [*range(300, 306)]


def test_an_ordinary_token_that_the_template_writes_is_a_control_token(tmp_path):
    spec = json.loads(train_bpe(tmp_path / "tokenizer.json").to_str())
    spec["model"]["ignore_merges"], spec["added_tokens"] = True, []
    spec["pre_tokenizer"]["use_regex"] = False
    spec["model"]["vocab"]["<turn>"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "chat_template.jinja").write_text("<turn>{{ messages[-1].content }}<turn>")
    vocabulary = open_vocabulary(tmp_path / "tokenizer.json")
    assert vocabulary.encode("<turn>", special=True) == [300]
    assert 300 not in vocabulary.encode("<turn>")
    assert vocabulary.decode(vocabulary.encode("<turn>")) == "<turn>"


def test_which_tokens_control_a_model():
    more = ("<｜User｜>", "[TOOL_CALLS]", "<s>", "<start_of_turn>", "{tool}", "【end】")
    for token in MARKS + more:
        assert is_control(token, None), token
    plain = ("  ", "\u2581\u2581", "\n\n", "colour", "[]", "<>", "->", ":)", "<b>", "</table>", "...")
    for token in plain:
        assert not is_control(token, None), token
    assert is_control("USER:", "USER: {{ x }}") and not is_control("USER:", None)
    assert is_control("<b>", "<b>{{ x }}</b>")
    for token in ("[0]", "<b>", "(a)", "<table>"):
        assert not is_control(token, None, ordinary=True), token
    assert is_control("<|im_end|>", None, ordinary=True)
    assert is_control("<end>", "{{ x }}<end>", ordinary=True)


def test_how_tokens_are_found():
    token = lambda i, text, **flags: AddedToken(id=i, content=text, **flags)
    splitter = Splitter([token(0, "<a>"), token(1, "<a>b"), token(2, "|x|", lstrip=True, rstrip=True)])
    found = lambda text: [(part, None if t is None else t.id) for part, t in splitter.split(text)]
    assert found("<a>") == [("", 0), ("", None)]
    assert found("1<a>b<a>c") == [("1", 1), ("", 0), ("c", None)]
    assert found("1 |x| \n2") == [("1", 2), ("2", None)]
    assert found("<a") == [("<a", None)]
    assert "<a>" not in splitter.broken("<a><a>b") and len(splitter.broken("<a>x")) == 5
    words = Splitter([token(0, "on", single_word=True)])
    assert [t is not None for _, t in words.split("on and upon on")] == [True, True, False]
