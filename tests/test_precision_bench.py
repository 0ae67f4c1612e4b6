"""bench/precision.py: other libraries' formats are theirs, every section runs, and the page has every contestant."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from foreign import package

sys.path.append(str(ROOT / "bench"))

import precision
import precision_contestants as contestants
import precision_report
import precision_tasks as tasks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:exp_avg_sq is stored in bfloat16")]


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    """Training sets torch's thread count for the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_bitsandbytes(signed: bool) -> None:
    theirs = package("bitsandbytes").functional.create_dynamic_map(signed=signed)
    torch.testing.assert_close(contestants.dynamic_map(signed), theirs)


def test_steps_are_those_of_bitsandbytes() -> None:
    """Its package rounds a few values that lie half-way between two codes to the other one."""
    theirs = package("bitsandbytes").optim.AdamW8bit
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2)]
    both = [theirs([params[0]], lr=0.01, min_8bit_size=1), contestants.bnb([params[1]], lr=0.01)]
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        grad = torch.randn(1000, generator=draw)
        for param, optimizer in zip(params, both, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    close = torch.isclose(params[0], params[1], rtol=1e-4, atol=1e-5)
    assert int(close.sum()) >= 980


@pytest.mark.parametrize("signed", [True, False])
def test_formats_come_back_close(signed: bool) -> None:
    value = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    value = value if signed else value.square()
    for kind in (contestants.Flash, contestants.Dynamic):
        back = kind(signed).decode(kind(signed).encode(value))
        assert back.shape == value.shape
        torch.testing.assert_close(back, value, rtol=0.1, atol=0.02 * float(value.max()))


SOME = contestants.BASE, "24-bit masters, compact", "FlashOptim, 24-bit masters", "bitsandbytes 8-bit, float32"


@pytest.mark.parametrize("name", SOME)
def test_sections(name: str) -> None:
    each = contestants.BY_NAME[name]
    assert precision.small_updates(each, 3)["largest"] >= 0
    found = precision.averages(each, 5)
    assert 0.9 < found["gaussian"] < 1.1
    exact = precision.different_scales(precision.of_states(each), 0.0, 10)
    assert exact["cosine"] > 0.99 and 0.5 < exact["largest"] < 3
    for task in tasks.TASKS:
        assert 0 < tasks.final_loss(task, name, 0, 2) < 10


def test_float32_is_exact() -> None:
    base = contestants.BY_NAME[contestants.BASE]
    assert precision.averages(base, 20)["zero"] == pytest.approx(1, abs=1e-5)
    assert precision.different_scales(base, 3.0, 20)["cosine"] == pytest.approx(1, abs=1e-6)


def test_memory() -> None:
    """Params, states and gradients are seen: 16 bytes per param. Gradient release leaves one gradient of 16."""
    plain, released = (precision.alone(precision.measured_memory, "float32", way, 16, 512) for way in (False, True))
    assert 15 < plain < 22
    assert released < plain - 2


def test_the_page(tmp_path: Path) -> None:
    names = list(contestants.BY_NAME)
    rows: dict[str, Any] = {
        "about": {"command": "python x", "commit": "0" * 40, "device": "a CPU", "torch": "2"},
        "base": contestants.BASE,
        "contestants": {name: each.stored for name, each in contestants.BY_NAME.items()},
        "small updates": {name: {"mean": 0.1, "largest": 0.2} for name in names},
        "averages": {name: {"gaussian": 1.0, "half": 1.1, "zero": 12345.0} for name in names},
        "different scales": {name: {"0.0": {"cosine": 1.0, "largest": 2.0}} for name in names},
        "memory": {names[0]: {"plain": 16.0, "release": 12.0}},
        "steps": {"GPT": 7, "convnet": 8},
        "losses": {task: {name: [1.0 + i, 2.0, 3.5] for i, name in enumerate(names)} for task in tasks.TASKS},
    }
    page = precision_report.write(tmp_path, rows).read_text()
    for name in names:
        assert page.count(f"| {name} |") == 5
    assert "| float32 | 12 | 16.00 | 12.00 |" in page and "12,345" in page and "7 steps" in page
    found = precision_report.against_base(rows, "GPT", names[1])
    assert found is not None and found.mean == pytest.approx(1 / 3) and math.isfinite(found.half)
    for picture in ("memory", "scales", "training"):
        assert f"({picture}.svg)" in page and (tmp_path / f"{picture}.svg").stat().st_size > 1000
