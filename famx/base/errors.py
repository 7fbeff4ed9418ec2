"""The exception for mistakes of the user."""


class ConfigError(ValueError):
    """A mistake of the user; the message is a plain sentence that says what is wrong and what to do."""
