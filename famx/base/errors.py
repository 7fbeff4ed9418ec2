"""The one exception that stands for bad input: its text is a plain sentence for the user."""


class ConfigError(ValueError):
    """Something the user gave cannot work; the message says what is wrong and what to do."""
