"""Calls for mypy, which `make lint` runs. The file is never executed. mypy must report an error at each `type: ignore`;
an unused one is an error too."""

from __future__ import annotations

import math

import torch
from torch import nn

from fused_optim import (
    FusedAdam,
    FusedAdamW,
    FusedLAMB,
    FusedLion,
    FusedQHAdam,
    FusedQHAdamW,
    FusedSGD,
    FusedSGDW,
    clip_grad_norm_,
)
from fused_optim.optim.options import Decayed

params = nn.Linear(3, 5).parameters()

# Options that every class accepts.
FusedAdam(params, backend="cpp", state_dtype=torch.float32, max_grad_norm=1.0, norm_type=math.inf)
FusedAdamW(params, skip_nonfinite=True, ema_decay=0.999, ema_dtype=torch.float32, decay="paper", lr_reference=1e-3)
FusedSGD(params, momentum=0.9, ema_decay=lambda steps: min(0.999, steps / 10), norm_group=None)
FusedSGDW(params, momentum=0.9, maximize=True, decay="normalized", decay_period=400)
FusedQHAdam(params, nus=(0.7, 1.0), capturable=True, backend="reference")
FusedQHAdamW(params, maximize=True, decay="paper", max_grad_norm=None)
FusedLAMB(params, max_grad_norm=1.0, skip_nonfinite=True)
FusedLion(params, capturable=True, decay="torch")

# Unknown options.
FusedAdam(params, max_grad_nrom=1.0)  # type: ignore[call-arg]
FusedAdamW(params, max_grad_nrom=1.0)  # type: ignore[call-arg]
FusedSGD(params, max_grad_nrom=1.0)  # type: ignore[call-arg]
FusedSGDW(params, max_grad_nrom=1.0)  # type: ignore[call-arg]
FusedQHAdam(params, max_grad_nrom=1.0)  # type: ignore[call-arg]
FusedQHAdamW(params, max_grad_nrom=1.0)  # type: ignore[call-arg]
FusedLAMB(params, max_grad_nrom=1.0)  # type: ignore[call-arg]
FusedLion(params, max_grad_nrom=1.0)  # type: ignore[call-arg]
FusedAdam(params, decay="paper")  # type: ignore[call-arg]
FusedSGD(params, capturable=True)  # type: ignore[call-arg]

# Values of wrong types.
FusedAdam(params, backend=3)  # type: ignore[arg-type]
FusedAdamW(params, backend="fast")  # type: ignore[arg-type]
FusedSGD(params, ema_decay="x")  # type: ignore[arg-type]
FusedSGDW(params, state_dtype="float32")  # type: ignore[arg-type]
FusedQHAdam(params, max_grad_norm="1")  # type: ignore[arg-type]
FusedQHAdamW(params, decay="papers")  # type: ignore[arg-type]
FusedLAMB(params, skip_nonfinite="yes")  # type: ignore[arg-type]
FusedLion(params, ema_dtype=32)  # type: ignore[arg-type]

# Every option, in every class.
options = Decayed(
    backend="cuda",
    state_dtype=None,
    max_grad_norm=0,
    norm_type=2,
    skip_nonfinite=False,
    norm_group=None,
    ema_decay=0.99,
    ema_dtype=None,
    decay="normalized",
    lr_reference=1e-3,
    decay_period=100.0,
)
FusedAdamW(params, **options)
FusedSGDW(params, **options)
FusedQHAdamW(params, **options)
FusedLion(params, **options)
Decayed(norm_type="inf")  # type: ignore[typeddict-item]
Decayed(decay="none")  # type: ignore[typeddict-item]
clip_grad_norm_(params, 1.0, backend="triton")
clip_grad_norm_(params, 1.0, backend="fast")  # type: ignore[arg-type]

# Attributes.
optimizer = FusedAdamW(params)
optimizer.max_grad_norm = 1.0
optimizer.backend = "fast"  # type: ignore[assignment]
optimizer.ema_decay = "x"  # type: ignore[assignment]
optimizer.norm_group = None  # type: ignore[misc]
optimizer.step(grad_scale="4")  # type: ignore[arg-type]
