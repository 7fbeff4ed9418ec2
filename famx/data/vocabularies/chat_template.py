"""Token ids of chat messages, by the Jinja chat template that comes with an instruct model."""

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from famx.base.errors import ConfigError
from famx.data.vocabularies.base import Vocabulary
from famx.data.vocabularies.special_tokens import BREAK, AddedToken, Splitter
from famx.data.vocabularies.template_renderer import renderer
from famx.data.vocabularies.tokenizer_files import Before

# Unicode noncharacters, which valid text does not contain. `BREAK` splits a special token that a message
# spells; `_QUESTION` and `_ANSWER` are placeholders for earlier messages, whose text is no longer known;
# what the template writes within {% generation %} is between `_OPEN` and `_CLOSE`.
_QUESTION, _ANSWER, _OPEN, _CLOSE = "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
_MARKS = re.compile(f"[{BREAK}-{_CLOSE}]")
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
        self._renderer = renderer(source)
        special = {text: i for text, i in vocabulary.special_tokens.items() if text}
        tokens = [AddedToken(id=i, content=text) for text, i in special.items()]
        self._splitter, self._special_ids = Splitter(tokens), frozenset(special.values())
        text_of = {i: text for text, i in special.items()}
        self._names = {
            f"{role}_token": text_of.get(getattr(vocabulary, f"{role}_id"), "")
            for role in ("bos", "eos", "pad", "unk")
        }
        end = self._end(self._around_answer()[1])
        self.end_of_turn = None if end is None else end[0].id

    def first(self, message: str, begin: bool = True) -> list[int]:
        """Encode the first message of a conversation, up to where the answer starts.

        Args:
          message: the user's text.
          begin: whether the template may write begin of text; False if the state has read text before.

        Raises:
          ConfigError: the template rejects the message.
        """
        text = self._render([self._user(message)], begin=begin)
        return self._encode(text, "start" if begin else "special")

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
        end = self._end(after) if ended else None
        if end is None:
            return self._encode(after, "text")
        return self._encode(after[end[1] :], "special")

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
                encoded = self._encode(part, self._before(ids))
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
        last, at = None, start
        while (found := self._splitter.find(text[:stop], at)) is not None:
            last = at = found[0] + len(found[1].content)
        if last is not None and not text[last:stop].strip():
            return last
        follows = self._end(text, stop) if tagged and start < stop else None
        return stop if follows is None or follows[0].id != self.end_of_turn else follows[1]

    def _end(self, text: str, start: int = 0) -> tuple[AddedToken, int] | None:
        """The special token that follows at `start`, after white space, and where it ends."""
        found = self._splitter.find(text, start)
        if found is None or text[start : found[0]].strip():
            return None
        return found[1], found[0] + len(found[1].content)

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
        """Put `BREAK` into everything in `text` that would be encoded as a special token."""
        text = _MARKS.sub("\N{REPLACEMENT CHARACTER}", text)
        return self._splitter.broken(text)

    def _encode(self, text: str, before: Before) -> list[int]:
        return self._vocabulary.encode(text, special=True, before=before)

    def _before(self, ids: Sequence[int]) -> Before:
        """What follows `ids` follows."""
        if not ids:
            return "start"
        return "special" if ids[-1] in self._special_ids else "text"

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
        names = self._names if begin else {**self._names, "bos_token": ""}
        return self._fill(messages, prompt, names, tools, marks, today)

    def _fill(
        self,
        messages: Sequence[Mapping],
        prompt: bool,
        names: Mapping[str, str],
        tools: Sequence | None = None,
        marks: bool = False,
        today: datetime.datetime | None = None,
    ) -> str:
        text = self._renderer.render(messages, prompt, names, tools, today)
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
