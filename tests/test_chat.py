"""`famx.chat`: answers, the state after them, and the program as a user runs it."""

import copy
import functools
import io
import itertools
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import start_process
from tiny import assert_close, assert_identical, make_model, make_params
from trained import write_model_dir

from famx import chat
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.data import ByteVocabulary
from famx.data.probes.passkey_text import passkey_words
from famx.decoding import Sampling, Streamer
from famx.inference import conversation as module
from famx.inference.conversation import Conversation, check_template, load_with_vocabulary
from famx.inference.terminal import HELP, converse, reply, unescape
from famx.model_dir.loading import TrainedModel
from famx.model_dir.memory_file import save_memory

QUESTION = "the grass is green."
KEPT = "Further messages and answers will be kept."
NOT_KEPT = "Further messages and answers will not be kept."
WARM = Sampling(40, temperature=1.5)


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    """Conversations share one reader, so that each program is compiled once."""
    monkeypatch.setattr(module, "Streamer", shared_streamer)


shared_streamer = functools.cache(Streamer)


def make_trained(vocabulary=None) -> TrainedModel:
    """A model of random weights, which has more ids than its vocabulary."""
    vocabulary = passkey_words() if vocabulary is None else vocabulary
    model = make_model(vocab_size=128, vocabulary=vocabulary)
    return TrainedModel(model, make_params(model.module, seed=1), 1, pathlib.Path("/model/checkpoint_1"))


TRAINED = make_trained()
VOCABULARY = TRAINED.model.vocabulary


def talk(conversation, message=QUESTION):
    """`(answer, the parts in which it was shown)`."""
    parts = []
    answer = conversation.exchange(message, parts.append)
    assert "".join(parts) == answer
    return answer, [part for part in parts if part]


def read_at_once(ids):
    streamer = shared_streamer(TRAINED.model.module)
    state = streamer.initial_state(TRAINED.params, 1)
    return streamer.read(TRAINED.params, state, np.array([ids], np.int32))


def write_at_once(ids, count):
    logits, state = read_at_once(ids)
    out = shared_streamer(TRAINED.model.module).generate(
        TRAINED.params, logits, state, Sampling(count)
    )
    return np.asarray(out.tokens)[0].tolist()


def decode(ids):
    return VOCABULARY.decode([i for i in ids if i < VOCABULARY.vocab_size])


def assert_has_read(conversation, ids):
    logits, state = read_at_once(ids)
    assert_close((conversation._logits, conversation._state), (logits, state), 1e-4)


PROMPT = [VOCABULARY.bos_id, *VOCABULARY.encode(QUESTION)]


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("count", [1, 31, 32, 70])
def test_an_answer_is_what_the_model_writes_at_once(count):
    conversation = Conversation(TRAINED, Sampling(count))
    answer, parts = talk(conversation)
    tokens = write_at_once(PROMPT, count)
    assert VOCABULARY.eos_id not in tokens  # otherwise choose other weights
    assert answer == decode(tokens)
    assert len(parts) == -(-count // 32)
    assert_has_read(conversation, PROMPT + tokens)


def test_the_conversation_goes_on_after_the_answer():
    conversation = Conversation(TRAINED, Sampling(9))
    first = write_at_once(PROMPT, 9)
    second = PROMPT + first + VOCABULARY.encode("river stone")
    talk(conversation)
    answer, _ = talk(conversation, "river stone")
    assert answer == decode(write_at_once(second, 9))
    assert_has_read(conversation, second + write_at_once(second, 9))


def test_the_template_is_what_is_read():
    conversation = Conversation(TRAINED, Sampling(3), template="Find {message} and memorize {message}")
    talk(conversation, "bread")
    ids = [VOCABULARY.bos_id, *VOCABULARY.encode("Find bread and memorize bread")]
    assert_has_read(conversation, ids + write_at_once(ids, 3))


def test_end_of_text_ends_an_answer_and_was_read():
    tokens = write_at_once(PROMPT, 40)
    end = next(token for token in tokens if tokens.index(token) > 2)
    vocabulary = copy.copy(VOCABULARY)
    vocabulary.eos_id = end
    conversation = Conversation(make_trained(vocabulary), Sampling(40))
    answer, _ = talk(conversation)
    written = tokens[: tokens.index(end) + 1]
    assert answer == decode(written[:-1])
    assert_has_read(conversation, PROMPT + written)


def test_a_stop_text_cuts_the_answer_wherever_it_lies():
    """It may lie inside a piece of the answer, across two pieces, inside a word, or at the start."""
    conversation = Conversation(TRAINED, Sampling(70, temperature=1.0))
    whole, parts = talk(conversation)
    border = len(parts[0])
    stops = [whole[border - 3 : border + 3], whole[:2], whole[5:12], whole[border + 9 : border + 15]]
    for stop in [*([s] for s in stops), stops]:
        conversation = Conversation(TRAINED, Sampling(70, temperature=1.0), stop=stop)
        answer, _ = talk(conversation)
        cut = min(whole.index(text) for text in stop)
        assert answer == whole[:cut]


def test_exactly_what_stands_before_a_stop_text_was_read():
    tokens = write_at_once(PROMPT, 40)
    text = decode(tokens)
    stop = next(word for word in text.split() if word.isalpha() and text.index(word) > 20)
    conversation = Conversation(TRAINED, Sampling(40), stop=[stop])
    answer, _ = talk(conversation)
    kept = next(tokens[:n] for n in range(40, 0, -1) if len(decode(tokens[:n])) <= len(answer))
    assert_has_read(conversation, PROMPT + kept)


def test_no_half_character_is_shown():
    """A four-byte character that is split between two pieces is shown once and complete."""
    assert module._settled("ab\ufffd", ()) == 2
    assert module._settled("ab\ufffd\ufffdc", ()) == 5
    assert module._settled("ab<|e", ["<|end|>", "|x"]) == 2
    assert module._settled("ab<|end|", ["<|end|>"]) == 2
    assert module._settled("ab<", ["<|end|>", "b<|"]) == 1
    assert module._settled("ab", ["abc"]) == 0


def test_ids_beyond_the_vocabulary_have_no_text():
    assert TRAINED.model.config.vocab_size > VOCABULARY.vocab_size
    answers = [talk(Conversation(TRAINED, WARM, seed=seed))[0] for seed in range(5)]
    assert len(set(answers)) == 5


def test_the_seed_alone_decides_what_is_drawn():
    first = talk(Conversation(TRAINED, WARM, seed=3))
    assert talk(Conversation(TRAINED, WARM, seed=3)) == first
    assert talk(Conversation(TRAINED, WARM, seed=4)) != first


# ---------------------------------------------------------------- the state after messages


@pytest.mark.parametrize("sampling", [Sampling(12), WARM])
def test_fresh_questions_get_the_same_answers_in_any_order(tmp_path, sampling):
    book = tmp_path / "book.txt"
    book.write_text("The sun is yellow. Here we go. " * 9)
    reader = Conversation(TRAINED)
    reader.read_file(str(book))
    reader.save(str(tmp_path / "book.famem"))
    questions = ["river", "The sky is", "stone stone window"]
    found = set()
    for order in itertools.permutations(questions):
        conversation = Conversation(TRAINED, sampling, fresh=True)
        conversation.load(str(tmp_path / "book.famem"))
        state = jax.tree.map(jnp.copy, conversation._state)
        answers = {question: talk(conversation, question)[0] for question in order}
        assert_identical(conversation._state, state)
        found.add(tuple(answers[question] for question in questions))
    (answers,) = found
    assert len(set(answers)) == 3
    for question, answer in zip(questions, answers):  # the same in a conversation that keeps them
        conversation = Conversation(TRAINED, sampling)
        conversation.load(str(tmp_path / "book.famem"))
        assert talk(conversation, question)[0] == answer


def test_back_takes_one_exchange_back():
    conversation = Conversation(TRAINED, Sampling(5))
    talk(conversation)
    state = jax.tree.map(jnp.copy, conversation._state)
    talk(conversation, "river")
    conversation.back()
    assert_identical(conversation._state, state)
    with pytest.raises(ConfigError, match="no exchange to undo"):
        conversation.back()


def test_an_exchange_before_something_else_cannot_be_taken_back(tmp_path):
    (tmp_path / "x.txt").write_text("bread")
    conversation = Conversation(TRAINED, Sampling(5))
    after = (
        lambda: conversation.read_file(str(tmp_path / "x.txt")),
        conversation.reset,
    )
    for do in after:
        talk(conversation)
        do()
        with pytest.raises(ConfigError, match="no exchange to undo"):
            conversation.back()


@pytest.mark.parametrize("shown", [1, 2])
def test_an_interrupted_answer_is_kept_as_far_as_it_came(shown):
    conversation, parts = Conversation(TRAINED, Sampling(96)), []

    def show(text):
        parts.append(text)
        if len(parts) == shown:
            raise KeyboardInterrupt

    conversation.exchange(QUESTION, show)
    assert_has_read(conversation, PROMPT + write_at_once(PROMPT, 32 * shown))
    conversation.back()
    assert conversation.tokens == 0


def test_a_question_interrupted_before_its_answer_leaves_no_trace(monkeypatch):
    conversation = Conversation(TRAINED, Sampling(96))
    talk(conversation)
    state = jax.tree.map(jnp.copy, conversation._state)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversation._streamer, "generate", interrupt)
        assert talk(conversation, "river") == ("", [])
    assert_identical(conversation._state, state)
    talk(conversation, "river")


def test_reading_that_is_interrupted_leaves_no_trace(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("bread and butter. " * 300)
    monkeypatch.setattr(module, "_FILE_BLOCKS", 1)
    conversation = Conversation(TRAINED, Sampling(5))
    talk(conversation)
    state = jax.tree.map(jnp.copy, conversation._state)

    def interrupt(done, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.read_file(str(tmp_path / "x.txt"), interrupt)
    assert_identical(conversation._state, state)
    assert conversation.sources == []
    conversation.back()


def test_an_empty_message_continues_what_was_read():
    conversation = Conversation(TRAINED, Sampling(6))
    talk(conversation)
    answer, _ = talk(conversation, "")
    assert answer == decode(write_at_once(PROMPT, 12)[6:])


# ---------------------------------------------------------------- lines of standard input


@pytest.fixture
def say(monkeypatch, capsys):
    """A function that gives lines to a conversation and returns (output, errors)."""

    def say(conversation, *lines):
        data = "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        converse(conversation)
        return capsys.readouterr()

    return say


def test_commands(say, tmp_path):
    (tmp_path / "a book.txt").write_text("The sun is yellow. " * 20)
    memory = tmp_path / "a book.famem"
    conversation = Conversation(TRAINED, Sampling(5))
    out, err = say(
        conversation,
        f"/read {tmp_path / 'a book.txt'}",
        f"/save {memory}",
        QUESTION,
        "/back",
        "/fresh",
        QUESTION,
        "/keep",
        QUESTION,
        "",
        "/state",
        "/reset",
        "/state",
        f"/load {memory}",
        f"/replace {memory}",
        "/help",
    )
    size = conversation.num_bytes
    end = f"{size:,} bytes of state, whatever the length of the text."
    begun = f"101 tokens read (a book.txt), 12 memory updates, {end}"
    none = f"0 tokens read, 0 memory updates, {end}"
    lines = out.splitlines()
    answer = lines[2]
    asked = begun.replace("101", "111").replace("12 m", "13 m")
    assert lines[:-12] == [
        f"101 tokens read from {tmp_path / 'a book.txt'}.", f"Saved to {memory}.", answer, begun,
        NOT_KEPT, answer, KEPT, answer, asked,
        none, none, begun, f"Saved to {memory}.",
    ]  # fmt: skip
    assert "\n".join(lines[-12:]) == HELP and err == ""


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("/nope", "There is no command /nope: /help lists the commands."),
        ("/READ x", "There is no command /READ: /help lists the commands."),
        ("/read", "/read needs a file."),
        ("/reset x", "/reset takes no argument."),
        ("/read {}/no.txt", "{}/no.txt cannot be read: No such file or directory."),
        ("/read {}", "{} cannot be read: Is a directory."),
        ("/read {}/empty.txt", "{}/empty.txt contains no text."),
        ("/load {}/no.famem", "There is no memory file {}/no.famem."),
        ("/load {}/empty.txt",
         "{}/empty.txt is not a whole memory file: make it again, or copy it again."),
        ("/load {}/two.famem",
         "{}/two.famem holds 2 memories, but a conversation can load only one."),
        ("/save {}/empty.txt", "{}/empty.txt already exists: choose another name, or use /replace."),
        ("/save {}/two.famem", "{}/two.famem already exists: choose another name, or use /replace."),
        ("/replace", "/replace needs a file."),
        ("/save {}/no/x", "{}/no/x cannot be written: No such file or directory."),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence_and_changes_nothing(say, tmp_path, line, sentence):
    (tmp_path / "empty.txt").write_text("")
    conversation = Conversation(TRAINED, Sampling(5))
    talk(conversation)
    twice = conversation._state.take([0, 0])
    save_memory(tmp_path / "two.famem", TRAINED, conversation._logits[jnp.array([0, 0])], twice)
    state = jax.tree.map(jnp.copy, conversation._state)
    out, err = say(conversation, line.format(tmp_path), "/keep")
    assert (out, err) == (f"{KEPT}\n", f"famx: {sentence.format(tmp_path)}\n")
    assert_identical(conversation._state, state)


def test_a_memory_file_that_was_loaded_or_saved_is_not_replaced_unasked(say, tmp_path):
    path = tmp_path / "x.famem"
    conversation = Conversation(TRAINED, Sampling(5))
    refused = f"famx: {path} already exists: choose another name, or use /replace.\n"
    save, load = f"/save {path}", f"/load {path}"
    out, err = say(conversation, QUESTION, save, "river", save, load, save)
    assert out.count(f"Saved to {path}.") == 1 and err == 2 * refused
    out, err = say(conversation, "river", f"/replace {path}")
    assert f"Saved to {path}." in out and err == ""
    again = Conversation(TRAINED)
    again.load(str(path))
    assert again.tokens == conversation.tokens
    with pytest.raises(ConfigError, match="already exists"):
        conversation.save(str(path))


class Screen(io.StringIO):
    """Standard output and error of a terminal, on which both are seen."""

    def isatty(self):
        return True


def test_the_bar_of_reading_is_gone_before_the_sentence(monkeypatch, tmp_path):
    (tmp_path / "x.txt").write_text("The sun is yellow. " * 20)
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    reply(Conversation(TRAINED), f"/read {tmp_path / 'x.txt'}")
    *_, last = screen.getvalue().split("\r")
    assert last == f"101 tokens read from {tmp_path / 'x.txt'}.\n"


@pytest.mark.parametrize("stage", ["reading", "first piece", "second piece"])
def test_ctrl_c_does_not_wait_for_the_model(stage, monkeypatch):
    """Each program is held up until the answer has been stopped."""
    conversation, parts = Conversation(TRAINED, Sampling(96)), []
    talk(conversation, "river")
    before, streamer = conversation.tokens, conversation._streamer
    expected, _ = talk(conversation, "bread")
    conversation.back()
    held, released, calls = threading.Event(), threading.Event(), []

    def holding(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == {"reading": 1, "first piece": 2, "second piece": 3}[stage]:
                held.set()
                released.wait(60)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(streamer, "read", holding(streamer.read))
        patch.setattr(streamer, "generate", holding(streamer.generate))
        began = time.monotonic()
        answer = conversation.exchange("bread", parts.append, held.is_set)
        assert time.monotonic() - began < 50 and not released.is_set()
        released.set()
    assert answer == "".join(parts) and expected.startswith(answer)
    assert (answer != "") == (stage == "second piece")
    read = len(VOCABULARY.encode("bread")) + 32 if stage == "second piece" else 0
    assert conversation.tokens == before + read
    rest, _ = talk(conversation, "" if stage == "second piece" else "bread")
    words = [*answer.split(), *rest.split()]
    assert words[: len(expected.split())] == expected.split()


def test_a_second_message_compiles_nothing(monkeypatch):
    monkeypatch.setattr(module, "Streamer", Streamer)
    model = make_model(vocab_size=128, vocabulary=VOCABULARY, block_size=64)
    params = make_params(model.module, seed=1)
    conversation = Conversation(TrainedModel(model, params, 1, pathlib.Path("/m")), Sampling(5))
    compiled = []
    listen = lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        talk(conversation, "the grass is green. the sky is blue. " * 2)
        assert compiled, "the listener hears nothing"
        compiled.clear()
        for message in ("river", "the sun is yellow. the sky is blue.", "bread and butter. " * 2):
            talk(conversation, message)
        assert conversation.tokens > 50 and compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_to_save_and_nothing_to_take_back(say, tmp_path):
    out, err = say(Conversation(TRAINED), f"/save {tmp_path / 'x'}", "/back")
    assert out == "" and not (tmp_path / "x").exists()
    assert err.splitlines() == [
        "famx: Nothing has been read yet, so there is no memory to save.",
        "famx: There is no exchange to undo.",
    ]


def test_quit_and_messages_with_a_slash(say):
    conversation = Conversation(TRAINED, Sampling(2))
    out, err = say(conversation, "//river stone", "/quit", "/nope")
    assert len(out.splitlines()) == 1 and err == ""
    words = [VOCABULARY.bos_id, *VOCABULARY.encode("/river stone")]
    assert conversation.tokens == len(words) + 2


def test_escapes():
    assert unescape(r"a\nb\tc\\nd\x ä") == "a\nb\tc\\nd\\x ä"


def test_templates_without_the_message_are_refused():
    for template in ("", "{}", "{text}", "{message", "{message:d}", "{message.x}", "{0}", "{{message}}"):
        with pytest.raises(ConfigError, match="must contain {message} and no other field"):
            check_template(template)


def test_templates_with_the_message():
    for template in ("{message}", "Q: {message}\nA:", "{{x}} {message} {message}"):
        check_template(template)


# ---------------------------------------------------------------- the program


def start(*args, **options):
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **options}
    return start_process(
        [sys.executable, "-m", "famx.chat", *args],
        cwd=gin_utils.gin_root(), stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def model_directory(path, vocabulary=VOCABULARY) -> str:
    return write_model_dir(path, TRAINED.model, TRAINED.params, vocabulary)


@pytest.mark.slow
def test_a_script_in_two_processes(tmp_path):
    directory = model_directory(tmp_path / "model")
    (tmp_path / "x.txt").write_text("The sun is yellow. " * 20)
    arguments = (f"--checkpoint={directory}", "--max_new_tokens=40", r"--template={message}\n")
    script = f"/read {tmp_path / 'x.txt'}\n/save {tmp_path / 'x.famem'}\n/nope\n{QUESTION}\n/state\n"
    process = start(*arguments)
    out, err = process.communicate(script)
    assert process.returncode == 1, err
    _, _, answer, state = out.splitlines()
    assert "famx: There is no command /nope" in err and "Traceback" not in err
    assert state.startswith("146 tokens read (x.txt), 18 memory updates, ")

    memory = f"--memory={tmp_path / 'x.famem'}"
    process = start(*arguments, memory, "--fresh")
    out, err = process.communicate(f"{QUESTION}\nriver\n{QUESTION}\n/keep\n{QUESTION}\n/state")
    assert process.returncode == 0, err
    first, _, again, _, kept, end = out.splitlines()
    assert first == again == kept == answer and end == state


@pytest.mark.slow
def test_a_terminal_has_a_prompt_and_ctrl_c_ends_the_answer_alone(tmp_path):
    directory = model_directory(tmp_path / "model")
    here, there = pty.openpty()
    process = start(
        f"--checkpoint={directory}", "--max_new_tokens=1000000", stdin=there, stdout=there
    )
    os.close(there)
    text = ""

    def wait_for(mark, length=0, again=lambda: None):
        nonlocal text
        end = time.monotonic() + 240
        while mark not in text or len(text) < length:
            assert time.monotonic() < end and process.poll() is None, text
            if select.select([here], [], [], 1)[0]:
                text += os.read(here, 4096).decode(errors="replace")
            else:
                again()  # readline misses a signal that comes just before it waits for a key
        found, text = text, ""
        return found

    try:
        found = wait_for(" tokens] > ")
        assert "/help lists the commands." in found and "[0 tokens] > " in found
        os.write(here, f"{QUESTION}\n".encode())
        wait_for("", length=500)  # the line, and more than the first piece of an answer
        process.send_signal(signal.SIGINT)
        found = wait_for(" tokens] > ")
        count = int(found.rsplit("[", 1)[1].split()[0].replace(",", ""))
        assert 32 < count < 1_000_000
        drop_line = lambda: process.send_signal(signal.SIGINT)
        drop_line()
        wait_for(" tokens] > ", again=drop_line)
        os.write(here, b"/back\n")
        assert "[0 tokens] > " in wait_for(" tokens] > ")
        os.write(here, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(here)


@pytest.fixture
def bad_input(monkeypatch, capsys):
    """A function that runs famx.chat in this process and returns its error sentence."""
    monkeypatch.setattr("famx.inference.conversation.load_model", _never)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["chat", *args])
        with pytest.raises(SystemExit) as caught:
            gin_utils.run(chat.main, chat.define_flags, gin_flags=False)
        *_, last = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 2
        return last.removeprefix("famx: error: ")

    return call


def _never(*args):
    raise AssertionError("the weights were read in spite of bad input")


def test_what_is_wrong_is_told_before_the_start(bad_input, tmp_path):
    bare, small = tmp_path / "bare", tmp_path / "small"
    model_directory(bare, None)
    model_directory(small, ByteVocabulary())
    sentences = {
        (): "--checkpoint is not set: add --checkpoint=MODEL_DIR or MODEL_DIR/checkpoint_<step>.",
        ("--checkpoint=/no/such",): "There is no checkpoint /no/such: /no/such is not a directory.",
        (f"--checkpoint={tmp_path}",): "is not the directory of a trained model: it has no model.json.",
        (f"--checkpoint={bare}",): "has no vocabulary.json, so text cannot be encoded: save the model's",
        (f"--checkpoint={small}",): "has 259 tokens, the model only 128: replace it by the vocabulary",
        ("--template=none",): "The template 'none' is not valid: it must contain {message}",
        ("--temperature=-1",): "--temperature must be a number of at least 0, not -1.",
        ("--memory=/no/such",): "There is no memory file /no/such.",
        ("stray",): "Unknown argument stray: see --help.",
    }
    for args, sentence in sentences.items():
        assert sentence in bad_input(*args)


def test_where_positions_end_a_conversation_says_so():
    conversation = Conversation(TRAINED, Sampling(4))
    conversation.exchange("the grass", lambda text: None)
    state = conversation._state
    conversation._state = state.replace(position=state.position * 0 + (2**31 - 3))
    with pytest.raises(ConfigError, match="positions end at 2,147,483,647"):
        conversation.exchange("the sky is blue. " * 5, lambda text: None)
    with pytest.raises(ConfigError, match="positions end at 2,147,483,647"):
        conversation.exchange("the", lambda text: None)


def test_a_directory_without_checkpoints(tmp_path):
    model_directory(tmp_path)
    for path in tmp_path.glob("checkpoint_*"):
        path.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="There is no checkpoint in"):
        load_with_vocabulary(str(tmp_path))
