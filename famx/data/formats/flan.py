"""Flan v2 (Longpre et al., 2023): instructions in packed rows, on which TransformerFAM was finetuned.

Files: the public dumps of the five submixtures, as uncompressed JSON lines, Parquet, Arrow or TFRecords,
anywhere below DATA_DIR/flan or DATA_DIR/flan_v2. A file belongs to the submixture named by the file or
its nearest folder, such as `cot/part-0.jsonl`, `niv2_submix_original/train.jsonl` or
`t0_zs_opt_train.jsonl`; in other files each record names it in `task_source`.

| submixture | weight | names | task_source |
|---|---|---|---|
| flan2021 | 0.4 | flan2021, flan | Flan2021 |
| t0 | 0.32 | t0, p3 | P3 |
| niv2 | 0.2 | niv2 | NIv2 |
| cot | 0.05 | cot | CoT |
| dialog | 0.03 | dialog | Dialog |

A record has `inputs` and `targets`, or `inputs_pretokenized` and `targets_pretokenized`; other columns
are ignored. Few-shot examples are part of the inputs. If inputs do not end with white space, a space is
put between inputs and targets.

Each submixture is a text task, such as `flan_cot`, and `flan` is their mixture, which
`famx prepare` takes. `flan_packed` makes the rows to train on, see `FlanRows`.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from famx.base.errors import ConfigError
from famx.base.ranges import Amount, NonNegative, OneOf, Path, Seed
from famx.base.values import checked
from famx.data.rows import decoder_batch
from famx.data.storage import TFRecordRecords, open_records
from famx.data.storage.records import where
from famx.data.tasks.examples import Example, Examples, Records, encode_example
from famx.data.tasks.kinds import SPLITS
from famx.data.tasks.mixtures import Mixture
from famx.data.tasks.text_task import TextTask, task_factories
from famx.data.vocabularies import AnyVocabulary, Vocabulary, as_vocabulary, token_ids

PUBLISHED = "https://github.com/google-research/FLAN/tree/main/flan/v2"
WEIGHTS = {"flan2021": 0.4, "t0": 0.32, "niv2": 0.2, "cot": 0.05, "dialog": 0.03}
REPEAT_PROMPT = " [repeat random segment]: "
HELD_OUT = 100  # of every 100 records, the last is held out for evaluation

_SOURCES = {"flan": "flan2021", "p3": "t0", "dialogue": "dialog", **{name: name for name in WEIGHTS}}
# The start of a file's or folder's name; "flan_v2" and "flan_2022" name the whole collection.
_NAME = re.compile(
    r"(flan2021|flan(?![_-]?(?:v?2|collection))|t0|p3|niv2|cot|dialog(?:ue)?)(?![a-z0-9])", re.IGNORECASE)
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
_ROWS = (".jsonl", ".parquet", ".arrow")


# ------ The records of a submixture


class JoinedRecords:
    """Chosen records of several files, concatenated.

    Args:
      parts: pairs (records, int64 `[n]` indices of the chosen ones, or None for all).
    """

    def __init__(self, parts: Sequence[tuple[Records, np.ndarray | None]]):
        self._parts = parts
        sizes = [len(records if chosen is None else chosen) for records, chosen in parts]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        records, k = self._place(i)
        return records[k]

    def where(self, i: int) -> str:
        """The place of a record, see `famx.data.storage.records.where`."""
        return where(*self._place(i))

    def _place(self, i: int) -> tuple[Records, int]:
        """The records of the file with record `i`, and its number in them."""
        if not 0 <= i < len(self):
            raise IndexError(f"Record {i} is not one of {len(self)} records.")
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        records, chosen = self._parts[part]
        k = int(i - self._starts[part])
        return records, k if chosen is None else int(chosen[k])


def open_submix(submix: str, folder: str, split: str) -> JoinedRecords:
    """Open the records of a submixture below `folder`.

    The records of a file whose path names no submixture are read, because each of them names its own.

    Raises:
      FileNotFoundError: there is no record.
      ValueError: all files are compressed, or a record does not name its submixture.
    """
    parts, compressed, empty = [], None, True
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(place, name)
            if not (name.endswith(_ROWS) or ".tfrecord" in name) or name.endswith(_COMPRESSED):
                compressed = compressed or (path if name.endswith(_COMPRESSED) else None)
                continue
            empty = False
            named = _submix_of_path(os.path.relpath(path, folder))
            if named == submix:
                parts.append((_open(path), None))
            elif named is None:
                stat = os.stat(path)
                submixes = _submixes_of_records(path, folder, stat.st_size, stat.st_mtime_ns)
                chosen = np.flatnonzero(submixes == list(WEIGHTS).index(submix))
                if len(chosen):
                    parts.append((_open(path), chosen))
    if empty and compressed:
        raise ValueError(
            f"{compressed} is compressed; decompress the files of Flan to JSON lines (.jsonl) first."
        )
    if not parts:
        raise FileNotFoundError(None, "missing", os.path.join(folder, submix, "*.jsonl"))
    return JoinedRecords(parts)


def _open(path: str) -> Records:
    return open_records([path]) if path.endswith(_ROWS) else TFRecordRecords([path])


def _submix_of_path(path: str) -> str | None:
    for name in reversed(path.split(os.sep)):
        match = _NAME.match(name)
        if match:
            return _SOURCES[match[1].lower()]
    return None


@functools.lru_cache(maxsize=64)
def _submixes_of_records(path: str, folder: str, size: int, changed: int) -> np.ndarray:
    """Int8 `[n]`: the submixture that each record of a file names; read once for all five."""
    del size, changed  # only part of the cache key: a changed file is read again
    records, submixes = _open(path), []
    folder_name = _submix_of_path(os.path.basename(os.path.normpath(folder)))
    for i in range(len(records)):
        record = records[i]
        source = next((record[x] for x in ("task_source", "_task_source", "task") if x in record), "")
        source = source.decode() if isinstance(source, bytes) else str(source)
        name = _SOURCES.get(source.lower(), folder_name)
        if name is None:
            raise ValueError(
                f"Record {i} of {path} has no column 'task_source' that names its submixture, one of "
                f"{', '.join(WEIGHTS)}; put the file into a folder of that name."
            )
        submixes.append(list(WEIGHTS).index(name))
    return np.array(submixes, np.int8)


def preprocess(record: Mapping[str, Any]) -> Example:
    """Make an example of a record.

    Raises:
      ValueError: a column is missing or is not text.
    """
    inputs, targets = _text(record, "inputs"), _text(record, "targets")
    gap = " " if inputs and not inputs[-1].isspace() else ""
    return {"inputs": inputs + gap, "targets": targets, "references": [targets]}


def _text(record: Mapping[str, Any], column: str) -> str:
    value = record.get(f"{column}_pretokenized", record.get(column))
    if not isinstance(value, str | bytes):
        raise ValueError(
            f"A record of Flan has no text in its column '{column}'; its columns are "
            f"{', '.join(record) or 'none'}."
        )
    return value.decode() if isinstance(value, bytes) else value


# ------ Rows


@checked
@dataclasses.dataclass(frozen=True)
class FlanRows:
    """A task made by index: rows of examples, with a repeated segment at the end.

    A row is a function of `(seed, split, index, length)` and the files. In tokens:

        example, example, ..., example (cut off) | repeat_prompt | a segment of the examples

    Examples are drawn independently: the submixture by its weight, then one of its records, uniformly.
    Targets and the eos after them have weight 1, inputs 0, and nothing masks one example from the next.
    An example that is too long for the row loses the middle of its inputs. The segment, `repeat_tokens`
    consecutive tokens from a random place, has weight `repeat_weight` (the paper's self-supervision),
    its prompt 0. Of 8 704 tokens 256 repeat a segment, and examples and prompt fill 8 448.

    Training draws from all records except every hundredth of a submixture; "eval" draws from those.

    Attributes:
      data_dir: as for text tasks.
      vocabulary: see `famx.data.vocabularies.as_vocabulary`; it must have a bos_id.
      weights: weight of each submixture, with any sum; unnamed ones have weight 0. None: `WEIGHTS`.
      allow_partial: train without submixtures that are missing; the others keep their weights.
      repeat_tokens: length of the segment; 0 leaves it and its prompt out.
      repeat_weight: loss weight of the tokens of the segment.
      repeat_prompt: the text before the segment.
      seed: seed of all rows, at least 0.
      split: "train" or "eval".

    Raises:
      ConfigError: on construction, a setting is unknown or out of range.
    """

    data_dir: Path | None = None
    vocabulary: AnyVocabulary = "bytes"
    weights: Mapping[Annotated[str, OneOf(tuple(WEIGHTS))], Amount] | None = None
    allow_partial: bool = False
    repeat_tokens: NonNegative = 256
    repeat_weight: Amount = 0.1
    repeat_prompt: str = REPEAT_PROMPT
    seed: Seed = 0
    split: Annotated[str, OneOf(SPLITS)] = "train"

    def __post_init__(self):
        if self.weights is not None and not any(self.weights.values()):
            raise ConfigError("All weights of Flan's submixtures are 0; give one of them more.")
        if self.vocab.bos_id is None:
            raise ConfigError(
                "The vocabulary has no bos_id, with which the inputs of every example begin; open it "
                "with one, such as its eos_id."
            )

    @functools.cached_property
    def vocab(self) -> Vocabulary:
        """The vocabulary object."""
        return as_vocabulary(self.vocabulary)

    @property
    def min_length(self) -> int:
        """The shortest row: a segment, its prompt, and the same number of tokens to draw it from."""
        return max(1, len(self._prompt) + 2 * self.repeat_tokens)

    def example(self, index: int, length: int) -> dict[str, Any]:
        """Make row `index` with `length` tokens.

        Returns:
          tokens int32 `[length]`: the targets.
          weights float32 `[length]`: their loss weights.
          starts list of int: where the examples begin.
          segment_start int: where the repeated segment begins; None without one.
          submixes list of str: the submixture of each example.

        Raises:
          ValueError: the row is too short, the index is negative, or a file is broken.
          ConfigError: files are missing; the sentence names them and where they are published.
        """
        if index < 0:
            raise ValueError(f"Rows of Flan are numbered from 0, but index is {index}.")
        if length < self.min_length:
            raise ValueError(
                f"A row of Flan with a repeated segment of {self.repeat_tokens} tokens needs at least "
                f"{self.min_length} tokens, but the length is {length}; make the rows longer."
            )
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        room = length - len(self._prompt) - self.repeat_tokens
        tokens, weights = np.empty(length, np.int32), np.zeros(length, np.float32)
        names, shares, examples = self._submixes
        starts, drawn, used = [], [], 0
        while used < room:
            k = int(rng.choice(len(shares), p=shares))
            text = examples[k][self._draw(rng, len(examples[k]), names[k])]
            part, part_weights = encode_example(text["inputs"], text["targets"], self.vocab, room)
            if not len(part):
                raise ValueError(f"A record of flan_{names[k]} is empty; leave empty records out.")
            end = min(used + len(part), room)
            tokens[used:end], weights[used:end] = part[: end - used], part_weights[: end - used]
            starts.append(used)
            drawn.append(names[k])
            used = end
        segment = None
        if self.repeat_tokens:
            segment = int(rng.integers(room - self.repeat_tokens + 1))
            tokens[room : length - self.repeat_tokens] = self._prompt
            tokens[length - self.repeat_tokens :] = tokens[segment : segment + self.repeat_tokens]
            weights[length - self.repeat_tokens :] = self.repeat_weight
        return dict(
            tokens=tokens, weights=weights, starts=starts, segment_start=segment, submixes=drawn)

    def batch(self, indices: Sequence[int], length: int) -> dict[str, np.ndarray]:
        """Make the rows `indices` as a batch for a decoder.

        Returns:
          decoder_input_tokens int32 `[B, L]`: the targets shifted by one, bos first in every example.
          decoder_target_tokens int32 `[B, L]`.
          decoder_loss_weights float32 `[B, L]`.
        """
        return decoder_batch([self.example(int(i), length) for i in indices], self.vocab)

    @property
    def sources(self) -> list[Examples]:
        """The examples that rows are made of, opened."""
        return self._submixes[2]

    @functools.cached_property
    def _prompt(self) -> np.ndarray:
        if not self.repeat_tokens:
            return np.zeros(0, np.int32)
        return token_ids(self.repeat_prompt, self.vocab)

    @functools.cached_property
    def _submixes(self) -> tuple[list[str], np.ndarray, list[Examples]]:
        """Names, shares that sum to 1, and examples of the submixtures with a weight."""
        names, weights, examples = [], [], []
        for name, weight in (self.weights or WEIGHTS).items():
            if not weight:
                continue
            try:
                task = _SUBMIX_TASKS[f"flan_{name}"](data_dir=self.data_dir)
                examples_of_submix = task.examples("train")
            except ConfigError as error:
                if not self.allow_partial:
                    raise ConfigError(
                        f"{error} Or set allow_partial, to train without '{name}'."
                    ) from error
                last_error = error
                continue
            names.append(name)
            weights.append(weight)
            examples.append(examples_of_submix)
        if not names:
            raise last_error
        return names, np.array(weights, np.float64) / sum(weights), examples

    def _draw(self, rng: np.random.Generator, count: int, name: str) -> int:
        """The index of a record of the split, out of `count` records."""
        held_out = count // HELD_OUT
        if self.split == "train":
            i = int(rng.integers(count - held_out))
            return i + i // (HELD_OUT - 1)
        if not held_out:
            raise ConfigError(
                f"flan_{name} has {count} records; evaluation takes every {HELD_OUT}th and needs one."
            )
        return int(rng.integers(held_out)) * HELD_OUT + HELD_OUT - 1


@checked
def flan(vocabulary: AnyVocabulary = "bytes", **options: Any) -> Mixture:
    """Make the mixture of all submixtures at their weights; `options` go to each text task."""
    tasks = tuple(_SUBMIX_TASKS[f"flan_{x}"](vocabulary=vocabulary, **options) for x in WEIGHTS)
    return Mixture("flan", tasks, {f"flan_{name}": weight for name, weight in WEIGHTS.items()})


_SUBMIX_TASKS = task_factories(
    TextTask(
        name=f"flan_{name}",
        kind="generation",
        open_split=functools.partial(open_submix, name),
        preprocess=preprocess,
        splits=("train",),
        folders=("flan", "flan_v2"),
        published=PUBLISHED,
    )
    for name in WEIGHTS
)
TASKS = {**_SUBMIX_TASKS, "flan": flan, "flan_packed": FlanRows}
