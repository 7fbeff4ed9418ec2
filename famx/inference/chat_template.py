"""Chat templates: what an instruct model reads for a message, as the model's own template has it."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence

from famx.base.errors import ConfigError
from famx.data.vocabularies.base import Vocabulary, optional_package

# Code points that no text has: one breaks what would be a special token in a message, the others
# stand for messages that are not known any more.
_BREAK, _QUESTION, _ANSWER = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = re.compile(f"[{_BREAK}{_QUESTION}{_ANSWER}]")
_ASKED = {"role": "user", "content": _QUESTION}


class ChatTemplate:
    """Turns messages into ids by the Jinja template of a vocabulary.

    The template's special tokens become their single ids. A message never does, whatever it says. A
    conversation is read on without its past: each turn gives what stands behind the last answer, so a
    template must not write an old turn in another way than it was read.

    Args:
      vocabulary: with a `chat_template`, of a tokenizer file.
      system: a system message that opens conversations; None: what the template does without one.

    Attributes:
      end_of_turn: the id that ends an answer by the template, or None.

    Raises:
      ConfigError: there is no template, it is damaged, it refuses the system message, or the package
        `jinja2` is missing.
    """

    def __init__(self, vocabulary: Vocabulary, system: str | None = None):
        source = vocabulary.chat_template
        if not source:
            raise ConfigError(
                "The model's vocabulary has no chat template: read its messages without CHAT_TEMPLATE."
            )
        self._vocabulary, self._system = vocabulary, system
        self._jinja = optional_package("jinja2", "Chat templates")
        environment = _environment(self._jinja)
        try:
            self._template = environment.from_string(source)
        except self._jinja.TemplateError as error:
            raise ConfigError(f"The chat template of the vocabulary is damaged: {error}.") from error
        special = {text: i for text, i in vocabulary.special_tokens.items() if text}
        # Tokens in brackets that the template spells may be ordinary ones by the file, as Gemma's are.
        for text in re.findall(r"<[^<>\s]+>", source):
            ids = vocabulary.encode(text)
            if text not in special and len(ids) == 1:
                special[text] = ids[0]
        longest_first = sorted(special, key=len, reverse=True)
        spelled = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._starts = re.compile(f"(?=(?:{spelled}))(.)", re.DOTALL)
        self._ends = re.compile(rf"\s*({spelled})")  # an answer, with spaces before it
        text_of = {i: text for text, i in special.items()}
        self._names = {
            f"{role}_token": text_of.get(getattr(vocabulary, f"{role}_id"), "")
            for role in ("bos", "eos", "pad", "unk")
        }
        end = self._ends.match(self._around_answer()[1])
        self.end_of_turn = None if end is None else special[end[1]]

    def first(self, message: str, begin: bool = True) -> list[int]:
        """Ids of the first message of a conversation, up to where the answer begins.

        Args:
          message: the user's text.
          begin: whether nothing was read yet, so that begin of text may stand in front.

        Raises:
          ConfigError: the template refuses the message.
        """
        return self._encode(self._render([self._user(message)], begin=begin))

    def next(self, message: str, ended: bool) -> list[int]:
        """Ids of a further message: what stands behind the last answer, up to the new one's beginning.

        Args:
          message: the user's text.
          ended: whether the last answer brought the token that ends it.

        Raises:
          ConfigError: the template refuses the message, or writes earlier turns in another way.
        """
        before, after = self._around_answer(self._user(message))
        if before.rstrip() != self._render([_ASKED]).rstrip():  # a space is the model's to write
            raise ConfigError(
                "The chat template writes earlier turns in another way than they were read, so that a"
                " conversation cannot go on: begin anew after each answer, or give --template."
            )
        end = self._ends.match(after) if ended else None
        return self._encode(after if end is None else after[end.end() :])

    def _user(self, message: str) -> dict[str, str]:
        return {"role": "user", "content": self._break(message)}

    def _break(self, text: str) -> str:
        """`text` with a mark in all that would be a special token."""
        text = _MARKS.sub("\N{REPLACEMENT CHARACTER}", text)
        return self._starts.sub(lambda found: found[1] + _BREAK, text)

    def _encode(self, text: str) -> list[int]:
        return [i for part in text.split(_BREAK) for i in self._vocabulary.encode(part, special=True)]

    def _around_answer(self, *more: Mapping) -> tuple[str, str]:
        """What stands before an answer, and behind it with `more` messages."""
        messages = [_ASKED, {"role": "assistant", "content": _ANSWER}, *more]
        before, answer, after = self._render(messages, prompt=bool(more)).partition(_ANSWER)
        if not answer:
            raise ConfigError("The chat template leaves answers out: give --template.")
        return before, after

    def _render(self, messages: Sequence[Mapping], prompt: bool = True, begin: bool = True) -> str:
        if self._system is not None:
            messages = [{"role": "system", "content": self._break(self._system)}, *messages]
        names = self._names if begin else {**self._names, "bos_token": ""}
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **names
            )
        except (self._jinja.TemplateError, TypeError, ValueError, LookupError) as error:
            raise ConfigError(f"The chat template refuses the messages: {error}.") from error


def _environment(jinja2):
    """Where templates from anywhere may run: nothing of Python can be reached from them."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks that some templates put around answers."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
