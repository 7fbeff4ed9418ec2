"""Token ids of chat messages, by the Jinja chat template that comes with an instruct model."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from famx.base.errors import ConfigError
from famx.data.vocabularies.base import Vocabulary, optional_package

# Unicode noncharacters, which valid text does not contain. `_BREAK` splits a special token that a message
# spells; `_QUESTION` and `_ANSWER` are placeholders for earlier messages, whose text is no longer known;
# what the template writes within {% generation %} is between `_OPEN` and `_CLOSE`.
_BREAK, _QUESTION, _ANSWER, _OPEN, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
_MARKS = re.compile(f"[{_BREAK}-{_CLOSE}]")
_TAGS = re.compile(f"[{_OPEN}{_CLOSE}]")
# A document of a run must not change from day to day; Llama 3's template writes this date by default.
_TODAY = datetime.datetime(2024, 7, 26)
_PLACEHOLDER_QUESTION = {"role": "user", "content": _QUESTION}


class ChatTemplate:
    """Encode messages with a vocabulary's Jinja chat template.

    Special tokens that the template writes become single ids; those that a message spells are encoded as
    ordinary text, so that no message can end a turn or speak for another role.

    A conversation is a state that has read the earlier turns, so only the text after the last answer is
    encoded. That requires a template that writes an earlier turn as it was written when it was the last
    one. For training, `conversation` encodes all turns at once.

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
        self._special = re.compile(spelled)
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

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode a whole conversation for training: ids int32 `[n]` and loss weights float32 `[n]`.

        The weight is 1 where the assistant writes: its text, its calls of tools and the token that ends
        its turn. It is 0 for all other turns and for what the template writes before and after an answer.
        An answer is encoded by itself, since a model writes it after a prompt that is encoded already.
        The date of today, if the template asks for it, is the same on every day.

        A template with {% generation %} tags marks the answers. For any other, an answer is what follows
        the prompt for it, so the template must write a conversation as the beginning of every longer one;
        it is rendered twice for each answer.

        Args:
          messages: dicts with `role` and `content`, and what else the template reads, such as
            `tool_calls`. A content may be a list of parts of the type "text". None counts as missing.
          tools: descriptions of tools, for the template.

        Raises:
          ConfigError: a message is not of this form, or the template rejects the messages or does not
            tell which tokens are the assistant's.
        """
        messages = [self._message(k, message) for k, message in enumerate(messages)]
        tools = self._broken(tools) if tools else None
        marked = self._render(messages, prompt=False, tools=tools, marks=True, today=_TODAY)
        text = _TAGS.sub("", marked)
        tagged = _OPEN in marked
        spans = _marked_spans(marked) if tagged else self._answers(messages, tools, text)
        ids, weights, at = [], [], 0
        for start, stop in [*spans, (len(text), len(text))]:
            stop = self._end_of_turn(text, start, stop, tagged)
            for part, weight in ((text[at:start], 0.0), (text[start:stop], 1.0)):
                encoded = self._encode(part)
                ids += encoded
                weights += [weight] * len(encoded)
            at = stop
        return np.array(ids, np.int32), np.array(weights, np.float32)

    def _answers(self, messages, tools, text: str) -> list[tuple[int, int]]:
        """Begin and end, in the rendered text, of the assistant's turns without the prompts for them."""
        spans = []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:k], tools=tools, today=_TODAY)
            after = self._render(messages[: k + 1], prompt=False, tools=tools, today=_TODAY)
            if not (after.startswith(before) and text.startswith(after)):
                raise ConfigError(
                    f"The chat template does not tell which tokens the assistant writes in message {k}: "
                    "it writes the turn otherwise after its prompt, or when others follow. Put "
                    "{% generation %} and {% endgeneration %} around the assistant's text in the "
                    "template, or take one that writes every turn the same."
                )
            spans.append((len(before), len(after)))
        return spans

    def _end_of_turn(self, text: str, start: int, stop: int, tagged: bool) -> int:
        """Where the loss on `text[start:stop]` ends: after the token that ends the turn, if there is one.

        Tags may stand before this token; without them, the text after `stop` is of another turn.
        """
        last = max((match.end() for match in self._special.finditer(text, start, stop)), default=None)
        if last is not None and not text[last:stop].strip():
            return last
        follows = self._ends.match(text, stop) if tagged and start < stop else None
        ends = follows is not None and self._vocabulary.encode(follows[1], special=True)
        return follows.end() if ends == [self.end_of_turn] else stop

    def _message(self, k: int, message: Any) -> dict[str, Any]:
        """The message as the template gets it: special tokens broken, missing values left out."""
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f"Message {k} of a conversation has no role: {str(message)[:50]!r}; write each as "
                '{"role": ..., "content": ...}.'
            )
        content = message.get("content")
        if isinstance(content, list | tuple):
            for part in content:
                if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                    raise ConfigError(
                        f"Message {k} of a conversation has a part that is not text: {str(part)[:50]!r}; "
                        "leave such conversations out."
                    )
            content = "".join(part["text"] for part in content)
        if content is not None and not isinstance(content, str):
            raise ConfigError(
                f"Message {k} of a conversation has the content {str(content)[:50]!r}, which is not "
                "text; write it as a string."
            )
        return self._broken({**message, "content": content or ""})

    def _broken(self, value: Any) -> Any:
        """`_break` of all strings in a value, without the items of dicts that are None."""
        if isinstance(value, str):
            return self._break(value)
        if isinstance(value, Mapping):
            return {key: self._broken(x) for key, x in value.items() if x is not None}
        return [self._broken(x) for x in value] if isinstance(value, list | tuple) else value

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

    def _render(
        self,
        messages: Sequence[Mapping],
        prompt: bool = True,
        begin: bool = True,
        tools: Sequence | None = None,
        marks: bool = False,
        today: datetime.datetime | None = None,
    ) -> str:
        """Text of the messages; with `marks`, what the template marks as generated is in marks."""
        if self._system is not None:
            messages = [{"role": "system", "content": self._break(self._system)}, *messages]
        names: dict[str, Any] = self._names if begin else {**self._names, "bos_token": ""}
        if today is not None:
            names = {**names, "strftime_now": today.strftime}
        return self._fill(messages, prompt, names, tools, marks)

    def _fill(
        self,
        messages: Sequence[Mapping],
        prompt: bool,
        names: Mapping[str, Any],
        tools: Sequence | None = None,
        marks: bool = False,
    ) -> str:
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=prompt, tools=tools, documents=None, **names
            )
        except (self._jinja.TemplateError, TypeError, ValueError, LookupError) as error:
            raise ConfigError(f"The chat template rejects the messages: {error}.") from error
        return text if marks else _TAGS.sub("", text)


def _marked_spans(text: str) -> list[tuple[int, int]]:
    """Begin and end of what is between `_OPEN` and `_CLOSE`, in the text without these marks."""
    spans, start, removed = [], 0, 0
    for mark in _TAGS.finditer(text):
        place = mark.start() - removed
        removed += 1
        if mark[0] == _OPEN:
            start = place
        else:
            spans.append((start, place))
    return spans


def _environment(jinja2):
    """Sandboxed Jinja environment, since a template comes from a downloaded file."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Turn the tags with which some templates mark answers for training into `_OPEN` and `_CLOSE`."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            mark = lambda text: nodes.Output([nodes.TemplateData(text)], lineno=line)
            return [mark(_OPEN), *body, mark(_CLOSE)]

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
