"""What the tests of the trainers share: a tiny net, its batches, ours and torch's optimizer, and an import that works.

The trainers are packages that need not be there; a test that lacks one is skipped and says which.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import parameters
from compare import assert_like_torch
from torch import Tensor, library, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from fused_optim import FusedAdamW, backends

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the packages are imported
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

PAGE = Path(__file__).resolve().parent.parent / "docs" / "trainers.md"
MISSING = backends.available()["cpp"]
on_cpp = pytest.mark.skipif(MISSING is not None, reason=f"cpp: {MISSING}")
# With torch's eps a gradient that is nothing but rounding, as that of a bias of attention's keys, moves a param by lr.
ADAMW = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-4}


def require(name: str) -> ModuleType:
    """The module, or a skip that says what is missing."""
    repair_torchvision()
    return pytest.importorskip(name)


@functools.cache
def repair_torchvision() -> library.Library | None:
    """PyPI's torchvision is a CUDA build. Beside a CPU build of torch its library does not load, its import fails at
    two operators that the library would have declared, and so does that of every package that looks for it. Nothing
    here calls them."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError:
        declared = library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return declared  # goes with its declarations when nobody holds it


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1))


def loader(count: int) -> DataLoader[tuple[Tensor, ...]]:
    """`count` batches of 8 pairs, always in the same order."""
    x = torch.randn(8 * count, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.square().sum(1, keepdim=True)), batch_size=8)


def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def ours(params: Any, **kwargs: Any) -> FusedAdamW:
    return FusedAdamW(params, **{**ADAMW, **kwargs})


def torchs(params: Any, **kwargs: Any) -> torch.optim.AdamW:
    """The for-loop: no other implementation of torch's allows everything that trainers do."""
    return torch.optim.AdamW(params, foreach=False, **{**ADAMW, **kwargs})


def assert_stepped(optimizer: Optimizer, steps: int) -> None:
    """Ours, and nothing else, has made so many updates of every param, by the C++ kernel."""
    assert isinstance(optimizer, FusedAdamW)
    counts = [optimizer.state[p]["step"].item() for p in parameters(optimizer)]
    assert counts == [steps] * len(counts)
    assert [bound.name for bound in optimizer._tables] == ["cpp"]


def assert_trained_alike(ours: Optimizer, theirs: Optimizer, bits: int = 32) -> None:
    """Params and states within what rounding grows to over a short training. A step moves a param by 0.02.

    A model in 16 bits saw params rounded, where two that differ in the last place of float32 differ by a jump now and
    then: there params alone are compared, within 0.001.
    """
    if bits == 32:
        assert_like_torch(ours, theirs, rtol=1e-4, atol=1e-5)
    else:
        for p, q in zip(parameters(ours), parameters(theirs), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-3)


def run_page(section: str, **names: Any) -> dict[str, Any]:
    """Runs the code of a section of docs/trainers.md with these names, and returns all that it knows then."""
    body = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    exec(compile(code, f"{PAGE.name}, {section}", "exec"), names)
    return names
