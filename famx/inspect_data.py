"""Shows what a model sees of a task: decoded tokens, their loss weights, blocks and numbers.

    python -m famx.inspect_data --task passkey_words --length 512 --block_size 128
    python -m famx.inspect_data --task python_stdlib --packed --length 8192 --plot lengths.png

The tokens are the targets; inputs are the same one step later, with bos in front. On a terminal, tokens
of weight 1 and more are green, those between 0 and 1 yellow; elsewhere they stand as `[1|text]`, with
their weight. `<block 3>` stands where block 3 begins. Control characters, characters written from right
to left and everything else that moves the cursor are shown as escapes, as `\\n` in front of a new line.
A character whose bytes are parted by a block or a weight is shown as replacement characters.
"""

import dataclasses
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.cache import json_options
from famx.data.rows import PackedRows, tokens_and_weights
from famx.data.tasks import Kind, has_settings, kind_of, registry
from famx.data.vocabularies import Vocabulary, open_vocabulary

_DEFAULT_LENGTH = 1024
_PLOTTED = 1000  # examples of a histogram at most
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # categories that print nothing or move the cursor
_RIGHT_TO_LEFT = {"R", "AL", "AN"}
_GREEN, _YELLOW, _CYAN, _RESET = "\x1b[30;42m", "\x1b[30;43m", "\x1b[36m", "\x1b[0m"


class Row(NamedTuple):
    """Tokens int32 [n] and their loss weights float32 [n]."""

    tokens: np.ndarray
    weights: np.ndarray


class Rows:
    """What a task gives to training, by number.

    Args:
      task: a task made by index, documents, or a text task or mixture.
      length: tokens of a row; None: of made tasks the shortest that is possible, at least 1024. Documents
        are whole without `packed`.
      packed: whether documents are shown as packed rows.
      seed: of the order of packed rows.

    Raises:
      ConfigError: the task is none of these, the settings do not fit it, or its files are missing.
    """

    def __init__(self, task: Any, length: int | None = None, packed: bool = False, seed: int = 0):
        kind = kind_of(task)
        self.task, self.packed, self.made = task, packed, kind is Kind.MADE
        if length is not None and length < 1:
            raise ConfigError(f"The length is {length}; it must be at least 1.")
        if kind is Kind.SEQIO:
            raise ConfigError(
                "SeqIO's tasks cannot be looked at here; read their datasets, or choose one of famx."
            )
        if packed and self.made:
            raise ConfigError("This task makes rows of its own; leave out --packed.")
        self.vocab: Vocabulary = task.vocab
        self.length = length
        if self.made:
            self.length = max(task.min_length, _DEFAULT_LENGTH) if length is None else length
        elif packed:
            self.length = length or _DEFAULT_LENGTH
            if self.vocab.bos_id is None:
                raise ConfigError("The vocabulary has no bos_id, with which packed documents begin.")
            self._packed = PackedRows(
                task, 1, self.length, seed, bos_id=self.vocab.bos_id, pad_id=self.vocab.pad_id)
            self._read: list[Row] = []
        elif length is not None:
            raise ConfigError("Documents are as long as they are; give --packed for rows of a length.")
        self.size = None if self.made or packed else len(task)

    def __getitem__(self, i: int) -> Row:
        if self.made:
            row = self.task.example(i, self.length)
            return Row(row["tokens"], row["weights"])
        if self.packed:
            while len(self._read) <= i:
                batch = next(self._packed)
                self._read.append(
                    Row(batch["decoder_target_tokens"][0], batch["decoder_loss_weights"][0]))
            return self._read[i]
        return Row(*tokens_and_weights(self.task[i]))


# ------ Text


def visible(text: str) -> str:
    """The text with escapes for what a terminal does not simply print; a new line stays one."""
    return "".join(map(_visible, text))


def _visible(char: str) -> str:
    if " " <= char <= "~" and char != "\\":
        return char
    if char == "\n":
        return "\\n\n"
    strange = (
        char == "\\"
        or unicodedata.category(char) in _HIDDEN
        or unicodedata.bidirectional(char) in _RIGHT_TO_LEFT
        or char.isspace()
    )
    return char.encode("unicode_escape").decode() if strange else char


def render(
    row: Row,
    vocabulary: Vocabulary,
    block_size: int | None = None,
    color: bool = False,
    show: int | None = None,
) -> str:
    """A row as text for a terminal.

    Args:
      row: the row.
      vocabulary: decodes its tokens.
      block_size: marks where blocks begin; None: none are marked.
      color: colours in place of brackets.
      show: number of tokens to show, half of them from the end; None: all.
    """
    n = len(row.tokens)
    if show is None or n <= show:
        return _render(row, vocabulary, block_size, color, 0, n)
    head, tail = show - show // 2, show // 2
    left_out = row.weights[head : n - tail]
    gap = f"... {len(left_out)} tokens left out, {int((left_out > 0).sum())} of them weighted ..."
    return "\n".join([
        _render(row, vocabulary, block_size, color, 0, head),
        f"{_CYAN}{gap}{_RESET}" if color else gap,
        _render(row, vocabulary, block_size, color, n - tail, n),
    ])  # fmt: skip


def _render(row, vocabulary, block_size, color, start, stop) -> str:
    tokens, weights = row.tokens, row.weights
    special = {
        getattr(vocabulary, f"{name}_id"): name
        for name in ("unk", "eos", "bos", "pad") if getattr(vocabulary, f"{name}_id") is not None
    }  # fmt: skip
    shown = tokens[start:stop]
    kinds = np.where(np.isin(shown, list(special)), shown, -1)
    changes = (np.diff(weights[start:stop]) != 0) | (np.diff(kinds) != 0)
    cuts = {start, *(start + 1 + np.flatnonzero(changes)).tolist()}
    marks = set(range(-(-start // block_size) * block_size, stop, block_size)) if block_size else set()
    cuts = [*sorted(cuts | marks), stop] if stop > start else []
    parts = []
    for a, b in zip(cuts, cuts[1:]):
        if a in marks:
            mark = f"<block {a // block_size}>"
            parts.append(f"{_CYAN}{mark}{_RESET}" if color else mark)
        token = int(tokens[a])
        if token in special:
            text = f"<{special[token]}>" + (f"*{b - a}" if b - a > 1 else "")
        else:
            text = visible(vocabulary.decode(tokens[a:b].tolist()))
        weight = float(weights[a])
        if not weight:
            parts.append(text)
        elif color:
            parts.append(f"{_GREEN if weight >= 1 else _YELLOW}{text}{_RESET}")
        else:
            parts.append(f"[{weight:.4g}|{text}]")
    return "".join(parts)


def numbers(row: Row, block_size: int | None = None) -> str:
    """Tokens, blocks and weighted tokens of a row, in words."""
    n, weighted = len(row.tokens), int((row.weights > 0).sum())
    blocks = f", {n / block_size:.4g} blocks of {block_size}" if block_size else ""
    return (
        f"{n} tokens{blocks}, {weighted} weighted ({weighted / max(n, 1):.1%}), sum of weights "
        f"{float(row.weights.sum(dtype=np.float64)):.6g}"
    )


# ------ All of it


def inspect(
    rows: Rows,
    examples: int = 2,
    first: int = 0,
    block_size: int | None = None,
    color: bool = False,
    show: int | None = None,
    message: Callable[[str], None] = print,
) -> dict[str, float]:
    """Prints examples `first` and on, each with its numbers.

    Returns:
      `examples`, `tokens`, `weighted_tokens` and their `share` in what was printed.

    Raises:
      ConfigError: a number is out of range, or there are fewer examples.
    """
    for name, value, least in (
        ("examples", examples, 1), ("first", first, 0), ("block_size", block_size, 1), ("show", show, 2)
    ):  # fmt: skip
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}.")
    if rows.size is not None and first >= rows.size:
        raise ConfigError(f"There are {rows.size} examples, numbered from 0, and no number {first}.")
    stop = first + examples if rows.size is None else min(first + examples, rows.size)
    tokens = weighted = 0
    for i in range(first, stop):
        row = rows[i]
        head = f"{'row' if rows.packed else 'example'} {i}: {numbers(row, block_size)}"
        message(f"{_CYAN}{head}{_RESET}" if color else head)
        message(render(row, rows.vocab, block_size, color, show))
        message("")
        tokens, weighted = tokens + len(row.tokens), weighted + int((row.weights > 0).sum())
    share = weighted / max(tokens, 1)
    message(f"{stop - first} shown: {tokens} tokens, {weighted} weighted ({share:.1%}).")
    return dict(examples=stop - first, tokens=tokens, weighted_tokens=weighted, share=share)


def sizes(rows: Rows, limit: int = _PLOTTED) -> Iterator[tuple[int, int]]:
    """(tokens, weighted tokens) of at most `limit` examples, evenly over all of them."""
    count = limit if rows.size is None else min(limit, rows.size)
    for k in range(count):
        row = rows[k if rows.size is None else k * rows.size // count]
        yield len(row.tokens), int((row.weights > 0).sum())


def plot(found: Sequence[tuple[int, int]], path: str, title: str) -> None:
    """Writes histograms of `sizes` as a PNG file.

    Raises:
      ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: {len(found)} examples")
    names = ("tokens of an example", "tokens with a loss weight")
    for axes, name, values in zip(figure.subplots(1, 2), names, np.array(found).reshape(-1, 2).T):
        median = float(np.median(values))
        bins: Any = min(50, len(np.unique(values)))
        if values.max() > 20 * max(values.min(), 1):  # a long tail would hide all else
            values = np.maximum(values, 1)
            bins = np.geomspace(values.min(), values.max(), 50)
            axes.set_xscale("log")
        axes.hist(values, bins=bins)
        axes.axvline(median, color="black", linestyle=":", label=f"median {median:g}")
        axes.set_xlabel(name)
        axes.set_ylabel("examples")
        axes.legend()
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error


def open_rows(
    name: str,
    options: Mapping[str, Any] | None = None,
    split: str | None = None,
    length: int | None = None,
    packed: bool = False,
    seed: int = 0,
) -> Rows:
    """The rows of a registered task.

    Args:
      name: its name.
      options: its settings, as in training.
      split: None: the task's own, which is that of training but for GPT-3's tasks.
      length, packed, seed: see `Rows`.

    Raises:
      ConfigError: there is no such task or split, or as `Rows`.
    """
    options = dict(options or {})
    try:
        task = registry.get(name, **options)
        if split is not None:
            if has_settings(task, "split"):
                task = dataclasses.replace(task, split=split)
            else:
                task = registry.get(name, **{**options, "split": split})
        return Rows(task, length, packed, seed)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def main() -> None:
    """The command line."""
    values = flags.FLAGS
    if not values.task:
        raise ConfigError("--task is missing: python -m famx.inspect_data --task NAME.")
    color = values.color == "always" or (values.color == "auto" and sys.stdout.isatty())
    sys.stdout.reconfigure(errors="backslashreplace")
    options = json_options(values.task_options, "task_options")
    try:
        if values.vocabulary:
            options["vocabulary"] = open_vocabulary(values.vocabulary)
        rows = open_rows(
            values.task, options, values.split, values.length, values.packed, values.seed)
        inspect(rows, values.examples, values.first, values.block_size, color, values.show)
        if values.plot:
            plot(list(sizes(rows)), values.plot, values.task)
            print(f"{values.plot}: histograms of lengths.")
    except (ValueError, OSError) as error:  # broken data gets its sentence too
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    flags.DEFINE_string("task", None, "Name of the task, such as passkey_words or scrolls_qasper.")
    flags.DEFINE_string("task_options", "", 'Settings of the task, such as {"data_dir": "/data"}.')
    flags.DEFINE_string("vocabulary", None, "Tokenizer file in place of the task's vocabulary.")
    flags.DEFINE_string("split", None, "Split; the task's own if not given.")
    flags.DEFINE_integer("length", None, "Tokens of a row, for tasks that are made and packed rows.")
    flags.DEFINE_bool("packed", False, "Show documents as packed rows.")
    flags.DEFINE_integer("seed", 0, "Seed of the order of packed rows.")
    flags.DEFINE_integer("block_size", None, "Mark where blocks of so many tokens begin.")
    flags.DEFINE_integer("examples", 2, "How many examples to show.")
    flags.DEFINE_integer("first", 0, "Number of the first one.")
    flags.DEFINE_integer("show", 2000, "Show at most so many tokens of an example, half from the end.")
    flags.DEFINE_enum("color", "auto", ["auto", "always", "never"], "Colours in place of brackets.")
    flags.DEFINE_string("plot", None, "PNG file for histograms of lengths.")
    gin_utils.run(main, gin_flags=False)
