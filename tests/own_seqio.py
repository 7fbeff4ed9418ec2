"""A SeqIO task of one's own: a user's module that registers it, with a vocabulary such as T5's."""

import functools
import importlib
import io
import pathlib
import sys
import tempfile

import pytest

NAME, MODULE = "own_questions", "own_seqio_module"  # of the task and of its module
EXTRA_IDS, EXAMPLES = 4, 50
_WORDS = "red green blue house tree river stone bird horse wind".split()
_SOURCE = f'''
import pathlib

import seqio
import tensorflow as tf

WORDS = {_WORDS}
MODEL = str(pathlib.Path(__file__).with_name("t5.model"))
VOCABULARY = seqio.SentencePieceVocabulary(MODEL, extra_ids={EXTRA_IDS})


def read(split, shuffle_files, seed=None):
    del shuffle_files, seed
    pairs = [(a, b) for a in WORDS for b in WORDS if a != b]
    pairs = pairs[:{EXAMPLES}] if split == "train" else pairs[-5:]
    texts = {{"inputs": [f"{{a}} {{b}} ?" for a, b in pairs], "targets": [b for _, b in pairs]}}
    return tf.data.Dataset.from_tensor_slices(texts)


def exact(targets, predictions):
    return {{"exact": sum(map(str.__eq__, targets, predictions)) / len(targets)}}


def register(name, vocabulary, **settings):
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(read, splits=("train", "validation")),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={{
            "inputs": seqio.Feature(vocabulary, add_eos=False),
            "targets": seqio.Feature(vocabulary, add_eos=True),
        }},
        **settings,
    )


register("{NAME}", VOCABULARY, metric_fns=[exact])
'''


@functools.cache
def own_folder() -> pathlib.Path:
    """A folder on Python's path, with the module and a SentencePiece model of pad 0, eos 1 and no bos."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tempfile.TemporaryDirectory()
    own_folder.kept = folder  # removed at the end of the process
    path, model = pathlib.Path(folder.name), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{a} {b} ? {b}" for a in _WORDS for b in _WORDS]), model_writer=model,
        vocab_size=60, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (path / "t5.model").write_bytes(model.getvalue())
    (path / f"{MODULE}.py").write_text(_SOURCE)
    sys.path.append(str(path))
    return path


def own_module():
    """The module, imported: it has registered the task `NAME`."""
    own_folder()
    return importlib.import_module(MODULE)
