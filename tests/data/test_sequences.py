"""Generated sequences: exact in (seed, split, index), right answers, nothing of the test in training."""

import dataclasses
import importlib.util
import itertools
import shutil
import sys

import numpy as np
import pytest

import famx.data
from famx.base.errors import ConfigError
from famx.base.features import Feature
from famx.data import ContinuousLanes, IndexedDocuments, Kind, PackedRows, SequenceTask, kind_of
from famx.data.sequences import SEQUENCES, digits, graphs, melodies, speech
from famx.data.sequences.log_mel import log_mel

SKLEARN = importlib.util.find_spec("sklearn") is not None
needs_sklearn = pytest.mark.skipif(not SKLEARN, reason="scikit-learn is not installed")
needs_espeak = pytest.mark.skipif(
    shutil.which(speech.PROGRAM) is None, reason=f"{speech.PROGRAM} is not installed"
)
OF_IMAGES = ("pixels", "album_first", "album_same", "key_then_images", "image_then_text")
TASKS = [
    pytest.param(
        name,
        marks=[needs_sklearn] * (name in OF_IMAGES) + [needs_espeak] * (name == "spoken_digit"),
    )
    for name in SEQUENCES
]


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", TASKS)
def test_an_example_is_a_function_of_seed_split_index_and_length(name):
    task = famx.data.get(name)
    assert kind_of(task) is Kind.MADE
    for length in (task.min_length, task.min_length + 13):
        batch = task.batch([5, 2], length)
        assert same(batch, famx.data.get(name).batch([5, 2], length))
        assert same(task.batch([2], length), {key: x[1:] for key, x in batch.items()})
        for feature in task.features:
            array = batch[feature.key]
            assert array.shape == (2, length, *feature.shape) and array.dtype == feature.dtype
            assert np.isfinite(array).all()
    first = task.features[0].key
    others = [(dict(seed=1), 5), (dict(split="eval"), 5), ({}, 6)]
    for options, index in others:
        other = famx.data.get(name, **options).batch([index, 2], length)
        assert not np.array_equal(other[first][0], batch[first][0])


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_ends_the_sequence(name):
    task = famx.data.get(name)
    for index in range(4):
        example = task.example(index, task.min_length + 5)
        start, length = example["answer_start"], task.min_length + 5
        answer = example["tokens"][start:].tolist()
        assert task.vocab.decode(answer) == example["references"][0]
        assert task.vocab.unk_id not in answer
        assert example["weights"].tolist() == [0.0] * start + [1.0] * (length - start)
    answers = {task.example(i, task.min_length)["references"][0] for i in range(40)}
    assert len(answers) >= 2
    with pytest.raises(ValueError, match=f"needs at least {task.min_length} positions"):
        task.example(0, task.min_length - 1)
    with pytest.raises(ValueError, match="numbered from 0"):
        task.example(-1, task.min_length)


@pytest.mark.parametrize("name", TASKS)
def test_a_padded_example_is_a_shorter_one_and_padding(name):
    task, ends = famx.data.get(name, padding=4), set()
    length = task.min_length + 9
    for index in range(24):
        example = task.example(index, length)
        end = example["answer_start"] + np.count_nonzero(example["weights"])
        shorter = famx.data.get(name).example(index, end)
        assert example.keys() == shorter.keys() and example["references"] == shorter["references"]
        assert (example["tokens"][end:] == task.vocab.pad_id).all() and not example["weights"][end:].any()
        for part in ("tokens", "weights"):
            np.testing.assert_array_equal(example[part][:end], shorter[part])
        for feature, array in example["features"].items():
            assert len(array) == length and not array[end:].any()
            np.testing.assert_array_equal(array[:end], shorter["features"][feature])
        ends.add(end)
    assert ends <= set(range(length - 4, length + 1)) and len(ends) >= 4
    assert task.example(0, task.min_length)["weights"][-1] == 1  # there is no room for padding


def test_predicted_values_are_padded_too():
    @dataclasses.dataclass(frozen=True)
    class Ramp(SequenceTask):
        value_width = 2
        features = (Feature("x", 1),)
        min_length = 3

        def row(self, rng, length):
            ones = np.ones((length, 2), np.float32)
            return dict(features={"x": ones[:, :1]}, values=ones, value_weights=ones[:, 0])

    batch = Ramp(padding=3).batch(range(40), 6)
    ends = batch["decoder_value_weights"].sum(1).astype(int)
    assert set(ends) == {3, 4, 5, 6}
    for row, end in enumerate(ends):
        assert batch["decoder_target_values"][row].any(1).sum() == end


# ---------------------------------------------------------------- images


@needs_sklearn
def test_training_and_evaluation_have_no_image_in_common():
    train, held = digits.digits("train"), digits.digits("eval")
    assert not set(train.numbers) & set(held.numbers)
    assert len(train.numbers) + len(held.numbers) == 1797 and len(held.numbers) == 360
    assert set(train.labels) == set(held.labels) == set(range(10))
    bytes_of = lambda images: {x.tobytes() for x in images.pixels}
    for name, split, seed in itertools.product(("pixels", "album_first"), ("train", "eval"), (0, 7)):
        task = famx.data.get(name, split=split, seed=seed, patch=8)
        array = task.batch(range(20), 5)[task.features[0].key][..., :64]
        shown = array.reshape(-1, 64)
        shown = {x.astype(np.float32).tobytes() for x in shown if x.any()}
        assert shown and shown <= bytes_of(digits.digits(split))


@needs_sklearn
@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_patches_are_the_image(side):
    image = digits.digits("train").pixels[0]
    cut, n = digits.patches(image, side), 8 // side
    assert cut.shape == (digits.patch_count(side), side * side + 2)
    for i in range(n * n):
        row, column = divmod(i, n)
        block = image[row * side : (row + 1) * side, column * side : (column + 1) * side]
        np.testing.assert_array_equal(cut[i, :-2], block.reshape(-1))
    assert len({tuple(x) for x in cut[:, -2:].tolist()}) == n * n


def shown_digits(array, patch):
    """The digits of the images of an album, by comparison with all images of the split."""
    images, size = digits.digits("train"), digits.patch_count(patch)
    known = {digits.patches(x, patch).tobytes(): int(y) for x, y in zip(images.pixels, images.labels)}
    count = (len(array) - 1) // size
    return [known[array[i * size : (i + 1) * size, :-1].tobytes()] for i in range(count)]


@needs_sklearn
def test_albums_ask_for_their_first_image():
    for name in ("album_first", "album_same"):
        task = famx.data.get(name)
        for index in range(12):
            example = task.example(index, 27)  # six images, and two positions of nothing
            array = example["features"]["patches"]
            found = shown_digits(array, 4)
            assert len(found) == 6 and not array[24:, :-1].any()
            assert array[:, -1].tolist() == [0.0] * 26 + [1.0]
            want = str(found[0]) if name == "album_first" else ("no", "yes")[found[0] == found[-1]]
            assert example["references"] == [want]
    answers = [task.example(i, 17)["references"][0] for i in range(200)]
    assert 70 < answers.count("yes") < 130


@needs_sklearn
def test_pixels_come_first_and_the_question_last():
    example = famx.data.get("pixels").example(3, 80)["features"]["pixels"]
    assert example[:64, 0].any() and not example[64:, :3].any() and example[-1, 3] == 1
    noisy = famx.data.get("pixels", noise=0.5).example(3, 80)["features"]["pixels"]
    assert 0.2 < noisy[64:, 0].std() < 0.8 and not noisy[64:, 1:3].any()


def test_without_scikit_learn_there_is_a_sentence(monkeypatch):
    digits.digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"need the package 'sklearn'.*pip install 'famx\[digits\]'"):
        famx.data.get("album_first")


# ---------------------------------------------------------------- sound


def test_log_mel_has_the_energy_where_the_tone_is():
    rate, hop, bands = 8000, 128, 16
    peaks = []
    for hertz in (300, 700, 1500, 3000):
        frames = log_mel(np.sin(2 * np.pi * hertz * np.arange(40 * hop) / rate), rate, hop, bands)
        assert frames.shape == (40, bands) and frames.dtype == np.float32
        peaks.append(set(frames[5:-5].argmax(axis=1).tolist()))
    assert all(len(x) == 1 for x in peaks) and sorted(peaks, key=min) == peaks
    assert len(set(map(min, peaks))) == 4
    quiet = log_mel(np.zeros(40 * hop), rate, hop, bands)
    assert np.ptp(quiet) < 1e-6 and quiet.max() < frames.max() - 1


def test_a_melody_is_the_same_in_every_key_and_split():
    pitches = melodies._pitches()
    assert len({tuple(x) for x in pitches.tolist()}) == len(pitches) == 16
    plain = dict(noise=0.0, chirps=0.0, transpose=0)
    names = {}
    for split, index in itertools.product(("train", "eval"), range(24)):
        task = famx.data.get("melody", split=split, **plain)
        example = task.example(index, 24)
        frames = example["features"]["frames"][:16, :-1]
        peaks = tuple(frames.reshape(4, 4, -1)[:, 1:3].mean(axis=1).argmax(axis=1).tolist())
        names.setdefault(example["references"][0], set()).add(peaks)
    assert len(names) == 8
    assert len(set.union(*names.values())) >= 6  # melodies sound different
    assert all(len(peaks) <= 3 for peaks in names.values())  # glides may cross to the next band
    chirps = famx.data.get("melody", chirps=1.0, noise=0.0).example(0, 64)["features"]["frames"]
    silent = famx.data.get("melody", **plain).example(0, 64)["features"]["frames"]
    assert chirps[20:, :-1].mean() > silent[20:, :-1].mean() + 0.1


@needs_espeak
def test_digits_are_spoken_by_other_voices_in_the_evaluation():
    assert not set(speech.VOICES["train"]) & set(speech.VOICES["eval"])
    heard = set()
    for voice in (speech.VOICES["train"][0], speech.VOICES["eval"][0]):
        for digit in (1, 7):
            samples, rate = speech.spoken(digit, voice, 160)
            assert rate > 8000 and 0.1 < len(samples) / rate < 1.2 and np.abs(samples).max() > 0.05
            heard.add(samples.tobytes())
    assert len(heard) == 4
    frames = famx.data.get("spoken_digit").example(0, 60)["features"]["frames"]
    assert frames[:36, :-1].mean() > frames[40:, :-1].mean() + 0.2


def test_without_espeak_there_is_a_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="espeak-ng, which is not installed: run apt-get install"):
        famx.data.get("spoken_digit")


# ---------------------------------------------------------------- graphs


def closure(edges, nodes):
    """Number of steps between all nodes, by products of matrices; 0: not reached."""
    one = np.zeros((nodes, nodes), bool)
    one[edges[:, 0], edges[:, 1]] = True
    steps, power = np.zeros((nodes, nodes), int), np.eye(nodes, dtype=bool)
    for step in range(1, nodes):
        power = power @ one
        steps[power & (steps == 0)] = step
    return steps


@pytest.mark.parametrize("name", ["reachable_tree", "reachable_sparse"])
@pytest.mark.parametrize("length", [8, 20, 42])
def test_graphs_have_the_answer_of_their_closure(name, length):
    task, yes, asked = famx.data.get(name, nodes=48), 0, set()
    for index in range(30):
        example = task.example(index, length)
        edges = example["features"]["edges"]
        assert edges[:, 2].tolist() == [graphs.EDGE] * (length - 2) + [graphs.REACHED, graphs.STEPS]
        assert (edges[-1, :2] == edges[-2, :2]).all()
        own, (start, end) = edges[:-2, :2], edges[-1, :2]
        assert len({tuple(x) for x in own.tolist()}) == length - 2 and (own[:, 0] != own[:, 1]).all()
        steps = closure(own, 48)[start, end]
        assert start != end and start in own[:, 0] and end in own[:, 1]
        answer = example["references"][0]
        assert answer == (f"yes {steps}" if steps else "no none")
        yes, asked = yes + bool(steps), asked | {steps}
        if name == "reachable_tree":
            assert len(np.unique(own[:, 1])) == len(own)  # one parent each
            assert closure(own, 48).max() <= task.most_steps
    assert 6 <= yes <= 24 and len(asked) >= 3


@pytest.mark.parametrize("name", ["reachable_tree", "reachable_sparse"])
@pytest.mark.parametrize("length", [14, 40])
def test_edges_after_the_graph_are_of_other_nodes_and_no_question_names_them(name, length):
    task = famx.data.get(name, nodes=16, edges=8, questions=3, most_steps=2)
    for index in range(30):
        example = task.example(index, length)
        edges, answers = example["features"]["edges"], example["references"][0].split()
        count = length - 6
        assert edges[:, 2].tolist() == [graphs.EDGE] * count + [graphs.REACHED, graphs.STEPS] * 3
        own, other, asked = edges[:8, :2], edges[8:count, :2], edges[count:, :2]
        assert not set(other.ravel()) & {*own.ravel(), *asked.ravel()}
        assert (other[:, 0] != other[:, 1]).all() and (asked[::2] == asked[1::2]).all()
        steps = closure(own, 16)
        for (start, end), *answer in zip(asked[::2], answers[::2], answers[1::2], strict=True):
            reached = steps[start, end]
            assert answer == (["yes", str(reached)] if reached else ["no", "none"])
            assert start in own[:, 0] and end in own[:, 1]


def test_a_graph_with_more_nodes_than_numbers_is_refused():
    with pytest.raises(ValueError, match="needs 31 numbers, more than the 16 of ReachableTask.nodes"):
        famx.data.get("reachable_tree", nodes=16).example(0, 32)
    with pytest.raises(ValueError, match="has 15 nodes, and needs 17 numbers, more than the 16"):
        famx.data.get("reachable_tree", nodes=16, edges=14).example(0, 32)
    assert famx.data.get("reachable_tree", nodes=17, edges=14).example(0, 32)


def test_a_tree_of_one_step_is_refused():
    """It reaches all nodes that questions name, so that there are no questions to be answered with no."""
    with pytest.raises(ConfigError, match="most_steps must be .*2"):
        famx.data.get("reachable_tree", most_steps=1)


# ---------------------------------------------------------------- several kinds, lanes


@needs_sklearn
@pytest.mark.parametrize("name", ["key_then_images", "image_then_text"])
def test_words_and_patches_are_read_one_position_later(name):
    task = famx.data.get(name)
    batch = task.batch([1, 4], 45)
    kinds, patches = batch["decoder_input_kinds"], batch["decoder_input_patches"]
    known = {digits.patches(x, 4).tobytes() for x in digits.digits("train").pixels}
    for i in range(2):
        assert kinds[i, 0] == 0 and not patches[i][kinds[i] == 0].any()
        shown = patches[i][kinds[i] == 1].reshape(-1, 4, 18)
        assert len(shown) and {x.tobytes() for x in shown} <= known
        targets, read = batch["decoder_target_tokens"][i], batch["decoder_input_tokens"][i]
        words = kinds[i, 1:] == 0  # what is predicted before a word is that word
        assert (read[1:] == targets[:-1]).all() and (targets[:-1][words] >= 4).all()
        assert (targets[:-1][~words] == task.vocab.pad_id).all()
    text = task.vocab.decode(batch["decoder_target_tokens"][0])
    asked = "what is the key?" if name == "key_then_images" else "what was it?"
    assert asked in text
    if name == "key_then_images":
        key = task.example(1, 45)["references"][0]
        assert len(key) == 3 and text.startswith(f"the key is {key}.") and text.endswith(f"? {key}")


class Recordings:
    """Two recordings with values to predict, of 7 and 3 positions."""

    features, value_width = (Feature("channels", 2),), 1

    def __len__(self):
        return 2

    def __getitem__(self, i):
        length = (7, 3)[i]
        channels = 10 * i + np.arange(2 * length, dtype=np.float32).reshape(length, 2) + 1
        return dict(
            tokens=np.zeros(length, np.int32), weights=np.zeros(length, np.float32),
            features={"channels": channels}, values=channels[:, :1], value_weights=np.ones(length),
        )  # fmt: skip


@pytest.mark.parametrize("cls", [ContinuousLanes, PackedRows])
def test_lanes_and_packed_rows_hold_features(cls):
    documents = Recordings()
    lanes, read = cls(documents, 1, 4, seed=0), []
    for step in range(6):
        if step == 2:  # resumes in the middle of a document
            state, lanes = lanes.get_state(), cls(documents, 1, 4, seed=0)
            lanes.set_state(state)
        batch = next(lanes)
        channels, weights = batch["decoder_input_channels"][0], batch["decoder_value_weights"][0]
        assert channels.shape == (4, 2) and batch["decoder_target_values"].shape == (1, 4, 1)
        assert not channels[weights == 0].any()
        np.testing.assert_array_equal(batch["decoder_target_values"][0, :, 0], channels[:, 0])
        read += channels[weights > 0].tolist()
    whole = {i: documents[i]["features"]["channels"].tolist() for i in range(2)}
    order = [i for epoch in range(4) for i in np.random.default_rng([0, epoch]).permutation(2)]
    want = [x for i in order for x in whole[int(i)]]
    assert read == want[: len(read)] and len(read) >= 15


@needs_sklearn
def test_examples_as_documents_are_the_examples():
    task = famx.data.get("key_then_images")
    lanes = ContinuousLanes(IndexedDocuments(task, 24, 1), 1, 8)
    pieces = [next(lanes) for _ in range(3)]
    batch = task.batch([0], 24)
    for name in ("decoder_input_patches", "decoder_input_kinds", "decoder_input_tokens"):
        np.testing.assert_array_equal(np.concatenate([x[name] for x in pieces], axis=1), batch[name])
    assert [x["reset"].tolist() for x in pieces] == [[True], [False], [False]]


class Wrong(SequenceTask):
    features, words, min_length = (Feature("channels", 2),), ("a",), 1
    made = {"channels": np.zeros((4, 3))}

    def row(self, rng, length):
        return dict(features=self.made, answer=["a"])


def test_a_feature_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"'channels' has the shape \[4, 3\], but should have \[4, 2\]"):
        Wrong().batch([0], 4)
    Wrong.made = {}
    with pytest.raises(ValueError, match="has no feature 'channels', which its task declares"):
        Wrong().batch([0], 4)
