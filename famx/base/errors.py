"""Exceptions for mistakes of the user, and for data that cannot be used."""


class ConfigError(ValueError):
    """A mistake of the user; the message is a plain sentence that says what is wrong and what to do."""


class BadData(ConfigError):
    """Data that a run cannot go on reading, such as a file that changed; the message names the file."""


class BadRecord(BadData):
    """A single record or document that cannot be used, while others can; the message names its place."""
