"""The code contains every error sentence that a page quotes."""

import ast
import contextlib
import functools
import re
import typing

import pytest
from configurables import configurables
from markdown_pages import ROOT

from famx.base.expectations import expectation
from famx.base.values import annotations

SOURCES = [*(ROOT / "famx").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
_LETTERS = 18  # that a template must have of its own, to count as a sentence


@functools.cache
def templates() -> tuple[re.Pattern, ...]:
    """Patterns of all strings in the sources that look like sentences; placeholders match anything."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            elif isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else None for v in node.values]
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
                continue
            else:
                continue
            own = "".join(filter(None, parts))
            if len(own) >= _LETTERS and " " in own:
                found.add("".join(".*" if part is None else re.escape(part) for part in parts))
    return tuple(re.compile(pattern, re.DOTALL) for pattern in sorted(found))


def known(sentence: str) -> bool:
    """Whether the code has the sentence: whole, after a prefix, or before a hint."""
    starts = [m.end() for m in re.finditer(r": ", sentence)]
    hint = re.sub(r" Did you mean \S+\?$", "", sentence)
    whole = {sentence, hint, *(sentence[start:] for start in starts)}
    if any(template.fullmatch(text) for template in templates() for text in whole):
        return True
    setting = re.fullmatch(r"\S+ must be (.+), not .+\.", hint)
    return setting is not None and setting[1] in expectations()


@functools.cache
def expectations() -> set[str]:
    """What the annotations of famx's settings expect, in words."""
    kinds = [kind for target in configurables().values() for kind in annotations(target).values()]
    found = set()
    while kinds:
        kind = kinds.pop()
        with contextlib.suppress(TypeError):
            found.add(expectation(kind))
            kinds += typing.get_type_hints(kind).values() if typing.is_typeddict(kind) else []
            kinds += [item for item in typing.get_args(kind) if not isinstance(item, list)]
    return found


def quoted() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    gin = (ROOT / "docs" / "gin.md").read_text().split("## Mistakes")[1]
    in_gin = re.findall(r"^\| `(.+?)` \| \w", gin, re.MULTILINE)
    return re.findall(r"^> (.+)$", page, re.MULTILINE) + in_gin


@pytest.mark.parametrize("sentence", quoted(), ids=lambda text: text[:40])
def test_the_code_says_so(sentence):
    assert known(sentence)


def test_enough_are_quoted():
    assert len(quoted()) >= 30


@pytest.mark.parametrize(
    "invented",
    [
        "MODEL_DIR must be a relative path, not runs/first: write it so.",
        "There is no checkpoint at all, and nobody knows why.",
        "embed_dim 100 is not a multiple of num_heads 3.",
    ],
)
def test_invented_sentences_are_not_known(invented):
    assert not known(invented)
