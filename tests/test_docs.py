"""The API reference: what it shows, that docstrings say what callers need, and that they render."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT

import fused_optim

MODULES = re.search(r"^API := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()  # type: ignore[index]


def public(module: Any) -> dict[str, Any]:
    """The functions and classes that a module shows, by name."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    found = {name: getattr(module, name) for name in names}
    return {name: value for name, value in found.items() if inspect.isclass(value) or inspect.isfunction(value)}


SHOWN = {f"{name}.{key}": value for name in MODULES for key, value in public(importlib.import_module(name)).items()}
BY_NAME = {full.rpartition(".")[2]: value for full, value in SHOWN.items()}


def texts(value: Any, seen: set[str]) -> Iterator[str]:
    """The docstring, and those that it refers to ("as FusedAdam's", "see FusedOptimizer")."""
    text = inspect.cleandoc(value.__doc__ or "")
    yield text
    for name in re.findall(r"\b(?:as|see) (?:fused_optim\.)?(?:\w+\.)?(\w+)", text):
        if name in BY_NAME and name not in seen:
            seen.add(name)
            yield from texts(BY_NAME[name], seen)


def arguments(value: Any) -> list[str]:
    """Names of what a call takes; not **options, which belong to a class named in the text."""
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
    """Their own, or that of the method they override."""
    methods = [
        key for key, value in vars(SHOWN[name]).items() if inspect.isroutine(value) or isinstance(value, property)
    ]
    assert not [key for key in methods if not key.startswith("_") and not inspect.getdoc(getattr(SHOWN[name], key))]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The HTML of every module, made as `make docs` makes it."""
    out = tmp_path_factory.mktemp("api")
    recipe = re.search(r"^\t\$\(PY\) (-m pdoc .*)$", (ROOT / "Makefile").read_text(), re.M)
    assert recipe, "the Makefile has no `make docs` any more"
    options = recipe[1].replace("$(API)", " ".join(MODULES)).replace("docs/api", str(out)).split()
    done = subprocess.run([sys.executable, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "warn" not in (done.stdout + done.stderr).lower(), done.stderr
    return {name: Path(out, *name.split(".")).with_suffix(".html").read_text() for name in MODULES}


def test_every_public_name_is_in_the_reference(pages: dict[str, str]) -> None:
    assert {f"fused_optim.{name}" for name in fused_optim.__all__} <= set(SHOWN)
    missing = [name for name in SHOWN if f'id="{name.rpartition(".")[2]}"' not in pages[name.rpartition(".")[0]]]
    assert not missing


@pytest.mark.parametrize("name", MODULES)
def test_the_reference_is_rendered(name: str, pages: dict[str, str]) -> None:
    """Headings, lists and formulas: none of their source is left in the page."""
    page = pages[name]
    assert not re.findall(r":math:|\.\. math|:(?:class|func|ref):|\bArgs:", page)
    # An item's second line that is not indented becomes an item of its own, which begins amid a sentence.
    assert not re.findall(r"<li>(?:<p>)?[a-z].*", page)
    formulas = re.findall(r"\\\((.*?)\\\)|\$\$(.*?)\$\$", page, re.S)
    assert not [formula for formula in formulas if re.search(r"[a-z]{2,}_[a-z]{2,}|<em>", "".join(formula))]


def test_formulas_are_in_the_reference(pages: dict[str, str]) -> None:
    assert r"\frac{m}{\sqrt{v}" in pages["fused_optim"]
    assert "MathJax" in pages["fused_optim"]
