"""A conversation in a terminal or a script: each line of standard input is a message or a command."""

import os
import re
import signal
import sys
from collections.abc import Sequence

from famx.base.errors import ConfigError
from famx.base.signals import graceful_stop
from famx.data.vocabularies.chat_template import ChatTemplate
from famx.decoding import Sampling
from famx.inference.conversation import Conversation, check_template, load_with_vocabulary
from famx.inference.reading import ReadProgress
from famx.model_dir.loading import TrainedModel
from famx.model_dir.memory_file import read_header

HELP = """\
/read FILE     read a text file
/save FILE     write the current state to a new memory file
/replace FILE  the same, also if the file exists
/load FILE     replace the current state by that of a memory file
/reset         forget everything
/fresh         answer each further message from the current state, and keep neither
/keep          keep further messages and answers
/back          undo the last message and its answer
/state         show what has been read
/help          list these commands
/quit          end the conversation, as the end of input does
Anything else is a message. Write // for a message that begins with /. Ctrl-C stops an answer."""


def chat(
    checkpoint: str | None,
    adapter: str | None = None,
    memory: str | None = None,
    fresh: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    template: str | None = None,
    system: str | None = None,
    stop: Sequence[str] = (),
) -> bool:
    r"""Loads a model and answers the lines of standard input; see `converse`, also for the result.

    Args:
      checkpoint: `MODEL_DIR` or `MODEL_DIR/checkpoint_<step>`.
      adapter: saved adapter, see `famx.model_dir.loading.load_model`.
      memory: memory file whose state the conversation starts from; None: an empty state.
      fresh: whether to answer each message from the same state, see `Conversation`.
      max_new_tokens, temperature, top_k, top_p: see `famx.decoding.Sampling`.
      seed: random seed for sampling.
      template: format of a message, with `{message}` in it and `\n` for a line end; None: the model's
        chat template, or the plain message if it has none.
      system: system message for the model's chat template.
      stop: texts that end an answer, with `\n` for a line end.

    Raises:
      ConfigError: a setting is not valid; known before the weights are read where possible.
    """
    if template is not None:
        template = unescape(template)
        check_template(template)
        if system is not None:
            raise ConfigError("--system is for the model's own chat template: put it into --template.")
    if "" in stop:
        raise ConfigError("--stop is an empty text, with which every answer would end: leave it out.")
    try:
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p)
    except ValueError as error:
        raise ConfigError(f"The sampling settings are not valid: {error}") from error
    if memory:
        read_header(memory)
    trained = load_with_vocabulary(checkpoint, adapter)
    conversation = Conversation(
        trained,
        sampling,
        default_template(trained, system) if template is None else template,
        [unescape(text) for text in stop],
        seed,
        fresh,
    )
    if memory:
        conversation.load(memory)
    return converse(conversation)


def default_template(trained: TrainedModel, system: str | None = None) -> str | ChatTemplate:
    """Template of a model: its chat template, or the plain message if it has none.

    Raises:
      ConfigError: the chat template cannot be used, or there is none to put a system message into.
    """
    vocabulary = trained.model.vocabulary
    if vocabulary.chat_template:
        return ChatTemplate(vocabulary, system)
    if system is not None:
        raise ConfigError("This model has no chat template for --system: put it into --template.")
    return "{message}"


def unescape(text: str) -> str:
    r"""Replaces the escapes `\n`, `\t` and `\\` by the characters that they stand for."""
    marks = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda escape: marks[escape[0]], text)


def converse(conversation: Conversation) -> bool:
    """Answers the lines of standard input until it ends or a line says /quit.

    A line that cannot be answered is said on standard error, and the next one is read. Returns whether
    all lines of a script were answered; True in a terminal.
    """
    terminal, answered = sys.stdin.isatty(), True
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    if terminal:
        import readline  # noqa: F401, gives `input` a history

        print(f"{state_line(conversation)} /help lists the commands.")
    while True:
        prompt = f"[{conversation.tokens:,} tokens] > "
        try:
            line = input(prompt if terminal else "").strip()
            if line == "/quit":
                return answered
            if line:
                reply(conversation, line)
        except EOFError:
            if terminal:
                print()
            return answered
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()  # ends the line that was being typed
        except ConfigError as error:
            print(f"famx: {error}", file=sys.stderr, flush=True)
            answered = terminal


def reply(conversation: Conversation, line: str) -> None:
    """Answers a message or carries out a command, and prints the result.

    Raises:
      ConfigError: the command cannot be carried out; the conversation is unchanged.
    """
    if not line.startswith("/") or line.startswith("//"):
        show = lambda text: print(text, end="", flush=True)
        # A KeyboardInterrupt could be swallowed by code of other packages.
        with graceful_stop((signal.SIGINT,), exit_on_repeat=False) as stop:
            conversation.exchange(line.removeprefix("/"), show, stop)
        print(flush=True)
        return
    command, _, name = line.partition(" ")
    takes_file = command in ("/read", "/save", "/replace", "/load")
    path = os.path.expanduser(name.strip())
    if takes_file != bool(path) and command in HELP.split():
        raise ConfigError(f"{command} needs a file." if takes_file else f"{command} takes no argument.")
    match command:
        case "/read":
            with ReadProgress(path) as progress:
                count = conversation.read_file(path, progress)
            print(f"{count:,} tokens read from {path}.")  # after the bar is gone
        case "/save" | "/replace":
            if command == "/save" and os.path.exists(path):
                raise ConfigError(f"{path} already exists: choose another name, or use /replace.")
            conversation.save(path, overwrite=True)
            print(f"Saved to {path}.")
        case "/load":
            conversation.load(path)
            print(state_line(conversation))
        case "/reset":
            conversation.reset()
            print(state_line(conversation))
        case "/back":
            conversation.back()
            print(state_line(conversation))
        case "/fresh" | "/keep":
            conversation.fresh = command == "/fresh"
            keeps = "not be kept" if conversation.fresh else "be kept"
            print(f"Further messages and answers will {keeps}.")
        case "/state":
            print(state_line(conversation))
        case "/help":
            print(HELP)
        case _:
            raise ConfigError(f"There is no command {command}: /help lists the commands.")
    sys.stdout.flush()


def state_line(conversation: Conversation) -> str:
    """One line about what has been read, as /state shows it."""
    texts = f" ({', '.join(conversation.sources)})" if conversation.sources else ""
    return (
        f"{conversation.tokens:,} tokens read{texts}, {conversation.updates:,} memory updates,"
        f" {conversation.num_bytes:,} bytes of state, whatever the length of the text."
    )
