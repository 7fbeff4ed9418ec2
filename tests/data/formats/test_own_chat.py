"""Conversations: the loss is on what the assistant writes, in the words of the chat template."""

import datetime
import json
import subprocess
import sys
import textwrap

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, make_params, make_run
from trained import write_model_dir

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from chat_templates import CHATML, TEMPLATES, make_vocabulary, whole_text  # noqa: E402

import famx.data  # noqa: E402
from famx.base import gin_utils  # noqa: E402
from famx.base.errors import ConfigError  # noqa: E402
from famx.data import ContinuousLanes, PackedRows  # noqa: E402
from famx.data.formats.own_chat import __doc__ as DOC  # noqa: E402
from famx.data.vocabularies.chat_template import ChatTemplate  # noqa: E402
from famx.evaluation import TextTaskEvaluation  # noqa: E402
from famx.training import loop  # noqa: E402

TOOLS = (  # as Qwen 2.5: descriptions in the system turn, calls as JSON, answers of tools in a user turn
    "{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'tool' %}"
    "{%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{%- endif %}"
    "{{ '\n[INST]' + message.content + '[/INST]' }}"
    "{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}{{ '[INST]' + call | tojson + '[/INST]' }}{%- endfor %}"
    "{{ '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
PLAIN = (  # no token ends a turn
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TAGGED = (  # rewrites earlier turns, but says which text is the assistant's; the end stands after the tag
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% if loop.last %}{{ '<think>\n' }}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
TEXT = st.text(max_size=20) | st.text(" ab\n<>|", max_size=12) | st.sampled_from(["<|im_end|>", "</s>"])


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[k % 2], "content": text} for k, text in enumerate(contents)]


@pytest.fixture
def vocabulary_of(tmp_path):
    return lambda template: make_vocabulary(tmp_path / str(abs(hash(template))), template)


def shown(vocabulary, ids, weights):
    """The text of the ids, with what has a loss in «»."""
    assert ids.dtype == np.int32 and weights.dtype == np.float32 and set(weights) <= {0, 1}
    cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(ids)]
    parts = [(whole_text(vocabulary, ids[a:b].tolist()), weights[a]) for a, b in zip(cuts, cuts[1:])]
    return "".join(f"«{text}»" if weight else text for text, weight in parts)


@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                 "<|im_start|>assistant\n«Good day.<|im_end|>»\n<|im_start|>user\nWhy?<|im_end|>\n"
                 "<|im_start|>assistant\n«So.<|im_end|>»\n"),
        (TEMPLATES["trimmed"], "<s><|im_start|>user\n\nHi<|im_end|><|im_start|>assistant\n\n"
                               "«Good day.<|im_end|>»<|im_start|>user\n\nWhy?<|im_end|>"
                               "<|im_start|>assistant\n\n«So.<|im_end|>»"),
        (TEMPLATES["inst"], "<s>[INST] Hi [/INST]« Good day. </s>»[INST] Why? [/INST]« So. </s>»"),
        (PLAIN, "user: Hi\nassistant: «Good day.\n»user: Why?\nassistant: «So.\n»"),
        (TAGGED, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Good day.<|im_end|>»\n"
                 "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n«So.<|im_end|>»\n"),
    ],
    ids=["chatml", "trimmed", "inst", "plain", "tagged"],
)  # fmt: skip
def test_the_assistant_alone_has_a_loss(vocabulary_of, template, expected):
    vocabulary = vocabulary_of(template)
    ids, weights = ChatTemplate(vocabulary).conversation(turns("Hi", "Good day.", "Why?", "So."))
    assert shown(vocabulary, ids, weights) == expected


def test_system_and_tool_turns_and_calls(vocabulary_of):
    vocabulary = vocabulary_of(TOOLS)
    call = {"name": "add", "arguments": {"x": 1, "y": None}}
    messages = [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "It is 2.", "tool_calls": None},
    ]
    ids, weights = ChatTemplate(vocabulary).conversation(messages, [{"name": "add"}])
    assert shown(vocabulary, ids, weights) == (
        '<|im_start|>system\n{"name": "add"}<|im_end|>\n<|im_start|>system\nBe exact.<|im_end|>\n'
        "<|im_start|>user\n1 + 1?<|im_end|>\n"
        '<|im_start|>assistant\n«[INST]{"name": "add", "arguments": {"x": 1}}[/INST]<|im_end|>»\n'
        "<|im_start|>user\n[INST]2[/INST]\n[INST]two[/INST]<|im_end|>\n"
        "<|im_start|>assistant\n«It is 2.<|im_end|>»\n"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_are_those_that_a_conversation_reads_and_writes(vocabulary_of, name):
    vocabulary = vocabulary_of(TEMPLATES[name])
    template = ChatTemplate(vocabulary)
    space = " " if name == "inst" else ""
    special = set(vocabulary.special_tokens.values())

    @settings(max_examples=60, deadline=None)
    @given(TEXT, TEXT, TEXT)
    def check(question, answer, more):
        said = answer.strip() if name == "trimmed" else answer
        plain = lambda text: [i for part in template._break(text).split("\ufdd0")
                              for i in vocabulary.encode(part)]  # fmt: skip
        written = [*plain(space + said + space), template.end_of_turn]
        ids, weights = template.conversation(turns(question, answer, more, "x"))
        start = template.first(question)
        after = template.next(more, True)
        assert ids.tolist()[: len(start) + len(written) + len(after)] == [*start, *written, *after]
        expected = [0] * len(start) + [1] * len(written) + [0] * len(after)
        assert weights.tolist()[: len(expected)] == expected
        assert [i for i in ids.tolist() if i in special] == [
            i for i in template.conversation(turns("a", "b", "c", "d"))[0].tolist() if i in special
        ], "no message spells a special token"

    check()


def test_the_tags_mark_what_they_mark_for_transformers(vocabulary_of, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = vocabulary_of(TEMPLATES["inst"])
    (tmp_path / "tokenizer.json").write_bytes(vocabulary.content)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    messages = turns("Hi 🙂", "Good day.", "Why?", "So.")
    found = theirs.apply_chat_template(
        messages, chat_template=vocabulary.chat_template, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    ids, weights = ChatTemplate(vocabulary).conversation(messages)
    assert ids.tolist() == found["input_ids"]
    assert weights.tolist() == found["assistant_masks"]


def test_a_conversation_is_the_same_on_every_day(vocabulary_of):
    template = ChatTemplate(vocabulary_of("{{ strftime_now('%Y-%m-%d ') }}" + PLAIN))
    ids, weights = template.conversation(turns("Hi", "Ho"))
    expected = "2024-07-26 user: Hi\nassistant: «Ho\n»"
    assert shown(template._vocabulary, ids, weights) == expected
    today = f"{datetime.datetime.now():%Y-}"
    assert whole_text(template._vocabulary, template.first("Hi")).startswith(today)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("assistant\n'", "assistant\n<think>\n'"),  # a prompt that no answer has
        PLAIN.replace("m.content", "(m.content if loop.last else m.content.upper())"),
    ],
)
def test_a_template_that_cannot_mark_answers_is_refused(vocabulary_of, template):
    template = ChatTemplate(vocabulary_of(template))
    with pytest.raises(ConfigError, match="not tell which tokens the assistant writes in message 1: "):
        template.conversation(turns("Hi", "Good day.", "Why?", "So."))


# ------------------------------------------------------------------- the task


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversations(count=9):
    rng = np.random.default_rng(0)
    word = lambda: "".join(chr(97 + x) for x in rng.integers(0, 26, rng.integers(1, 30)))
    rows = [{"messages": turns(*(word() for _ in range(2 * rng.integers(1, 4)))), "n": i}
            for i in range(count)]  # fmt: skip
    rows[2]["messages"][0]["name"] = "Ann"
    rows[3]["tools"] = [{"name": "add"}]
    return rows


def test_rows_of_all_lengths_stream_the_conversations(vocabulary_of, tmp_path):
    """Continuous lanes: a conversation continues in the next row, and no row holds two."""
    vocabulary = vocabulary_of(TEMPLATES["trimmed"])
    rows = conversations()
    task = famx.data.get(
        "own_chat", files=write(tmp_path / "a.jsonl", rows), vocabulary=vocabulary,
        validation_files=str(tmp_path / "a.jsonl"),
    )  # fmt: skip
    template = ChatTemplate(vocabulary)
    for i, row in enumerate(rows):
        ids, weights = template.conversation(row["messages"])
        assert ids[0] == vocabulary.bos_id
        np.testing.assert_array_equal(task[i][0], ids[1:])  # rows begin with bos
        np.testing.assert_array_equal(task[i][1], weights[1:])
    lanes = ContinuousLanes(task, 2, 16, 0, bos_id=vocabulary.bos_id, pad_id=vocabulary.pad_id)
    whole = {tuple(task[i][0].tolist()): task[i][1].tolist() for i in range(len(task))}
    assert max(len(ids) for ids in whole) > 3 * 16
    reading, finished = {}, {}
    for _ in range(90):
        batch = next(lanes)
        for k in range(2):
            if batch["reset"][k]:
                reading[k] = ([], [])
            n = int((batch["decoder_target_tokens"][k] != vocabulary.pad_id).sum())
            reading[k][0].extend(batch["decoder_target_tokens"][k, :n].tolist())
            reading[k][1].extend(batch["decoder_loss_weights"][k, :n].tolist())
            if tuple(reading[k][0]) in whole:
                finished[tuple(reading[k][0])] = reading[k][1]
    assert finished == whole
    packed = next(PackedRows(task, 2, 64, 0))
    assert 0 < packed["decoder_loss_weights"].mean() < 1


def test_tables_are_the_same_conversations_as_json_lines(vocabulary_of, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    vocabulary, rows = vocabulary_of(TOOLS), conversations()
    plain = famx.data.get("own_chat", files=write(tmp_path / "a.jsonl", rows), vocabulary=vocabulary)
    table = arrow.Table.from_pylist([{"tools": None, **row} for row in rows])
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    text = [{**row, "messages": json.dumps(row["messages"])} for row in rows]
    write(tmp_path / "b.jsonl", text)
    for name in ("a.parquet", "b.jsonl"):
        task = famx.data.get("own_chat", files=str(tmp_path / name), vocabulary=vocabulary)
        for split in ("train", "validation"):
            ours, theirs = task.documents(split), plain.documents(split)
            assert len(ours) == len(theirs)
            for i in range(len(ours)):
                for a, b in zip(ours[i], theirs[i]):
                    np.testing.assert_array_equal(a, b)
    path = str(tmp_path / "a.jsonl")
    short = famx.data.get("own_chat", files=path, vocabulary=vocabulary, max_tokens=9)
    assert all(len(short[i][0]) == len(short[i][1]) == 9 for i in range(len(short)))


@pytest.mark.slow
def test_scores_are_those_of_the_assistants_tokens(vocabulary_of, tmp_path):
    vocabulary = vocabulary_of(TEMPLATES["trimmed"])
    path = write(tmp_path / "a.jsonl", conversations(5))
    model = make_model(vocab_size=270, vocabulary=vocabulary)
    params = make_params(model.module)
    options = {"files": path, "validation_files": path}
    scores = TextTaskEvaluation("own_chat", options, batch_size=2, health=False)(model, params, 0)
    nats = count = right = 0
    task = famx.data.get("own_chat", vocabulary=vocabulary, **options)
    for i in range(len(task)):
        lanes = ContinuousLanes(task, 1, 256, bos_id=vocabulary.bos_id, pad_id=vocabulary.pad_id)
        lanes._order = (0, np.roll(np.arange(len(task)), -i))
        batch = next(lanes)
        assert batch["decoder_loss_weights"].sum() == task[i][1].sum()
        _, metrics, _ = model.loss(params, batch, None, model.initial_state(params, 1))
        nats += float(metrics["loss"].total)
        count += float(metrics["loss"].count)
        right += float(metrics["accuracy"].total)
    assert count == sum(task[i][1].sum() for i in range(len(task)))
    assert scores["bits_per_token"] == pytest.approx(nats / count / np.log(2), rel=1e-4)
    assert scores["next_token_accuracy"] == pytest.approx(100 * right / count)
    answers = [m["content"] for row in conversations(5) for m in row["messages"][1::2]]
    written = "".join(answer + "<|im_end|>" for answer in answers)
    expected = scores["bits_per_token"] * count / len(written)
    assert scores["bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def test_a_run_learns_what_the_assistant_says(vocabulary_of, tmp_path):
    """Two answers to the same words: the loss falls to their entropy, whatever the user says."""
    vocabulary = vocabulary_of(TEMPLATES["trimmed"])
    rng = np.random.default_rng(0)
    noise = lambda: "".join(chr(97 + x) for x in rng.integers(0, 26, 20))
    path = write(tmp_path / "a.jsonl", [{"messages": turns(noise(), "yes")} for _ in range(40)])
    from famx.training.run_log import read_metrics

    loop.train(make_run(
        model_dir=str(tmp_path / "run"), model=make_model(vocab_size=270, vocabulary=vocabulary),
        task="own_chat", lengths={"targets": 48}, options={"files": path, "vocabulary": vocabulary},
        steps=40, optimizer=optax.adam(0.02), packed=False,
    ))  # fmt: skip
    losses = [line["loss"] for line in read_metrics(str(tmp_path / "run")) if "loss" in line]
    assert losses[-1] < 0.3, "four tokens to learn; the user's letters would cost 3.2 nats each"


def test_bad_conversations_get_a_sentence(vocabulary_of, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": turns("Hi", "Ho")}] * 30)
    get = lambda **options: famx.data.get("own_chat", **{"files": path, **options})
    with pytest.raises(ConfigError, match="by a chat template, and the vocabulary has none: give the"):
        get()[0]
    with pytest.raises(ValueError, match="no column 'conversations' of messages; their columns are mess"):
        get(messages="conversations")
    vocabulary = vocabulary_of(CHATML)

    def first(*rows, **options):
        held = write(tmp_path / "b.jsonl", [{"messages": turns("Hi", "Ho")}, *rows])
        return get(files=held, validation_files=path, vocabulary=vocabulary, **options)[1]

    for row, sentence in [
        ({"messages": [{"from": "gpt", "value": "x"}]}, "Line 2 of .*b.jsonl: Message 0 .* has no role:"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has a part that is not text"),
        ({"messages": [{"role": "user", "content": 3}]}, "has the content '3', which is not text"),
        ({"messages": "no"}, "Column 'messages' contains 'no', which is not a list"),
        ({"text": "x"}, "The records have no column 'messages' of messages; their columns are text."),
    ]:
        with pytest.raises(ValueError, match=sentence):
            first(row)
    path = write(tmp_path / "c.jsonl", [{"messages": [{"role": "human"}, {"role": "gpt"}]}])
    with pytest.raises(ValueError, match="no turn of the role 'assistant', .* roles are human, gpt."):
        get(files=path)


@pytest.mark.slow
def test_the_gin_lines_of_the_docstring_train(vocabulary_of, tmp_path):
    """The vocabulary, and with it the chat template, is that of the checkpoint."""
    vocabulary = vocabulary_of(CHATML)
    model = make_model(vocab_size=270, vocabulary=vocabulary)
    base = write_model_dir(tmp_path / "base", model, make_params(model.module), vocabulary)
    write(tmp_path / "a.jsonl", conversations(30))
    lines = [line for line in DOC.splitlines() if line.startswith("    ")]
    text = textwrap.dedent("\n".join(lines)).replace("/data/chats/*.jsonl", str(tmp_path / "a.jsonl"))
    sizes = dict(vocab_size=270, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, block_size=8,
                 memory_segments=1)  # fmt: skip
    imports = "\nfrom famx import modules\nfrom famx.memories import fam\n"
    text = text.replace("import dynamic_registration\n", f"import dynamic_registration{imports}")
    text = text.replace('finetune.gin"', 'finetune.gin"\ninclude "gin_configs/models/tiny.gin"')
    text += "".join(f"\nmodules.DecoderConfig.{name} = {value}" for name, value in sizes.items())
    (tmp_path / "own.gin").write_text(f"{text}\nfam.Fam.length = 2\n".replace("4096", "32"))
    args = [f"MODEL_DIR='{tmp_path}/model'", "BATCH_SIZE=2", "TRAIN_STEPS=2",
            f"INITIAL_CHECKPOINT_PATH='{base}'", "TRAINABLE='all'"]  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-m", "famx.train", f"--gin_file={tmp_path}/own.gin",
         *(f"--gin.{arg}" for arg in args)],
        cwd=gin_utils.gin_root(), text=True, capture_output=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "model" / "checkpoint_2").is_dir() and len(lines) == 6
