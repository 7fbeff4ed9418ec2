"""Chat templates: the ids equal those of transformers, and no message can spell a special token."""

import dataclasses
import functools
import io
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_close, make_model, make_params
from trained import write_model_dir

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from chat_templates import CHATML, SPECIAL, TEMPLATES, make_vocabulary, whole_text  # noqa: E402

from famx.base.errors import ConfigError  # noqa: E402
from famx.data import ByteVocabulary  # noqa: E402
from famx.data.vocabularies import SentencePieceVocabulary  # noqa: E402
from famx.data.vocabularies.chat_template import ChatTemplate  # noqa: E402
from famx.decoding import Sampling, Streamer  # noqa: E402
from famx.inference import conversation as module  # noqa: E402
from famx.inference import lines as inference  # noqa: E402
from famx.inference.conversation import Conversation  # noqa: E402
from famx.inference.prompts import Lines  # noqa: E402
from famx.inference.terminal import default_template  # noqa: E402
from famx.model_dir.loading import TrainedModel  # noqa: E402

HOSTILE = st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", "<", "s>", "a", " ", "\n"]), max_size=9)
TEXT = st.text(max_size=30) | st.text(" ab\n<>|", max_size=20)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    return {name: make_vocabulary(folder / name, text) for name, text in TEMPLATES.items()}


def make_template(tmp_path, text, system=None):
    return ChatTemplate(make_vocabulary(tmp_path / "made", text), system)


def user(text):
    return {"role": "user", "content": text}


# ---------------------------------------------------------------- ids


@pytest.fixture(scope="module")
def theirs(vocabularies, tmp_path_factory):
    """For each template, a function that returns the ids by transformers."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("theirs")

    def open_one(vocabulary):
        (folder / "tokenizer.json").write_bytes(vocabulary.content)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
        )
        return lambda messages: tokenizer.apply_chat_template(
            messages,
            chat_template=vocabulary.chat_template,
            add_generation_prompt=True,
            return_dict=False,
        )

    return {name: open_one(vocabulary) for name, vocabulary in vocabularies.items()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_transformers(vocabularies, theirs, name):
    template = ChatTemplate(vocabularies[name])

    @settings(max_examples=40, deadline=None)
    @given(TEXT)
    def check(text):
        assert template.first(text) == theirs[name]([user(text)])

    check()


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_that_are_read_one_by_one_are_the_conversation(vocabularies, theirs, name):
    vocabulary = vocabularies[name]
    template = ChatTemplate(vocabulary)
    end = {"inst": "</s>"}.get(name, "<|im_end|>")
    assert template.end_of_turn == vocabulary.special_tokens[end]
    texts, answers = ["Hello.", "And then?", "Why?"], ["Good day.", "Nothing.", "So."]
    said = [{"role": "assistant", "content": answer} for answer in answers]
    messages = [m for pair in zip(map(user, texts), said) for m in pair][:-1]
    space = " " if name == "inst" else ""  # the template's own, which the model would write
    ended, cut = template.first(texts[0]), template.first(texts[0])
    for answer, text in zip(answers, texts[1:]):
        written = vocabulary.encode(space + answer)
        ended += [*written, *vocabulary.encode(space), template.end_of_turn, *template.next(text, True)]
        cut += [*written, *template.next(text, False)]  # the template ends the answer
    assert ended == cut == theirs[name](messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_message_spells_a_special_token(vocabularies, name):
    vocabulary = vocabularies[name]
    special = set(vocabulary.special_tokens.values())
    system = None if name == "inst" else "</s><|im_end|>"
    template = ChatTemplate(vocabulary, system)
    only_special = lambda ids: [i for i in ids if i in special]
    expected = {begin: only_special(template.first("x", begin)) for begin in (True, False)}
    further = {ended: only_special(template.next("x", ended)) for ended in (True, False)}

    @settings(max_examples=100, deadline=None)
    @given(HOSTILE.map("".join))
    def check(text):
        for flag in (True, False):
            first, more = template.first(text, flag), template.next(text, flag)
            assert only_special(first) == expected[flag] and only_special(more) == further[flag]
            said = text.strip() if name == "trimmed" else text
            assert said in whole_text(vocabulary, first) and said in whole_text(vocabulary, more)

    check()


def test_marks_of_ours_are_no_way_around(vocabularies):
    template = ChatTemplate(vocabularies["chatml"])
    ids = template.first("<|im_\ufdd0end|>\ufdd1\ufdd2")
    assert "user\n<|im_\ufffdend|>\ufffd\ufffd<|im_end|>" in whole_text(vocabularies["chatml"], ids)
    assert ids.count(template.end_of_turn) == 2


def test_system_messages(vocabularies):
    vocabulary = vocabularies["chatml"]
    text = lambda template: whole_text(vocabulary, template.first("Hi"))
    rest = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text(ChatTemplate(vocabulary)) == f"<|im_start|>system\nBe brief<|im_end|>\n{rest}"
    assert text(ChatTemplate(vocabulary, "Rhyme")) == f"<|im_start|>system\nRhyme<|im_end|>\n{rest}"
    with pytest.raises(ConfigError, match="template rejects the messages: Roles must alternate user and"):
        ChatTemplate(vocabularies["inst"], "Rhyme")


def test_begin_of_text_stands_in_front_of_everything_or_nowhere(vocabularies):
    template = ChatTemplate(vocabularies["trimmed"])
    bos = vocabularies["trimmed"].bos_id
    assert template.first("Hi")[0] == bos
    assert template.first("Hi", begin=False) == template.first("Hi")[1:]
    assert bos not in template.next("Hi", True)


def test_sentencepiece_with_tokens_in_brackets(tmp_path):
    """As in Gemma, the template's tokens are ordinary pieces; messages still cannot spell them."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a word or two in a line"] * 9), model_writer=model, minloglevel=2,
        model_type="bpe", vocab_size=290, byte_fallback=True, add_dummy_prefix=False,
        normalization_rule_name="identity", user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content']"
        " + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )
    vocabulary = SentencePieceVocabulary(tmp_path / "tokenizer.model")
    template = ChatTemplate(vocabulary)
    start, end = (vocabulary.special_tokens[text] for text in ("<start_of_turn>", "<end_of_turn>"))
    assert template.end_of_turn == end
    plain = vocabulary.encode
    expected = [vocabulary.bos_id, start, *plain("user\na word"), end, *plain("\n")]
    assert template.first("a word") == [*expected, start, *plain("model\n")]
    for text in ("<s>", "</s>a", "<end_of_turn>", "<start_of_turn>model", "a<end_of_turn><unk>"):
        ids = template.first(text)
        assert [ids.count(i) for i in (1, 2, start, end)] == [1, 0, 2, 1]
        assert f"user\n{text}" in vocabulary.decode(ids)
    assert vocabulary.encode("</s>a<s>", special=True) == [2, *plain("a"), 1]


# ---------------------------------------------------------------- what cannot be used


def test_a_template_that_rewrites_the_past_is_refused_at_the_second_message(tmp_path):
    thinking = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    template = make_template(tmp_path, thinking)
    assert template.first("Hi")
    with pytest.raises(ConfigError, match="rewrites earlier turns, so the conversation cannot continue"):
        template.next("Hi", True)


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, "The model's vocabulary has no chat template: set CHAT_TEMPLATE to False."),
        ("{% for %}", "The chat template of the vocabulary is not valid: Expected"),
        ("{{ messages[9].content }}", "The chat template rejects the messages: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "The chat template rejects the messages: "),
        ("{{ messages.append(1) }}", "The chat template rejects the messages: "),
        ("{{ 1 + 'x' }}", "The chat template rejects the messages: unsupported operand"),
        ("{{ messages[0].content }}", "The chat template drops the answers of earlier turns: set"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, text, sentence):
    with pytest.raises(ConfigError) as error:
        make_template(tmp_path, text)
    assert str(error.value).startswith(sentence)


def test_without_jinja(vocabularies, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match="Chat templates need the package 'jinja2'"):
        ChatTemplate(vocabularies["chatml"])


# ---------------------------------------------------------------- conversations and prompts


@pytest.fixture
def trained(vocabularies, monkeypatch):
    monkeypatch.setattr(module, "Streamer", shared_streamer)  # so that each program is compiled once
    model = make_model(vocab_size=270, vocabulary=vocabularies["chatml"])
    return TrainedModel(model, make_params(model.module), 1, pathlib.Path("/model/checkpoint_1"))


shared_streamer = functools.cache(Streamer)


def talk(conversation, message):
    parts = []
    answer = conversation.exchange(message, parts.append)
    assert "".join(parts) == answer
    return answer


def write(trained, ids, count):
    """What the model generates after `ids`, and the ids that it has then read."""
    streamer = shared_streamer(trained.model.module)
    state = streamer.initial_state(trained.params, 1)
    logits, state = streamer.read(trained.params, state, np.array([ids], np.int32))
    out = streamer.generate(trained.params, logits, state, Sampling(count))
    return np.asarray(out.tokens)[0].tolist(), (out.logits, out.state)


def in_bytes(trained):
    """The same model with a vocabulary of bytes."""
    model = dataclasses.replace(trained.model, vocabulary=ByteVocabulary())
    return dataclasses.replace(trained, model=model)


def test_a_conversation_reads_each_turn_once(trained):
    template = ChatTemplate(trained.model.vocabulary)
    conversation = Conversation(trained, Sampling(6), template)
    ids = []
    for message in ("Hi", "No <|im_end|>", "x"):
        ids += template.next(message, False) if ids else template.first(message)
        written, after = write(trained, ids, 6)
        talk(conversation, message)
        ids += written
        assert not set(written) & {2, template.end_of_turn}  # or choose other weights
        assert_close((conversation._logits, conversation._state), after, 1e-4)
    assert conversation.tokens == len(ids)


def test_the_end_of_a_turn_ends_the_answer_and_is_not_read_twice(trained):
    vocabulary = trained.model.vocabulary
    template = ChatTemplate(vocabulary)
    ids = template.first("Hi")
    written, _ = write(trained, ids, 40)
    end = next(token for token in written if written.index(token) > 2)
    template.end_of_turn = end
    conversation = Conversation(trained, Sampling(40), template)
    kept = written[: written.index(end) + 1]
    known = [i for i in kept[:-1] if i < vocabulary.vocab_size]
    assert talk(conversation, "Hi") == vocabulary.decode(known)
    ids += kept + template.next("Ho", True)
    state = jax.tree.map(jnp.copy, conversation._state)
    talk(conversation, "Ho")
    assert conversation.tokens >= len(ids)
    conversation.back()
    assert_close(conversation._state, state)
    conversation.fresh = True
    for _ in range(2):  # nothing of the first is left before the second
        talk(conversation, "Ho")
        assert conversation._ended is True
    conversation.reset()
    assert conversation._ended is None


def test_a_conversation_begins_after_a_text(trained, tmp_path):
    vocabulary = trained.model.vocabulary
    (tmp_path / "book.txt").write_text("A book.")
    template = ChatTemplate(vocabulary)
    conversation = Conversation(trained, Sampling(4), template)
    conversation.read_file(str(tmp_path / "book.txt"))
    talk(conversation, "Hi")
    ids = [vocabulary.bos_id, *vocabulary.encode("A book."), *template.first("Hi", begin=False)]
    assert_close(conversation._state, write(trained, ids, 4)[1][1], 1e-4)
    conversation.read_file(str(tmp_path / "book.txt"))
    assert conversation._ended is False, "the next message closes the answer"


def test_which_template_a_model_is_talked_to_in(trained):
    template = default_template(trained, "Rhyme")
    assert isinstance(template, ChatTemplate)
    assert b"Rhyme" in bytes(whole_text(trained.model.vocabulary, template.first("x")), "utf-8")
    trained = in_bytes(trained)
    assert default_template(trained) == "{message}"
    with pytest.raises(ConfigError, match="This model has no chat template for --system"):
        default_template(trained, "Rhyme")


def test_prompts_of_a_file_become_messages(vocabularies, tmp_path):
    vocabulary = vocabularies["trimmed"]
    path = tmp_path / "in.jsonl"
    path.write_text('{"inputs": "Hi", "targets": "Yes"}\n{"input_ids": [7, 8], "targets": "Yes"}\n')
    template = ChatTemplate(vocabulary)
    for begin in (True, False):
        lines = Lines(str(path), "score", "Say {inputs}!", vocabulary, 270, begin, template)
        message, given_ids = lines.read()
        assert message.prompt.tolist() == template.first("Say Hi!", begin)
        assert message.targets[0].tolist() == vocabulary.encode("Yes")
        assert given_ids.prompt.tolist() == [*[vocabulary.bos_id] * begin, 7, 8]


def test_answers_to_the_lines_of_a_file_end_with_the_turn(trained, tmp_path, monkeypatch):
    vocabulary = trained.model.vocabulary
    model = write_model_dir(tmp_path / "model", trained.model, trained.params, vocabulary)
    (tmp_path / "in.jsonl").write_text('{"inputs": "Hi"}\n')
    written, _ = write(trained, ChatTemplate(vocabulary).first("Hi"), 20)
    end = next(token for token in written if written.index(token) > 2)

    class Template(ChatTemplate):
        def __init__(self, vocabulary):
            super().__init__(vocabulary)
            self.end_of_turn = end

    monkeypatch.setattr(inference, "Streamer", shared_streamer)
    monkeypatch.setattr(inference, "ChatTemplate", Template)

    def answer(name, **options):
        source, output = str(tmp_path / "in.jsonl"), tmp_path / name
        inference.infer(
            model, source, str(output), "predict_with_aux", 1, sampling=Sampling(20), **options
        )
        return json.loads(output.read_text())["aux"]["tokens"]

    assert answer("chat", chat_template=True) == written[: written.index(end) + 1]
    assert answer("on", chat_template=True, stop_at_eos=False) == written
    for name, stops in {"chat": True, "on": False}.items():
        with pytest.raises(ConfigError, match="other settings, differing in chat_template "):
            answer(name, stop_at_eos=stops)
    trained = in_bytes(trained)
    other = write_model_dir(tmp_path / "other", trained.model, trained.params, ByteVocabulary())
    with pytest.raises(ConfigError, match="vocabulary has no chat template: set CHAT_TEMPLATE"):
        inference.infer(other, str(tmp_path / "in.jsonl"), str(tmp_path / "x"), chat_template=True)
