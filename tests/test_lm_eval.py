"""famx as a model of lm-evaluation-harness, its tasks as an evaluation, and its command."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from lm_eval_files import CAPITALS, run, write_tasks
from pretrained import write_byte_pair, write_pretrained
from tiny import make_model, make_params
from trained import write_model_dir

pytest.importorskip("lm_eval", reason="pip install 'famx[lm-eval]'")
datasets = pytest.importorskip("datasets")

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from famx.base.errors import ConfigError  # noqa: E402
from famx.data.vocabularies import ByteVocabulary, WordVocabulary, open_vocabulary  # noqa: E402
from famx.decoding import Sampling, Streamer  # noqa: E402
from famx.evaluation import LmEvaluation, lm_eval_tasks  # noqa: E402
from famx.evaluation.checkpoints import evaluate  # noqa: E402
from famx.evaluation.lm_eval_model import FamxLM  # noqa: E402
from famx.inference.conversation import Conversation  # noqa: E402
from famx.model_dir.loading import TrainedModel, load_model  # noqa: E402

BYTES = ByteVocabulary()
TEMPLATE = (
    "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model of random weights with a BPE vocabulary whose file does not ask for begin of text."""
    return write_pretrained(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """The same with a chat template."""
    path = tmp_path_factory.mktemp("chatting")
    _, vocabulary = write_pretrained(path / "plain")
    vocabulary.chat_template = TEMPLATE
    model = make_model(vocab_size=vocabulary.vocab_size)
    return write_model_dir(path / "model", model, make_params(model.module), vocabulary)


def loaded(vocabulary=BYTES, **sizes):
    model = make_model(vocabulary=vocabulary, **sizes)
    return TrainedModel(model, make_params(model.module), 3, None)


def requests(kind, *arguments):
    return [Instance(kind, {}, args, i, ("task", i, 1)) for i, args in enumerate(arguments)]


@functools.cache
def streamer(module):
    return Streamer(module)


def likely(trained, ids):
    """`(log-likelihoods, whether likeliest)` of all ids but the first, in one pass."""
    reader, ids = streamer(trained.model.module), np.array([ids], np.int32)
    state = reader.initial_state(trained.params, 1)
    (log_p, best), _ = reader.score(trained.params, state, ids[:, :-1], ids[:, 1:])
    return log_p[0], best[0]


def greedy(trained, ids, count):
    """`count` tokens that follow, without a stop."""
    reader, ids = streamer(trained.model.module), np.array([ids], np.int32)
    logits, state = reader.read(trained.params, reader.initial_state(trained.params, 1), ids)
    out = reader.generate(trained.params, logits, state, Sampling(count))
    return np.asarray(out.tokens)[0].tolist()


# ---------------------------------------------------------------- the model's answers


def test_log_likelihoods_of_continuations():
    trained, lm = loaded(), FamxLM(loaded(), batch_size=3)
    pairs = [("A red", " cat"), ("A red", " dog or two"), ("A ", "cat"), ("", "cat"), ("A" * 50, "b")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (score, best) in zip(pairs, found, strict=True):
        ids = [BYTES.bos_id, *BYTES.encode(context + continuation)]
        n = len(continuation) + (context == "A ")  # the space is scored, as lm-eval does
        log_p, likeliest = likely(trained, ids)
        assert score == pytest.approx(log_p[-n:].sum(), rel=1e-5) and best == likeliest[-n:].all()
    assert not any(best for _, best in found)
    prompt = [BYTES.bos_id, *BYTES.encode("A red")]
    text = [i for i in greedy(trained, prompt, 1)]
    pair = (np.array(prompt, np.int32).tolist(), text)
    assert lm._loglikelihood_tokens([(("", ""), *pair)], disable_tqdm=True)[0][1] is True


def test_an_empty_continuation_is_certain():
    assert FamxLM(loaded())._loglikelihood_tokens([(("a", ""), [5], [])], True) == [(0.0, True)]


def test_a_document_is_read_to_its_end_in_one_stream():
    trained, lm = loaded(), FamxLM(loaded(), batch_size=2)
    texts = ["x" * 3, "many blocks of eight bytes, and more than the window holds: " * 4, ""]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((x,) for x in texts)), True)
    for text, score in zip(texts[:2], found):
        log_p, _ = likely(trained, [BYTES.bos_id, *BYTES.encode(text)])
        assert score == pytest.approx(log_p.sum(), rel=1e-5)
    assert found[2] == 0


def test_answers_end_at_a_text_a_token_or_the_limit():
    trained = loaded()
    likely_letters = np.full((260, 1), 0.3, np.float32)
    likely_letters[BYTES.encode("abcdefgh ")] = 2.0
    params = {**trained.params, "embedding": trained.params["embedding"] * likely_letters}
    trained = dataclasses.replace(trained, params=params)
    lm, context = FamxLM(trained, batch_size=2, max_gen_toks=70), "The text of a question."
    ids = greedy(trained, [BYTES.bos_id, *BYTES.encode(context)], 70)
    written = BYTES.decode(ids)
    assert len(written) > 40, "the tests below cut this text"
    early, end = written[20:22], written[36:38]
    asked = requests(
        "generate_until", (context, {"until": []}), (context, {"until": [end]}),
        (context, {"until": [early, end]}), (context, {"until": end, "max_gen_toks": 9}),
        ("Another", {"max_gen_toks": 3}),
    )  # fmt: skip
    found = lm.generate_until(asked, disable_tqdm=True)
    free = BYTES.decode(ids[: ids.index(BYTES.eos_id)] if BYTES.eos_id in ids else ids)
    assert found[0] == free and found[1] == free.split(end)[0]
    assert found[2] == free.split(end)[0].split(early)[0]
    assert found[3] == BYTES.decode(ids[:9]).split(end)[0]
    assert len(found[4]) <= 3
    assert asked[1].args[1] == {"until": [end]}, "the task's own settings are not changed"


def test_special_tokens_end_an_answer_as_tokens(directory):
    trained = load_model(directory)
    vocabulary = trained.model.vocabulary
    lm = FamxLM(directory)
    sampling, until = lm._how({"until": ["<pad>", "\n"]})
    special = vocabulary.special_tokens
    assert set(sampling.stop_tokens) == {special["<pad>"], special["<eos>"]}
    assert until == ("<pad>", "\n", "<eos>")
    assert lm._text([special["<bos>"], *vocabulary.encode("list"), special["<pad>"]]) == "list"


def test_how_answers_are_drawn():
    lm = FamxLM(loaded())
    how = lambda **given: lm._how(given)[0]
    assert how() == Sampling(256, stop_tokens=(2,))
    assert how(temperature=0.7).temperature == 0.7 and how(max_new_tokens=5).max_new_tokens == 5
    assert how(do_sample=True).temperature == 1 and how(do_sample=False, temperature=1).temperature == 0
    drawn = how(do_sample=True, temperature=0.5, top_k=4, top_p=0.9)
    assert (drawn.temperature, drawn.top_k, drawn.top_p) == (0.5, 4, 0.9)
    with pytest.raises(ConfigError, match="cannot generate with num_beams=4: known are do_sample,"):
        how(num_beams=4)
    with pytest.raises(ConfigError, match="generation_kwargs cannot be used: Sampling.top_p must be a"):
        how(do_sample=True, top_p=3)


def test_draws_depend_on_the_seed_and_the_request():
    def texts(seed):
        settings = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 20}
        asked = requests("generate_until", ("A", settings), ("A", settings))
        return FamxLM(loaded(), seed=seed, batch_size=2).generate_until(asked, disable_tqdm=True)

    assert texts(0) == texts(0) != texts(1) and len(set(texts(0))) == 2


def test_begin_of_text_is_as_the_tokenizer_has_it(directory, tmp_path):
    words = WordVocabulary(["a", "b"])
    assert FamxLM(loaded(words)).tok_encode("a b") == [words.bos_id, 4, 5]
    plain, begun = FamxLM(directory), FamxLM(directory, add_bos_token=True)
    ids = load_model(directory).model.vocabulary.encode("the list")
    assert plain.tok_encode("the list") == ids and begun.tok_encode("the list") == [1, *ids]
    assert begun.tok_encode("<bos>the list") == [1, *ids], "not twice"
    assert begun.tok_encode("the list", add_special_tokens=False) == ids
    assert plain.prefix_token_id == 1 and FamxLM(directory, prefix_token_id=2).prefix_token_id == 2
    begin, text = {"id": "<bos>", "type_id": 0}, {"id": "A", "type_id": 0}
    template = {
        "type": "TemplateProcessing", "pair": [{"Sequence": text}, {"Sequence": {**text, "id": "B"}}],
        "single": [{"SpecialToken": begin}, {"Sequence": text}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    }  # fmt: skip
    folder = tmp_path / "tokenizer"
    file = folder / "tokenizer.json"
    write_byte_pair(folder)
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": template}))
    assert open_vocabulary(file).adds_bos and not plain.vocabulary.adds_bos


def test_a_memory_file_and_an_empty_memory(tmp_path, directory):
    trained = load_model(directory)
    conversation = Conversation(trained)
    (tmp_path / "book.txt").write_text("Of the list and the string in it, 3 or 291 remain. " * 8)
    conversation.read_file(str(tmp_path / "book.txt"))
    conversation.save(str(tmp_path / "book.famem"))
    asked = requests("loglikelihood", ("What remains", " to be found"))
    scores = [
        FamxLM(directory, **arguments).loglikelihood(asked, disable_tqdm=True)[0][0]
        for arguments in ({"memory": str(tmp_path / "book.famem")}, {}, {"zero_memory": True})
    ]
    ids = [1, *trained.model.vocabulary.encode((tmp_path / "book.txt").read_text())]
    whole = trained.model.vocabulary.encode("What remains to be found")
    n = len(whole) - len(trained.model.vocabulary.encode("What remains"))
    assert scores[0] == pytest.approx(likely(trained, ids + whole)[0][-n:].sum(), rel=1e-4)
    assert len(set(scores)) == 3, "the prompt of the memory counts from the first block on"


def test_chat_templates(chatting):
    lm = FamxLM(chatting)
    history = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "the list?"}]
    text = "<bos>system\nBe brief.<eos>\n<bos>user\nthe list?<eos>\n<bos>assistant\n"
    assert lm.apply_chat_template(history) == text
    assert lm.tok_encode(text)[0] == 1 and lm.tok_encode(text).count(1) == 3
    answered = [*history, {"role": "assistant", "content": "It is"}]
    assert lm.apply_chat_template(answered, add_generation_prompt=False).endswith("<bos>assistant\nIt is")
    assert lm.chat_template(True) == TEMPLATE and lm.chat_template(False) is None
    assert lm.tokenizer_name.startswith("famx-byte_pair-")


def test_a_template_that_refuses_the_system_message(chatting):
    trained = load_model(chatting)
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    vocabulary = type(trained.model.vocabulary).restore(
        {**trained.model.vocabulary.description(), "chat_template": strict},
        trained.model.vocabulary.content,
    )
    model = dataclasses.replace(trained.model, vocabulary=vocabulary)
    lm = FamxLM(dataclasses.replace(trained, model=model))
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the list?"}]
    assert lm.apply_chat_template(history) == "<bos>user\nthe list?<eos>\n<bos>assistant\n"


def test_answers_are_kept_for_a_run_that_is_interrupted(directory, tmp_path):
    names = write_tasks(tmp_path)
    arguments = {"checkpoint": directory, "batch_size": 4}
    once = lambda: lm_eval.simple_evaluate(
        model="famx", model_args=arguments, tasks=names, use_cache=str(tmp_path / "answers"),
        task_manager=TaskManager(include_path=str(tmp_path)),
    )  # fmt: skip
    first = lm_eval_tasks.figures(once())
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FamxLM, "generate_until", lambda self, asked: calls.append(asked))
        patch.setattr(FamxLM, "loglikelihood", lambda self, asked: calls.append(asked))
        patch.setattr(FamxLM, "loglikelihood_rolling", lambda self, asked: calls.append(asked))
        second = once()
    assert not calls and lm_eval_tasks.figures(second) == first
    described = second["config"]
    assert described["model_memory"] == "fam" and described["model_num_parameters"] > 600 * 16


@pytest.mark.parametrize("arguments, sentence", [
    ({}, r"needs a checkpoint: --model_args checkpoint=MODEL_DIR"),
    ({"checkpoint": "/none"}, r"/none is not a directory"),
    ({"checkpoint": None, "pretrained": "x"}, r"has no argument pretrained\. Known are checkpoint,"),
    ({"checkpoint": None, "adaptor": "x"}, r"has no argument adaptor\. Did you mean adapter\?"),
])  # fmt: skip
def test_wrong_arguments_are_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        FamxLM(**arguments)


@pytest.mark.parametrize("size", [0, "many", -3])
def test_wrong_batch_sizes(size):
    with pytest.raises(ConfigError, match="batch_size must be a whole number of at least 1 or auto"):
        FamxLM(loaded(), batch_size=size)


def test_batch_sizes_of_the_command():
    assert FamxLM(loaded(), batch_size="auto:4").batch_size == 8
    assert FamxLM(loaded(), batch_size="3", device="cuda:0").batch_size == 3
    arguments, flags = {"checkpoint": loaded(), "batch_size": 5}, {"batch_size": 1, "device": None}
    assert FamxLM.create_from_arg_obj(arguments, flags).batch_size == 5
    assert FamxLM.create_from_arg_obj({"checkpoint": loaded()}, flags).batch_size == 1


def test_arguments_as_one_text(directory):
    lm = FamxLM.create_from_arg_string(f"checkpoint={directory},batch_size=3,add_bos_token=True")
    assert lm.batch_size == 3 and lm.tok_encode("the")[0] == lm.vocabulary.bos_id


# ---------------------------------------------------------------- the evaluation


def test_tasks_are_an_evaluation_of_checkpoints(directory, tmp_path):
    names = write_tasks(tmp_path / "tasks")
    evaluation = LmEvaluation(names, include_path=str(tmp_path / "tasks"), batch_size=3, health=True)
    (found,) = evaluate(directory, {"harness": evaluation}, str(tmp_path / "out"))["harness"].values()
    assert found["capitals/acc"] in np.arange(9) / 8 and found["capitals_text/word_perplexity"] > 1
    assert {"capitals/acc_stderr", "capitals_written/exact_match"} <= set(found)
    zeroed = found["memory/zeroed/capitals_text/bits_per_byte"]
    assert zeroed != found["capitals_text/bits_per_byte"] and zeroed > 0
    # Choices as they are ranked one by one.
    trained = load_model(directory)
    encode = trained.model.vocabulary.encode
    rows = list(map(json.loads, (tmp_path / "tasks" / "capitals.jsonl").read_text().splitlines()))
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context = f"The capital of {row['country']} is"
            ids, n = encode(f"{context} {choice}"), len(encode(context))
            scores.append(likely(trained, ids)[0][n - 1 :].sum())
        right += int(np.argmax(scores) == row["answer"])
    assert found["capitals/acc"] == right / len(rows)
    lines = (tmp_path / "out" / "harness" / "0.predictions.jsonl").read_text().splitlines()
    samples = list(map(json.loads, lines))
    assert [s["task"] for s in samples] == [name for name in names for _ in CAPITALS]
    assert all({"arguments", "filtered_resps", "target"} <= set(sample) for sample in samples)


def test_the_same_tasks_serve_several_checkpoints(tmp_path):
    names = write_tasks(tmp_path / "tasks", generation_kwargs={"until": ["."], "max_gen_toks": 4})
    evaluation = LmEvaluation(names, str(tmp_path / "tasks"), limit=2)
    trained = loaded()
    evaluation.check(trained.model)
    once = evaluation(trained.model, trained.params, 1)
    other = jax.tree.map(lambda x: x * 1.1, trained.params)
    assert evaluation(trained.model, other, 2) != once
    assert evaluation(trained.model, trained.params, 3) == once


def test_prompts_in_a_chat_template(chatting, tmp_path):
    names = write_tasks(tmp_path / "tasks")
    settings = dict(include_path=str(tmp_path / "tasks"), limit=2, apply_chat_template=True)
    evaluation = LmEvaluation(names[1], system_instruction="Be brief.", **settings)
    evaluate(chatting, {"chat": evaluation}, str(tmp_path / "out"))
    lines = (tmp_path / "out" / "chat" / "1.predictions.jsonl").read_text().splitlines()
    prompt = json.loads(lines[0])["arguments"][0][0]
    assert prompt.startswith("<bos>system\nBe brief.<eos>\n<bos>user\nThe capital of France is<eos>")
    assert prompt.endswith("\n<bos>assistant\n") and len(lines) == 2


@pytest.mark.parametrize("fields, sentence", [
    ({}, "LmEvaluation.tasks is not set"),
    ({"tasks": ["capitalz"]}, r"lm-eval has no task capitalz\. Did you mean capitals\?"),
    ({"tasks": ["capitals"], "include_path": "/none"}, "include_path /none is not a directory"),
])  # fmt: skip
def test_wrong_settings_are_one_sentence(fields, sentence, tmp_path):
    write_tasks(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        LmEvaluation(**{"include_path": str(tmp_path), **fields}).check(loaded().model)


def test_a_model_without_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="needs a vocabulary, and the model has none"):
        LmEvaluation(["capitals"]).check(make_model())


def test_a_chat_template_that_is_missing(tmp_path):
    write_tasks(tmp_path)
    evaluation = LmEvaluation("capitals", str(tmp_path), apply_chat_template=True)
    with pytest.raises(ConfigError, match="has no chat template"):
        evaluation(loaded().model, loaded().params, 0)


# ---------------------------------------------------------------- the command


def test_the_command_gives_the_figures_of_the_evaluation(directory, tmp_path):
    names = write_tasks(tmp_path / "tasks")
    done = run(
        "-m", "famx.lm_eval", "--model", "famx", "--model_args", f"checkpoint={directory},batch_size=2",
        "--tasks", ",".join(names), "--include_path", "tasks", "--output_path", "out", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|capitals" in done.stdout and "famx ({'checkpoint'" in done.stdout
    (file,) = (tmp_path / "out").rglob("*.json")
    trained = load_model(directory)
    expected = LmEvaluation(names, str(tmp_path / "tasks"))(trained.model, trained.params, 0)
    assert lm_eval_tasks.figures(json.loads(file.read_text())) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("arguments, sentence", [
    (["--tasks", "arc_easy"], r"needs data that is not on this machine and cannot be downloaded: Couldn't"
     " reach 'allenai/ai2_arc' on the Hub"),
    (["--tasks", "no_such_task"], "Tasks not found: no_such_task."),
])  # fmt: skip
def test_mistakes_of_the_command_are_one_sentence(directory, tmp_path, arguments, sentence):
    model = ["--model", "famx", "--model_args", f"checkpoint={directory}"]
    done = run("-m", "famx.lm_eval", *model, *arguments, folder=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("famx: error: ") and sentence in last and "Traceback" not in done.stderr


def test_its_own_help_is_that_of_lm_eval(tmp_path):
    done = run("-m", "famx.lm_eval", "run", "--help", folder=tmp_path)
    assert done.returncode == 0 and "--num_fewshot" in done.stdout


def test_without_lm_eval_one_sentence_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['lm_eval'] = None; sys.argv = ['famx lm-eval', '--model', 'famx'];"
        "import runpy; runpy.run_module('famx.lm_eval', run_name='__main__')"
    )
    done = run("-c", code, folder=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("run pip install 'famx[lm-eval]'.\n")
    assert len(done.stderr.splitlines()) == 1
