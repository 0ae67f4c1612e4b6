"""timm's factory creates our optimizers by name, with timm's param groups. They are compared with torch's optimizers
from the same factory."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from trainers import ADAMW, assert_stepped, assert_trained_alike, on_cpp, require, run_page

import fused_optim
from fused_optim.integrations import register_timm

STEPS = 6

pytestmark = pytest.mark.trainers


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    module = require("timm")
    register_timm()
    return module


def vit(timm: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def train(model: nn.Module, optimizer: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.randn(4, 3, 16, 16, generator=generator)
        nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@on_cpp
@pytest.mark.parametrize(
    ("name", "theirs", "kwargs"),
    [
        ("adamw", "adamw", {"eps": ADAMW["eps"]}),
        ("adamw", "adamw", {"eps": ADAMW["eps"], "layer_decay": 0.5, "betas": (0.8, 0.9)}),
        ("adam", "adam", {"eps": ADAMW["eps"]}),
        ("sgd", "momentum", {"momentum": 0.8}),
    ],
)
def test_the_factory(name: str, theirs: str, kwargs: dict[str, Any], timm: ModuleType) -> None:
    pair = []
    for opt in (f"fused-optim-{name}", theirs):
        model = vit(timm)
        optimizer = timm.optim.create_optimizer_v2(model, opt, lr=0.02, weight_decay=0.1, foreach=False, **kwargs)
        pair.append(train(model, optimizer))
    assert type(pair[0]) is {"adamw": fused_optim.FusedAdamW, "adam": fused_optim.FusedAdam}.get(
        name, fused_optim.FusedSGD
    )
    assert len(pair[0].param_groups) == len(pair[1].param_groups) >= 2
    assert_trained_alike(*pair)


@on_cpp
def test_lookahead(timm: ModuleType) -> None:
    pair = []
    for opt in ("lookahead_fused-optim-adamw", "lookahead_adamw"):
        model = vit(timm)
        pair.append(train(model, timm.optim.create_optimizer_v2(model, opt, **ADAMW, foreach=False)))
    assert_stepped(pair[0]._base_optimizer, STEPS)
    assert_trained_alike(pair[0]._base_optimizer, pair[1]._base_optimizer)


@on_cpp
def test_page(timm: ModuleType) -> None:
    """The factory passes on arguments that only our optimizers have."""
    model = vit(timm)
    mine = run_page("timm", model=model)["optimizer"]
    assert [group["max_grad_norm"] for group in mine.param_groups] == [1.0, 1.0]
    assert_stepped(train(model, mine), STEPS)
    assert mine.last_grad_norm > 0


def test_every_class_can_be_made(timm: ModuleType) -> None:
    registry = timm.optim.OptimizerRegistry()
    names = register_timm(registry)
    assert names == registry.list_optimizers() == timm.optim.list_optimizers("fused-optim-*")
    made = [registry.create_optimizer(vit(timm), name, lr=0.01, weight_decay=0.1, momentum=0.7) for name in names]
    classes = [getattr(fused_optim, name) for name in fused_optim.__all__ if name.startswith("Fused")]
    classes.remove(fused_optim.FusedOptimizer)
    classes.remove(fused_optim.FusedMuon)  # needs groups of matrices
    assert {type(optimizer) for optimizer in made} == {*classes} and len(made) == len(classes)
    for optimizer in made:
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
        assert optimizer.defaults.get("momentum", 0.7) == 0.7


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ImportError, match=r"register_timm needs timm 1\.0\.12 or newer"):
        register_timm()
