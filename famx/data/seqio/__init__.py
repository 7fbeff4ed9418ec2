"""SeqIO: vocabularies, tasks, and the feature converter of FAM decoders.

The only package of `famx.data` that needs SeqIO and TensorFlow. Importing it registers nothing;
`register_tasks()` registers the tasks of famx under their names; the other functions register single
tasks.
"""

from famx.data.seqio.availability import seqio as _seqio  # noqa: F401, first: it says what is missing
from famx.data.seqio.feature_converter import FamFeatureConverter
from famx.data.seqio.registration import (
    register_documents,
    register_made,
    register_named,
    register_tasks,
    register_text_task,
)
from famx.data.seqio.rows import training_rows
from famx.data.seqio.vocabularies import as_seqio_vocabulary, begin_id, from_seqio_vocabulary

__all__ = [
    "FamFeatureConverter",
    "as_seqio_vocabulary",
    "begin_id",
    "from_seqio_vocabulary",
    "register_documents",
    "register_made",
    "register_named",
    "register_tasks",
    "register_text_task",
    "training_rows",
]
