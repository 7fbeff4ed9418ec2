"""The grid of a study: its cells, and the gin file of each.

A cell is one choice on each axis and one seed. It is a run like any other, with a gin file and a
MODEL_DIR of its own, so that one command reruns it anywhere.
"""

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import gin
from annotated_types import MinLen

from famx.base.errors import ConfigError
from famx.base.files import write_text
from famx.base.ranges import Expected, Name, Path, Seed
from famx.base.values import checked

GIN_FILE = "cell.gin"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.,+=-]*")
_SETTING = re.compile(r"[A-Za-z_][\w./]*")
_MODULE = re.compile(r"\w+(\.\w+)*")
_Settings = Annotated[
    Mapping[str, Any], Expected("a dict of settings by name, such as {'TRAIN_STEPS': 100}")
]
_Choices = Annotated[
    Mapping[str, _Settings], MinLen(1),
    Expected("a dict of at least one choice, such as {'short': {'TRAIN_STEPS': 100}}", inside=True),
]  # fmt: skip
_Axes = Annotated[
    Mapping[str, _Choices],
    Expected("a dict of axes, such as {'steps': {'short': {'TRAIN_STEPS': 100}}}", inside=True),
]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run of a study.

    Attributes:
      choices: name of the choice on each axis.
      seed: random seed.
      settings: value of each setting that the choices make, the seed included.
      directory: MODEL_DIR.
    """

    choices: Mapping[str, str]
    seed: int
    settings: Mapping[str, Any]
    directory: pathlib.Path

    @property
    def name(self) -> str:
        """Such as `memory=fam, blocks=64, seed 0`."""
        choices = (f"{axis}={choice}" for axis, choice in self.choices.items())
        return ", ".join([*choices, f"seed {self.seed}"])

    @property
    def gin_file(self) -> pathlib.Path:
        """The cell's gin file."""
        return self.directory / GIN_FILE


@gin.configurable
@checked
@dataclasses.dataclass(frozen=True)
class Study:
    """A grid of training runs.

    Attributes:
      directory: absolute directory of all cells and tables.
      gin_files: gin files of every run, as for `famx.train`.
      axes: for each axis its choices by name, each a dict of settings by name as for `--gin.NAME=VALUE`:
        `{"memory": {"fam": {}, "infini": {"MEMORY": "@infini.Infini()"}}}`. A text that begins with `@`
        or `%` is a reference of gin, also within a dict or a tuple.
      settings: settings of all cells; those of a choice replace them.
      seeds: values of RANDOM_SEED.
      skip: regular expressions; a cell whose name contains one of them is not in the study.
      imports: modules that references name, such as "famx.memories.infini".
      measures: names of the measures that the summary shows, see `famx.study.results`, or patterns such
        as `eval/accuracy/*`.

    Raises:
      ConfigError: on construction, if a value is not valid.
    """

    directory: Path
    gin_files: Annotated[Sequence[Name], MinLen(1), Expected("the gin files of the runs, in a tuple")]
    axes: _Axes
    settings: _Settings = dataclasses.field(default_factory=dict)
    seeds: Annotated[Sequence[Seed], MinLen(1)] = (0,)
    skip: Sequence[Name] = ()
    imports: Sequence[Name] = ()
    measures: Sequence[Name] = ()

    def __post_init__(self):
        if not os.path.isabs(str(self.directory)):
            raise ConfigError(f"The directory of a study must be an absolute path, not {self.directory}.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"Study.seeds has a seed twice: {tuple(self.seeds)}.")
        for pattern in self.skip:
            check_pattern(pattern, f"Study.skip has {pattern!r}, which")
        for module in self.imports:
            if not _MODULE.fullmatch(module):
                raise ConfigError(f"Study.imports must be names of modules, not {module!r}.")
        self._check_settings("Study.settings", self.settings)
        for axis, choices in self.axes.items():
            if axis == "seed" or not _NAME.fullmatch(axis):
                raise ConfigError(f"An axis cannot be named {axis!r}: use letters, and not 'seed'.")
            for name, settings in choices.items():
                if not _NAME.fullmatch(name):
                    raise ConfigError(
                        f"A choice of {axis} cannot be named {name!r}: use letters and digits."
                    )
                self._check_settings(f"The choice {name} of {axis}", settings)
        if next(self.cells(), None) is None:
            raise ConfigError(f"Study.skip {tuple(self.skip)} leaves no cell of the study.")

    def _check_settings(self, what: str, settings: Mapping[str, Any]) -> None:
        for name in settings:
            if not _SETTING.fullmatch(name):
                raise ConfigError(f"{what} names {name!r}, which is no setting of gin.")
            if name in ("MODEL_DIR", "RANDOM_SEED"):
                raise ConfigError(f"{what} sets {name}, which the study sets for each cell.")

    def cells(self) -> Iterator[Cell]:
        """The cells, seed by seed: a study that is stopped early has all choices with fewer seeds."""
        axes = list(self.axes)
        for seed in self.seeds:
            for choices in itertools.product(*(self.axes[axis] for axis in axes)):
                chosen = dict(zip(axes, choices, strict=True))
                settings = dict(self.settings)
                for axis, choice in chosen.items():
                    settings |= self.axes[axis][choice]
                parts = [f"{axis}={choice}" for axis, choice in chosen.items()]
                name = "-".join([*parts, f"seed={seed}"]).replace(" ", "_")
                directory = pathlib.Path(self.directory) / "cells" / name
                cell = Cell(chosen, seed, settings | {"RANDOM_SEED": seed}, directory)
                if not any(re.search(pattern, cell.name) for pattern in self.skip):
                    yield cell

    def write_gin_file(self, cell: Cell) -> None:
        """Writes the gin file of a cell, with MODEL_DIR.

        Raises:
          ConfigError: the cell has one with other settings.
        """
        for path, text in self._gin_files(cell).items():
            if path.exists() and path.read_text(encoding="utf-8") != text:
                raise ConfigError(
                    f"{path} belongs to a study with other settings: choose another directory, or delete"
                    f" {cell.directory} to run this cell again."
                )
        cell.directory.mkdir(parents=True, exist_ok=True)
        for path, text in self._gin_files(cell).items():
            write_text(path, text)

    def _gin_files(self, cell: Cell) -> dict[pathlib.Path, str]:
        """Texts of the cell's gin files.

        A file that imports modules must import all that it names. So what names one of the study's
        imports is in a file of its own, and all other settings are read as on the command line.
        """
        modules = [module.rpartition(".") for module in self.imports]
        named = re.compile("|".join([rf"^@?{name}\." for *_, name in modules]) or "(?!)")
        settings = {name: _literal(value) for name, value in cell.settings.items()}
        settings["MODEL_DIR"] = repr(str(cell.directory))
        own = {
            name: text for name, text in settings.items()
            if modules and (named.search(name) or named.search(text))
        }  # fmt: skip
        bindings = lambda some: [f"{name} = {text}" for name, text in some.items()]
        includes = [f"include {str(name)!r}" for name in self.gin_files]
        files = {}
        if own:
            imports = [f"from {a} import {b}" if a else f"import {b}" for a, _, b in modules]
            first = ["from __gin__ import dynamic_registration", "", *imports, "", *includes, ""]
            path = cell.directory / "choices.gin"
            files[path] = "\n".join([*first, *bindings(own)]) + "\n"
            includes = [f"include {str(path)!r}"]
        rest = {name: text for name, text in settings.items() if name not in own}
        files[cell.gin_file] = "\n".join([f"# {cell.name}", *includes, "", *bindings(rest)]) + "\n"
        return files


def check_pattern(pattern: str, subject: str) -> None:
    """Raises ConfigError, a sentence with this subject, if a text is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{subject} is no regular expression: {error}.") from error


def _literal(value: Any) -> str:
    if isinstance(value, str) and value[:1] in ("@", "%"):
        return value
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        inside = ", ".join(map(_literal, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    return repr(value)
