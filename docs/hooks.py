"""What the site needs besides Markdown: pages from outside of docs/, their links, and formulas as MathML."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# A link from a page in docs/ to one of the repository's other files that are pages of the site, too.
OUTSIDE = re.compile(r"\]\(((?:\.\./)*)\.\./(bench/results/|CHANGELOG\.md|README\.md)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds README.md as the home page, the changelog, and the committed results of the benchmarks."""
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    results = (path for path in (ROOT / "bench" / "results").rglob("*") if path.suffix in (".md", ".png", ".svg"))
    for path in (ROOT / "CHANGELOG.md", *sorted(results)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The site's root is docs/, so links to files outside of it have one step up less."""
    return OUTSIDE.sub(r"](\1\2", markdown).replace("README.md)", "index.md)")


def on_page_content(content: str, **_: Any) -> str:
    r"""Replaces formulas, \(...\) and \[...\] in the HTML of a page, by MathML, which browsers render by themselves."""

    def mathml(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]).strip(), display="inline" if found[1] == "span" else "block")

    return FORMULA.sub(mathml, content)
