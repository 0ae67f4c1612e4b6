"""The documentation site: docstrings describe every argument, every public name is in the reference, pages render."""

from __future__ import annotations

import html
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT

import fused_optim

# test_every_public_name_is_in_the_reference fails for a public name that the reference does not have.
pytestmark = pytest.mark.slow
MODULES = [
    "fused_optim",
    *(f"fused_optim.{name}" for name in ("clip", "schedules", "decay", "groups", "lr_finder", "convert")),
    "fused_optim.integrations",
]
REFERENCE = {path.stem: path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")}
DOCUMENTED = re.findall(r"^::: (\S+)$", "\n".join(REFERENCE.values()), re.M)


def public(module: Any) -> dict[str, Any]:
    """The public functions and classes of a module by name: its own, and those re-exported from lower rooms."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    found = {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("fused_optim")
    }


def look_up(name: str) -> Any:
    module, _, key = name.rpartition(".")
    return getattr(importlib.import_module(module), key)


SHOWN = {name: look_up(name) for name in DOCUMENTED}
BY_NAME = {full.rpartition(".")[2]: value for full, value in SHOWN.items()}


def texts(value: Any, seen: set[str]) -> Iterator[str]:
    """The docstring, and the docstrings that it refers to ("as FusedAdam's", "see FusedOptimizer")."""
    text = inspect.cleandoc(value.__doc__ or "")
    yield text
    for name in re.findall(r"\b(?:as|see) (?:fused_optim\.)?(?:\w+\.)?(\w+)", text):
        if name in BY_NAME and name not in seen:
            seen.add(name)
            yield from texts(BY_NAME[name], seen)


def arguments(value: Any) -> list[str]:
    """Names of the arguments. Not **options, which belong to a class named in the text."""
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [name for name, parameter in inspect.signature(value).parameters.items() if parameter.kind not in kinds]


@pytest.mark.parametrize("name", SHOWN)
def test_docstrings_name_their_arguments(name: str) -> None:
    value = SHOWN[name]
    assert value.__doc__, "no docstring"
    said = "\n".join([str(sys.modules[value.__module__].__doc__), *texts(value, {name})])
    assert not [argument for argument in arguments(value) if not re.search(rf"\b{argument}\b", said)]


@pytest.mark.parametrize("name", [name for name, value in SHOWN.items() if inspect.isclass(value)])
def test_methods_have_docstrings(name: str) -> None:
    """Each method has a docstring, or overrides a method that has one."""
    methods = [
        key for key, value in vars(SHOWN[name]).items() if inspect.isroutine(value) or isinstance(value, property)
    ]
    assert not [key for key in methods if not key.startswith("_") and not inspect.getdoc(getattr(SHOWN[name], key))]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    """With its shortest path."""
    found = public(importlib.import_module(name))
    assert found
    top = {key for key in fused_optim.__all__ if hasattr(fused_optim, key)}
    assert not {f"{name}.{key}" for key in found if name == "fused_optim" or key not in top} - set(DOCUMENTED)


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The HTML of every page, built with the command of `make docs`: warnings, such as broken links, are errors."""
    out = tmp_path_factory.mktemp("site")
    recipe = re.search(
        r"^\tNO_MKDOCS_2_WARNING=1 \$\(PY\) (-m mkdocs build .*)$", (ROOT / "Makefile").read_text(), re.M
    )
    assert recipe, "the recipe of `make docs` is not in the Makefile"
    command = [sys.executable, *recipe[1].split(), "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.relative_to(out).as_posix(): path.read_text() for path in sorted(out.rglob("*.html"))}


def test_every_page_is_in_the_site(site: dict[str, str]) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert pages | {"index.html", "CHANGELOG.html"} <= set(site)


def test_the_reference_holds_what_its_pages_name(site: dict[str, str]) -> None:
    page = "\n".join(site[f"reference/{stem}.html"] for stem in REFERENCE)
    assert not [name for name in DOCUMENTED if f'id="{name}"' not in page]


def test_markup_is_rendered(site: dict[str, str]) -> None:
    """No source of headings, lists or formulas is left in a page."""
    for name, page in site.items():
        text = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", page, flags=re.S)
        assert not re.findall(r":math:|\.\. math|:(?:class|func|ref):|\b(?:Args|Raises|Returns):\n", text), name
        # If an item's second line is not indented, it becomes a separate item that starts in lower case.
        assert not re.findall(r"<li>(?:<p>)?[a-z].*", text) or not name.startswith("reference/"), name
        assert not re.findall(r'class="arithmatex"|\$\$', text), name


def test_formulas_are_mathml(site: dict[str, str]) -> None:
    formulas = re.findall(r"<math.*?</math>", site["reference/optimizers.html"], re.S)
    assert len([formula for formula in formulas if 'display="block"' in formula]) >= 6
    assert any("<mfrac>" in formula and "<msqrt>" in formula for formula in formulas)
    # The converter leaves unknown commands in place, with their backslash.
    assert not [formula for formula in formulas if "\\" in html.unescape(formula)]


def test_the_site_needs_no_network(site: dict[str, str]) -> None:
    loaded = r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"https?://[^\"]*"
    assert not [found for page in site.values() for found in re.findall(loaded, page)]


def test_the_picture_is_in_the_site(site: dict[str, str]) -> None:
    page = site["how-a-step-works.html"]
    source = re.search(r'<img[^>]*src="([^"]+\.svg)"', page)
    assert source and Path(ROOT, "docs", source[1]).exists()
