"""The documentation pages, README.md and docs/*.md, and the code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from commands import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
}
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n)?(?P<indent> *)```(?P<kind>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced code block. line: its first line of code, from 1. section: its "## " heading. why: the reason not to run
    it, or None."""

    page: str
    line: int
    section: str
    kind: str
    code: str
    why: str | None

    def run(self, names: dict[str, Any]) -> None:
        """Executes the block with these names and adds the names it defines. Tracebacks show the page and its lines."""
        exec(compile("\n" * (self.line - 1) + self.code, str(ROOT / self.page), "exec"), names)


def blocks(page: str) -> list[Block]:
    text = PAGES[page]
    found = []
    for match in BLOCK.finditer(text):
        before = text[: match.start("code")]
        headings = re.findall(r"^## (.*)$", before, re.M)
        section = headings[-1] if headings else ""
        found.append(Block(page, before.count("\n") + 1, section, match["kind"], match["code"], match["why"]))
    return found


def examples(page: str) -> list[Block]:
    """The Python blocks of a page, without those marked as not run."""
    return [block for block in blocks(page) if block.kind in ("python", "py") and block.why is None]
