"""A task as the model sees it, in text: decoded tokens, their loss weights, blocks and sizes.

The tokens are the targets; the inputs are the same tokens one step later, with bos in front. With
colours, tokens of weight 1 and more are green, those between 0 and 1 yellow; without, they appear as
`[1|text]`, with their weight. `<block 3>` marks the start of block 3. Control characters, characters
written from right to left and everything else that moves the cursor are escaped, a line end as `\\n`
before the actual one. A character whose bytes are separated by a block or a weight appears as
replacement characters.
"""

import dataclasses
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from famx.base.errors import ConfigError
from famx.base.palette import LINES
from famx.base.ranges import AtLeastTwo, NonNegative, Positive, Seed
from famx.base.values import checked, options_named
from famx.data.rows import PackedRows, tokens_and_weights
from famx.data.tasks import Kind, has_settings, kind_of, registry, vocabulary_of
from famx.data.vocabularies import Vocabulary, open_vocabulary

_DEFAULT_LENGTH = 1024
_PLOTTED = 1000  # maximum number of examples in a histogram
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # categories that print nothing or move the cursor
_RIGHT_TO_LEFT = {"R", "AL", "AN"}
_GREEN, _YELLOW, _CYAN, _RESET = "\x1b[30;42m", "\x1b[30;43m", "\x1b[36m", "\x1b[0m"


class Row(NamedTuple):
    """Tokens, int32 [n], and their loss weights, float32 [n]."""

    tokens: np.ndarray
    weights: np.ndarray


@checked
class Rows:
    """Rows of a task as training gets them, by index.

    Args:
      task: task that generates examples, documents, or a text task or mixture.
      length: tokens per row; None: 1024, or the shortest length of a task that generates examples if
        that is longer. Without `packed`, documents have their own lengths.
      packed: show documents as packed rows.
      seed: random seed of the order of packed rows.

    Raises:
      ConfigError: the task is of another kind, the settings do not fit it, or its files are missing.
    """

    def __init__(self, task: Any, length: Positive | None = None, packed: bool = False, seed: Seed = 0):
        kind = kind_of(task)
        self.task, self.packed, self.made = task, packed, kind is Kind.MADE
        if kind is Kind.SEQIO:
            raise ConfigError(
                "SeqIO's tasks cannot be shown here; read their datasets, or choose a task of famx."
            )
        if packed and self.made:
            raise ConfigError("This task generates its own rows; leave out --packed.")
        vocabulary = vocabulary_of(task)
        if vocabulary is None:
            raise ConfigError("These documents have no attribute vocab, so their tokens cannot be shown.")
        self.vocab: Vocabulary = vocabulary
        self.length = length
        if self.made:
            self.length = max(task.min_length, _DEFAULT_LENGTH) if length is None else length
        elif packed:
            self.length = length or _DEFAULT_LENGTH
            if self.vocab.bos_id is None:
                raise ConfigError("The vocabulary has no bos_id, with which packed documents begin.")
            self._packed = PackedRows(
                task, 1, self.length, seed, bos_id=self.vocab.bos_id, pad_id=self.vocab.pad_id)
            self._rows: list[Row] = []
        elif length is not None:
            raise ConfigError("Documents keep their own lengths; add --packed for rows of one length.")
        self.size = None if self.made or packed else len(task)

    def __getitem__(self, i: int) -> Row:
        if self.made:
            row = self.task.example(i, self.length)
            return Row(row["tokens"], row["weights"])
        if self.packed:
            while len(self._rows) <= i:
                batch = next(self._packed)
                self._rows.append(
                    Row(batch["decoder_target_tokens"][0], batch["decoder_loss_weights"][0]))
            return self._rows[i]
        return Row(*tokens_and_weights(self.task[i]))


# ------ Text


def visible(text: str) -> str:
    """Text with escapes for every character that a terminal does not simply print; a line end is kept."""
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
    """Render a row as text for a terminal.

    Args:
      row: row to show.
      vocabulary: vocabulary that decodes its tokens.
      block_size: tokens per block, to mark where blocks begin; None: no marks.
      color: show weights by colours instead of brackets.
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
    for begin, end in zip(cuts, cuts[1:]):
        if begin in marks:
            mark = f"<block {begin // block_size}>"
            parts.append(f"{_CYAN}{mark}{_RESET}" if color else mark)
        token = int(tokens[begin])
        if token in special:
            text = f"<{special[token]}>" + (f"*{end - begin}" if end - begin > 1 else "")
        else:
            text = visible(vocabulary.decode(tokens[begin:end].tolist()))
        weight = float(weights[begin])
        if not weight:
            parts.append(text)
        elif color:
            parts.append(f"{_GREEN if weight >= 1 else _YELLOW}{text}{_RESET}")
        else:
            parts.append(f"[{weight:.4g}|{text}]")
    return "".join(parts)


def numbers(row: Row, block_size: int | None = None) -> str:
    """One line about a row: tokens, blocks, weighted tokens, sum of weights."""
    n, weighted = len(row.tokens), int((row.weights > 0).sum())
    blocks = f", {n / block_size:.4g} blocks of {block_size}" if block_size else ""
    return (
        f"{n} tokens{blocks}, {weighted} weighted ({weighted / max(n, 1):.1%}), sum of weights "
        f"{float(row.weights.sum(dtype=np.float64)):.6g}"
    )


# ------ Several rows


@checked
def inspect(
    rows: Rows,
    examples: Positive = 2,
    first: NonNegative = 0,
    block_size: Positive | None = None,
    color: bool = False,
    show: AtLeastTwo | None = None,
    message: Callable[[str], None] = print,
) -> dict[str, float]:
    """Print consecutive examples, each with its sizes.

    Args:
      rows: rows of the task.
      examples: number of examples to print.
      first: index of the first one.
      block_size, color, show: see `render`.
      message: called with each line.

    Returns:
      `examples`, `tokens`, `weighted_tokens` and their `share` in what was printed.

    Raises:
      ConfigError: a number is out of range, or there is no example `first`.
    """
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
    """Yield (tokens, weighted tokens) for at most `limit` examples, spread evenly over all of them."""
    count = limit if rows.size is None else min(limit, rows.size)
    for k in range(count):
        row = rows[k if rows.size is None else k * rows.size // count]
        yield len(row.tokens), int((row.weights > 0).sum())


def plot(lengths: Sequence[tuple[int, int]], path: str, title: str) -> None:
    """Write histograms of lengths as a PNG file.

    Args:
      lengths: (tokens, weighted tokens) of each example, see `sizes`.
      path: file to write.
      title: title of the figure.

    Raises:
      ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: {len(lengths)} examples")
    names = ("tokens of an example", "tokens with a loss weight")
    for axes, name, values in zip(figure.subplots(1, 2), names, np.array(lengths).reshape(-1, 2).T):
        median = float(np.median(values))
        bins: Any = min(50, len(np.unique(values)))
        if values.max() > 20 * max(values.min(), 1):  # a long tail would hide everything else
            values = np.maximum(values, 1)
            bins = np.geomspace(values.min(), values.max(), 50)
            axes.set_xscale("log")
        axes.hist(values, bins=bins, color=LINES[0])
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
    """Open the rows of a registered task.

    Args:
      name: name of the task.
      options: options of the task, as in training.
      split: split to show; None: the task's default, the training split except for GPT-3's tasks.
      length, packed, seed: see `Rows`.

    Raises:
      ConfigError: the task or the split does not exist, or see `Rows`.
    """
    options = dict(options or {})
    try:
        with options_named("--task_options", options):
            task = registry.get(name, **options)
        if split is not None:
            if has_settings(task, "split"):
                task = dataclasses.replace(task, split=split)
            else:
                task = registry.get(name, **{**options, "split": split})
        return Rows(task, length, packed, seed)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def inspect_task(
    name: str,
    options: Mapping[str, Any] | None = None,
    vocabulary: str | None = None,
    split: str | None = None,
    length: int | None = None,
    packed: bool = False,
    seed: int = 0,
    plot_file: str | None = None,
    **shown: Any,
) -> None:
    """Print examples of a registered task, and plot the lengths of many.

    Args:
      name, options, split, length, packed, seed: see `open_rows`.
      vocabulary: tokenizer file that replaces the task's vocabulary.
      plot_file: PNG file of the histograms; None: no histograms.
      **shown: arguments of `inspect`.

    Raises:
      ConfigError: a setting cannot be used, or data is missing or broken.
    """
    try:
        if vocabulary:
            options = {**(options or {}), "vocabulary": open_vocabulary(vocabulary)}
        rows = open_rows(name, options, split, length, packed, seed)
        inspect(rows, **shown)
        if plot_file:
            plot(list(sizes(rows)), plot_file, name)
            print(f"{plot_file}: histograms of lengths.")
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
