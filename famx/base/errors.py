"""Exceptions for mistakes of the user, and for data that cannot be used."""

from collections.abc import Iterator

_MOST_CHARACTERS = 4800  # more than the longest path and a sentence


class ConfigError(ValueError):
    """A mistake of the user; the message is a plain sentence that says what is wrong and what to do.

    Messages quote names and values from files that others wrote. Control characters, with which a file
    could write to the user's terminal, become question marks, and a very long message is cut.
    """

    def __init__(self, message: object = ""):
        text = str(message)
        text = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
        super().__init__("".join(x if x.isprintable() or x == "\n" else "?" for x in text))


class BadData(ConfigError):
    """Data that a run cannot read on, such as a file that changed; the message names the file."""


class BadRecord(BadData):
    """A single record or document that cannot be used, while others can; the message names its place."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, the one that it was raised from or while handling, and so on; each once.

    An exception that was raised from itself is its own cause.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
