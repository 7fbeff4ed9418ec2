"""The GPT-3 suite: prompts, choices and answers of every task, from JSON lines and as TFDS writes."""

import dataclasses
import json
import os

import pytest

import famx.data
from famx.base.errors import ConfigError
from famx.data.storage import tfrecord
from famx.data.tasks.ranking import SCORINGS
from famx.data.tools.prepare import prepare

NLI = {"premise": "It rains.", "hypothesis": "It is wet"}
SCHEMA = {
    "text": "Ann thanked Bea because she helped.", "pronoun_start": 24, "pronoun_end": 27,
    "pronoun_text": "she", "option1": "Ann", "option1_normalized": "Ann", "option2": "Bea",
    "option2_normalized": "Bea", "label": 1, "idx": 0,
}  # fmt: skip
PLACED = dict(
    inputs="Ann thanked Bea because Bea", targets=" helped.", choices=["Ann", "Bea"], answer=[1],
    contexts=["Ann thanked Bea because Ann", "Ann thanked Bea because Bea"], references=["Bea"],
)  # fmt: skip


def arc(prompt="Question: Why?\nAnswer:"):
    record = {"id": "x", "question": "Why?", "answerKey": "C",
              "choices": {"text": ["so", "no", "ü"], "label": ["A", "B", "C"]}}  # fmt: skip
    return record, dict(inputs=prompt, choices=[" so", " no", " ü"], answer=[2])


def anli(k):
    record = {"uid": "u", "context": "A text.", "hypothesis": "A claim.", "label": "c"}
    prompt = f"anli {k}: anli {k}: A text.\nQuestion: A claim. True, False, or Neither?"
    return record, dict(inputs=prompt, choices=[" True", " Neither", " False"], answer=[2])


def race():
    record = {
        "article": " A text. ", "example_id": "high1.txt", "questions": ["One?", "Two _ ."],
        "answers": ["B", "A"], "options": [["a", "b"], ["c", "d", "e"]],
    }  # fmt: skip
    prompt = "Article:\n\nA text.\n\nQ: One?\n\nA: b\n\nQ: Two _ .\n\nA:"
    return record, dict(inputs=prompt, choices=[" c", " d", " e"], answer=[0], id="high1.txt/1")


CASES = {  # task: (record in TFDS' fields, what its last example holds)
    "anli_r1": anli(1), "anli_r2": anli(2), "anli_r3": anli(3),
    "arc_challenge": arc(), "arc_easy": arc(),
    "boolq": (
        {"passage": "Ice -- Ice is cold.", "question": "is ice cold", "label": "True", "idx": 1},
        dict(inputs="Ice -- Ice is cold.\nquestion: is ice cold?\nanswer:", choices=[" no", " yes"],
             answer=[1]),
    ),
    "cb": (
        {**NLI, "label": "neutral", "idx": 1},
        dict(inputs="It rains.\nquestion: It is wet. true, false, or neither?\nanswer:",
             choices=[" true", " false", " neither"], answer=[2], references=["neither"]),
    ),
    "copa": (
        {"premise": "The grass was dark.", "choice1": "The sun set.", "choice2": "I slept.",
         "question": "cause", "label": "choice2", "idx": 1},
        dict(inputs="The grass was dark because", choices=[" the sun set.", " I slept."], answer=[1]),
    ),
    "hellaswag": (
        {"context": "A man stands. He", "endings": ["sits.", " runs."], "activity_label": "Sport",
         "label": 1, "split_type": "zeroshot", "source_id": "s"},
        dict(inputs="Sport: A man stands. He", choices=[" sits.", " runs."], answer=[1]),
    ),
    "multirc": (
        {"paragraph": "A text.", "question": "Who?", "answer": "Ann", "label": "False",
         "idx": {"paragraph": 4, "question": 7, "answer": 2}},
        dict(inputs="READING COMPREHENSION ANSWER KEY\n\nA text.\n\nWho?\n",
             choices=["- [False] Ann", "- [True] Ann"], answer=[0], id="4/7"),
    ),
    "openbookqa": (
        {"question": {"stem": "Plants need", "choice_A": "air", "choice_B": "gold", "choice_C": "ink",
                      "choice_D": "glue"}, "answerKey": "A", "fact1": "f", "humanScore": 1.0,
         "clarity": 1.0, "turkIdAnonymized": "t"},
        dict(inputs="Plants need", choices=[" air", " gold", " ink", " glue"], answer=[0]),
    ),
    "piqa": (
        {"id": "1", "goal": "Open a jar.", "sol1": "Turn it.", "sol2": "Eat it.", "label": 0},
        dict(inputs="Open a jar.", choices=[" Turn it.", " Eat it."], answer=[0]),
    ),
    "race_high": race(), "race_middle": race(),
    "record": (
        {"passage": "A text.\n@highlight\nOne point", "query": "@placeholder won.",
         "entities": ["Ann", "Bea", "Cid"], "answers": ["Bea", "Cid"], "idx": {"passage": 1, "query": 2}},
        dict(inputs="A text.\n- One point\n", choices=["- Ann won.", "- Bea won.", "- Cid won."],
             answer=[1, 2], references=["- Bea won.", "- Cid won."]),
    ),
    "rte": (
        {**NLI, "label": "not_entailment", "idx": 1},
        dict(inputs="It rains.\nquestion: It is wet. True or False?\nanswer:",
             choices=[" True", " False"], answer=[1]),
    ),
    "story_cloze": (
        {"context": "Bob paid.", "endings": ["He left.", "He sang."], "label": 2},
        dict(inputs="Bob paid.", choices=[" He left.", " He sang."], answer=[1]),
    ),
    "wic": (
        {"word": "bat", "sentence1": "A bat flies.", "sentence2": "Take a bat.", "label": "False",
         "start1": 2, "start2": 7, "end1": 5, "end2": 10, "idx": 1},
        dict(inputs="A bat flies.\nTake a bat.\nquestion: Is the word 'bat' used in the same way in the "
                    "two sentences above?\nanswer:", choices=[" no", " yes"], answer=[0]),
    ),
    "winograd": (SCHEMA, PLACED), "wsc273": (SCHEMA, PLACED),
    "winogrande": (
        {"sentence": "Joe eats fruits because _ are sweet.", "option1": "fruits", "option2": "nuts",
         "label": "1"},
        dict(inputs="Joe eats fruits because fruits", targets=" are sweet.", answer=[0],
             contexts=["Joe eats fruits because fruits", "Joe eats fruits because nuts"],
             choices=["fruits", "nuts"]),
    ),
    "lambada": (
        {"passage": "she saw more than a step\n"},
        dict(inputs="she saw more than a", targets=" step", references=["step"]),
    ),
    "natural_questions": (
        {"question": "who played tess", "answer": ["Della", "Reese"]},
        dict(inputs="Q: Who played tess?\n\nA:", targets=" Della", references=["Della", "Reese"]),
    ),
    "squad_v2": (
        {"id": "1", "title": "The_Blitz", "context": "Four sorties.", "question": "How many?",
         "is_impossible": True, "answers": {"text": [], "answer_start": []},
         "plausible_answers": {"text": ["Four"], "answer_start": [0]}},
        dict(inputs="Title: The Blitz\n\nBackground: Four sorties.\n\nQ: How many?\n\nA:",
             targets=" none", references=["none", ""]),
    ),
    "trivia_qa": (
        {"question": "Who painted it?", "question_id": "1", "question_source": "s", "entity_pages": [],
         "search_results": [],
         "answer": {"value": "Duchamp", "aliases": ["R. Mutt", "Duchamp"],
                    "normalized_aliases": ["r mutt"], "matched_wiki_entity_name": "",
                    "normalized_matched_wiki_entity_name": "",
                    "normalized_value": "duchamp", "type": "x"}},
        dict(inputs="Q: Who painted it?\n\nA:", targets=" Duchamp",
             references=["Duchamp", "R. Mutt", "r mutt"]),
    ),
    "web_questions": (
        {"url": "u", "question": "what school?", "answers": ["Arts"]},
        dict(inputs="Q: What school?\n\nA:", targets=" Arts", references=["Arts"]),
    ),
}  # fmt: skip


def write(folder, name, rows, split=None):
    path = folder / "gpt3" / name / f"{split or famx.data.get(f'gpt3_{name}').split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def get(name, folder, **options):
    return famx.data.get(f"gpt3_{name}", data_dir=str(folder), **options)


def check(task, expected):
    examples = task.examples(task.split)
    example = examples[len(examples) - 1]
    found = {name: example[name] for name in expected}
    assert found == expected
    if task.kind == "rank" and "contexts" not in expected:
        assert example["targets"] == example["choices"][example["answer"][0]]
    assert {"inputs", "targets", "references"} <= set(example)


def test_the_suites_are_those_of_the_paper():
    rank, gen = famx.data.get("gpt3_rank"), famx.data.get("gpt3_gen")
    assert (len(rank.tasks), len(gen.tasks)) == (21, 5)
    assert {task.name for task in rank.tasks + gen.tasks} == {f"gpt3_{name}" for name in CASES}
    assert {task.kind for task in rank.tasks} == {"rank"}
    assert {task.kind for task in gen.tasks} == {"generation"}


@pytest.mark.parametrize("name", CASES)
def test_json_lines_become_prompts_and_choices(name, tmp_path):
    record, expected = CASES[name]
    write(tmp_path, name, [record])
    check(get(name, tmp_path), expected)


@pytest.mark.slow
def test_what_tensorflow_datasets_writes_is_read_the_same(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("FAMX_DATA_DIR", raising=False)
    for name, (record, expected) in CASES.items():
        task = famx.data.get(f"gpt3_{name}")
        builder = tfds.builder(task.tfds, data_dir=str(tmp_path))
        features = builder.info.features
        data = features.serialize_example(features.encode_example(record))
        file = f"{builder.name}-{task.split}.tfrecord-00000-of-00001"
        os.makedirs(builder.data_dir, exist_ok=True)
        with open(os.path.join(builder.data_dir, file), "wb") as out:
            out.write(tfrecord.frame(data))
        check(task, expected)


@pytest.mark.parametrize("name", ["race_high", "winogrande", "multirc", "natural_questions"])
def test_prepared_records_give_the_same_examples(name, tmp_path):
    record, _ = CASES[name]
    write(tmp_path, name, [record, record])
    prepare(f"gpt3_{name}", str(tmp_path / "gpt3"), str(tmp_path / "out"), True, message=str)
    task, prepared = get(name, tmp_path), get(name, tmp_path / "out")
    for split in (task.split,):
        assert len(task.examples(split)) == len(prepared.examples(split)) > 1
        for a, b in zip(task.examples(split), prepared.examples(split), strict=True):
            assert {"id": "", **a} == b


def test_labels_that_are_not_published_give_no_answer(tmp_path):
    hidden = {"label": -1}
    for name, changes in (("cb", hidden), ("hellaswag", {"label": ""}), ("story_cloze", hidden),
                          ("winogrande", hidden), ("record", {"answers": []})):  # fmt: skip
        write(tmp_path, name, [{**CASES[name][0], **changes}])
        assert get(name, tmp_path).examples(get(name, tmp_path).split)[0]["answer"] == []
    with pytest.raises(ConfigError, match="published without answers"):
        get("cb", tmp_path).evaluate("validation", [[1, 2, 3]])


# ------ Scores


def obvious(pairs):
    """A likelihood that knows no text: shorter targets, and those with more `e`, are likelier."""
    return [(-len(b) + 3 * b.count("e") - 0.01 * len(a), len(b)) for a, b in pairs]


def measured(task, score=obvious, indices=None):
    examples = task.examples(task.split)
    numbers = range(len(examples)) if indices is None else indices
    pairs = [(examples[i], task.requests(examples[i])) for i in numbers]
    return task.evaluate(task.split, [task.choice_scores(x, score(r)) for x, r in pairs], indices)


@pytest.mark.parametrize("scoring", ["sum", "mean", "unconditional"])
def test_choices_are_compared_as_asked(scoring, tmp_path):
    record, _ = CASES["openbookqa"]
    texts = ["elm tree", "o", "three seeds", "a"]
    question = {"stem": "Grow", **{f"choice_{x}": text for x, text in zip("ABCD", texts)}}
    write(tmp_path, "openbookqa", [{**record, "question": question, "answerKey": x} for x in "ABCD"])
    task = get("openbookqa", tmp_path, scoring=scoring, split="test")
    like = lambda a, text: obvious([(a, f" {text}")])[0][0]
    expected = {
        "sum": [like("Grow", x) for x in texts],
        "mean": [like("Grow", x) / (len(x) + 1) for x in texts],
        "unconditional": [like("Grow", x) - like("Answer:", x) for x in texts],
    }[scoring]
    example = task.examples("test")[0]
    assert task.choice_scores(example, obvious(task.requests(example))) == pytest.approx(expected)
    assert measured(task) == {"accuracy": 25.0}
    best = expected.index(max(expected))
    assert measured(task, indices=[best]) == {"accuracy": 100.0}
    with pytest.raises(ValueError, match=r"has \d requests, but 1 scores"):
        task.choice_scores(example, [(0, 1)])


def test_what_follows_the_option_decides_a_winograd_schema(tmp_path):
    write(tmp_path, "winogrande", [CASES["winogrande"][0]])
    task = get("winogrande", tmp_path)
    score = lambda pairs: [(-1.0 - ("nuts" in context), 4) for context, _ in pairs]
    for scoring in SCORINGS:
        task = dataclasses.replace(task, scoring=scoring)
        assert measured(task, score) == {"accuracy": 100.0}
        assert task.requests(task.examples("validation")[0]) == [
            ("Joe eats fruits because fruits", " are sweet."),
            ("Joe eats fruits because nuts", " are sweet."),
        ]


def test_a_question_of_multirc_needs_all_its_answers_judged_rightly(tmp_path):
    rows = [{**CASES["multirc"][0], "label": label, "idx": {"paragraph": 0, "question": q, "answer": a}}
            for q, a, label in ((0, 0, 1), (1, 0, 0), (0, 1, 0), (1, 1, 1))]  # fmt: skip
    write(tmp_path, "multirc", rows)
    task = get("multirc", tmp_path)
    judged = [[0, 1], [1, 0], [0, 1], [0, 1]]  # true, false, true, true
    assert task.evaluate("validation", judged) == {
        "accuracy": 50.0, "answer_accuracy": 75.0, "f1a": pytest.approx(100 * 2 * 2 / (3 + 2))}
    assert task.evaluate("validation", judged[3:], [3])["accuracy"] == 100.0
    assert "exact_match" in task.evaluate("validation", ["- [True] Ann"] * 4)


def test_free_answers_count_up_to_the_end_of_their_line(tmp_path):
    for name, answer, expected in (
        ("natural_questions", " the reese!\nQ: Next?", {"em": 100.0, "f1": 100.0}),
        ("trivia_qa", "R Mutt", {"em": 100.0, "f1": 100.0}),
        ("squad_v2", "", {"em": 100.0, "f1": 0.0}),
        ("lambada", " step, and", {"accuracy": 100.0}),
        ("lambada", "", {"accuracy": 0.0}),
    ):
        write(tmp_path, name, [CASES[name][0]])
        task = get(name, tmp_path)
        assert task.evaluate(task.split, [answer]) == expected


def test_a_suite_reports_every_task_and_the_average(tmp_path):
    for name in ("boolq", "record", "multirc", "lambada", "web_questions"):
        write(tmp_path, name, [CASES[name][0]] * 2)
    suite = famx.data.get("gpt3_rank", members=["boolq", "record", "multirc"], data_dir=str(tmp_path))
    predictions = {"gpt3_boolq": [[0, 1], [1, 0]], "gpt3_record": [[0, 0, 1]] * 2,
                   "gpt3_multirc": [[1, 0]] * 2}  # fmt: skip
    found = suite.evaluate(predictions)
    assert found == {
        "gpt3_boolq/accuracy": 50.0, "gpt3_record/accuracy": 100.0, "gpt3_multirc/accuracy": 100.0,
        "gpt3_multirc/answer_accuracy": 100.0, "gpt3_multirc/f1a": 0.0, "average": pytest.approx(250 / 3),
    }  # fmt: skip
    first = suite.evaluate({name: rows[:1] for name, rows in predictions.items()},
                           {name: [0] for name in predictions})  # fmt: skip
    assert first["average"] == 100.0
    gen = famx.data.get("gpt3_gen", members=["lambada", "web_questions"], data_dir=str(tmp_path))
    found = gen.evaluate({"gpt3_lambada": ["no"] * 2, "gpt3_web_questions": ["Arts"] * 2})
    assert (found["gpt3_web_questions/em"], found["average"]) == (100.0, 50.0)


# ------ Bad input


def test_bad_input_gets_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="'gpt3_rank' has no task 'boolk'; the nearest name is 'boolq'"):
        famx.data.get("gpt3_rank", members=["boolk"])
    with pytest.raises(ConfigError, match="scoring must be one of 'sum', 'mean', 'uncond.*, not"):
        famx.data.get("gpt3_cb", scoring="average")
    with pytest.raises(ConfigError, match=r"gpt3/cb/validation.jsonl, which is not there. Published: "
                                          r"https://www.tensorflow.org/datasets/catalog/super_glue.*"
                                          r"tfds build super_glue/cb"):  # fmt: skip
        famx.data.get("gpt3_cb", data_dir=str(tmp_path)).examples("validation")
    write(tmp_path, "cb", [CASES["cb"][0]])
    suite = famx.data.get("gpt3_rank", data_dir=str(tmp_path), members=["cb"])
    with pytest.raises(ConfigError, match="'gpt3_rank' got no predictions of 'gpt3_cb'"):
        suite.evaluate({})


@pytest.mark.parametrize(("name", "changes", "sentence"), [
    ("cb", {"label": "maybe"}, "'maybe' is no label; it must be one of entailment, contradiction"),
    ("cb", {"label": 3}, "3 is no label; there are 3, numbered from 0"),
    ("winogrande", {"sentence": "No gap."}, "'No gap.' has no gap _"),
    ("lambada", {"passage": "word\n"}, "'word' has fewer than two words"),
])  # fmt: skip
def test_records_that_are_not_as_published_get_a_sentence(name, changes, sentence, tmp_path):
    write(tmp_path, name, [{**CASES[name][0], **changes}])
    with pytest.raises(ValueError, match=sentence):
        get(name, tmp_path).examples(get(name, tmp_path).split)[0]


def test_a_missing_column_gets_a_sentence(tmp_path):
    write(tmp_path, "cb", [{"premise": "a", "label": 0}])
    with pytest.raises(ValueError, match="has no column 'hypothesis'; its columns are premise, label"):
        get("cb", tmp_path).examples("validation")
