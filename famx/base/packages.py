"""Optional packages: importing one, and the sentence that says what installs it."""

import importlib
import re
from types import ModuleType

from famx.base.errors import ConfigError

# Packages that the user's own modules import, with the extra of famx that installs them.
_EXTRAS = {
    "seqio": "seqio", "tensorflow": "seqio", "tensorflow_text": "seqio", "tensorflow_datasets": "seqio",
}  # fmt: skip


def optional_package(name: str, what: str, extra: str = "tokenizers") -> ModuleType:
    """Import a module of a package that not every installation has.

    Args:
      name: name of the module.
      what: what needs it, a plural, for the sentence of the error.
      extra: the extra of famx that installs it.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing_package(name, what, extra) from error


def missing_package(name: str, what: str, extra: str) -> ConfigError:
    """The error for a module that could not be imported; arguments as of `optional_package`."""
    return ConfigError(
        f"{what} need the package '{name.partition('.')[0]}', which is not installed; run "
        f"pip install 'famx[{extra}]'."
    )


def import_named(name: str, what: str) -> ModuleType:
    """Import a module that the user named.

    Args:
      name: name of the module.
      what: the setting and the name, for the sentence of the error.

    Raises:
      ConfigError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{what} cannot be imported: {error}.{install_hint(error)}") from error


def install_hint(error: ImportError) -> str:
    """The sentence, after a space, that says what installs a module that is missing; "" if unknown."""
    named = re.search(r"No module named '(\w+)", str(error))  # gin drops the error's own `name`
    extra = _EXTRAS.get(named[1]) if named else None
    return f" Run pip install 'famx[{extra}]'." if extra else ""
