"""Data of famx: everything imported here needs only numpy. SeqIO: `famx.data.seqio_tasks`."""

import functools

from famx.data.batches import IndexedBatches, IndexedDocuments
from famx.data.lanes import ContinuousLanes
from famx.data.passkey import PasskeyTask, digit_accuracy, exact_match
from famx.data.registry import get, names, register
from famx.data.text import TextFiles, stdlib_text_files
from famx.data.vocabularies import ByteVocabulary, WordVocabulary

__all__ = [
    "ByteVocabulary",
    "ContinuousLanes",
    "IndexedBatches",
    "IndexedDocuments",
    "PasskeyTask",
    "TextFiles",
    "WordVocabulary",
    "digit_accuracy",
    "exact_match",
    "get",
    "names",
    "register",
    "stdlib_text_files",
]

register("passkey_words", functools.partial(PasskeyTask, vocabulary="words"))
register("passkey_bytes", functools.partial(PasskeyTask, vocabulary="bytes"))
register("python_stdlib", functools.partial(TextFiles, files=None))
register("own_text", TextFiles)
