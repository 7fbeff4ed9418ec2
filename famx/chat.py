"""A conversation with a trained model, line by line, from nothing or from a memory file.

    python -m famx.chat --checkpoint /tmp/famx/model --memory book.famem
    echo "What is the pass key? The pass key is" | python -m famx.chat --checkpoint /tmp/famx/model

Each line is a message; /help tells the commands. Answers go to standard output, all that went wrong
to standard error. An instruct model reads messages in its own chat template, if it brought one.
"""

import contextlib
import os
import re
import signal
import sys

from absl import flags

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.decoding import Sampling
from famx.inference.chat_template import ChatTemplate
from famx.inference.conversation import Conversation, check_template, load_with_vocabulary
from famx.inference.reading import ReadProgress
from famx.model_dir.loading import TrainedModel
from famx.model_dir.memory_file import read_header

HELP = """\
/read FILE   read a text file
/save FILE   write what was read to a memory file
/load FILE   go on from a memory file, and forget all else
/reset       forget all
/fresh       from now on answer each message from the same state; nothing of it is kept
/keep        from now on keep messages and answers
/back        take the last message and its answer back
/state       tell what was read
/help        tell these commands
/quit        end, as end of input does
Anything else is a message. One that begins with / is written with //. Ctrl-C ends an answer."""


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "MODEL_DIR, or MODEL_DIR/checkpoint_<step>.")
    flags.DEFINE_string("adapter", None, "A saved adapter for the checkpoint.")
    flags.DEFINE_string("memory", None, "A memory file to begin from.")
    flags.DEFINE_bool("fresh", False, "Answer each message from the same state; keep nothing.")
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
    flags.DEFINE_integer("top_k", None, "Draw only from so many of the likeliest tokens.")
    flags.DEFINE_float("top_p", 1.0, "Draw only from the likeliest tokens of this probability.")
    flags.DEFINE_integer("max_new_tokens", 256, "Longest answer.")
    flags.DEFINE_integer("seed", 0, "Of what is drawn.", lower_bound=0)
    flags.DEFINE_string("template", None, r"What is read for a message, {message} by default or the "
                        r"model's own chat template; \n is a line end.")  # fmt: skip
    flags.DEFINE_string("system", None, "A system message for the model's own chat template.")
    flags.DEFINE_multi_string("stop", [], r"Text before which an answer ends; \n is a line end.")


def main():
    values = flags.FLAGS
    template = None
    if values.template is not None:
        template = unescape(values.template)
        check_template(template)
        if values.system is not None:
            raise ConfigError("--system is for the model's own chat template: put it into --template.")
    try:
        sampling = Sampling(values.max_new_tokens, values.temperature, values.top_k, values.top_p)
    except ValueError as error:
        raise ConfigError(f"The answers cannot be written so: {error}") from error
    if values.memory:
        read_header(values.memory)
    trained = load_with_vocabulary(values.checkpoint, values.adapter)
    if template is None:
        template = own_template(trained, values.system)
    conversation = Conversation(
        trained, sampling, template,
        [unescape(text) for text in values.stop], values.seed, values.fresh,
    )  # fmt: skip
    if values.memory:
        conversation.load(values.memory)
    converse(conversation)


def own_template(trained: TrainedModel, system: str | None = None) -> str | ChatTemplate:
    """How messages are read where nobody says how: in the model's chat template, or as they are.

    Raises:
      ConfigError: there is no template for the system message, or it cannot be used.
    """
    vocabulary = trained.model.vocabulary
    if vocabulary.chat_template:
        return ChatTemplate(vocabulary, system)
    if system is not None:
        raise ConfigError("This model has no chat template for --system: put it into --template.")
    return "{message}"


def unescape(text: str) -> str:
    r"""Turns `\n`, `\t` and `\\` into the characters that they stand for."""
    marks = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda found: marks[found[0]], text)


def converse(conversation: Conversation) -> None:
    """Answers the lines of standard input until it ends or says /quit."""
    terminal = sys.stdin.isatty()
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    if terminal:
        import readline  # noqa: F401, gives `input` a history

        print(f"{state_line(conversation)} /help tells the commands.")
    while True:
        prompt = f"[{conversation.tokens:,} tokens, {conversation.num_bytes:,} bytes] > "
        try:
            line = input(prompt if terminal else "").strip()
            if line == "/quit":
                return
            if line:
                reply(conversation, line)
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()  # drops the line that was being written
        except ConfigError as error:
            print(f"famx: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def interrupts():
    """Gives a function that tells whether Ctrl-C came; an exception could be lost in foreign code."""
    asked = []
    old = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, old)


def reply(conversation: Conversation, line: str) -> None:
    """Does what a line asks for, and prints the outcome.

    Raises:
      ConfigError: it cannot be done; the conversation is as before.
    """
    if not line.startswith("/") or line.startswith("//"):
        show = lambda text: print(text, end="", flush=True)
        with interrupts() as stop:
            conversation.exchange(line.removeprefix("/"), show, stop)
        print(flush=True)
        return
    command, _, name = line.partition(" ")
    takes_file = command in ("/read", "/save", "/load")
    path = os.path.expanduser(name.strip())
    if takes_file != bool(path) and command in HELP.split():
        raise ConfigError(f"{command} needs a file." if takes_file else f"{command} stands alone.")
    match command:
        case "/read":
            with ReadProgress(path) as progress:
                print(f"{conversation.read_file(path, progress):,} tokens read from {path}.")
        case "/save":
            conversation.save(path)
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
            print("Nothing is kept from now on." if conversation.fresh else "All is kept from now on.")
        case "/state":
            print(state_line(conversation))
        case "/help":
            print(HELP)
        case _:
            raise ConfigError(f"There is no command {command}: /help tells those that there are.")
    sys.stdout.flush()


def state_line(conversation: Conversation) -> str:
    """What has been read, in one line, as /state shows it."""
    texts = f" ({', '.join(conversation.sources)})" if conversation.sources else ""
    return (
        f"{conversation.tokens:,} tokens read{texts}, {conversation.updates:,} memory updates,"
        f" {conversation.num_bytes:,} bytes of state, however much is read."
    )


if __name__ == "__main__":
    define_flags()
    gin_utils.run(main, gin_flags=False)
