"""Examples of text tasks: by number, as prepared records, and as documents with loss weights."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np

from famx.base.errors import BadData, BadRecord, ConfigError
from famx.base.ranges import OneOf, Positive
from famx.base.values import checked
from famx.data.storage.records import where
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
        """Make example `i`.

        Raises:
          BadRecord: its record cannot be used; the message names its file and line.
          BadData: a file changed since it was opened.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"Example {i} is not one of {len(self)} examples.")
        with bad_records(self.where, int(i)):
            example = self.preprocess(self.records[int(i)])
            check_example(example)
            return _without_lone_surrogates(example)

    def where(self, i: int) -> str:
        """The place of an example's record for a message."""
        return where(self.records, int(i))


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
        with bad_records(self.where, i):
            if self.kind == "chat":
                return self._conversation(example)
            if self.kind == "documents":
                tokens = _with_eos(token_ids(example["targets"], self.vocab), self.vocab)
                tokens = tokens[: self.max_tokens]
                return tokens, np.ones(len(tokens), np.float32)
            return encode_example(
                example["inputs"], example["targets"], self.vocab, self.max_tokens, self.cut)

    def check(self, i: int) -> None:
        """Raises BadRecord if document `i` cannot be used; makes no tokens."""
        self.examples[i]  # noqa: B018, made for its checks

    def where(self, i: int) -> str:
        """The place of document `i` for a message."""
        return where(self.examples, i)

    def _conversation(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        try:
            tokens, weights = self._template.conversation(example["messages"], example.get("tools"))
        except ConfigError as error:
            raise BadRecord(str(error)) from error
        begin = int(len(tokens) > 0 and tokens[0] == self.vocab.bos_id)  # rows begin with this id
        return tokens[begin:][: self.max_tokens], weights[begin:][: self.max_tokens]


@contextlib.contextmanager
def bad_records(place: Callable[[int], str], i: int) -> Iterator[None]:
    """A context in which an error of a record becomes a BadRecord that names the record's place.

    Args:
      place: function of the record's number that returns its place.
      i: the number.
    """
    try:
        yield
    except BadData as error:
        if not isinstance(error, BadRecord) or place(i) in str(error):
            raise
        raise BadRecord(f"{place(i)}: {error}") from error
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise BadRecord(text if place(i) in text else f"{place(i)}: {text}") from error


def check_example(example: Any) -> None:
    """Raises BadRecord unless the parts of an example have the types that a text task needs."""
    if not isinstance(example, Mapping):
        raise BadRecord(f"an example must be a dict, not {_kind(example)}")
    for name, value in example.items():
        if name in ("inputs", "targets") and not isinstance(value, str):
            raise BadRecord(f"'{name}' must be a text, not {_kind(value)}")
        if name in ("references", "choices", "contexts") and not _are(value, str):
            raise BadRecord(f"'{name}' must be a list of texts, not {_kind(value)}")
        if name == "messages" and not _are(value, Mapping):
            raise BadRecord(f"'{name}' must be a list of messages, not {_kind(value)}")
    if "answer" in example:
        count = len(example.get("choices", ()))
        answer = example["answer"]
        if not _are(answer, int) or not all(0 <= i < count for i in answer):
            raise BadRecord(f"'answer' must be a list of numbers of the {count} choices, not {answer!r}")
    if example.get("contexts") and len(example["contexts"]) != len(example.get("choices", ())):
        raise BadRecord("'contexts' must have one text for each of the 'choices'")


def _are(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(x, kind) and not isinstance(x, bool) for x in value
    )


def _kind(value: Any) -> str:
    """A value and its type for a message."""
    text = repr(value)
    return f"{text[:47]}..." if len(text) > 50 else text


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
