"""The peers: optimizers that the benchmarks compare, how each is built, and where each runs."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from family import OPTIMIZERS
from foreach import ForeachLAMB, ForeachLion, ForeachQHAdam, TorchSGDW
from workload import DTYPES, Config, Workload

# Last on the path: an installed fused_optim takes precedence over the checkout.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# build(groups, config, device, graph) returns the optimizer. The groups hold params and weight_decay. graph: a CUDA
# graph will capture the step, so optimizers with the option capturable get capturable=True.
Groups = list[dict[str, Any]]
Build = Callable[[Groups, Config, torch.device, bool], torch.optim.Optimizer]

# torch.compile unrolls the step over the tensors. Beyond this number of tensors it takes minutes.
COMPILE_LIMIT = 500


@dataclass(frozen=True)
class Peer:
    """One implementation of one or several optimizers.

    builds: a constructor by key of family.OPTIMIZERS.
    states: the dtype of its states: "param" (as the param), "float32", "own" (its own format), "any" (configurable).
    slack: see workload.check.
    note: an explanation for the report.
    """

    name: str
    builds: dict[str, Build]
    package: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    states: str = "param"
    amsgrad: bool = False
    compiled: bool = False
    slack: float = 0.0
    note: str = ""

    def build(self, groups: Groups, config: Config, device: torch.device, graph: bool = False) -> torch.optim.Optimizer:
        return self.builds[config.optimizer](groups, config, device, graph)

    def why_not(self, workload: Workload) -> str | None:
        """Why the peer cannot run this case, or None."""
        config = workload.config
        if config.optimizer not in self.builds:
            return f"has no {config.spec.title}"
        if workload.device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if importlib.util.find_spec(self.package.split(".")[0]) is None:
            return f"{self.package.split('.')[0]} is not installed"
        if config.amsgrad and not self.amsgrad:
            return "has no amsgrad"
        param_dtype, state_dtype = DTYPES[config.dtype]
        keeps = {"param": param_dtype, "float32": torch.float32}.get(self.states, state_dtype)
        if keeps != state_dtype:
            return f"stores its states in {str(keeps).removeprefix('torch.')}"
        if self.compiled and len(workload.params) > COMPILE_LIMIT:
            return f"compiling a step over more than {COMPILE_LIMIT} tensors takes minutes"
        return None


def made(cls: Callable[..., torch.optim.Optimizer], **options: Any) -> Build:
    def build(groups: Groups, config: Config, device: torch.device, graph: bool) -> torch.optim.Optimizer:
        chosen = {**config.spec.options, **options}
        if config.amsgrad:
            chosen["amsgrad"] = True
        if graph and "capturable" in inspect.signature(cls).parameters:
            chosen["capturable"] = True
        return cls(groups, **chosen)

    return build


def imported(module: str, name: str, **options: Any) -> Build:
    def build(groups: Groups, config: Config, device: torch.device, graph: bool) -> torch.optim.Optimizer:
        return made(getattr(importlib.import_module(module), name), **options)(groups, config, device, graph)

    return build


def torch_classes(**options: Any) -> dict[str, Build]:
    classes = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "sgdw": TorchSGDW}
    return {optimizer: made(cls, **options) for optimizer, cls in classes.items()}


def capturable(cls: Callable[..., torch.optim.Optimizer]) -> Build:
    """Keeps its step counts in tensors: torch.compile recompiles for a Python number that changes at every step."""

    def build(groups: Groups, config: Config, device: torch.device, graph: bool) -> torch.optim.Optimizer:
        return made(cls, foreach=True, capturable=device.type == "cuda")(groups, config, device, graph)

    return build


def ours(backend: str, package: str = "fused_optim") -> dict[str, Build]:
    def build(groups: Groups, config: Config, device: torch.device, graph: bool) -> torch.optim.Optimizer:
        param_dtype, state_dtype = DTYPES[config.dtype]
        options: dict[str, Any] = {"max_grad_norm": None} if config.optimizer == "lamb" else {}
        options["state_dtype"] = None if state_dtype == param_dtype else state_dtype
        return imported(package, config.spec.fused, backend=backend, **options)(groups, config, device, graph)

    return dict.fromkeys(OPTIMIZERS, build)


# Tolerance for one update of a peer with quantised states, as a share of lr. It detects a wrong formula. It does not
# measure accuracy.
QUANTISED = 0.5

GPU = ("cuda",)
QHADAM = {"qhadam": made(ForeachQHAdam), "qhadamw": made(ForeachQHAdam, decoupled=True)}
OPTIMI = {
    "adamw": imported("optimi", "AdamW", kahan_sum=False),
    "adam": imported("optimi", "Adam", kahan_sum=False),
    "sgd": imported("optimi", "SGD", kahan_sum=False),
    "sgdw": imported("optimi", "SGD", kahan_sum=False, decouple_wd=True),
    "lion": imported("optimi", "Lion", kahan_sum=False),
}
FLASH = {"adamw": "FlashAdamW", "sgd": "FlashSGD", "sgdw": "FlashSGDW", "lion": "FlashLion"}

PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch-for", torch_classes(foreach=False, fused=False), amsgrad=True),
        Peer("torch-foreach", torch_classes(foreach=True), amsgrad=True),
        Peer(
            "torch-fused",
            torch_classes(fused=True),
            amsgrad=True,
            note="torch has no SGDW: for it, torch-* are torch's SGD after a _foreach_mul_ of the params "
            "(bench/foreach.py). On CPUs the fused SGD of torch 2.13 leaves most elements of bf16 and float16 params "
            "unchanged (pytorch#191763).",
        ),
        Peer(
            "torch-compile",
            {
                "adamw": capturable(torch.optim.AdamW),
                "adam": capturable(torch.optim.Adam),
                "sgd": made(torch.optim.SGD, foreach=True),
            },
            amsgrad=True,
            compiled=True,
        ),
        Peer(
            "foreach",
            {**QHADAM, "lamb": made(ForeachLAMB), "lion": made(ForeachLion)},
            note="plain PyTorch with torch's _foreach_ functions (bench/foreach.py)",
        ),
        Peer(
            "qhoptim",
            {"qhadam": imported("qhoptim.pyt", "QHAdam"), "qhadamw": imported("qhoptim.pyt", "QHAdamW")},
            "qhoptim",
            note="the package of QHAdam's authors; it loops over the tensors",
        ),
        Peer("ours", ours("auto"), "fused_optim", states="any", amsgrad=True),
        *(
            Peer(f"ours-{name}", ours(name), "fused_optim", states="any", amsgrad=True)
            for name in ("triton", "cuda", "cpp", "reference")
        ),
        Peer("optimi", OPTIMI, "optimi"),
        Peer(
            "apex",
            {
                "adamw": imported("apex.optimizers", "FusedAdam"),
                "adam": imported("apex.optimizers", "FusedAdam", adam_w_mode=False),
            },
            "apex",
            GPU,
            "float32",
        ),
        Peer(
            "apex-sgd-lamb",
            {
                "sgd": imported("apex.optimizers", "FusedSGD"),
                "lamb": imported("apex.optimizers", "FusedLAMB", max_grad_norm=math.inf),
            },
            "apex",
            GPU,
            note="Apex's LAMB reads the gradients once more for their norm, even without clipping",
        ),
        Peer(
            "bitsandbytes",
            {
                "adamw": imported("bitsandbytes.optim", "AdamW32bit"),
                "lion": imported("bitsandbytes.optim", "Lion32bit"),
            },
            "bitsandbytes",
            GPU,
            "float32",
        ),
        Peer(
            "flashoptim",
            {optimizer: imported("flashoptim", name) for optimizer, name in FLASH.items()},
            "flashoptim",
            GPU,
            "own",
            slack=QUANTISED,
        ),
        Peer("torchao-8bit", {"adamw": imported("torchao.optim", "AdamW8bit")}, "torchao", GPU, "own", slack=QUANTISED),
    )
}


def add_ours_at(package: str) -> str:
    """Adds the package of another commit as a peer. Returns the peer's name."""
    peer = Peer(
        package.replace("fused_optim_at_", "ours-at-"), ours("auto", package), package, states="any", amsgrad=True
    )
    PEERS[peer.name] = peer
    return peer.name


def backend_of(optimizer: torch.optim.Optimizer, device: torch.device) -> str | None:
    """The backend that our optimizer uses on the device; None for other optimizers."""
    name = getattr(optimizer, "backend", None)
    if not isinstance(name, str):
        return None
    return str(importlib.import_module("fused_optim.backends").pick(name, device).name)
