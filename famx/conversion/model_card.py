"""The model card of an export: what the model is, how it was trained, what it can do, and how to load it.

It says what the records of a MODEL_DIR say (config.gin, metrics.jsonl, base.json, model.gin), and where
there is no record, that it is not known.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from famx import __version__
from famx.base.files import as_path
from famx.base.text import byte_size
from famx.conversion.with_memory import CODE
from famx.modules.config import DecoderConfig

CARD = "README.md"
_MOST_FIGURES = 40  # of the last evaluation
_IMPORTED = re.compile(r"# The model that was imported from (.+)\.$")  # first line of model.gin
_PRIVATE = re.compile(r"""(_DIR|_PATH|_FILES?) *=|['"](/|~|[a-z0-9]+://)""")  # paths of one machine
_OF_SPEED = ("tokens_per_second", "step_seconds", "data_wait", "memory_gb", "time", "step", "split")


@dataclasses.dataclass(frozen=True)
class History:
    """What is recorded of the training of a model; None: it is not recorded.

    Attributes:
      step: number of training steps.
      began_from: the model that the training began from, or that was imported.
      settings: text of config.gin without paths.
      task: the text of the setting MIXTURE_OR_TASK_NAME.
      figures: last logged figures of the training.
      evaluation: `(step, figures)` of the last evaluation.
    """

    step: int | None = None
    began_from: str | None = None
    settings: str | None = None
    task: str | None = None
    figures: Mapping[str, float] | None = None
    evaluation: tuple[int, Mapping[str, float]] | None = None


def read_history(run: pathlib.Path, step: int | None) -> History:
    """Read the records of a run.

    Args:
      run: its MODEL_DIR.
      step: the step of the checkpoint; later records are not read. None: the last step that was logged.
    """
    settings = _text(run / "config.gin")
    task = re.search(r"^MIXTURE_OR_TASK_NAME = (.+)$", settings or "", re.MULTILINE)
    lines = [line for line in _lines(run / "metrics.jsonl") if step is None or line["step"] <= step]
    trained = [line for line in lines if line["split"] == "train"]
    evaluated = [line for line in lines if line["split"] != "train"]
    figures = lambda line: {k: v for k, v in line.items() if k not in _OF_SPEED}
    return History(
        step=trained[-1]["step"] if step is None and trained else step,
        began_from=_began_from(run, settings or ""),
        settings=settings and _without_paths(settings),
        task=task and task[1],
        figures=figures(trained[-1]) if trained else None,
        evaluation=(evaluated[-1]["step"], figures(evaluated[-1])) if evaluated else None,
    )


def model_card(
    config: DecoderConfig,
    base: Mapping[str, Any],
    history: History,
    name: str,
    dtype: str,
    tokenizer: bool,
) -> str:
    """The text of the model card, in Markdown.

    Args:
      config: the decoder.
      base: config.json of the decoder without its memory.
      history: what is recorded of its training.
      name: name of the directory.
      dtype: dtype of the weights.
      tokenizer: whether there is a tokenizer of transformers.
    """
    with_memory = config.memory.exists
    tags = ["famx", *(["feedback-attention-memory", "long-context"] if with_memory else [])]
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags: [{', '.join(tags)}]\n---",
        f"# {name}",
        _about(config, base, dtype),
        f"## Use\n\n{_use(config, name, tokenizer)}",
        f"## The model\n\n{_model(config, base, dtype)}",
        f"## How it was trained\n\n{_training(history, with_memory)}",
        f"## What it can do\n\n{_abilities(history)}",
        "The licence is that of the model that it began from and of the data that it was trained on; this"
        " export does not know them.",
    ]
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------- parts of the card


def _about(c: DecoderConfig, base: Mapping[str, Any], dtype: str) -> str:
    architecture = base["architectures"][0]
    if not c.memory.exists:
        return f"A language model of the architecture {architecture}, exported by famx {__version__}."
    return (
        f"A language model of the architecture {architecture} with feedback attention memory"
        " (TransformerFAM, [arXiv 2404.09173](https://arxiv.org/abs/2404.09173)), exported by famx"
        f" {__version__}. It reads text of any length in blocks of {c.block_size:,} tokens. What it keeps"
        f" of a text is {byte_size(_state_bytes(c, dtype))}, however long the text is.\n\n"
        f"`{CODE.name}` defines the model: read it, then load it with `trust_remote_code=True`."
        " `famx convert --from THIS_DIRECTORY --to MODEL_DIR` takes it back into famx."
    )


def _use(c: DecoderConfig, name: str, tokenizer: bool) -> str:
    lines = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    trust = ", trust_remote_code=True" if c.memory.exists else ""
    lines += [
        f"NAME = {json.dumps(name)}  # the path of this directory, or its name on a hub",
        f"model = AutoModelForCausalLM.from_pretrained(NAME{trust})",
    ]
    if tokenizer:
        lines += ["tokenizer = AutoTokenizer.from_pretrained(NAME)"]
        encode = lambda text: f'tokenizer("{text}", return_tensors="pt").input_ids'
        show = "print(tokenizer.decode(written[0, {}.shape[1] :]))"
        long = '"The pass key is 71. " + "The sky is blue. " * 200'
        text = f'tokenizer({long}, return_tensors="pt").input_ids'
    else:
        lines[1] = "from transformers import AutoModelForCausalLM"
        lines += ["", "# There is no tokenizer of transformers for its vocabulary: ids come from famx."]
        encode = lambda text: f"torch.tensor([[{', '.join(str(i % c.vocab_size) for i in range(5, 9))}]])"
        show = "print(written[0, {}.shape[1] :])"
        text = f"torch.arange({2 * c.block_size + 3})[None] % {c.vocab_size}"
    lines += ["", f"prompt = {encode('The sky is')}"]
    lines += ["written = model.generate(prompt, max_new_tokens=20)", show.format("prompt")]
    if c.memory.exists:
        lines.insert(0, "import copy\n")
        lines += [
            "",
            "# Read once, ask often: `state` is all that is kept of the text.",
            f"text = {text}",
            "state = model.read(text)",
            f"tokens = torch.cat([text, {encode('What is the pass key?')}], dim=1)",
            "written = model.generate(tokens, state=copy.deepcopy(state), max_new_tokens=20)",
            show.format("tokens"),
        ]
    else:
        lines = [line for line in lines if line != "import torch" or not tokenizer]
    return "```python\n" + "\n".join(lines).strip() + "\n```"


def _model(c: DecoderConfig, base: Mapping[str, Any], dtype: str) -> str:
    rows = {
        "architecture": base["architectures"][0],
        "layers, width, heads": f"{c.num_layers}, {c.embed_dim}, {c.num_heads}",
        "vocabulary": f"{c.vocab_size:,}",
        "weights": dtype,
        "trained with blocks of": f"{c.block_size:,} tokens",
        "past blocks in the window": str(c.memory_segments),
    }
    memory = c.memory.to_dict() if c.memory.exists else {}
    rows |= {f"memory: {key}": str(value) for key, value in memory.items()}
    return _table(("", ""), rows)


def _training(history: History, with_memory: bool) -> str:
    trained = bool(history.step)
    began = history.began_from
    if began is None:
        began = "random weights" if history.settings else "a model that is not recorded"
    if not trained:
        lines = [f"* It was imported from {began} and not trained afterwards."]
        if with_memory:
            lines.append("* Its memory was never trained: it disturbs the model and remembers nothing.")
        return "\n".join(lines)
    lines = [
        f"* It began from {began}.",
        f"* It was trained for {history.step:,} steps.",
        f"* Task: {history.task or 'not recorded'}.",
    ]
    if history.figures:
        figures = ", ".join(f"{key} {value:.4g}" for key, value in history.figures.items())
        lines.append(f"* Last logged figures of the training: {figures}.")
    if history.settings is None:
        return "\n".join([*lines, "* Its settings are not recorded."])
    details = f"<details><summary>All settings</summary>\n\n```\n{history.settings}\n```\n\n</details>"
    return "\n".join([*lines, "", details])


def _abilities(history: History) -> str:
    if history.evaluation is None:
        return (
            "No evaluation is recorded with this model, so it is not known. `famx eval` measures how well"
            " it remembers, with its memory set to zero beside it."
        )
    step, figures = history.evaluation
    shown = dict(list(figures.items())[:_MOST_FIGURES])
    rest = len(figures) - len(shown)
    text = _table((f"evaluation at step {step:,}", ""), {k: f"{v:.4g}" for k, v in shown.items()})
    text += f"\n\n{rest} more figures are in the records of the run." if rest else ""
    return text + "\n\nNothing else was measured."


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows.items())])


def _state_bytes(c: DecoderConfig, dtype: str) -> int:
    """Bytes that are kept of one text."""
    itemsize = {"float64": 8, "float32": 4}.get(dtype, 2)
    columns = c.memory_columns + (c.memory_segments + 1) * c.block_size
    window = 2 * math.prod((c.num_layers, c.num_kv_heads, columns, c.head_dim)) * itemsize
    return window + math.prod((c.num_layers, c.memory_columns, c.embed_dim)) * max(itemsize, 4)


# --------------------------------------------------------------------------- records


def _text(path: pathlib.Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that is not whole, or has no step, is skipped."""
    found = []
    for text in (_text(path) or "").splitlines():
        try:
            line = json.loads(text)
            found += [line] if {"step", "split"} <= line.keys() else []
        except (ValueError, AttributeError):
            continue
    return found


def _began_from(run: pathlib.Path, settings: str = "") -> str | None:
    """The name of the model that was imported, or of the checkpoint that the run began from.

    Args:
      run: MODEL_DIR.
      settings: text of its config.gin, which names the checkpoint if base.json does not.
    """
    if match := _IMPORTED.match((_text(run / "model.gin") or "").partition("\n")[0]):
        return match[1]
    try:
        checkpoint = json.loads(_text(run / "base.json") or "null")["checkpoint"]
    except (ValueError, KeyError, TypeError):
        found = re.search(r"^INITIAL_CHECKPOINT_PATH = ['\"](.+)['\"]$", settings, re.MULTILINE)
        if found is None:
            return None
        checkpoint = found[1]
    directory = as_path(re.sub(r"/checkpoint_\d+/?$", "", checkpoint))
    if directory != run and directory.is_dir() and (origin := _began_from(directory)):
        return f"{origin} ({directory.name})"
    return directory.name


def _without_paths(settings: str) -> str:
    """The bindings of gin text without those that hold a path."""
    joined = re.sub(r"\\?\n[ \t]+", " ", settings)  # gin wraps long values
    lines = [line for line in joined.splitlines() if not _PRIVATE.search(line)]
    return "\n".join(lines).strip()
