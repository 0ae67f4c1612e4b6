"""The public import paths keep working after the code has moved."""

from __future__ import annotations

import importlib

import pytest

import fused_optim

PATHS = {
    "backends": ["BACKENDS", "available"],
    "clip": ["clip_grad_norm_", "release_captured"],
    "convert": ["apex", "bitsandbytes", "deepspeed", "optimi"],
    "decay": ["Decay", "Decoupled", "decoupled"],
    "decoupled": ["Decoupled"],
    "groups": ["depths", "layerwise", "muon", "named_group", "no_decay", "per_group", "split"],
    "integrations": ["register_timm"],
    "lr_finder": ["RangeTest", "lr_range_test"],
    "schedules": ["OneCycle", "WarmRestarts", "adamwr", "cosine_restarts", "normalized_decay", "one_cycle", "sgdwr"],
}


@pytest.mark.parametrize("path", PATHS)
def test_public_paths(path: str) -> None:
    module = importlib.import_module(f"fused_optim.{path}")
    for name in PATHS[path]:
        assert callable(getattr(module, name)) or name == "BACKENDS"


def test_one_thing_under_several_paths_is_one() -> None:
    decay, decoupled = (importlib.import_module(f"fused_optim.{path}") for path in ("decay", "decoupled"))
    assert decay.Decoupled is decoupled.Decoupled and issubclass(fused_optim.FusedAdamW, decay.Decoupled)
    assert importlib.import_module("fused_optim.clip").clip_grad_norm_ is fused_optim.clip_grad_norm_
