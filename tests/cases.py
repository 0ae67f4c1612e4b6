"""The table of cases, and what most tests share: targets, tensors, training.

A case is a row of the table: our class, torch's class if there is one, the oracle's rule and keyword arguments. A new
optimizer needs one or two rows here and one function in oracle/. A target is a backend and a device. The targets
depend on `fused_optim.backends.available()` and on the environment. `make gpu` runs the same tests on a GPU.

    TRITON_INTERPRET=1          adds the Triton kernels on the CPU, in Triton's interpreter, with small sizes
    FUSED_OPTIM_CUDA_EMULATE=1  adds the CUDA kernels, run in a loop on the CPU
    FUSED_OPTIM_TEST_BACKENDS   selects backends, separated by commas. "triton-ptx" and "cuda-ptx" (see tests/ptx) run
                                only if they are named here
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import oracle
import ptx.backends
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_optim import (
    FusedAdagrad,
    FusedAdam,
    FusedAdamW,
    FusedAdan,
    FusedAdEMAMix,
    FusedADOPT,
    FusedLAMB,
    FusedLion,
    FusedNAdam,
    FusedQHAdam,
    FusedQHAdamW,
    FusedRAdam,
    FusedScheduleFreeAdamW,
    FusedScheduleFreeSGD,
    FusedSGD,
    FusedSGDW,
    FusedStableAdamW,
    backends,
)
from fused_optim.backends import native
from fused_optim.decay import Decoupled

# Without this check the tests of a module that was built from other sources would be skipped.
if STALE := native.stale():
    raise RuntimeError("; ".join(STALE.values()))


@dataclass(frozen=True)
class Case:
    name: str
    ours: Any  # class
    torch: Any  # class; None where torch has none
    rule: oracle.Rule
    kwargs: dict[str, Any] = field(default_factory=dict)
    typical: bool = False  # the case of its rule in tests that need only one; it has every state

    def __str__(self) -> str:
        return self.name

    @cached_property
    def group(self) -> dict[str, Any]:
        """A param group."""
        one = torch.nn.Parameter(torch.zeros(1))
        return self.ours([one], backend="reference", **self.kwargs).param_groups[0]

    @property
    def options(self) -> set[str]:
        """The names of the options in its param groups."""
        return set(self.group)

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the states besides `step`."""
        return tuple(self.ours.rule.states_of(self.group))

    @property
    def momentum(self) -> str | None:
        """The option with the momentum, which schedulers can cycle."""
        return next((option for option in ("momentum", "betas") if option in self.options), None)

    @property
    def has_betas(self) -> bool:
        """Whether it has averages with decay rates `betas`."""
        return "betas" in self.options

    @property
    def divides(self) -> bool:
        """Whether the update is divided by a root plus eps."""
        return "eps" in self.options

    @property
    def is_eager(self) -> bool:
        """Whether states exist before the first step."""
        return self.ours.rule.eager

    @property
    def kernel(self) -> tuple[str, int]:
        """The rule and the number of states, which select the compiled code of a step. The code reads all other options
        as numbers."""
        return self.ours.rule.name, len(self.states)

    @property
    def kind(self) -> tuple[bool, ...]:
        """The properties of its rule on which host code depends."""
        rule = self.ours.rule
        return rule.counted, rule.eager, rule.trust, bool(rule.switched), bool(rule.running)

    def known(self, **kwargs: Any) -> dict[str, Any]:
        """The given options without those that the class lacks. A class with three betas gets the second one twice."""
        found = {key: value for key, value in kwargs.items() if key in self.options}
        if "betas" in found:
            found["betas"] = (*found["betas"], found["betas"][1])[: len(self.group["betas"])]
        return found


Adagrad, Adam, AdamW, SGD = torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
CASES = [
    Case("adam", FusedAdam, Adam, oracle.adam, {"lr": 0.01}),
    Case("adam-l2", FusedAdam, Adam, oracle.adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    Case(
        "adam-decoupled",
        FusedAdam,
        Adam,
        oracle.adam,
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    Case(
        "adam-l2-amsgrad-maximize",
        FusedAdam,
        Adam,
        oracle.adam,
        {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    ),
    Case("adamw", FusedAdamW, AdamW, oracle.adam, {"lr": 0.01}),
    Case(
        "adamw-amsgrad",
        FusedAdamW,
        AdamW,
        oracle.adam,
        {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "betas": (0.9, 0.99)},
        typical=True,
    ),
    Case(
        "adamw-maximize",
        FusedAdamW,
        AdamW,
        oracle.adam,
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "eps": 1e-6},
    ),
    Case(
        "sgd-dampening-maximize",
        FusedSGD,
        SGD,
        oracle.sgd,
        {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
        typical=True,
    ),
    Case("sgd-plain", FusedSGD, SGD, oracle.sgd, {"lr": 0.01, "weight_decay": 0.1}),
    Case("sgdw-nesterov", FusedSGDW, None, oracle.sgd, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    Case(
        "qhadam-l2-maximize",
        FusedQHAdam,
        None,
        oracle.qhadam,
        {"lr": 0.01, "nus": (0.7, 0.9), "weight_decay": 0.1, "maximize": True},
        typical=True,
    ),
    Case(
        "qhadamw-normalized",
        FusedQHAdamW,
        None,
        oracle.qhadam,
        {"lr": 0.01, "nus": (0.8, 1.0), "weight_decay": 0.5, "decay": "normalized", "decay_period": 400},
    ),
    Case("lamb", FusedLAMB, None, oracle.lamb, {"lr": 0.01}, typical=True),
    Case(
        "lamb-l2-nvlamb",
        FusedLAMB,
        None,
        oracle.lamb,
        {
            "lr": 0.01,
            "bias_correction": False,
            "adam_w_mode": False,
            "grad_averaging": False,
            "max_grad_norm": None,
            "use_nvlamb": True,
            "trust_clip": (0.5, 1.5),
        },
    ),
    Case(
        "lion-paper-maximize",
        FusedLion,
        None,
        oracle.lion,
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "decay": "paper", "lr_reference": 0.05},
        typical=True,
    ),
    Case("adagrad", FusedAdagrad, Adagrad, oracle.adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 1}),
    Case("adagrad-maximize", FusedAdagrad, Adagrad, oracle.adagrad, {"weight_decay": 0.1, "maximize": True}),
    Case(
        "nadam-decoupled",
        FusedNAdam,
        torch.optim.NAdam,
        oracle.nadam,
        {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.02, "decoupled_weight_decay": True},
    ),
    Case("radam", FusedRAdam, torch.optim.RAdam, oracle.radam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.9)}),
    Case(
        "schedule-free-adamw",
        FusedScheduleFreeAdamW,
        None,
        oracle.schedule_free_adamw,
        {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 3, "r": 0.5},
    ),
    Case(
        "schedule-free-sgd-maximize",
        FusedScheduleFreeSGD,
        None,
        oracle.schedule_free_sgd,
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
    ),
    Case(
        "ademamix",
        FusedAdEMAMix,
        None,
        oracle.ademamix,
        {"lr": 0.01, "weight_decay": 0.1, "alpha_warmup": 3, "beta3_warmup": 50},
    ),
    Case("adopt", FusedADOPT, None, oracle.adopt, {"lr": 0.01, "weight_decay": 0.1, "decouple": True}),
    Case("adan", FusedAdan, None, oracle.adan, {"lr": 0.01, "weight_decay": 0.1}),
    Case("stableadamw", FusedStableAdamW, None, oracle.stableadamw, {"lr": 0.01, "weight_decay": 0.1}),
]
BY_NAME = {case.name: case for case in CASES}
ADAMW, AMSGRAD = BY_NAME["adamw"], BY_NAME["adamw-amsgrad"]  # the latter has every state
LAMB = BY_NAME["lamb"]
SCALARS = {"step", "lr_max", *(name for case in CASES for name in case.ours.rule.running)}  # states of one number


class Target(NamedTuple):
    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("FUSED_OPTIM_CUDA_EMULATE") == "1"
HAS_CUDA = torch.cuda.is_available()
RUNS_ON = {
    "cpp": ["cpu"],
    "reference": ["cpu"] + ["cuda"] * HAS_CUDA,
    "triton": ["cpu"] if INTERPRETED else ["cuda"] * HAS_CUDA,
    "cuda": ["cuda"] * HAS_CUDA + ["cpu"] * EMULATED,
}
DEFAULT = ",".join(RUNS_ON)
RUNS_ON |= {name: ["cpu"] for name in ptx.backends.NAMES}
CHOSEN = os.environ.get("FUSED_OPTIM_TEST_BACKENDS", DEFAULT).split(",")
if not {*ptx.backends.NAMES}.isdisjoint(CHOSEN):
    ptx.backends.register()
# The interpreters take tens of milliseconds per program or launch.
SLOW = {*ptx.backends.NAMES, *["triton"] * INTERPRETED}


def targets() -> list[Any]:
    """Every chosen backend with each of its devices. A backend that does not work here is skipped with its reason."""
    reasons = backends.available()
    rows = []
    for name in CHOSEN:
        reason = reasons[name]
        marks = [] if reason is None else [pytest.mark.skip(reason=f"{name}: {reason}")]
        rows += [pytest.param(Target(name, device), id=f"{name}-{device}", marks=marks) for device in RUNS_ON[name]]
    return rows


on_every_target = pytest.mark.parametrize("target", targets())
# One case per rule: the typical one, or the first one.
TYPICAL = {case.rule: case for case in reversed(CASES)} | {case.rule: case for case in CASES if case.typical}
ONE_EACH = [case for case in CASES if case is TYPICAL[case.rule]]
RUN = ONE_EACH if INTERPRETED else CASES  # all cases would take half an hour in Triton's interpreter
CLASSES = list({case.ours: case for case in reversed(RUN)}.values())[::-1]  # the first case of each class
DECOUPLED = [case for case in CLASSES if issubclass(case.ours, Decoupled)]


def every(cases: Sequence[Case], *options: str, in_torch: bool = False) -> Any:
    """Parametrizes a test with the cases whose groups have these options. in_torch: and whose class torch has."""
    rows = [case for case in cases if case.options.issuperset(options) and (case.torch or not in_torch)]
    return pytest.mark.parametrize("case", rows, ids=str)


for_every_case, for_every_class, for_every_rule = every(RUN), every(CLASSES), every(ONE_EACH)
for_every_case_of_torch, for_every_class_of_torch = every(RUN, in_torch=True), every(CLASSES, in_torch=True)


def quick(target: Target, usual: int, interpreted: int) -> int:
    """A number of steps, elements or examples: `usual`, or `interpreted` on slow backends."""
    return interpreted if target.backend in SLOW else usual


def build(case: Case, target: Target, params: Any, **kwargs: Any) -> Any:
    return case.ours(params, backend=target.backend, **{**case.kwargs, **kwargs})


def build_torch(case: Case, params: Any, **kwargs: Any) -> Any:
    """torch's for-loop implementation, whose behaviour ours must have."""
    return case.torch(params, **{"foreach": False, **case.kwargs, **kwargs})


SHAPES: tuple[tuple[int, ...], ...] = ((3, 5), (), (0,), (1000,), (7, 1, 9))


def make_params(
    shapes: Iterable[Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.complex128 if dtype.is_complex else torch.float64
    return [
        torch.nn.Parameter(torch.randn(tuple(shape), generator=generator, dtype=draw).to(device, dtype))
        for shape in shapes
    ]


def random_grads(params: Sequence[Tensor], seed: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Random gradients that span six orders of magnitude."""
    generator = torch.Generator().manual_seed(1000 + seed)
    grads = []
    for p in params:
        kind = dtype or p.dtype
        draw = torch.complex128 if kind.is_complex else torch.float64
        size = 10.0 ** (torch.rand(p.shape, generator=generator, dtype=torch.float64) * 6 - 5)
        grads.append((torch.randn(p.shape, generator=generator, dtype=draw) * size).to(p.device, kind))
    return grads


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for p, grad in zip(params, grads, strict=True):
        if grad is not None and grad.dtype != p.dtype:
            p.grad_dtype = grad.dtype
        p.grad = None if grad is None else grad.clone(memory_format=torch.preserve_format)


def parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def hypers(optimizer: Optimizer) -> list[dict[str, Any]]:
    """For each parameter its param group."""
    return [group for group in optimizer.param_groups for _ in group["params"]]


def copies(params: Sequence[Tensor]) -> list[torch.nn.Parameter]:
    """Parameters with the same values and strides in other memory."""
    return [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]


def train(
    optimizers: Sequence[Optimizer], steps: int, seed: int = 0, each: Callable[[int], None] | None = None
) -> None:
    """Steps several optimizers, whose params have equal shapes, with the same random gradients. each: called after each
    step with its number."""
    for step in range(steps):
        grads = random_grads(parameters(optimizers[0]), seed + step)
        for optimizer in optimizers:
            params = parameters(optimizer)
            set_grads(params, [g.to(p.device, p.dtype) for g, p in zip(grads, params, strict=True)])
            optimizer.step()
        if each is not None:
            each(step)
