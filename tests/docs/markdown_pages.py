"""The Markdown pages of the repository, their fenced blocks and links, without importing famx."""

import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted(
    path
    for folder in ("", "docs", "launch", "notebooks")
    for path in (ROOT / folder).glob("**/*.md" if folder == "docs" else "*.md")
)
_BLOCK = re.compile(
    r"^(?:<!-- (?P<marker>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      page: path of the page, from the top of the repository.
      line: of its first line of text, from 1.
      language: after the fence.
      marker: text of an HTML comment in the line before, or "".
      text: what it holds.
    """

    page: str
    line: int
    language: str
    marker: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(path: pathlib.Path, language: str | None = None) -> list[Block]:
    """Fenced blocks of a page, in order; of one language, if it is given."""
    page, name = path.read_text(), path.relative_to(ROOT).as_posix()
    found = [
        Block(name, page[: m.start("text")].count("\n") + 1, m["language"], m["marker"] or "", m["text"])
        for m in _BLOCK.finditer(page)
    ]
    return [block for block in found if language in (None, block.language)]


def prose(path: pathlib.Path) -> str:
    """A page without its fenced blocks."""
    return _BLOCK.sub("", path.read_text())


def anchors(path: pathlib.Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        again = 1
        while slug in found:  # a second heading of the same name
            slug, again = f"{slug.removesuffix(f'-{again - 1}')}-{again}", again + 1
        found.add(slug)
    return found


def links(path: pathlib.Path) -> list[str]:
    """Targets of a page's links and pictures, without links to other sites."""
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]
