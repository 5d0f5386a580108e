"""The pages of the documentation, as they stand in the repository: their links, anchors and code blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for path in [*(REPOSITORY / "docs").rglob("*.md"), *REPOSITORY.glob("*.md")]
    if path.parent.name != "tables"  # a comparison's tables, which its README shows
)
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def source(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The page's fenced blocks, without their indent."""
    text = source(page)
    found = []
    for match in _BLOCK.finditer(text):
        lines = [line.removeprefix(match["indent"]) for line in match["text"].splitlines(keepends=True)]
        found.append(Block(page, text[: match.start()].count("\n") + 1, match["language"], "".join(lines)))
    return found


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return _BLOCK.sub("", source(page))


def links(text: str) -> list[str]:
    """Targets of the links and pictures that stay in the repository."""
    return [target for target in _LINK.findall(text) if not re.match(r"[a-z]+:", target)]


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to headings, and that mkdocstrings gives to the names it documents."""
    text = prose(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
