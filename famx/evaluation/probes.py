"""Written answers to generated probes over length, with and without memory: a table, cell by cell."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from annotated_types import MinLen

from famx.base.errors import ConfigError
from famx.base.files import as_path
from famx.base.gin_checks import nearest
from famx.base.ranges import Amount, Name, Positive, Seed
from famx.base.values import checked
from famx.data.probes.catalogue import PROBES
from famx.data.probes.chance import chance
from famx.data.probes.probe import Probe
from famx.data.vocabularies import token_ids
from famx.evaluation.common import check_vocabulary, without_memory
from famx.evaluation.probe_table import Cell, ProbeTable
from famx.evaluation.text_answers import answers_of, in_batches
from famx.inference.prompts import Example as Prompt
from famx.models import DecoderModel
from famx.training.feeds import check_bos

RETRIEVAL = tuple(f"ruler_niah_{x}_{k}" for x in ("single", "multikey") for k in (1, 2, 3))
COMPARED = (*RETRIEVAL, "ruler_vt", "babilong_qa1", "babilong_qa2", "babilong_qa3")
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


@checked
@dataclasses.dataclass
class ProbeEvaluation:
    """Scores of answers that the model writes to RULER's and BABILong's questions, by length.

    Prompts are the probes' published texts, encoded as a whole by the model's own tokenizer. Answers are
    generated greedily, as long as the benchmark lets them be, and scored by its metric, on a scale of 0
    to 100 (`famx.data.probes.Probe.score`).

    Every cell, that is a probe at a length with or without memory, is written to a file of its own as
    soon as it is measured, with its answers; a cell that exists with the same settings is read and not
    measured again. After each cell `<step>.table.json` and `<step>.table.md` are written again. They name
    every cell, also those that are not measured yet.

    Attributes:
      probes: names of probes (`famx.data.probes.PROBES`), or one of them; by default those of the
        comparable table.
      lengths: lengths in tokens of the model's vocabulary: bos, prompt and room for the answer together.
      examples: number of examples per cell. RULER has 500, BABILong 100.
      batch_size: number of examples that are read at a time; it does not change scores beyond rounding.
      memory: "both" measures every cell with the model's memory and without it, "with" and "without" one
        of them. Without memory the same weights read with block sliding window attention alone. A model
        that has no memory is measured without.
      probe_options: options of a probe, by its name, such as `{"babilong_qa1": {"instructed": False}}`.
      max_new_tokens: maximum length of an answer; None: what the benchmark of each probe allows.
      minutes: time after which no new cell is begun; None: no limit.
      seed: seed of the examples, which belong to the split "eval".
    """

    probes: Name | Annotated[Sequence[Name], MinLen(1)] = COMPARED
    lengths: Annotated[Sequence[Positive], MinLen(1)] = LENGTHS
    examples: Positive = 100
    batch_size: Positive = 4
    memory: Literal["both", "with", "without"] = "both"
    probe_options: Mapping[Name, Mapping[Name, Any]] | None = None
    max_new_tokens: Positive | None = None
    minutes: Amount | None = None
    seed: Seed = 1

    writes_predictions: ClassVar[bool] = True  # see `__call__`
    stops_between_cells: ClassVar[bool] = True

    def __post_init__(self):
        self.probes = (self.probes,) if isinstance(self.probes, str) else tuple(self.probes)
        self.lengths = tuple(sorted(set(self.lengths)))

    def __call__(
        self,
        model: DecoderModel,
        params,
        step: int,
        folder: str | os.PathLike | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Measures all cells, short lengths first.

        Args:
          model: the model.
          params: its parameters.
          step: training step of the parameters, for the file names.
          folder: directory of `<step>.cells` and of the tables; None writes no file.
          stop: asked before each cell; if true, the rest is not measured.

        Returns:
          `<probe>/<length>` with memory, and `memory/without/<probe>/<length>`, of all measured cells. A
          model without memory has the first of these names for its only scores.
        """
        parent = None if folder is None else as_path(folder)
        table = ProbeTable(parent, step, list(self._cells(model)))
        began, halted, bare = time.monotonic(), False, None
        of, prompts = None, _Prompts([], [])  # of the last cell; the next may be without memory
        for cell in table.cells:
            if cell.read(table.folder):
                continue
            late = self.minutes is not None and time.monotonic() - began >= 60 * self.minutes
            halted = halted or stop() or late  # every process must ask, equally often
            if halted:
                continue
            if not cell.memory and model.config.memory.exists and bare is None:
                bare = without_memory(model, params)
            if of != (cell.probe, cell.length):
                of, prompts = (cell.probe, cell.length), self._prompts(cell, model)
            which = bare if bare is not None and not cell.memory else (model, params)
            cell.result = self._measure(cell, prompts, *which)
            cell.write(table.folder)
            table.write()
            print(f"Checkpoint {step}: {cell}", file=sys.stderr, flush=True)
        table.write()
        prefix = lambda cell: "memory/without/" if model.config.memory.exists and not cell.memory else ""
        return {
            f"{prefix(cell)}{cell.probe}/{cell.length}": cell.score
            for cell in table.cells
            if cell.score is not None
        }

    def check(self, model: DecoderModel) -> None:
        """Raises ConfigError if a probe is unknown, too long for a length, or not for the vocabulary."""
        if self.memory == "with" and not model.config.memory.exists:
            raise ConfigError(
                "ProbeEvaluation.memory is 'with', but the model has no memory: set it to 'without'."
            )
        for name in self.probes:
            probe = self._probe(name, model)
            try:
                probe.prompt(0, self.lengths[0], self._room(probe))
            except ValueError as error:
                raise ConfigError(
                    f"ProbeEvaluation.lengths begin with {self.lengths[0]}, too few for '{name}': {error}"
                ) from error

    def _probe(self, name: str, model: DecoderModel) -> Probe:
        options = (self.probe_options or {}).get(name, {})
        return probe_of(model, name, options, self.seed, "ProbeEvaluation.probes")

    def _room(self, probe: Probe) -> int:
        return self.max_new_tokens or probe.written_tokens

    def _cells(self, model: DecoderModel) -> Iterator[Cell]:
        exists = model.config.memory.exists
        wanted = {"both": (True, False), "with": (True,), "without": (False,)}[self.memory]
        for length in self.lengths:
            for name in self.probes:
                settings = dict(
                    examples=self.examples,
                    seed=self.seed,
                    max_new_tokens=self._room(self._probe(name, model)),
                    options=dict((self.probe_options or {}).get(name, {})),
                )
                for memory in wanted if exists else (False,):
                    yield Cell(name, length, memory, settings)

    def _prompts(self, cell: Cell, model: DecoderModel) -> "_Prompts":
        probe, vocabulary = self._probe(cell.probe, model), model.vocabulary
        room = self._room(probe)
        examples = [probe.prompt(i, cell.length, room) for i in range(self.examples)]
        ids = [np.insert(token_ids(x["inputs"], vocabulary), 0, vocabulary.bos_id) for x in examples]
        return _Prompts(examples, [Prompt(i, {}, tokens) for i, tokens in enumerate(ids)])

    def _measure(
        self, cell: Cell, prompts: "_Prompts", model: DecoderModel, params
    ) -> dict[str, Any]:
        """The score of a cell, those of trivial strategies on the same examples, and the answers."""
        began, probe = time.monotonic(), self._probe(cell.probe, model)
        answers = answers_of(model.module, model.vocabulary, self.batch_size, self._room(probe))
        rows = in_batches(
            lambda batch: answers.predict(params, batch), prompts.encoded, self.batch_size
        )
        predictions = [row["prediction"] for row in rows]
        ((metric, score),) = probe.score(prompts.examples, predictions).items()
        return dict(
            score=score,
            metric=metric,
            trivial=chance(probe, prompts.examples),
            seconds=round(time.monotonic() - began, 1),
            answers=[
                {"index": i, "prediction": prediction, "references": example["references"]}
                for i, (example, prediction) in enumerate(zip(prompts.examples, predictions))
            ],
        )


def probe_of(
    model: DecoderModel, name: str, options: Mapping[str, Any], seed: int, setting: str
) -> Probe:
    """The probe of a name, for evaluation, in the vocabulary of a model unless the options give another.

    Args:
      model: the model that is to answer.
      name: name of the probe.
      options: its options.
      seed: seed of its examples.
      setting: what named the probe, for error sentences.

    Raises:
      ConfigError: there is no such probe or option, or the model's vocabulary cannot spell the probe.
    """
    if name not in PROBES:
        raise ConfigError(
            f"{setting} names {name!r}, which is no probe.{nearest(name, list(PROBES))} All are"
            f" {', '.join(PROBES)}."
        )
    if model.vocabulary is None:
        raise ConfigError(
            f"{setting} {name!r} needs a vocabulary, and the model has none: copy the vocabulary.json of"
            " the training run next to model.json."
        )
    check_bos(model.vocabulary.bos_id, "the model")
    given = {"vocabulary": model.vocabulary, **options, "split": "eval", "seed": seed}
    try:
        probe = PROBES[name](**given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{setting} '{name}': {error}") from error
    check_vocabulary(probe.vocab, model, f"{setting} '{name}'")
    return probe


class _Prompts(NamedTuple):
    """The examples of a probe at a length, and each as tokens."""

    examples: list[dict[str, Any]]
    encoded: list[Prompt]
