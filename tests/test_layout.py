"""The layout of tables has one definition, fused_optim/engine/layout.py. Modules built from another layout are
refused."""

from __future__ import annotations

import re
import runpy
import sys
import types

import pytest
from commands import ROOT, run

from fused_optim.backends import native
from fused_optim.backends.reference_rules import RULES
from fused_optim.engine import layout, modules


def test_the_header_is_current() -> None:
    made = runpy.run_path(str(ROOT / "csrc/make_layout.py"))["header"]()
    assert (ROOT / "csrc/layout.h").read_text() == made, "run python csrc/make_layout.py"


def test_every_module_carries_the_layout() -> None:
    built = [module for module in map(modules.load, modules.NAMES) if not isinstance(module, str)]
    if not built:
        pytest.skip("this is a pure Python installation: no module is built")
    assert all(module.LAYOUT == layout.LAYOUT for module in built)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"CHUNK": 8192}, "CHUNK is 8192 there and 4096 here"),
        ({"ROW_EXTRA": 9}, "ROW_EXTRA is 9 there and missing here"),
        ({}, None),
    ],
)
def test_what_differs_is_named(other: dict[str, int], said: str | None) -> None:
    assert layout.difference(layout.LAYOUT | other) == said
    assert layout.difference({}) == "CHUNK is missing there and 4096 here"


def test_a_module_whose_layout_has_no_names_is_refused() -> None:
    old = types.ModuleType("_poll")
    old.VERSION, old.LAYOUT = "1", (4096, 8, 17, 16)  # type: ignore[attr-defined]
    assert "another layout of the tables (CHUNK is missing there" in str(modules.why_stale("_poll", old, "1"))


def test_a_module_without_a_rule_is_refused() -> None:
    """Otherwise the first step of the new optimizer would fail."""
    old = types.ModuleType("_cpu_avx2")
    old.RULES = tuple(name for name in RULES if name != "lion")  # type: ignore[attr-defined]
    assert str(native.with_all_rules(old)).startswith("_cpu_avx2 was built without the rule lion; install")
    old.RULES = tuple(RULES)  # type: ignore[attr-defined]
    assert native.with_all_rules(old) is old


@pytest.mark.slow
@pytest.mark.skipif(isinstance(modules.cpu(), str), reason="the C++ kernel is not built")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("LAYOUT['CHUNK'] *= 2", r"another layout of the tables \(CHUNK is 4096 there and 8192 here\); install"),
        ("RULES['new'] = RULES['lion']", "built without the rule new; install"),
    ],
    ids=["layout", "rules"],
)
def test_tests_of_a_stale_build_fail(change: str, message: str) -> None:
    """Without this check the tests of the backend would be skipped, because a stale backend is not available."""
    code = f"""
import pytest
import sys
from fused_optim.backends.reference_rules import RULES
from fused_optim.engine.layout import LAYOUT
{change}
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--collect-only", "tests/test_lion.py"]))
"""
    with pytest.raises(AssertionError) as failed:
        run([sys.executable, "-c", code])
    assert re.search(message, str(failed.value))


@pytest.mark.codegen
def test_triton_compiles_anew_for_another_layout() -> None:
    """Triton's cache key depends on the source of the kernels, which does not contain the column numbers. The key must
    depend on the layout too."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
from collections import namedtuple
from fused_optim.engine import layout
kind = getattr(layout, {name!r})
fields = list(kind._fields)
fields[0], fields[1] = fields[1], fields[0]
setattr(layout, {name!r}, namedtuple({name!r}, fields, defaults=(0.0,) * len(fields)) if {swap} else kind)
from fused_optim.triton_kernels.prep import prep_kernel
print(prep_kernel.cache_key)
"""

    def key(name: str, swap: bool) -> str:
        return run([sys.executable, "-c", code.format(name=name, swap=swap)]).split()[-1]

    usual = key("RowFields", False)
    assert usual == key("TensorScalars", False)
    assert len({usual, *(key(name, True) for name in ("RowFields", "GroupHparams", "TensorScalars"))}) == 4
