"""Markers. `make quick` leaves out the tests marked slow, distributed, trainers or codegen. The runs that repeat tests
for one more backend (see the Makefile) take the tests marked backend."""

from __future__ import annotations

from typing import Any

import pytest
from cases import AMSGRAD, SLOW, Target

from fused_optim.optim import plans

MARKERS = {
    "slow": "takes seconds: builds a package, starts processes, trains, or goes over many examples",
    "distributed": "starts several processes that work together",
    "trainers": "needs a trainer or a library of models: transformers, Lightning, timm, torchvision",
    "codegen": "compiles kernels, and reads the code or runs it without torch",
    "backend": "depends on the backend: given to every test that takes a target",
    "host": "its subject is host code, the same for every rule: in interpreters one case is enough",
    "once": "takes a target, but is not repeated for one more backend",
    "compiled": "of the tests that depend on the backend, those that `make test` runs on the compiled GPU kernels",
}


def pytest_configure(config: pytest.Config) -> None:
    plans.told.add(plans.SLOW_AVERAGES)  # it would be given in whichever test comes first
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


@pytest.hookimpl(tryfirst=True)  # pytest's -m must see the markers that this adds
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(arguments(item).get("target"), Target) and item.get_closest_marker("once") is None:
            item.add_marker("backend")
    with_amsgrad = {function(item) for item in items if arguments(item).get("case") is AMSGRAD}
    needless = [item for item in items if is_needless(item) and function(item) in with_amsgrad]
    config.hook.pytest_deselected(items=needless)
    dropped = set(needless)
    items[:] = [item for item in items if item not in dropped]


def arguments(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def is_needless(item: pytest.Item) -> bool:
    """Whether the test can be dropped: a test of host code, on a slow backend, with another case than AMSGRAD. AMSGRAD
    has every state, so it is enough. The caller keeps the test if its function has no case AMSGRAD."""
    found = arguments(item)
    target, case = found.get("target"), found.get("case", AMSGRAD)
    slow = isinstance(target, Target) and target.backend in SLOW
    return slow and case is not AMSGRAD and item.get_closest_marker("host") is not None
