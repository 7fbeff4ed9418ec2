"""Token ids of chat messages, by the Jinja chat template that comes with an instruct model."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence

from famx.base.errors import ConfigError
from famx.data.vocabularies.base import Vocabulary, optional_package

# Unicode noncharacters, which valid text does not contain. `_BREAK` splits a special token that a message
# spells; the others are placeholders for earlier messages, whose text is no longer known.
_BREAK, _QUESTION, _ANSWER = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = re.compile(f"[{_BREAK}{_QUESTION}{_ANSWER}]")
_PLACEHOLDER_QUESTION = {"role": "user", "content": _QUESTION}


class ChatTemplate:
    """Encode messages with a vocabulary's Jinja chat template.

    Special tokens that the template writes become single ids; those that a message spells are encoded as
    ordinary text, so that no message can end a turn or speak for another role.

    A conversation is a state that has read the earlier turns, so only the text after the last answer is
    encoded. That requires a template that writes an earlier turn as it was written when it was the last
    one.

    Args:
      vocabulary: a vocabulary of a tokenizer file, with a `chat_template`.
      system: the system message of every conversation; None: the template's default, if it has one.

    Attributes:
      end_of_turn: id of the token that the template puts after an answer; None if there is none.

    Raises:
      ConfigError: the vocabulary has no template, the template is not valid or rejects the system
        message, or the package `jinja2` is missing.
    """

    def __init__(self, vocabulary: Vocabulary, system: str | None = None):
        source = vocabulary.chat_template
        if not source:
            raise ConfigError(
                "The model's vocabulary has no chat template: set CHAT_TEMPLATE to False."
            )
        self._vocabulary, self._system = vocabulary, system
        self._jinja = optional_package("jinja2", "Chat templates")
        environment = _environment(self._jinja)
        try:
            self._template = environment.from_string(source)
        except self._jinja.TemplateError as error:
            raise ConfigError(f"The chat template of the vocabulary is not valid: {error}.") from error
        special = {text: i for text, i in vocabulary.special_tokens.items() if text}
        # Some tokenizer files list tokens such as Gemma's <start_of_turn> as ordinary ones.
        for text in re.findall(r"<[^<>\s]+>", source):
            ids = vocabulary.encode(text)
            if text not in special and len(ids) == 1:
                special[text] = ids[0]
        longest_first = sorted(special, key=len, reverse=True)
        spelled = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._starts = re.compile(f"(?=(?:{spelled}))(.)", re.DOTALL)
        self._ends = re.compile(rf"\s*({spelled})")  # what ends an answer
        text_of = {i: text for text, i in special.items()}
        self._names = {
            f"{role}_token": text_of.get(getattr(vocabulary, f"{role}_id"), "")
            for role in ("bos", "eos", "pad", "unk")
        }
        end = self._ends.match(self._around_answer()[1])
        self.end_of_turn = None if end is None else special[end[1]]

    def first(self, message: str, begin: bool = True) -> list[int]:
        """Encode the first message of a conversation, up to where the answer starts.

        Args:
          message: the user's text.
          begin: whether the template may write begin of text; False if the state has read text before.

        Raises:
          ConfigError: the template rejects the message.
        """
        return self._encode(self._render([self._user(message)], begin=begin))

    def next(self, message: str, ended: bool) -> list[int]:
        """Encode a later message: the text from the end of the last answer to the start of the next.

        Args:
          message: the user's text.
          ended: whether the last answer already includes the token that ends it.

        Raises:
          ConfigError: the template rejects the message, or rewrites earlier turns.
        """
        before, after = self._around_answer(self._user(message))
        # Trailing spaces may differ: a template that puts one before an answer leaves it to the model.
        if before.rstrip() != self._render([_PLACEHOLDER_QUESTION]).rstrip():
            raise ConfigError(
                "The chat template rewrites earlier turns, so the conversation cannot continue from what"
                " was read: start over after each answer (/reset), or set --template."
            )
        end = self._ends.match(after) if ended else None
        return self._encode(after if end is None else after[end.end() :])

    def text(self, messages: Sequence[Mapping[str, str]], prompt: bool = True) -> str:
        """The text of a whole conversation, for programs that pass prompts on as text.

        Special tokens are spelled out, and so are those that a message spells: only for messages that may
        contain some, as those of a benchmark.

        Args:
          messages: `{"role": ..., "content": ...}` each; the template sees no other system message.
          prompt: whether the text ends where an answer starts; otherwise it ends with the last message,
            which may then be continued.

        Raises:
          ConfigError: the template rejects the messages, or drops the last one.
        """
        text = self._fill(messages, prompt, self._names)
        if prompt:
            return text
        last = messages[-1]["content"]
        for ending in (last, last.strip()):  # most templates strip messages
            if ending in text:
                return text[: text.rindex(ending) + len(ending)]
        raise ConfigError("The chat template drops the last message, so it cannot be continued.")

    def _user(self, message: str) -> dict[str, str]:
        return {"role": "user", "content": self._break(message)}

    def _break(self, text: str) -> str:
        """Put `_BREAK` into everything in `text` that would be encoded as a special token."""
        text = _MARKS.sub("\N{REPLACEMENT CHARACTER}", text)
        return self._starts.sub(lambda match: match[1] + _BREAK, text)

    def _encode(self, text: str) -> list[int]:
        return [i for part in text.split(_BREAK) for i in self._vocabulary.encode(part, special=True)]

    def _around_answer(self, *more: Mapping) -> tuple[str, str]:
        """Rendered text before and after a placeholder answer that is followed by `more` messages."""
        messages = [_PLACEHOLDER_QUESTION, {"role": "assistant", "content": _ANSWER}, *more]
        before, answer, after = self._render(messages, prompt=bool(more)).partition(_ANSWER)
        if not answer:
            raise ConfigError("The chat template drops the answers of earlier turns: set --template.")
        return before, after

    def _render(self, messages: Sequence[Mapping], prompt: bool = True, begin: bool = True) -> str:
        if self._system is not None:
            messages = [{"role": "system", "content": self._break(self._system)}, *messages]
        return self._fill(messages, prompt, self._names if begin else {**self._names, "bos_token": ""})

    def _fill(self, messages: Sequence[Mapping], prompt: bool, names: Mapping[str, str]) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **names
            )
        except (self._jinja.TemplateError, TypeError, ValueError, LookupError) as error:
            raise ConfigError(f"The chat template rejects the messages: {error}.") from error


def _environment(jinja2):
    """Sandboxed Jinja environment, since a template comes from a downloaded file."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Drop the tags with which some templates mark answers for training."""

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
