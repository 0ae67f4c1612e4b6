"""An optimizer with groups for Muon and for AdamW."""

from __future__ import annotations

import copy
from typing import Any

import torch
from cases import Target, make_params, parameters, random_grads, set_grads
from compare import states
from muon import gradients
from torch import Tensor
from torch.nn import Parameter

from fused_optim import FusedMuon

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
MATRICES, OTHERS = [(8, 24), (24, 8), (8, 24)], [(10, 3), (7,), (), (0,), (2, 3, 4)]
ADAMW = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}


def build(target: Target, params: list[Parameter], **options: Any) -> FusedMuon:
    """The first three params are stepped by Muon, the others by AdamW."""
    adamw = {"params": params[3:], "use_muon": False, **ADAMW}
    return FusedMuon([{"params": params[:3]}, adamw], **{"lr": 0.02, "backend": target.backend, **options})


def draw(params: list[Parameter], seed: int) -> list[Tensor]:
    return gradients(params[:3], seed) + random_grads(params[3:], seed)


def steps(optimizer: Any, count: int, first: int = 0, scale: float = 1.0) -> None:
    params = parameters(optimizer)
    for step in range(first, first + count):
        set_grads(params, [grad * scale for grad in draw(params, step)])
        optimizer.step()


def values(optimizer: Any) -> list[Any]:
    return [[p.detach().clone() for p in parameters(optimizer)], copy.deepcopy(states(optimizer))]


def make(target: Target, dtype: torch.dtype = F32) -> list[Parameter]:
    return make_params(MATRICES + OTHERS, dtype, target.device)
