"""Data: vocabularies, files, rows, metrics and tasks by name.

The packages import in one direction: `vocabularies`, `metrics` <- `storage` <- `rows` <- `tasks` <-
`probes` <- `sequences` <- `formats` <- `catalogue` <- `seqio`. All but `famx.data.seqio` need only numpy,
Parquet and Arrow files also pyarrow, and handwritten digits scikit-learn;
`famx.data.seqio.register_tasks()` registers the same tasks with SeqIO.
"""

from famx.data.catalogue import register_tasks
from famx.data.metrics import digit_accuracy, exact_match
from famx.data.probes import PasskeyTask
from famx.data.rows import ContinuousLanes, PackedRows, Prefetch, decoder_batch
from famx.data.sequences import SequenceTask
from famx.data.storage import (
    JsonlRecords,
    RecordDocuments,
    TableRecords,
    TextFiles,
    TFRecordRecords,
    open_records,
    stdlib_text_files,
    write_tfrecords,
)
from famx.data.tasks import (
    IndexedDocuments,
    Kind,
    Mixture,
    Suite,
    TextTask,
    get,
    kind_of,
    names,
    register,
    register_task,
)
from famx.data.vocabularies import (
    BytePairVocabulary,
    ByteVocabulary,
    SentencePieceVocabulary,
    WordVocabulary,
    as_vocabulary,
    load_vocabulary,
    open_vocabulary,
    save_vocabulary,
)

__all__ = [
    "BytePairVocabulary",
    "ByteVocabulary",
    "ContinuousLanes",
    "IndexedDocuments",
    "JsonlRecords",
    "Kind",
    "Mixture",
    "PackedRows",
    "PasskeyTask",
    "Prefetch",
    "RecordDocuments",
    "SentencePieceVocabulary",
    "SequenceTask",
    "Suite",
    "TFRecordRecords",
    "TableRecords",
    "TextFiles",
    "TextTask",
    "WordVocabulary",
    "as_vocabulary",
    "decoder_batch",
    "digit_accuracy",
    "exact_match",
    "get",
    "kind_of",
    "load_vocabulary",
    "names",
    "open_records",
    "open_vocabulary",
    "register",
    "register_task",
    "save_vocabulary",
    "stdlib_text_files",
    "write_tfrecords",
]

register_tasks()
