"""The optimizers that the benchmarks compare, each with how it is built and where it can run."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from workload import BETAS, DTYPES, EPS, LR, Config, Workload

# Last on the path, so that an installed fused_optim goes before the one in the checkout.
sys.path.append(str(Path(__file__).resolve().parent.parent))

Build = Callable[[list[dict[str, Any]], Config, torch.device], torch.optim.Optimizer]

# torch.compile unrolls the step over the tensors and takes minutes beyond this many.
COMPILE_LIMIT = 500


@dataclass(frozen=True)
class Peer:
    """build(groups, config, device): the optimizer, the groups holding params and weight_decay.

    states: the dtype it keeps them in: "param" (the param's), "float32", "own" (its own format), "any" (as told).
    slack: see workload.check.
    """

    name: str
    build: Build
    package: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    states: str = "param"
    amsgrad: bool = True
    compiled: bool = False
    slack: float = 0.0

    def why_not(self, workload: Workload) -> str | None:
        """None where it can run this case, else the reason."""
        config = workload.config
        if workload.device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if importlib.util.find_spec(self.package.split(".")[0]) is None:
            return f"{self.package.split('.')[0]} is not installed"
        if config.amsgrad and not self.amsgrad:
            return "has no amsgrad"
        param_dtype, state_dtype = DTYPES[config.dtype]
        keeps = {"param": param_dtype, "float32": torch.float32}.get(self.states, state_dtype)
        if keeps != state_dtype:
            return f"keeps its states in {str(keeps).removeprefix('torch.')}"
        if self.compiled and len(workload.params) > COMPILE_LIMIT:
            return f"compiling a step over more than {COMPILE_LIMIT} tensors takes minutes"
        return None


def torch_adamw(**options: Any) -> Build:
    def build(groups: list[dict[str, Any]], config: Config, device: torch.device) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, amsgrad=config.amsgrad, **options)

    return build


def capturable_adamw(groups: list[dict[str, Any]], config: Config, device: torch.device) -> torch.optim.Optimizer:
    """Counts its steps in tensors, so that torch.compile sees no Python number change from step to step."""
    return torch_adamw(foreach=True, capturable=device.type == "cuda")(groups, config, device)


def ours(backend: str) -> Build:
    def build(groups: list[dict[str, Any]], config: Config, device: torch.device) -> torch.optim.Optimizer:
        fused_optim = importlib.import_module("fused_optim")
        param_dtype, state_dtype = DTYPES[config.dtype]
        return fused_optim.FusedAdamW(
            groups,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            amsgrad=config.amsgrad,
            backend=backend,
            state_dtype=None if state_dtype == param_dtype else state_dtype,
        )

    return build


def imported(module: str, name: str, **options: Any) -> Build:
    def build(groups: list[dict[str, Any]], config: Config, device: torch.device) -> torch.optim.Optimizer:
        return getattr(importlib.import_module(module), name)(groups, lr=LR, betas=BETAS, eps=EPS, **options)

    return build


# How far one update of a peer with 8-bit states may lie from AdamW's, as a share of lr: enough to tell a wrong formula,
# no judgement of its accuracy.
QUANTISED = 0.5

GPU = ("cuda",)

PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch-for", torch_adamw(foreach=False, fused=False)),
        Peer("torch-foreach", torch_adamw(foreach=True)),
        Peer("torch-fused", torch_adamw(fused=True)),
        Peer("torch-compile", capturable_adamw, compiled=True),
        Peer("ours", ours("auto"), "fused_optim", states="any"),
        *(
            Peer(f"ours-{name}", ours(name), "fused_optim", states="any")
            for name in ("triton", "cuda", "cpp", "reference")
        ),
        Peer("optimi", imported("optimi", "AdamW", kahan_sum=False), "optimi", amsgrad=False),
        Peer("apex", imported("apex.optimizers", "FusedAdam"), "apex", GPU, "float32", amsgrad=False),
        Peer(
            "bitsandbytes", imported("bitsandbytes.optim", "AdamW32bit"), "bitsandbytes", GPU, "float32", amsgrad=False
        ),
        Peer("flashoptim", imported("flashoptim", "FlashAdamW"), "flashoptim", GPU, "own", False, slack=QUANTISED),
        Peer("torchao-8bit", imported("torchao.optim", "AdamW8bit"), "torchao", GPU, "own", False, slack=QUANTISED),
    )
}


def backend_of(optimizer: torch.optim.Optimizer, device: torch.device) -> str | None:
    """Which backend ours steps that device with; None for other optimizers."""
    name = getattr(optimizer, "backend", None)
    if not isinstance(name, str):
        return None
    return str(importlib.import_module("fused_optim.backends").pick(name, device).name)
