"""Markers. `make quick` leaves out the tests that are slow, distributed, trainers or codegen. The runs that repeat
tests for one more backend (see the Makefile) take those that are marked backend."""

from __future__ import annotations

import pytest
from cases import Target

MARKERS = {
    "slow": "takes seconds: builds a package, starts processes, trains, or goes over many examples",
    "distributed": "starts several processes that work together",
    "trainers": "needs a trainer or a library of models: transformers, Lightning, timm, torchvision",
    "codegen": "compiles kernels, and reads the code or runs it without torch",
    "backend": "depends on the backend: given to every test that takes a target",
    "once": "takes a target, but is not repeated for one more backend",
    "compiled": "of the tests that depend on the backend, those that `make test` runs on the compiled GPU kernels",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        arguments = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if isinstance(arguments.get("target"), Target) and item.get_closest_marker("once") is None:
            item.add_marker("backend")
