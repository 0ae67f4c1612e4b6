"""Markers. `make quick` leaves out the tests marked slow, distributed, trainers or codegen. The runs that repeat tests
for one more backend (see the Makefile) take the tests marked backend."""

from __future__ import annotations

from typing import Any

import ptx.backends
import pytest
from cases import AMSGRAD, KERNELS, LAMB, SLOW, Case, Target

from fused_optim.optim import plans

MARKERS = {
    "slow": "takes seconds: builds a package, starts processes, trains, or goes over many examples",
    "distributed": "starts several processes that work together",
    "trainers": "needs a trainer or a library of models: transformers, Lightning, timm, torchvision",
    "codegen": "compiles kernels, and reads the code or runs it without torch",
    "backend": "depends on the backend: given to every test that takes a target",
    "host": "its subject is host code, the same for every rule: in interpreters one case is enough",
    "arithmetic": "its subject is the arithmetic of the rules: all rules on every backend, all cases on plain PyTorch",
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
    needless += repetitions(items)
    config.hook.pytest_deselected(items=needless)
    dropped = set(needless)
    items[:] = [item for item in items if item not in dropped]


def repetitions(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests that differ from another one only in the options of the case, on backends where one case for each
    kernel is enough. The emulated CUDA kernels compute with the sources of "cpp" (csrc/prep.h, csrc/rules.h), and the
    tests on "cpp" take all cases. The PTX interpreter is slow. Plain PyTorch has its own arithmetic, but only tests of
    the arithmetic depend on it."""
    by_code: dict[Any, list[pytest.Item]] = {}
    for item in items:
        found = dict(arguments(item))
        target, case = found.pop("target", None), found.pop("case", None)
        if not (isinstance(target, Target) and isinstance(case, Case)):
            continue
        plain = target.backend == "reference" and item.get_closest_marker("arithmetic") is None
        if plain or target == Target("cuda", "cpu") or target.backend in ptx.backends.NAMES:
            others = tuple((name, repr(value)) for name, value in found.items())
            by_code.setdefault((function(item), target, case.kernel, others), []).append(item)
    repeated = []
    for same in by_code.values():
        kept = next((item for item in same if arguments(item)["case"] in KERNELS.values()), same[0])
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
    of_rules = any(item.get_closest_marker(name) for name in ("compiled", "arithmetic"))
    return not of_rules and case not in (AMSGRAD, LAMB)
