"""Tokens that are not text: which ones control a model, and where a text spells them.

Files give control tokens several types. `<|im_end|>` may be special, an added token that is not special,
"user defined", or an ordinary piece; the model obeys it in any case. So the type does not decide alone: a
token whose text looks like a mark, or that the chat template writes, is a control token, too, and no text
of a user may encode to it.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

from pydantic import Field

from famx.base.untrusted import Fields

MOST_TOKENS = 1 << 22  # of a vocabulary
MOST_TOKEN = 4096  # characters of a token; the longest of known vocabularies has some hundred
MOST_SPECIAL = 1 << 16
# A noncharacter of Unicode, which valid text does not contain. Put into the spelling of a control token,
# it keeps the spelling from being read as that token; `FileVocabulary.encode` takes it out again.
BREAK = "\ufdd0"

_MARK = re.compile(r"[<\[{(【«｜|].*\w.*[>\]})】»｜|]", re.DOTALL)
_CERTAIN_MARK = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>\s]+｜>")
_WRITTEN_MARK = re.compile(r"<[^<>\s]+>|\[/?[A-Z][A-Z_]*\]")  # in the source of a chat template
# HTML, which some vocabularies (Gemma's) have as tokens. It is text unless the chat template writes it.
_HTML = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|sub|sup|code|pre|br"
    r"|p|ul|ol|li|a|div|span)>"
)


class AddedToken(Fields):
    """A token that is recognised in a text before it is split, or that no text may spell.

    Attributes:
      id: its id.
      content: its text.
      special: whether the file calls it special.
      lstrip, rstrip: whether white space before and after it belongs to it.
      single_word: whether it is recognised only between characters that are not of a word.
    """

    id: Annotated[int, Field(ge=0, lt=MOST_TOKENS)]
    content: Annotated[str, Field(min_length=1, max_length=MOST_TOKEN)]
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def is_space(self) -> bool:
        """Whether it is nothing but white space, as in vocabularies for code."""
        return not self.content.replace("\u2581", " ").strip()


def is_control(token: str, template: str | None, ordinary: bool = False) -> bool:
    """Whether a token that its file does not call special controls the model.

    Args:
      token: its text.
      template: source of the chat template, or None.
      ordinary: whether the file lists it among ordinary pieces of text, of which some, such as "[i]" or
        "<b>", look like marks.
    """
    written = template is not None and token in template
    if ordinary:
        return bool(_CERTAIN_MARK.fullmatch(token) or written and _WRITTEN_MARK.fullmatch(token))
    if written and re.search(r"\w", token) and re.search(r"[^\w\s\u2581]", token):
        return True
    return bool(_MARK.fullmatch(token)) and not _HTML.fullmatch(token)


class Splitter:
    """Finds tokens in a text, the longest first, in time that does not grow with their number.

    Args:
      tokens: the tokens to find.
    """

    def __init__(self, tokens: Iterable[AddedToken]):
        self._tokens = {token.content: token for token in tokens}
        lengths: dict[str, set[int]] = {}
        for text in self._tokens:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(set_, reverse=True) for first, set_ in lengths.items()}
        self._first = re.compile(f"[{re.escape(''.join(lengths))}]" if lengths else "(?!)")

    def find(self, text: str, start: int = 0) -> tuple[int, AddedToken] | None:
        """Place of the first token at or after `start`, and the token; None if there is none."""
        while match := self._first.search(text, start):
            start = match.start()
            for length in self._lengths[text[start]]:
                token = self._tokens.get(text[start : start + length])
                if token is not None and not (token.single_word and _in_word(text, start, length)):
                    return start, token
            start += 1
        return None

    def split(self, text: str) -> Iterator[tuple[str, AddedToken | None]]:
        """The text in parts `(text before a token, the token)`, the last one with None."""
        done = 0
        while found := self.find(text, done):
            place, token = found
            before = text[done:place]
            done = place + len(token.content)
            if token.rstrip:
                done += len(text[done:]) - len(text[done:].lstrip())
            yield (before.rstrip() if token.lstrip else before), token
        yield text[done:], None

    def broken(self, text: str) -> str:
        """The text with a `BREAK` after the first character of everything that spells a token."""
        places, start = [], 0
        while found := self.find(text, start):
            start = found[0] + 1
            places.append(start)
        return BREAK.join(text[a:b] for a, b in zip([0, *places], [*places, len(text)]))


def _in_word(text: str, start: int, length: int) -> bool:
    around: Sequence[str] = (text[start - 1 : start] if start else "", text[start + length :][:1])
    return any(re.match(r"\w", character) for character in around)
