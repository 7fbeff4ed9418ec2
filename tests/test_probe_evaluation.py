"""Written answers to probes: their scores, their cells and table, and `famx eval` as a user runs it."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from tiny import fam, make_model, make_params
from trained import write_model_dir

from famx.base.errors import ConfigError
from famx.data import ByteVocabulary
from famx.data.probes import PROBES
from famx.data.probes.chance import chance
from famx.decoding import Sampling
from famx.evaluation import ProbeEvaluation
from famx.evaluation.common import streamer_of, without_memory
from famx.evaluation.probe_table import Cell, ProbeTable
from famx.inference.answers import Answers
from famx.inference.prompts import Example as Prompt
from famx.modules import Memory

BYTES = ByteVocabulary()
NEEDLE, STORY = "ruler_niah_single_1", "babilong_qa1"
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model():
    return make_model(vocabulary=BYTES, block_size=64)


@pytest.fixture(scope="module")
def params(model):
    return make_params(model.module, seed=3)


def make(**changes):
    settings = dict(probes=[NEEDLE], lengths=[600], examples=5, batch_size=2, max_new_tokens=6)
    return ProbeEvaluation(**{**settings, **changes})


def cells(folder, step=7):
    return {path.stem: json.loads(path.read_text()) for path in (folder / f"{step}.cells").iterdir()}


class Knowing:
    """Answers that a model could write: `right` of every prompt, else the text "none"."""

    def __init__(self, right):
        self.right, self.asked = right, []

    def answers_of(self, module, vocabulary, batch_size, max_new_tokens):
        self.asked.append((module.config.memory.exists, max_new_tokens))
        return self

    def predict(self, params, batch):
        texts = [BYTES.decode(example.prompt[1:]) for example in batch]
        return [{"prediction": self.right(text), "aux": {}} for text in texts], 0


def needle(text):
    return re.search(r"One of the special magic \w+ for \S+ is: (\S+)\.", text)[1]


# ---------------------------------------------------------------- scores


@pytest.mark.sampled(2)
@pytest.mark.parametrize("memory, name, length", [(True, NEEDLE, 600), (False, "ruler_vt", 1500)])
def test_answers_are_those_of_the_model_after_the_published_prompt(
    model, params, tmp_path, memory, name, length
):
    which = "with" if memory else "without"
    make(memory=which, probes=name, lengths=[length], examples=3)(model, params, 7, tmp_path)
    answers = cells(tmp_path)[f"{name}-{length}-{which}_memory"]["result"]["answers"]
    assert [row["index"] for row in answers] == [0, 1, 2]
    reader, weights = (model, params) if memory else without_memory(model, params)
    streamer, probe = streamer_of(reader.module), PROBES[name](split="eval", seed=1)
    for row in answers[:2]:
        prompt = probe.prompt(row["index"], length, 6)
        tokens = np.array([[BYTES.bos_id, *BYTES.encode(prompt["inputs"])]], np.int32)
        assert tokens.shape[1] + 6 <= length
        logits, state = streamer.read(weights, streamer.initial_state(weights, 1), tokens)
        out = streamer.generate(weights, logits, state, Sampling(6, stop_tokens=(BYTES.eos_id,)))
        written = np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()
        written = written[:-1] if written[-1] == BYTES.eos_id else written
        assert row["prediction"] == BYTES.decode([i for i in written if i < BYTES.vocab_size])
        assert row["references"] == prompt["references"]


def test_the_score_is_the_benchmarks(model, params, monkeypatch, tmp_path):
    half = Knowing(lambda text: f" It is {needle(text)}!" if int(needle(text)) % 2 else "none")
    monkeypatch.setattr("famx.evaluation.probes.answers_of", half.answers_of)
    found = make(examples=20, memory="with")(model, params, 7, tmp_path)
    probe = PROBES[NEEDLE](split="eval", seed=1)
    odd = [int(probe.prompt(i, 600, 6)["references"][0]) % 2 for i in range(20)]
    assert 0 < sum(odd) < 20 and found == {f"{NEEDLE}/600": pytest.approx(5 * sum(odd))}
    cell = cells(tmp_path)[f"{NEEDLE}-600-with_memory"]["result"]
    assert cell["metric"] == "string_match_all" and cell["score"] == found[f"{NEEDLE}/600"]
    assert cell["trivial"] == chance(probe, [probe.prompt(i, 600, 6) for i in range(20)])
    # BABILong: one place, in the first sentence.
    two = Knowing(lambda text: "\nAnswer: The most recent location of X is garden. Or kitchen.")
    monkeypatch.setattr("famx.evaluation.probes.answers_of", two.answers_of)
    found = make(probes=STORY, lengths=[4000], examples=30, max_new_tokens=None)(model, params, 7)
    story = PROBES[STORY](split="eval", seed=1)
    gardens = [story.prompt(i, 4000, 20)["references"] == ["garden"] for i in range(30)]
    expected = pytest.approx(100 * np.mean(gardens))
    assert found == {f"{STORY}/4000": expected, f"memory/without/{STORY}/4000": expected}
    assert two.asked == [(True, 20), (False, 20)] and 0 < sum(gardens) < 30


def test_without_memory_is_the_same_decoder_without_it(model, params):
    bare, rest = without_memory(model, params)
    assert bare.config == make_model(block_size=64, memory=Memory()).config
    plain = make_params(make_model(block_size=64, memory=Memory()).module)
    assert {name: set(value) if isinstance(value, dict) else None for name, value in rest.items()} == {
        name: set(value) if isinstance(value, dict) else None for name, value in plain.items()
    }
    tokens = np.arange(2, 202, dtype=np.int32)[None]

    def read(model, params):
        streamer = streamer_of(model.module)
        return streamer.predict(params, streamer.initial_state(params, 1), tokens)[0]

    zero = make_model(vocabulary=BYTES, block_size=64, memory=fam(0))
    np.testing.assert_array_equal(read(bare, rest), read(zero, rest))
    assert (read(bare, rest) != read(model, params)).any()


def test_prompts_beyond_the_reach_of_the_windows_are_not_read(model, params, monkeypatch):
    bare, rest = without_memory(model, params)
    streamer = streamer_of(bare.module)
    answers = Answers(streamer, BYTES, None, 3, Sampling(70), 1, 0)
    rng, reach = np.random.default_rng(0), bare.config.reach
    assert reach == 64
    sizes = [reach + 64, reach + 65, 900]
    examples = [Prompt(i, {}, rng.integers(3, 250, n).astype(np.int32)) for i, n in enumerate(sizes)]
    with monkeypatch.context() as whole:
        whole.setattr(answers, "_out_of_reach", lambda prompts: np.zeros(3, np.int32))
        expected = answers.predict(rest, examples)
    read, shapes = streamer.read, []

    def recorded(params, state, tokens, lengths):
        shapes.append(lengths.tolist())
        return read(params, state, tokens, lengths)

    monkeypatch.setattr(streamer, "read", recorded)
    rows, count = answers.predict(rest, examples)
    assert [row["aux"]["tokens"] for row in rows] == [row["aux"]["tokens"] for row in expected[0]]
    assert shapes == [[128, 65, 900 - 13 * 64]] and count == expected[1] == sum(sizes) + 3 * 70
    full = Answers(streamer_of(model.module), BYTES, None, 3, Sampling(70), 1, 0)
    prompts = [example.prompt for example in examples]
    assert not full._out_of_reach(prompts).any()  # a memory reaches to the first token


def test_a_model_without_memory_has_one_score_per_cell(params, monkeypatch, tmp_path):
    model = make_model(vocabulary=BYTES, block_size=64, memory=Memory())
    knowing = Knowing(needle)
    monkeypatch.setattr("famx.evaluation.probes.answers_of", knowing.answers_of)
    assert make()(model, params, 7, tmp_path) == {f"{NEEDLE}/600": 100.0}
    assert list(cells(tmp_path)) == [f"{NEEDLE}-600-without_memory"]
    with pytest.raises(ConfigError, match="memory is 'with', but the model has no memory"):
        make(memory="with").check(model)


# ---------------------------------------------------------------- cells and table


def test_a_stopped_table_says_what_is_not_measured_and_goes_on(model, params, monkeypatch, tmp_path):
    knowing = Knowing(needle)
    monkeypatch.setattr("famx.evaluation.probes.answers_of", knowing.answers_of)
    asked = []
    stop = lambda: len(asked) == 3 or asked.append(True)
    evaluation = make(lengths=[600, 800], probes=[NEEDLE, "ruler_niah_single_3"])
    found = evaluation(model, params, 7, tmp_path, stop)
    assert len(knowing.asked) == len(found) == 3
    rows = json.loads((tmp_path / "7.table.json").read_text())["cells"]
    assert [(row["length"], row["state"]) for row in rows] == [
        (600, "measured")] * 3 + [(600, "not measured")] + [(800, "not measured")] * 4  # fmt: skip
    text = (tmp_path / "7.table.md").read_text()
    assert f"| {NEEDLE} | with | 100.0 | not measured |" in text
    assert "| ruler_niah_single_3 | without | not measured | not measured |" in text
    assert "3 of 8 cells are measured." in text
    before = cells(tmp_path)
    found = evaluation(model, params, 7, tmp_path)
    assert len(knowing.asked) == 8 and len(found) == 8
    assert {name: cells(tmp_path)[name] for name in before} == before
    text = (tmp_path / "7.table.md").read_text()
    assert "not measured" not in text and "8 of 8 cells are measured." in text
    assert "| best trivial answer | 100.0 (the first value) | 100.0 (the first value) |" in text
    # Other settings, and a damaged cell, are measured again.
    evaluation(model, params, 7, tmp_path)
    assert len(knowing.asked) == 8
    (tmp_path / "7.cells" / f"{NEEDLE}-600-with_memory.json").write_text('{"settings": ')
    evaluation(model, params, 7, tmp_path)
    assert len(knowing.asked) == 9
    make(seed=2)(model, params, 7, tmp_path)
    assert len(knowing.asked) == 11


def test_no_cell_is_begun_after_the_time(model, params, monkeypatch, tmp_path):
    monkeypatch.setattr("famx.evaluation.probes.answers_of", Knowing(needle).answers_of)
    assert make(minutes=0.0)(model, params, 7, tmp_path) == {}
    assert "0 of 2 cells are measured." in (tmp_path / "7.table.md").read_text()


def test_a_table_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = ProbeTable(None, 1, [Cell("a", 1, True, {})])
    table.write()
    assert not table.cells[0].read(table.folder) and not list(tmp_path.iterdir())
    assert "| a | with | not measured |" in table.markdown()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(probes=["ruler_niah_singel_1"]), "is no probe. Did you mean ruler_niah_single_1?"),
        (dict(lengths=[200, 4000]), "begin with 200, too few for 'ruler_niah_single_1'"),
        (dict(probe_options={NEEDLE: {"colour": 1}}), "'ruler_niah_single_1': .*colour"),
        (dict(probe_options={NEEDLE: {"keys": "letters"}}), "must be one of 'words', .*, not 'letters'"),
        (dict(probes=["copy_at_distance"], probe_options={"copy_at_distance": {"block_size": 4}}),
         "does not fit into a block of 4"),
    ],
)  # fmt: skip
def test_what_does_not_fit_gets_a_sentence(model, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make(**changes).check(model)


def test_a_model_without_vocabulary_gets_a_sentence():
    with pytest.raises(ConfigError, match="needs a vocabulary, and the model has none"):
        make().check(make_model())


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(probes=[]), r"probes must be .*, not \[\]"),
        (dict(lengths=[]), r"lengths must be .*, not \[\]"),
        (dict(examples=0), "examples must be a whole number of at least 1"),
        (dict(memory="off"), "must be one of 'both', 'with', 'without', not 'off'"),
        (dict(seed=-1), "seed must be a whole number of at least 0"),
    ],
)
def test_bad_settings_get_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**changes)


# ---------------------------------------------------------------- the command


def test_one_command_makes_the_table(model, params, tmp_path):
    write_model_dir(tmp_path / "model", model, params, BYTES, 3)
    command = [
        sys.executable, "-m", "famx.eval", f"--gin_file={ROOT / 'gin_configs/runs/probes.gin'}",
        f"--gin.CHECKPOINT_PATH='{tmp_path / 'model'}'", "--gin.LENGTHS=(700, 900)",
        "--gin.EXAMPLES=2", "--gin.PROBE_BATCH_SIZE=2",
        "--gin.ProbeEvaluation.max_new_tokens=4",
        f"--gin.ProbeEvaluation.probes=('{NEEDLE}',)",
    ]  # fmt: skip
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "model" / "eval" / "probes"
    assert "4 of 4 cells are measured." in (folder / "3.table.md").read_text()
    assert len(cells(folder, 3)) == 4 and f"{NEEDLE}/900" in first.stdout
    scalars = json.loads((folder / "3.json").read_text())["scalars"]
    assert set(scalars) == {f"{m}{NEEDLE}/{n}" for m in ("", "memory/without/") for n in (700, 900)}
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "3.cells").iterdir()}
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "3.cells").iterdir()} == stamps
