"""Shared by the trainer tests: a tiny net, its batches, our optimizer and torch's, and a workaround for torchvision.

The trainers are optional packages. A test that lacks one is skipped and names it.
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

os.environ["HF_HUB_OFFLINE"] = "1"  # the packages read these at import
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

PAGE = Path(__file__).resolve().parent.parent / "docs" / "trainers.md"
MISSING = backends.available()["cpp"]
on_cpp = pytest.mark.skipif(MISSING is not None, reason=f"cpp: {MISSING}")
# With torch's default eps a gradient of pure rounding error, as that of an attention key bias, moves a param by lr.
ADAMW = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-4}


def require(name: str) -> ModuleType:
    """The module. Skips the test, with the name of what is missing, if it cannot be used."""
    repair_torchvision()
    return pytest.importorskip(name)


@functools.cache
def repair_torchvision() -> library.Library | None:
    """PyPI's torchvision is a CUDA build. With a CPU build of torch its library does not load. Its import then fails
    because two operators are not declared, and so does the import of every package that imports it. This declares the
    two operators, which no test calls."""
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
        return declared  # the declarations live as long as this object


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
    """torch's for-loop implementation. Its other implementations do not support everything that trainers do."""
    return torch.optim.AdamW(params, foreach=False, **{**ADAMW, **kwargs})


def assert_stepped(optimizer: Optimizer, steps: int) -> None:
    """FusedAdamW made `steps` updates of every param, with the C++ kernel."""
    assert isinstance(optimizer, FusedAdamW)
    counts = [optimizer.state[p]["step"].item() for p in parameters(optimizer)]
    assert counts == [steps] * len(counts)
    assert [bound.name for bound in optimizer._tables] == ["cpp"]


def assert_trained_alike(ours: Optimizer, theirs: Optimizer, bits: int = 32) -> None:
    """Compares params and states within the rounding differences of a short training. A step moves a param by 0.02.

    A 16-bit model computes with rounded params. Two params that differ in the last place of float32 sometimes round to
    different values. So in 16 bits only the params are compared, within 0.001.
    """
    if bits == 32:
        assert_like_torch(ours, theirs, rtol=1e-4, atol=1e-5)
    else:
        for p, q in zip(parameters(ours), parameters(theirs), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-3)


def run_page(section: str, **names: Any) -> dict[str, Any]:
    """Executes the code of a section of docs/trainers.md with these names. Returns all names defined afterwards."""
    body = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    exec(compile(code, f"{PAGE.name}, {section}", "exec"), names)
    return names
