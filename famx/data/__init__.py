"""Data of famx: everything imported here needs only numpy. SeqIO: `famx.data.seqio`."""

import functools
import sys

from famx.data.formats import (  # noqa: F401, each registers its tasks
    flan,
    gpt3,
    isabelle,
    narrative_qa,
    offline,
    own_jsonl,
    pg19,
    scrolls,
    xlsum,
)
from famx.data.probes import PROBES as _PROBES
from famx.data.probes.passkey import PasskeyTask, digit_accuracy, exact_match
from famx.data.rows.batches import IndexedBatches, IndexedDocuments
from famx.data.rows.lanes import ContinuousLanes
from famx.data.rows.packing import PackedRows, Prefetch
from famx.data.storage.records import JsonlRecords, RecordDocuments, TFRecordRecords, write_tfrecords
from famx.data.storage.text_files import TextFiles, stdlib_text_files
from famx.data.tasks.mixtures import Mixture
from famx.data.tasks.registry import get, names, register
from famx.data.tasks.text_task import TextTask
from famx.data.vocabularies import (
    BytePairVocabulary,
    ByteVocabulary,
    SentencePieceVocabulary,
    WordVocabulary,
    load_vocabulary,
    open_vocabulary,
    save_vocabulary,
)

__all__ = [
    "BytePairVocabulary",
    "ByteVocabulary",
    "ContinuousLanes",
    "IndexedBatches",
    "IndexedDocuments",
    "JsonlRecords",
    "Mixture",
    "PackedRows",
    "PasskeyTask",
    "Prefetch",
    "RecordDocuments",
    "SentencePieceVocabulary",
    "TFRecordRecords",
    "TextFiles",
    "TextTask",
    "WordVocabulary",
    "digit_accuracy",
    "exact_match",
    "get",
    "load_vocabulary",
    "names",
    "open_vocabulary",
    "register",
    "save_vocabulary",
    "stdlib_text_files",
    "write_tfrecords",
]

for _name, _factory in _PROBES.items():
    register(_name, _factory)
register("python_stdlib", functools.partial(TextFiles, files=None))
register("own_text", TextFiles)

if sys.modules.get("seqio"):  # its users find the tasks there too; others need no TensorFlow
    import famx.data.seqio  # noqa: F401
