"""Examples of text tasks: by number, as prepared records, and as documents with loss weights."""

import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from famx.base.errors import ConfigError
from famx.data.storage.text_files import token_ids
from famx.data.vocabularies.base import Vocabulary

CUTS = ("left", "middle")

Records = Sequence[Mapping[str, Any]]
Example = dict[str, Any]


class Examples:
    """Examples of a split by number, made when they are asked for."""

    def __init__(self, records: Records, preprocess: Callable[[Mapping[str, Any]], Example]):
        self.records, self.preprocess = records, preprocess

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"Example {i} is not one of {len(self)} examples.")
        return _without_lone_surrogates(self.preprocess(self.records[int(i)]))


class TaskDocuments:
    """Examples as documents for lanes and packed rows; see `TextTask.documents`."""

    def __init__(
        self,
        examples: Sequence[Example],
        kind: str,
        vocabulary: Vocabulary,
        max_tokens: int | None = None,
        cut: str = "middle",
    ):
        self.examples, self.kind, self.vocab = examples, kind, vocabulary
        self.max_tokens, self.cut = max_tokens, cut

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        example = self.examples[i]
        if self.kind == "documents":
            tokens = _with_eos(token_ids(example["targets"], self.vocab), self.vocab)
            tokens = tokens[: self.max_tokens]
            return tokens, np.ones(len(tokens), np.float32)
        return encode_example(
            example["inputs"], example["targets"], self.vocab, self.max_tokens, self.cut)


def encode_example(
    inputs: str,
    targets: str,
    vocabulary: Vocabulary,
    max_tokens: int | None = None,
    cut: str = "middle",
) -> tuple[np.ndarray, np.ndarray]:
    """One document (tokens int32 [n], loss weights float32 [n]) of an example.

    Also what a choice is scored with: put it in the place of the targets.
    """
    prompt = token_ids(inputs, vocabulary)
    answer = _with_eos(token_ids(targets, vocabulary), vocabulary)
    if max_tokens is not None:
        prompt = cut_tokens(prompt, max(0, max_tokens - len(answer)), cut)
    weights = np.repeat(np.array([0, 1], np.float32), [len(prompt), len(answer)])
    return np.concatenate([prompt, answer]), weights


def cut_tokens(tokens: np.ndarray, size: int, cut: str) -> np.ndarray:
    """At most `size` of the tokens: without the first ones ("left") or without the middle."""
    if len(tokens) <= size:
        return tokens
    head = (size + 1) // 2 if cut == "middle" else 0
    return np.concatenate([tokens[:head], tokens[len(tokens) - (size - head) :]])


def check_cut(max_tokens: int | None, cut: str) -> None:
    """Raises ConfigError unless the settings of `TextTask.documents` are possible."""
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1, or None.")
    if cut not in CUTS:
        raise ConfigError(f"'{cut}' cannot be cut from the inputs; choose one of {', '.join(CUTS)}.")


def _with_eos(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    if vocabulary.eos_id is None:
        return tokens
    return np.append(tokens, np.int32(vocabulary.eos_id))


def _without_lone_surrogates(example: Example) -> Example:
    """Halves of surrogate pairs, which JSON can hold and UTF-8 cannot, become replacement characters."""

    def valid(value: Any) -> Any:
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return [valid(x) for x in value] if isinstance(value, list) else value

    return {name: valid(value) for name, value in example.items()}


# ------ Prepared records


def complete_shards(name: str) -> list[str]:
    """Paths of the shards `name-00000-of-00010` and so on, if all of one set are there, else []."""
    numbered = re.compile(re.escape(name) + r"-(\d{5})-of-(\d{5})$")
    sets: dict[int, list[str]] = {}
    for path in sorted(glob.glob(f"{glob.escape(name)}-*")):
        found = numbered.match(path)
        if found:
            sets.setdefault(int(found[2]), []).append(path)
    return next((paths for size, paths in sorted(sets.items()) if len(paths) == size), [])


def tfds_shards(name: str, split: str) -> list[str]:
    """The files of the newest version that TensorFlow Datasets has prepared."""
    root = os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
    versions = glob.glob(os.path.join(glob.escape(root), name, "[0-9]*"))
    version = lambda path: [int(x) for x in re.findall(r"\d+", os.path.basename(path))]
    for folder in sorted(versions, key=version, reverse=True):
        paths = complete_shards(os.path.join(folder, f"{name.split('/')[0]}-{split}.tfrecord"))
        if paths:
            return paths
    return []


def example_of_record(record: Mapping[str, Any]) -> Example:
    """A prepared record as an example; lists of one text come as the text alone."""
    text = lambda value: value.decode() if isinstance(value, bytes) else ""
    texts = lambda value: [x.decode() for x in ([value] if isinstance(value, bytes) else value)]
    example = {
        "id": text(record.get("id")),
        "inputs": text(record["inputs"]),
        "targets": text(record["targets"]),
        "references": texts(record["references"]),
    }
    if "choices" in record:
        example |= {"choices": texts(record["choices"]), "answer": [int(x) for x in record["answer"]]}
    return example
