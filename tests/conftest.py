"""Markers. `make quick` leaves out the tests marked slow, distributed, trainers or codegen. The runs that repeat tests
for one more backend (see the Makefile) take the tests marked backend."""

from __future__ import annotations

from typing import Any

import pytest
from cases import AMSGRAD, INTERPRETED, LAMB, SLOW, Case, Target
from interpreter import patch_languages_once

from fused_optim.optim import plans

MARKERS = {
    "slow": "takes seconds: builds a package, starts processes, trains, or goes over many examples",
    "distributed": "starts several processes that work together",
    "trainers": "needs a trainer or a library of models: transformers, Lightning, timm, torchvision",
    "codegen": "compiles kernels, and reads the code or runs it without torch",
    "backend": "depends on the backend: given to every test that takes a target",
    "host": "its subject is host code, the same for every rule: in interpreters one case is enough",
    "shared": "its subject is code that all rules share: one case for each kind of rule is enough on every backend",
    "arithmetic": "its subject is the arithmetic of the rules: every rule on every backend",
    "once": "takes a target, but is not repeated for one more backend",
    "compiled": "of the tests that depend on the backend, those that `make test` runs on the compiled GPU kernels",
}


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:
        patch_languages_once()
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
    dropped = {*needless, *repetitions(items)}
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]


def of_rules(item: pytest.Item) -> bool:
    """Whether the test is about the arithmetic of the rules. Other tests are about code that all rules share."""
    return any(item.get_closest_marker(name) for name in ("compiled", "arithmetic"))


def repetitions(items: list[pytest.Item]) -> list[pytest.Item]:
    """Tests that run the same code as another test with other numbers.

    The emulated CUDA kernels compute with the sources of "cpp" (csrc/prep.h, csrc/rules/), and the PTX interpreter is
    slow: tests of the rules take one case for each kernel. Plain PyTorch has its own arithmetic and takes all cases.
    Other tests take one case for each kind of rule. "cpp" takes all cases, except in tests marked `shared`.
    """
    groups: dict[Any, list[pytest.Item]] = {}
    for item in items:
        found = dict(arguments(item))
        target, case = found.pop("target", None), found.pop("case", None)
        if not isinstance(case, Case):
            continue
        if item.get_closest_marker("shared") is None:
            if not isinstance(target, Target) or target.backend in ("cpp", "triton") or target.device != "cpu":
                continue
            if of_rules(item) and target.backend == "reference":
                continue
        code = case.kernel if of_rules(item) else case.kind
        others = tuple((name, repr(value)) for name, value in found.items())
        groups.setdefault((function(item), target, code, others), []).append(item)
    repeated = []
    for same in groups.values():
        kept = next((item for item in same if arguments(item)["case"].typical), same[0])
        repeated += [item for item in same if item is not kept]
    return repeated


def arguments(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def is_needless(item: pytest.Item) -> bool:
    """Whether the test can be dropped: on a slow backend a test whose subject is not the arithmetic of the rules, with
    another case than AMSGRAD and LAMB. AMSGRAD has every state, and LAMB has both walks. Tests of host code need
    AMSGRAD alone. The caller keeps the test if its function has no case AMSGRAD."""
    found = arguments(item)
    target, case = found.get("target"), found.get("case", AMSGRAD)
    if not (isinstance(target, Target) and target.backend in SLOW):
        return False
    if item.get_closest_marker("host") is not None:
        return case is not AMSGRAD
    return not of_rules(item) and case not in (AMSGRAD, LAMB)
