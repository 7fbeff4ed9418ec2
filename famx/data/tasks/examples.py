"""Examples of text tasks: by number, as prepared records, and as documents with loss weights."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np

from famx.base.errors import ConfigError
from famx.base.ranges import OneOf, Positive
from famx.base.values import checked
from famx.data.vocabularies import Vocabulary, token_ids
from famx.data.vocabularies.chat_template import ChatTemplate

CUTS = ("left", "middle")
RANK_COLUMNS = ("choices", "answer")

Item = TypeVar("Item", covariant=True)


class Numbered(Protocol[Item]):
    """Items by number: a length, and `[i]`, which may read or make the item."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Item: ...


Example = dict[str, Any]
Records = Numbered[Mapping[str, Any]]


class Examples:
    """The examples of a split by number, each made from its record at access."""

    def __init__(self, records: Records, preprocess: Callable[[Mapping[str, Any]], Example]):
        self.records, self.preprocess = records, preprocess

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"Example {i} is not one of {len(self)} examples.")
        return _without_lone_surrogates(self.preprocess(self.records[int(i)]))


@checked
class TaskDocuments:
    """Examples as documents for lanes and packed rows; see `TextTask.documents`."""

    def __init__(
        self,
        examples: Numbered[Example],
        kind: str,
        vocabulary: Vocabulary,
        max_tokens: Positive | None = None,
        cut: Annotated[str, OneOf(CUTS)] = "middle",
    ):
        self.examples, self.kind, self.vocab = examples, kind, vocabulary
        self.max_tokens, self.cut = max_tokens, cut
        if kind == "chat":
            if not vocabulary.chat_template:
                raise ConfigError(
                    "Conversations are spelled by a chat template, and the vocabulary has none: give the "
                    "directory of an instruct model as `vocabulary`, or train from one."
                )
            self._template = ChatTemplate(vocabulary)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        example = self.examples[i]
        if self.kind == "chat":
            return self._conversation(example, i)
        if self.kind == "documents":
            tokens = _with_eos(token_ids(example["targets"], self.vocab), self.vocab)
            tokens = tokens[: self.max_tokens]
            return tokens, np.ones(len(tokens), np.float32)
        return encode_example(
            example["inputs"], example["targets"], self.vocab, self.max_tokens, self.cut)

    def _conversation(self, example: Example, i: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            tokens, weights = self._template.conversation(example["messages"], example.get("tools"))
        except ConfigError as error:
            raise ConfigError(f"Conversation {i}: {error}") from error
        begin = int(len(tokens) > 0 and tokens[0] == self.vocab.bos_id)  # rows begin with this id
        return tokens[begin:][: self.max_tokens], weights[begin:][: self.max_tokens]


def encode_example(
    inputs: str,
    targets: str,
    vocabulary: Vocabulary,
    max_tokens: int | None = None,
    cut: str = "middle",
) -> tuple[np.ndarray, np.ndarray]:
    """Encode an example as a document: tokens int32 `[n]` and loss weights float32 `[n]`.

    To score a choice, pass it as `targets`.
    """
    prompt = token_ids(inputs, vocabulary)
    answer = _with_eos(token_ids(targets, vocabulary), vocabulary)
    if max_tokens is not None:
        prompt = cut_tokens(prompt, max(0, max_tokens - len(answer)), cut)
    weights = np.repeat(np.array([0, 1], np.float32), [len(prompt), len(answer)])
    return np.concatenate([prompt, answer]), weights


def cut_tokens(tokens: np.ndarray, size: int, cut: str) -> np.ndarray:
    """Shorten to `size` tokens by removing the first ones ("left") or those in the middle."""
    if len(tokens) <= size:
        return tokens
    head = (size + 1) // 2 if cut == "middle" else 0
    return np.concatenate([tokens[:head], tokens[len(tokens) - (size - head) :]])


def example_of_record(record: Mapping[str, Any]) -> Example:
    """Turn a prepared record into an example; a list of one text is stored as the text alone."""
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
    if "contexts" in record:
        example["contexts"] = texts(record["contexts"])
    return example


def example_of_row(row: Mapping[str, Any]) -> Example:
    """Turn a row of a table whose columns are those of an example into one, without missing values."""
    names = ("id", "inputs", "targets", "references", *RANK_COLUMNS, "contexts")
    example = {name: row[name] for name in names if row.get(name) is not None}
    return {"id": "", "inputs": "", "targets": "", "references": []} | example


def _with_eos(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    if vocabulary.eos_id is None:
        return tokens
    return np.append(tokens, np.int32(vocabulary.eos_id))


def _without_lone_surrogates(example: Example) -> Example:
    """Replace halves of surrogate pairs, which JSON allows and UTF-8 cannot encode."""

    def valid(value: Any) -> Any:
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if isinstance(value, dict):
            return {name: valid(x) for name, x in value.items()}
        return [valid(x) for x in value] if isinstance(value, list) else value

    return {name: valid(value) for name, value in example.items()}
