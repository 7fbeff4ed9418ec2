"""From a pretrained model to one that remembers, in one command: import, train, evaluate.

    python -m benchmarks.remember --from=MODEL.gguf --to=/tmp/famx/remember

imports the model, measures what a new memory does to its loss on plain text, trains by the recipe of
gin_configs/examples/finetune_passkey.gin in sizes that fit the machine, and evaluates. Everything goes to
the directory: `remember.json`, `remember.md`, `remember.png`, the imported model `base`, the run `fam`
and its twin without memory `bswa`. The same command continues what was stopped.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import command, memory_start
from famx.base import files, gin_utils, tables
from famx.base.errors import ConfigError
from famx.conversion.commands import convert, read_memory
from famx.conversion.gin_file import model_gin
from famx.data.probes.passkey import PasskeyTask
from famx.evaluation import PasskeyEvaluation
from famx.evaluation.figures import lengths_figure, passkey_results
from famx.memories import Fam
from famx.model_dir.loading import TrainedModel, load_model
from famx.models.memory_start import MemoryStart
from famx.modules import Memory
from famx.scale.timing import machine
from famx.training import loop
from famx.training.run_log import read_metrics
from famx.training.stages import SMOOTHING

RECIPE = "gin_configs/examples/finetune_passkey.gin"
_TWIN = """\
from __gin__ import dynamic_registration

from famx import modules

modules.DecoderConfig:
  memory = @modules.Memory()
  memory_segments = 1
"""
PROBES = ("hold", "hold_unaligned", "hold_repeated", "overwrite")
REACHED = 0.95  # exact match whose number of steps is noted
VARIED = {"header": 0.5, "depth": None, "second_key": 0.3}
FILLERS = ("repeated", "random_words", "python_stdlib")


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the whole procedure.

    Attributes:
      stages: stages of the run, see `famx.training.stages`. What the first one sets of the
        memory is as `memory` has it in the others.
      steps: steps of the run.
      memory: the memory that the model gets, if no other one is asked for.
      settings: other values for the recipe's gin file.
      twin_steps: steps of the twin without memory, in the first stage; 0: no twin.
      lengths: lengths of the evaluated documents, in blocks of the last stage.
      examples: documents for each length and probe.
      texts: number of texts whose loss is measured.
      text_blocks: their length in blocks of the last stage.
      train_minutes: training stops after this time, that of the twin after a quarter of it, and what was
        learnt until then is evaluated; None: it is never stopped.
    """

    stages: tuple[Mapping[str, Any], ...]
    steps: int
    memory: Fam
    settings: Mapping[str, Any]
    twin_steps: int
    lengths: tuple[int, ...]
    examples: int = 32
    texts: int = 4
    text_blocks: int = 5
    train_minutes: float | None = None

    @property
    def block_size(self) -> int:
        """Tokens of a block in the last stage."""
        return [stage["block_size"] for stage in self.stages if "block_size" in stage][-1]

    @property
    def longest(self) -> int:
        """Length of the longest training documents, in blocks of the last stage."""
        return max(
            max((stage.get("curriculum") or {}).get("blocks", (stage.get("blocks", 1),)))
            for stage in self.stages
        )


# A residual update learns in fewer steps, but the memory grows with every block: a model that had learnt
# 8 blocks knew hardly anything at 16 (docs/pretrained.md). So on CPUs the first stage has it, and the
# other has the gated one.
LEARNING = {"update": "residual"}
SIZES = {
    # One GPU: the paper's blocks of 1,024 tokens at the end, documents of up to 64 blocks. Four programs:
    # stages of the same block size and update share theirs.
    "gpu": Size(
        stages=(
            {"steps": 350, "until": {"exact_match": 0.9}, "block_size": 256, "blocks": 8,
             "batch_size": 32, "curriculum": {"blocks": (2, 4, 8)}, "options": {"padding": 255}},
            {"steps": 150, "until": {"exact_match": 0.9}, "curriculum": {"blocks": (4, 8)},
             "options": {**VARIED, "filler": FILLERS, "text_weight": 0.002}},
            {"block_size": 1024, "batch_size": 8, "state_passing": "aged",
             "curriculum": {"blocks": (8, 16, 32, 64), "smoothing": 0.8},
             "options": {"text_weight": 0.0005, "padding": 1023}},
        ),
        steps=700,
        memory=Fam(64, update="gated", first_residual="ordinary"),
        settings={
            "Lora.rank": 12, "Lora.alpha": 24, "warmup_cosine.learning_rate": 1e-3,
            "run.Run.adapter_dtype": "bfloat16", "Every.log": 10, "Every.checkpoint": 250,
        },
        twin_steps=100,
        lengths=(8, 16, 32, 64, 128, 256),
        examples=16,
        texts=2,
        train_minutes=4.5,
    ),
    # Two CPU cores, for a model of 135M parameters: short blocks and a short memory.
    "cpu": Size(
        stages=(
            {"steps": 180, "until": {"exact_match": 0.9}, "block_size": 64, "blocks": 4, "batch_size": 16,
             "curriculum": {"blocks": (2, 4)}, "memory": LEARNING, "options": {"padding": 63}},
            {"state_passing": "aged", "curriculum": {"blocks": (4, 8, 16, 32, 64), "smoothing": 0.8},
             "options": {"filler": FILLERS, "text_weight": 0.004}},
        ),
        steps=260,
        memory=Fam(16, update="gated", first_residual="ordinary", bias="minus_log_length"),
        settings={
            "DecoderConfig.remat": "full", "DecoderModel.loss_chunk": 256,
            "Every.log": 1, "Every.checkpoint": 10, "Lora.rank": 8, "Lora.alpha": 16,
            "warmup_cosine.learning_rate": 1e-3, "warmup_cosine.warmup_steps": 5,
            "run.Run.adapter_dtype": "bfloat16",
        },
        twin_steps=0,
        lengths=(2, 4, 8, 16, 32, 64),
        examples=16,
        texts=2,
    ),
}  # fmt: skip


# ---------------------------------------------------------------- the procedure


def remember(directory: pathlib.Path, size: Size, memory: Fam, prompt: str, seed: int) -> dict[str, Any]:
    """Train and evaluate the model in `directory/base`.

    Args:
      directory: where everything is; what is finished there is not made again.
      size: sizes.
      memory: the memory that the model gets.
      prompt: what the prompt starts as, see `MemoryStart`.
      seed: random seed.

    Returns:
      Figures for `remember.json`.

    Raises:
      SystemExit: a signal stopped the training before its time.
    """
    base = load_model(str(directory / "base"))
    model, twin = directory / "base.gin", directory / "bswa.gin"
    files.write_text(model, model_gin(base.model.config, str(directory / "base")))
    files.write_text(twin, _TWIN)
    loss = Loss(base, size)
    figures: dict[str, Any] = {
        "memory": memory.to_dict(), "prompt": prompt, "seed": seed, "block_size": size.block_size,
        "plain_text": loss.before(memory, prompt, seed),
    }  # fmt: skip
    runs = {"fam": size.steps} | ({"bswa": size.twin_steps} if size.twin_steps else {})
    for name, steps in runs.items():
        began = time.monotonic()
        given = _settings(directory, name, size, memory, prompt, seed, steps)
        gin_files = [str(model), RECIPE, *([str(twin)] if name == "bswa" else [])]
        gin_utils.call_with(loop.train, gin_files, given)
        minutes, limit = (time.monotonic() - began) / 60, _minutes(name, size)
        trained = load_model(str(directory / name))
        if trained.step < steps and (limit is None or minutes < limit):
            raise SystemExit(f"Training stopped at step {trained.step}; the same command continues.")
        figures[name] = {
            "steps": trained.step,
            "minutes": minutes,
            "stages": _stage_ends(directory / name),
            "reached": _reached(directory / name),
            **_scores(directory / name, trained, size, seed, trained.step == steps),
        }
        figures["plain_text"][f"{name}, trained"] = loss.of(trained)
    return figures


def _settings(directory, name, size, memory, prompt, seed, steps) -> dict[str, Any]:
    """Values for the recipe's gin file."""
    stages = [*size.stages]
    if len(stages) > 1 and "memory" in stages[0]:
        stages[1] = {**stages[1], "memory": {name: getattr(memory, name) for name in stages[0]["memory"]}}
    settings = {
        "MODEL_DIR": directory / name,
        "INITIAL_CHECKPOINT_PATH": directory / "base",
        "RANDOM_SEED": seed,
        "TASK_FEATURE_LENGTHS": {"targets": stages[0]["blocks"] * stages[0]["block_size"]},
        "BATCH_SIZE": stages[0]["batch_size"],
        "DecoderConfig.block_size": size.block_size,
        "warmup_cosine.warmup_steps": 30,
        "Every.evaluation": 0,
        "run.Run.minutes": _minutes(name, size),
        **{f"PasskeyEvaluation.{field}": value for field, value in _evaluation(size, seed).items()},
        **size.settings,
    }
    if name == "fam":
        fields = {f"Fam.{field}": value for field, value in memory.to_dict().items() if field != "kind"}
        settings |= {"PROMPT": prompt, **fields}
    else:
        others = ("steps", "until", "memory")
        stages = [{key: value for key, value in stages[0].items() if key not in others}]
    return {**settings, "TRAIN_STEPS": steps, "STAGES": tuple(stages)}


def _minutes(name: str, size: Size) -> float | None:
    if size.train_minutes is None or name == "fam":
        return size.train_minutes
    return size.train_minutes / 4


def _stage_ends(run: pathlib.Path) -> dict[str, int]:
    """Number of steps of the run at the end of each stage, by the stage's number."""
    ends: dict[str, int] = {}
    for line in read_metrics(str(run), "train"):
        ends[str(int(line.get("stage", 1)))] = line["step"]
    return ends


def _reached(run: pathlib.Path) -> int | None:
    """Steps until the logged exact match of the first stage was `REACHED`, or None if it never was.

    It counts from where the longest documents are unlocked, smoothed from 0 like a stage's `until`.
    """
    lines = [line for line in read_metrics(str(run), "train") if int(line.get("stage", 1)) == 1]
    longest = max((line.get("blocks", 0) for line in lines), default=0)
    level = 0.0
    for line in lines:
        if line.get("blocks", 0) == longest:
            level = SMOOTHING * level + (1 - SMOOTHING) * line["exact_match"]
        if level >= REACHED:
            return line["step"]
    return None


def _scores(
    run: pathlib.Path, trained: TrainedModel, size: Size, seed: int, complete: bool
) -> dict[str, Any]:
    """`{"exact_match": scores, "answer_loss": nats of an answer's token}`.

    Both are by probe and by number of blocks; those of `zeroed ...` are without the memory.
    A `complete` run has evaluated itself at its end; any other is evaluated here, as far as it has come.
    """
    if not complete:
        header = [
            stage["options"]["header"] for stage in size.stages if "header" in stage.get("options", {})
        ]
        task = PasskeyTask(vocabulary=trained.model.vocabulary, header=header[-1] if header else True)
        evaluation = PasskeyEvaluation(task, **_evaluation(size, seed))
        evaluation.report(trained.model, trained.params, str(run))
    results = passkey_results(run)
    match = {probe: {str(n): x for n, x in row.items()} for probe, row in results["exact_match"].items()}
    for name, value in results["memory"].items():
        if name.startswith("zeroed/"):
            _, probe, blocks = name.split("/")
            match.setdefault(f"zeroed {probe}", {})[blocks] = value
    kept, zeroed = (results.get("answer_loss", {}).get(name, {}) for name in ("kept", "zeroed"))
    loss = {**kept, **{f"zeroed {probe}": row for probe, row in zeroed.items()}}
    return {"exact_match": match, "answer_loss": loss}


def _evaluation(size: Size, seed: int) -> dict[str, Any]:
    """Fields of `PasskeyEvaluation`."""
    return {
        "blocks": (), "report_blocks": size.lengths, "train_blocks": size.longest, "probes": PROBES,
        "examples": size.examples, "seed": seed + 1, "health_tokens": size.block_size,
    }  # fmt: skip


class Loss:
    """Loss on plain texts, block by block.

    Args:
      base: the pretrained model, without a memory.
      size: sizes of the texts.
    """

    def __init__(self, base: TrainedModel, size: Size):
        self._base, self._length = base, size.block_size * size.text_blocks
        self._size = size
        self._tokens = memory_start.texts(base, (), size.texts, self._length)

    def before(self, memory: Fam, prompt: str, seed: int) -> dict[str, list[float]]:
        """Of the model as it was pretrained, in one block and in blocks; and with an untrained memory."""
        config = self._base.model.config
        whole = dataclasses.replace(config, block_size=self._length, memory_segments=0, memory=Memory())
        blocks = dataclasses.replace(whole, block_size=self._size.block_size)
        fam = dataclasses.replace(blocks, memory=memory)
        params = memory_start.with_memory(self._base, fam, MemoryStart(prompt), seed)
        return {
            "pretrained, whole text": self._read(whole, self._base.params),
            "pretrained, blocks apart": self._read(blocks, self._base.params),
            "fam, untrained": self._read(fam, params),
        }

    def of(self, trained: TrainedModel) -> list[float]:
        """Of a trained model."""
        return self._read(trained.model.config, trained.params)

    def _read(self, config, params) -> list[float]:
        return memory_start.losses(config, params, self._tokens, self._size.block_size).tolist()


# ---------------------------------------------------------------- outputs


def made_tables(figures: Mapping[str, Any], host: Mapping[str, Any]) -> list[tables.Table]:
    """The tables of exact match, of the answers' loss and of the loss on plain text."""
    steps = ", ".join(f"{name} {figures[name]['steps']}" for name in ("fam", "bswa") if name in figures)
    notes = (
        f"Memory {figures['memory']}, prompt {figures['prompt']}; blocks of {figures['block_size']}"
        f" tokens; seed {figures['seed']}; steps: {steps}",
        f"{host['cpu']}, {host['cores']} cores; {host['device']}; jax {host['jax']}",
    )
    by_length = lambda measure: [
        {"model": name, "probe": probe}
        | {f"{blocks} blocks": f"{value:.3f}" for blocks, value in row.items()}
        for name in ("fam", "bswa") if name in figures
        for probe, row in figures[name][measure].items()
    ]  # fmt: skip
    losses = [
        {"model": name}
        | {f"block {i}": f"{x:.2f}" for i, x in enumerate(row)}
        | {"from block 1": f"{np.mean(row[1:]):.3f}"}
        for name, row in figures["plain_text"].items()
    ]
    return [
        tables.Table("remember_scores", "Exact match by length", notes, by_length("exact_match")),
        tables.Table(
            "remember_answers", "Loss of the answers, nats per token", (), by_length("answer_loss")
        ),
        tables.Table("remember_loss", "Loss on plain text, nats per token", (), losses),
    ]


def write(directory: pathlib.Path, figures: Mapping[str, Any], size: Size) -> str:
    """Writes `remember.json`, `.md` and `.png`; returns the tables as text."""
    host = machine()
    made = made_tables(figures, host)
    files.write_json(directory / "remember.json", {"machine": host, **figures})
    files.write_text(directory / "remember.md", "\n\n".join(t.markdown() for t in made) + "\n")
    numbers = lambda row: {int(blocks): value for blocks, value in row.items()}
    lines: dict[str, dict[str, dict[int, float]]] = {probe: {} for probe in PROBES}
    for name, label in (("fam", "FAM"), ("bswa", "BSWA, M 1")):
        for probe, row in figures.get(name, {}).get("exact_match", {}).items():
            zeroed = probe.startswith("zeroed ")
            title = f"{label}, memory zeroed" if zeroed else label
            lines[probe.removeprefix("zeroed ")][title] = numbers(row)
    figure = lengths_figure(lines, size.block_size, size.longest)
    figure.savefig(directory / "remember.png", dpi=150)
    return "\n\n".join(t.text() for t in made)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--from", dest="source", help="GGUF file or Hugging Face directory to import")
    parser.add_argument("--to", type=pathlib.Path, required=True, help="directory for everything")
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument("--memory", help="as for famx.convert, such as fam:length=16,update=gated")
    parser.add_argument("--prompt", default="text", help="normal, tokens, text or bos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop training after this time, and evaluate")
    values = parser.parse_args(argv)
    size = SIZES[values.size]
    if values.minutes is not None:
        size = dataclasses.replace(size, train_minutes=values.minutes)
    base = values.to / "base"
    if not (base / "model.json").exists():
        if values.source is None:
            raise ConfigError(f"There is no model in {base}: add --from=FILE.gguf or --from=DIRECTORY.")
        convert(values.source, str(base), {"memory": Memory()})
    memory = size.memory if values.memory is None else read_memory(values.memory)
    if not isinstance(memory, Fam):
        raise ConfigError(f"--memory={values.memory}: only memories of the kind fam are trained here.")
    figures = remember(values.to.absolute(), size, memory, values.prompt, values.seed)
    print(write(values.to, figures, size))


if __name__ == "__main__":
    with command.exit_on_bad_input():
        main()
