"""The looks at the tensors before each step: every one that there is here, to be tested one after the other."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fused_optim.engine import changes, modules

LOOKS = ("aten", "dlpack", "python")


def class_of(look: str) -> Any:
    """The class ChangeDetector of that look, or why there is none."""
    if look == "python":
        return changes.ChangeDetector
    module = modules.load("_poll_aten" if look == "aten" else "_poll")
    return module.ChangeDetector if isinstance(module, ModuleType) else module


def only(look: str) -> Any:
    """What modules.poll() answers where there is no other look."""
    return (
        "the compiled looks are hidden from this test"
        if look == "python"
        else SimpleNamespace(ChangeDetector=class_of(look))
    )


def choose(monkeypatch: pytest.MonkeyPatch, look: str) -> None:
    """Has optimizers look by it until the test ends."""
    if isinstance(reason := class_of(look), str):
        pytest.skip(reason)
    monkeypatch.setattr(modules, "poll", lambda: only(look))
