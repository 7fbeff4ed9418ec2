"""Kinds of tasks: every task has one, and what is no task gets a sentence."""

import types

import numpy as np
import pytest

import famx.data
from famx.base.errors import ConfigError
from famx.data import ByteVocabulary, IndexedDocuments, Kind, PasskeyTask, Suite, kind_of
from famx.data.catalogue import TASKS
from famx.data.probes import PROBES
from famx.data.sequences import SEQUENCES
from famx.data.tasks import Made, Scored, vocabulary_of


def test_every_task_of_famx_has_its_kind():
    kinds = {name: set() for name in Kind}
    for name in set(TASKS) - {"own_records", "own_chat", "gpt3_rank", "gpt3_gen", "spoken_digit"}:
        kinds[kind_of(famx.data.get(name))].add(name)
    assert kinds[Kind.MADE] == {*PROBES, *SEQUENCES, "flan_packed"} - {"spoken_digit"}
    assert kinds[Kind.DOCUMENTS] == {"own_text", "python_stdlib"} and not kinds[Kind.SEQIO]
    assert kinds[Kind.SCORED] >= {"pg19", "scrolls_qasper", "gpt3_boolq", "xlsum", "flan"}


def test_documents_need_no_class():
    assert kind_of([np.arange(3)]) is Kind.DOCUMENTS
    assert kind_of(IndexedDocuments(PasskeyTask(), 99, 3)) is Kind.DOCUMENTS


def test_a_task_of_seqio_is_known_by_its_features():
    task = types.SimpleNamespace(name="theirs", output_features={})
    assert kind_of(task) is Kind.SEQIO and vocabulary_of(task) is None


class Ball:
    vocab, min_length = ByteVocabulary(), 2

    def batch(self, indices, length):
        return {}


def test_a_task_made_by_index_needs_four_members():
    with pytest.raises(ConfigError, match="Ball has a method batch, .* but it lacks example; add"):
        kind_of(Ball())
    whole = type("Whole", (Ball,), {"example": lambda self, index, length: {}})()
    assert kind_of(whole) is Kind.MADE and isinstance(whole, Made) and not isinstance(whole, Scored)
    assert vocabulary_of(whole) == ByteVocabulary()


def test_what_is_no_task_gets_a_sentence():
    with pytest.raises(ConfigError, match="'gpt3_gen' is a suite; choose one of its tasks: gpt3_lam"):
        kind_of(famx.data.get("gpt3_gen"))
    with pytest.raises(ConfigError, match="int is not a task: it has neither examples made by index"):
        kind_of(3)


def test_a_text_task_is_its_only_member_and_a_mixture_has_several():
    task, mixture = famx.data.get("pg19"), famx.data.get("flan")
    assert task.tasks == (task,) and len(mixture.tasks) == 5
    scores = {one.name: {"f1": float(i)} for i, one in enumerate(mixture.tasks)}
    assert mixture.summary(scores)["f1"] == 2.0 and mixture.summary(scores)["flan_dialog/f1"] == 4.0
    assert task.summary({"pg19": {"f1": 1.0}}) == {"f1": 1.0}
    suite = Suite("both", mixture.tasks, dict.fromkeys(scores, "f1"))
    assert suite.summary(scores) == {**{f"{x}/f1": s["f1"] for x, s in scores.items()}, "average": 2.0}
