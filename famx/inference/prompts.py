"""Prompts from the lines of a JSON-lines file: checking, encoding, batching by length."""

import dataclasses
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from famx.base.errors import ConfigError
from famx.data.vocabularies import Vocabulary
from famx.data.vocabularies.chat_template import ChatTemplate
from famx.inference.jsonl import place, read_objects

NEW_FIELDS = {
    "predict": ("prediction",),
    "predict_with_aux": ("prediction", "aux"),
    "score": ("score", "num_tokens"),
}


@dataclasses.dataclass(frozen=True)
class Example:
    """One line of the input, encoded.

    Attributes:
      line: line number, from 0.
      fields: the line's JSON object.
      prompt: token ids, int32 `[n]` with `n >= 1`.
      targets: in mode "score", the token ids of each target, int32 `[n]` with `n >= 1`; otherwise empty.
    """

    line: int
    fields: Mapping[str, Any]
    prompt: np.ndarray
    targets: Sequence[np.ndarray] = ()


class Lines:
    """Examples of a JSON-lines file.

    The file may be larger than the memory: each pass reads it again, one line at a time.

    Args:
      path: the JSON-lines file.
      mode: a key of `NEW_FIELDS`; "score" requires `targets` in every line.
      template: format string that makes a prompt of the fields of a line.
      vocabulary: encodes prompts and targets.
      vocab_size: number of ids that the model has.
      begin: whether prompts start with the begin-of-text token.
      chat: formats each prompt as the first message of a conversation, including begin of text; None:
        prompts are read as they are.

    Raises:
      ConfigError: `template` is not valid.
    """

    def __init__(
        self,
        path: str,
        mode: str,
        template: str,
        vocabulary: Vocabulary,
        vocab_size: int,
        begin: bool,
        chat: ChatTemplate | None = None,
    ):
        self.path, self.mode, self.template = path, mode, template
        self.vocabulary, self.vocab_size = vocabulary, vocab_size
        self._bos = [vocabulary.bos_id] if begin and vocabulary.bos_id is not None else []
        self._begin, self._chat = begin, chat
        self._names = _template_fields(template)

    def check(self) -> int:
        """Check every line without encoding it; return the number of lines.

        Raises:
          ConfigError: the file is empty or a line is not valid; the sentence names the line.
        """
        count = 0
        for line, fields in self._objects(0):
            try:
                self._check(fields)
            except ValueError as error:
                raise ConfigError(f"{place(self.path, line)} {error}") from error
            count += 1
        if not count:
            raise ConfigError(f"{self.path} is empty: give at least one line.")
        return count

    def read(self, first: int = 0) -> Iterator[Example]:
        """Encode lines from number `first` on, one at a time.

        Raises:
          ConfigError: while iterating, if a line is not valid or a text encodes to no tokens.
        """
        return (self._example(line, fields) for line, fields in self._objects(first))

    def _objects(self, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            yield from read_objects(self.path, first)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _check(self, fields: Mapping[str, Any]) -> None:
        for name in NEW_FIELDS[self.mode]:
            if name in fields:
                raise ValueError(
                    f"already has a field '{name}', which mode {self.mode} writes: rename it."
                )
        if "input_ids" in fields:
            also = next((name for name in self._names if name in fields), None)
            if also is not None:
                raise ValueError(f"has both 'input_ids' and '{also}': keep one of them.")
            self._check_ids(fields["input_ids"])
        else:
            for name in self._names:
                if name not in fields:
                    raise ValueError(f"has no '{name}'; its fields are: {', '.join(fields) or 'none'}.")
                if not isinstance(fields[name], str):
                    raise ValueError(f"has '{name}' that is {_kind(fields[name])}, not text.")
            self._check_text("prompt", self.template.format_map(fields))
        if self.mode != "score":
            return
        if "targets" not in fields:
            raise ValueError("has no 'targets', which mode score needs: add a text or a list of texts.")
        targets = fields["targets"]
        targets = targets if isinstance(targets, list) else [targets]
        if not targets:
            raise ValueError("has an empty list of 'targets': add at least one text.")
        for text in targets:
            if not isinstance(text, str):
                raise ValueError(f"has 'targets' that contain {_kind(text)} instead of text.")
            self._check_text("target", text)

    def _check_ids(self, ids: Any) -> None:
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise ValueError("has 'input_ids' that are not a list of integers.")
        if not ids:
            raise ValueError("has an empty prompt: 'input_ids' is an empty list.")
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"has the token id {i}, which is outside the vocabulary: ids run from 0 to"
                    f" {self.vocab_size - 1}."
                )

    def _check_text(self, what: str, text: str) -> None:
        if not text or (text.isspace() and not self.vocabulary.encode(text)):
            raise ValueError(f"has an empty {what}: it needs at least one token.")

    def _example(self, line: int, fields: Mapping[str, Any]) -> Example:
        try:
            self._check(fields)  # again: the file may have changed since `check`
            if "input_ids" in fields:
                ids = fields["input_ids"]
                bos = self._bos if ids[:1] != self._bos else []
                prompt = np.array(bos + ids, np.int32)
            else:
                prompt = np.array(self._prompt(self.template.format_map(fields)), np.int32)
            targets = fields["targets"] if self.mode == "score" else []
            targets = [targets] if isinstance(targets, str) else targets
            targets = [np.array(self._encode("target", text), np.int32) for text in targets]
        except ValueError as error:
            raise ConfigError(f"{place(self.path, line)} {error}") from error
        return Example(line, fields, prompt, targets)

    def _prompt(self, text: str) -> list[int]:
        if self._chat is None:
            return self._bos + self._encode("prompt", text)
        return self._check_encoded("prompt", self._chat.first(text, self._begin))

    def _encode(self, what: str, text: str) -> list[int]:
        return self._check_encoded(what, self.vocabulary.encode(text))

    def _check_encoded(self, what: str, ids: list[int]) -> list[int]:
        if not ids:
            raise ValueError(f"has an empty {what}: its text encodes to no tokens.")
        if max(ids) >= self.vocab_size:
            raise ValueError(
                f"encodes to the token id {max(ids)}, but the model has only {self.vocab_size} ids."
            )
        return ids


def batches(examples: Iterable[Example], batch_size: int) -> list[list[Example]]:
    """Group examples of similar prompt length, which need little padding.

    Batches are sorted by their earliest line, so that each batch completes at least one line of output.
    """
    by_length = sorted(examples, key=lambda example: len(example.prompt))
    groups = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return sorted(groups, key=lambda batch: min(example.line for example in batch))


def _template_fields(template: str) -> list[str]:
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError:
        parts = []
    if not parts or not all(name.isidentifier() and not s and not c for name, s, c in parts):
        raise ConfigError(
            f"PROMPT_TEMPLATE {template!r} must contain names of fields in braces, as in 'Question:"
            " {inputs}'; write a literal brace twice."
        )
    return list(dict.fromkeys(name for name, _, _ in parts))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
