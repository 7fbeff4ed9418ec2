"""Hostile chat templates: bounded in time, memory and output, and nothing of Python is within reach."""

import pickle
import threading
import time

import pytest
from fuzzing import ends_well, fuzz
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from chat_templates import CHATML, TEMPLATES, make_vocabulary  # noqa: E402

from famx.base.errors import ConfigError  # noqa: E402
from famx.data.vocabularies import template_renderer  # noqa: E402
from famx.data.vocabularies.chat_template import ChatTemplate  # noqa: E402
from famx.data.vocabularies.template_renderer import Renderer, renderer  # noqa: E402

MESSAGES = [{"role": "user", "content": "Hi"}]
# What took all the time or memory that there was in Jinja's sandbox alone.
BOMBS = [
    "{{ 'x' * 10**10 }}",
    "{% set x = 'x' * 10**9 %}{{ (x ~ x) | length }}",
    "{{ 10 ** 10 ** 9 }}",
    "{{ 'x' | center(10**10) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ [0] * 10**10 }}",
    "{{ (range(99999) | list) * 99999 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(9999) %}xxxxxxxxxxxx{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ 'x' | indent(10**10) }}",
    "{{ ('x ' * 10**6) | wordwrap(1) | wordcount * 'x' * 10**6 }}",
    "{{ strftime_now('%999999999Y') }}",
    "{{ lipsum(n=9999, min=9999, max=99999) }}",
    "{{ ('(' * 10**7) | tojson | tojson | tojson | length * 'xxxxxxxxxx' }}",
]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.__class__.__base__ }}",
    "{{ ('%s' | attr('format'))(messages) | attr('__class__') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ joiner.__init__.__builtins__ }}",
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("source", BOMBS)
def test_a_template_without_end_is_ended(source, monkeypatch):
    monkeypatch.setattr(template_renderer, "MOST_SECONDS", 1.0)
    start = time.monotonic()
    try:
        text = Renderer(source).render(MESSAGES, True, {})
        assert len(text) < template_renderer.MOST_CHARACTERS + 100_000
    except ConfigError as error:
        assert str(error).startswith(("The chat template rejects", "The chat template of the vocabulary"))
    assert time.monotonic() - start < template_renderer._MOST_WAITING


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_of_python_is_within_reach(source):
    try:
        text = Renderer(source).render(MESSAGES, True, {})
        assert "<class" not in text and "<module" not in text and "root:" not in text
    except ConfigError:
        pass


def test_a_process_goes_on_after_a_limit_was_exceeded(monkeypatch):
    monkeypatch.setattr(template_renderer, "MOST_SECONDS", 0.5)
    one = Renderer("{% if messages[0].content == 'x' %}{{ 'x' * 10**10 }}{% endif %}"
                   "{% for a in range(99999) if messages[0].content == 'y' %}"
                   "{% for b in range(99999) %}{% endfor %}{% endfor %}fine")  # fmt: skip
    for content in ("x", "y"):
        with pytest.raises(ConfigError, match="it (needs too much memory|takes more than)"):
            one.render([{"role": "user", "content": content}], True, {})
        assert one.render(MESSAGES, True, {}) == "fine"


def test_messages_of_a_template_cannot_write_to_the_terminal():
    with pytest.raises(ConfigError) as caught:
        Renderer("{{ raise_exception('\x1b[2Jforged' ~ 'x' * 10000) }}").render(MESSAGES, True, {})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_the_process_has_no_environment_and_ends_with_its_owner(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    one = Renderer("fine")
    process = one._process
    with open(f"/proc/{process.pid}/environ", "rb") as file:
        assert b"SECRET_TOKEN" not in file.read()
    del one
    assert process.poll() is not None


def test_a_renderer_is_shared_between_threads_and_can_be_pickled():
    one = renderer(CHATML)
    assert renderer(CHATML) is one
    wanted = {str(i): one.render([{"role": "user", "content": str(i)}], True, {}) for i in range(20)}
    found = {}

    assert pickle.loads(pickle.dumps(one)) is one

    def work(i):
        found[str(i)] = one.render([{"role": "user", "content": str(i)}], True, {})

    threads = [threading.Thread(target=work, args=(i,)) for i in range(20)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == wanted


def test_a_turn_is_rendered_quickly():
    one = renderer(CHATML)
    one.render(MESSAGES, True, {})
    start = time.process_time()
    for _ in range(100):
        one.render(MESSAGES, True, {})
    assert (time.process_time() - start) / 100 < 0.005, "seconds of this process for a turn"


PARTS = [
    "{{ ", " }}", "{% ", " %}", "for m in messages", "endfor", "m.content", "messages", "if ", "endif",
    "'x'", " * ", "10**9", "range(9)", "|tojson", "|length", "|join", "|list", "set x = ", "bos_token",
    "macro f(n)", "endmacro", "f(1)", "[0]", "['role']", "<|im_end|>", "\n", "raise_exception('x')",
    "loop.index", "namespace(a=1)", "generation", "endgeneration", "strftime_now('%Y')", "()", " ~ ", "x",
    ".__class__",
]  # fmt: skip
EDITS = st.lists(
    st.tuples(st.floats(0, 1, allow_nan=False), st.sampled_from([*PARTS, None])), min_size=1, max_size=4
)
SOURCES = st.lists(st.sampled_from(PARTS), max_size=14).map("".join) | st.builds(
    lambda source, edits: _edited(source, edits), st.sampled_from(sorted(TEMPLATES.values())), EDITS
)


def _edited(source, edits):
    for place, part in edits:
        at = int(place * len(source))
        source = source[:at] + (source[at + 7 :] if part is None else part + source[at:])
    return source


def test_templates(tmp_path, monkeypatch):
    monkeypatch.setattr(template_renderer, "MOST_SECONDS", 1.0)

    @fuzz
    @given(SOURCES)
    def check(source):
        vocabulary = make_vocabulary(tmp_path / "made", None)
        vocabulary.chat_template = source

        def talk():
            template = ChatTemplate(vocabulary)
            return template.first("Hi <|im_end|>"), template.next("Ho", True)

        ends_well(talk)

    check()
