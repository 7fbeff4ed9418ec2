"""Packed rows: every token once and in order, weights bit for bit, positions and shards exact."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from famx.data import ContinuousLanes, TextFiles
from famx.data.rows import PackedRows, Prefetch


def make_documents(sizes, seed=0):
    """Pairs whose tokens tell which document and which place they are; weights are any bits."""
    rng = np.random.default_rng(seed)
    return [
        (np.arange(size, dtype=np.int32) + 1000 * (i + 1),
         rng.integers(1, 2**32, size, np.uint32).view(np.float32))
        for i, size in enumerate(sizes)
    ]  # fmt: skip


class Counted:
    """Documents that record which are loaded; with `sizes`, sizes are known without loading."""

    def __init__(self, documents, tell_sizes):
        self.documents, self.loaded = documents, []
        if tell_sizes:
            self.num_tokens = lambda i: len(documents[i][0])

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, i):
        self.loaded.append(i)
        return self.documents[i]


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=8)
SETTINGS = dict(
    sizes=SIZES, batch_size=st.integers(1, 4), length=st.integers(1, 12), seed=st.integers(0, 5),
    whole=st.booleans(),
)  # fmt: skip
NAMES = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].tobytes() == b[name].tobytes(), name


def pieces_of(steps, lane):
    """[(number, [(step, place, target, weight)])] of the documents of a lane, in order."""
    pieces = []
    for t, step in enumerate(steps):
        inputs, targets, weights = (step[name][lane] for name in NAMES)
        for place, target in enumerate(targets):
            if not target:
                assert inputs[place] == 0 and weights[place].tobytes() == bytes(4)
                continue
            if inputs[place] == 1:
                pieces.append((target // 1000 - 1, []))
            else:
                assert inputs[place] == pieces[-1][1][-1][2]  # the target before
            pieces[-1][1].append((t, place, target, weights[place]))
    return pieces


@settings(max_examples=60, deadline=None)
@given(**SETTINGS)
def test_lanes_are_documents_one_after_another(sizes, batch_size, length, seed, whole):
    documents = make_documents(sizes, seed)
    rows = PackedRows(documents, batch_size, length, seed, whole_documents=whole)
    steps = list(itertools.islice(rows, 30))
    for lane in range(batch_size):
        pieces = pieces_of(steps, lane)
        for i, (number, piece) in enumerate(pieces):
            tokens, weights = documents[number]
            if i < len(pieces) - 1:
                assert len(piece) == len(tokens)
            read = np.array([target for _, _, target, _ in piece], np.int32)
            assert read.tobytes() == tokens[: len(piece)].tobytes()
            read = np.array([weight for *_, weight in piece], np.float32)
            assert read.tobytes() == weights[: len(piece)].tobytes()
        # A row is new where it begins with the first token of a document.
        begins = {piece[0][0] for _, piece in pieces if piece[0][1] == 0}
        assert [bool(step["reset"][lane]) for step in steps] == [t in begins for t in range(30)]


@settings(max_examples=60, deadline=None)
@given(**SETTINGS)
def test_rows_are_full_unless_whole_documents_wait(sizes, batch_size, length, seed, whole):
    rows = PackedRows(make_documents(sizes), batch_size, length, seed, whole_documents=whole)
    steps = list(itertools.islice(rows, 20))
    for lane in range(batch_size):
        pieces = pieces_of(steps, lane)
        padding = [int((step[NAMES[1]][lane] == 0).sum()) for step in steps]
        if not whole:
            assert not any(padding)
            continue
        first_of = {piece[0][0]: number for number, piece in reversed(pieces) if piece[0][1] == 0}
        for number, piece in pieces:
            if sizes[number] <= length:
                assert len({t for t, *_ in piece}) == 1
            # Only a document's rows after its first may begin with it: it continues at place 0.
            for (t, place, *_), (later, begin, *_) in itertools.pairwise(piece):
                assert (later, begin) == ((t, place + 1) if place + 1 < length else (t + 1, 0))
        for t, empty in enumerate(padding[:-1]):
            assert not empty or empty < sizes[first_of[t + 1]] <= length


@settings(max_examples=40, deadline=None)
@given(**SETTINGS)
def test_every_epoch_holds_every_document_once(sizes, batch_size, length, seed, whole):
    rows = PackedRows(make_documents(sizes), batch_size, length, seed, whole_documents=whole)
    steps = list(itertools.islice(rows, 60))
    begun = np.zeros(len(sizes), int)
    order = []
    for lane in range(batch_size):
        for number, piece in pieces_of(steps, lane):
            begun[number] += 1
            order.append((piece[0][0], lane, piece[0][1], number))
    state = rows.get_state()
    waiting = sum(lane is not None and lane[1] == 0 for lane in state["lanes"])
    assert begun.sum() + waiting == state["epoch"] * len(sizes) + state["taken"]
    if not whole:  # then none waits, and they begin in the order of the queue
        order = [number for *_, number in sorted(order)]
        for i in range(0, len(order) - len(sizes) + 1, len(sizes)):
            assert sorted(order[i : i + len(sizes)]) == list(range(len(sizes)))


def test_epochs_and_seeds_have_different_orders():
    def order(seed, count):
        return next(PackedRows(make_documents([1] * 30), 1, count, seed))[NAMES[1]][0].tolist()

    both = order(0, 60)
    assert both[:30] != both[30:] and sorted(both[:30]) == sorted(both[30:])
    assert order(1, 30) != both[:30] and order(0, 30) == both[:30]


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(0, 20), shards=st.sampled_from([1, 2, 4]), **SETTINGS)
def test_resume_is_exact_anywhere_on_any_number_of_shards(
    sizes, batch_size, length, seed, whole, steps, shards
):
    documents, batch_size = make_documents(sizes), 4 * batch_size
    rows = PackedRows(documents, batch_size, length, seed, whole_documents=whole)
    for _ in range(steps):
        next(rows)
    state = json.loads(json.dumps(rows.get_state()))
    resumed = [
        PackedRows(documents, batch_size, length, seed, i, shards, whole_documents=whole)
        for i in range(shards)
    ]
    for part in resumed:
        next(part)
        part.set_state(state)
    for _ in range(10):
        parts = [next(part) for part in resumed]
        assert all(len(part["reset"]) == batch_size // shards for part in parts)
        assert_same({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, next(rows))
    assert all(part.get_state() == rows.get_state() for part in resumed)


@pytest.mark.parametrize("whole", [True, False])
def test_documents_as_long_as_a_row_or_one_token(whole):
    documents = make_documents([8, 8, 8])
    rows = PackedRows(documents, 2, 8, whole_documents=whole)
    for _ in range(5):
        step = next(rows)
        assert step["reset"].all() and (step[NAMES[0]][:, 0] == 1).all()
        assert (step[NAMES[1]] % 1000 == np.arange(8)).all()
    rows = PackedRows([np.array([5], np.int32)] * 3, 1, 7, whole_documents=whole)
    step = next(rows)
    assert step[NAMES[0]].tolist() == [[1] * 7] and step[NAMES[1]].tolist() == [[5] * 7]
    assert step[NAMES[2]].tolist() == [[1.0] * 7]


def test_a_document_that_fits_waits_for_a_new_row():
    tokens = [np.full(3, 7, np.int32)] * 2
    rows = PackedRows(tokens, 1, 5, bos_id=4, pad_id=9, whole_documents=True)
    for _ in range(2):
        step = next(rows)
        assert step[NAMES[0]].tolist() == [[4, 7, 7, 9, 9]]
        assert step[NAMES[1]].tolist() == [[7, 7, 7, 9, 9]]
        assert step[NAMES[2]].tolist() == [[1, 1, 1, 0, 0]] and step["reset"].all()
    rows = PackedRows(tokens, 1, 5, bos_id=4, pad_id=9)
    assert next(rows)[NAMES[0]].tolist() == [[4, 7, 7, 4, 7]]
    step = next(rows)
    assert step[NAMES[0]].tolist() == [[7, 4, 7, 7, 4]] and not step["reset"].any()


def test_lanes_are_rows_of_one_document():
    """Where documents are at least as long as rows are, lanes and whole documents agree at first."""
    documents = make_documents([8, 8, 16])
    lanes, rows = ContinuousLanes(documents, 2, 8), PackedRows(documents, 2, 8)
    for _ in range(6):
        assert_same(next(lanes), next(rows))


def test_documents_are_loaded_once_and_only_where_they_are_read():
    documents = make_documents([5, 9, 30, 2, 7, 11])
    for tell_sizes in (True, False):
        parts = [Counted(documents, tell_sizes) for _ in range(2)]
        taken = []
        for i, part in enumerate(parts):
            rows = PackedRows(part, 2, 4, shard_index=i, num_shards=2)
            for _ in range(6):
                next(rows)
            taken.append(rows.get_state()["epoch"] * 6 + rows.get_state()["taken"])
        assert taken[0] == taken[1] > 4
        loads = [len(part.loaded) for part in parts]
        assert (sum(loads) == taken[0]) if tell_sizes else (loads == taken)


def test_text_files_are_packed(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 5)
    files = TextFiles(str(tmp_path / "*"), validation_fraction=0.0)
    step = next(PackedRows(files, 1, 15))
    text = files.vocab.decode(step[NAMES[1]][0])
    assert sorted(text[i : i + 5] for i in (0, 5, 10)) == ["aaaaa", "bbbbb", "ccccc"]
    assert (step[NAMES[0]][0] == 1).nonzero()[0].tolist() == [0, 5, 10]


def test_length_may_change_between_steps():
    rows = PackedRows(make_documents([10]), 1, 4)
    targets = [next(rows)[NAMES[1]][0]]
    rows.length = 9
    targets.append(next(rows)[NAMES[1]][0])
    assert np.concatenate(targets).tolist() == [*range(1000, 1010), 1000, 1001, 1002]


@pytest.mark.parametrize("size", [1, 3])
def test_prefetch_is_exact(size):
    make = lambda: PackedRows(make_documents([5, 9, 3]), 2, 4)
    plain, ahead = make(), Prefetch(make(), size)
    assert iter(ahead) is ahead and ahead.get_state() == plain.get_state()
    for _ in range(8):
        assert_same(next(ahead), next(plain))
        assert ahead.get_state() == plain.get_state()
    state = json.loads(json.dumps(ahead.get_state()))
    expected = [next(plain) for _ in range(4)]
    for _ in range(2):
        next(ahead)
    ahead.set_state(state)
    for batch in expected:
        assert_same(next(ahead), batch)
    ahead.close()
    with pytest.raises(StopIteration):
        next(ahead)


def test_prefetch_hands_errors_on_after_the_batches_before():
    documents = [np.full(n, 5, np.int32) for n in (4, 4, 4)]
    rows = PackedRows(documents, 1, 4)
    ahead = Prefetch(rows, 1)
    documents[:] = [np.zeros(0, np.int32)] * 3
    for _ in range(2):
        with pytest.raises(ValueError, match="is empty"):
            for _ in range(9):
                next(ahead)
    with pytest.raises(ValueError, match="at least 1 batch"):
        Prefetch(rows, 0)


def test_bad_input_gets_a_sentence():
    documents = make_documents([3, 4])
    with pytest.raises(ValueError, match="at least one document"):
        PackedRows([], 1, 4)
    with pytest.raises(ValueError, match="A row needs a length of at least 1 token, but it is 0"):
        PackedRows(documents, 1, 0)
    with pytest.raises(ValueError, match="divided evenly among 2"):
        PackedRows(documents, 3, 4, num_shards=2)
    for documents in (make_documents([0]), Counted(make_documents([0]), True)):
        with pytest.raises(ValueError, match="Document 0 is empty; leave empty documents out"):
            next(PackedRows(documents, 1, 4))
    with pytest.raises(ValueError, match="3 tokens but 2 loss weights"):
        next(PackedRows([(np.ones(3, np.int32), np.ones(2, np.float32))], 1, 4))
    state = PackedRows(make_documents([3, 4]), 1, 4).get_state()
    with pytest.raises(ValueError, match="number of documents was 2 and is now 1"):
        PackedRows(make_documents([3]), 1, 4).set_state(state)
