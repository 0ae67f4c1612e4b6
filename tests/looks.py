"""The change detectors: each implementation that is available here, so that tests can run with each of them."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fused_optim.engine import changes, modules

LOOKS = ("aten", "dlpack", "python")


def class_of(look: str) -> Any:
    """The ChangeDetector class of that implementation, or the reason why it is not available."""
    if look == "python":
        return changes.ChangeDetector
    module = modules.load("_poll_aten" if look == "aten" else "_poll")
    return module.ChangeDetector if isinstance(module, ModuleType) else module


def only(look: str) -> Any:
    """What modules.poll() returns if this is the only implementation."""
    return (
        "the compiled looks are hidden from this test"
        if look == "python"
        else SimpleNamespace(ChangeDetector=class_of(look))
    )


def choose(monkeypatch: pytest.MonkeyPatch, look: str) -> None:
    """Makes optimizers use this change detector until the test ends. Skips the test if it is not available."""
    if isinstance(reason := class_of(look), str):
        pytest.skip(reason)
    monkeypatch.setattr(modules, "poll", lambda: only(look))
