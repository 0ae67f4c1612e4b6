"""One table of cases, and the ground every property test stands on: targets, tensors, and comparison in ulps.

A case is one row: our class, torch's, the oracle's rule and keyword arguments. A new optimizer is one or two rows here
and one function in oracle.py. A target is a backend together with a device it runs on. Targets come from
`fused_optim.backends.available()` and the environment, so `make gpu` runs the very same tests on the GPU:

    TRITON_INTERPRET=1          adds the Triton kernels on the CPU, in Triton's interpreter (small sizes, few examples)
    FUSED_OPTIM_CUDA_EMULATE=1  adds the CUDA kernel body, looped over on the CPU
    FUSED_OPTIM_TEST_BACKENDS   comma-separated names: only these backends
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_optim import FusedAdam, FusedAdamW, backends


@dataclass(frozen=True)
class Case:
    name: str
    ours: Any  # class
    torch: Any  # class
    rule: oracle.Rule
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("adam", FusedAdam, torch.optim.Adam, oracle.adam, {"lr": 0.01}),
    Case("adam-l2", FusedAdam, torch.optim.Adam, oracle.adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    Case(
        "adam-decoupled",
        FusedAdam,
        torch.optim.Adam,
        oracle.adam,
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    Case(
        "adam-l2-amsgrad-maximize",
        FusedAdam,
        torch.optim.Adam,
        oracle.adam,
        {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    ),
    Case("adamw", FusedAdamW, torch.optim.AdamW, oracle.adam, {"lr": 0.01}),
    Case(
        "adamw-amsgrad",
        FusedAdamW,
        torch.optim.AdamW,
        oracle.adam,
        {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "betas": (0.9, 0.99)},
    ),
    Case(
        "adamw-maximize",
        FusedAdamW,
        torch.optim.AdamW,
        oracle.adam,
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "eps": 1e-6},
    ),
]


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
SLOW = {"triton"} if INTERPRETED else set()  # the interpreter takes tens of milliseconds for each program


def targets() -> list[Any]:
    """Every backend with every device it should run on here; one that cannot run is skipped with its own reason."""
    chosen = os.environ.get("FUSED_OPTIM_TEST_BACKENDS", ",".join(RUNS_ON)).split(",")
    reasons = backends.available()
    rows = []
    for name in chosen:
        reason = reasons[name]
        marks = [] if reason is None else [pytest.mark.skip(reason=f"{name}: {reason}")]
        rows += [pytest.param(Target(name, device), id=f"{name}-{device}", marks=marks) for device in RUNS_ON[name]]
    return rows


on_every_target = pytest.mark.parametrize("target", targets())
# In Triton's interpreter, three rows that have every option among them: minutes instead of half an hour.
for_every_case = pytest.mark.parametrize("case", CASES[3:6] if INTERPRETED else CASES, ids=str)
CLASSES = list({case.ours: case for case in CASES}.values())  # one case for each of our classes
for_every_class = pytest.mark.parametrize("case", CLASSES, ids=[case.ours.__name__ for case in CLASSES])


def quick(target: Target, usual: int, interpreted: int) -> int:
    """A number of steps, elements or examples: fewer in Triton's interpreter."""
    return interpreted if target.backend in SLOW else usual


def build(case: Case, target: Target, params: Any, **kwargs: Any) -> Any:
    return case.ours(params, backend=target.backend, **{**case.kwargs, **kwargs})


def build_torch(case: Case, params: Any, **kwargs: Any) -> Any:
    """torch's own for-loop implementation, the contract."""
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
    """Gradients that span six orders of magnitude, as real ones do."""
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
    """The group options of every parameter."""
    return [group for group in optimizer.param_groups for _ in group["params"]]


def snapshot(optimizer: Optimizer) -> list[oracle.Slot]:
    """Params and states as they are stored now, in float64."""
    return [
        oracle.Slot(oracle.as_real(p), {key: oracle.as_real(value) for key, value in optimizer.state[p].items()})
        if p in optimizer.state
        else oracle.Slot(oracle.as_real(p))
        for p in parameters(optimizer)
    ]


def stored_dtypes(optimizer: Optimizer) -> list[dict[str, torch.dtype]]:
    return [
        {"param": p.dtype, **{key: value.dtype for key, value in optimizer.state[p].items()}}
        if p in optimizer.state
        else {"param": p.dtype}
        for p in parameters(optimizer)
    ]


def ulps(got: Tensor, want: Tensor, scale: Tensor, dtype: torch.dtype) -> float:
    """The largest error, in units of the last place of numbers as large as `scale`, stored as dtype.

    Below the smallest normal number the unit no longer shrinks.
    """
    if got.numel() == 0:
        return 0.0
    info = torch.finfo(dtype.to_real() if dtype.is_complex else dtype)
    unit = scale.abs().clamp(min=info.tiny) * info.eps
    return ((got - want).abs() / unit).max().item()


def errors(
    got: Sequence[oracle.Slot],
    want: Sequence[oracle.Slot],
    sizes: Sequence[oracle.Slot],
    dtypes: Sequence[dict[str, torch.dtype]],
) -> dict[str, float]:
    """The largest error in ulps of params and of every state; `sizes` as `scales` returns them."""
    worst = {"param": 0.0}
    for slot, truth, scale, dtype in zip(got, want, sizes, dtypes, strict=True):
        assert slot.state.keys() == truth.state.keys()
        worst["param"] = max(worst["param"], ulps(slot.param, truth.param, scale.param, dtype["param"]))
        for key, value in truth.state.items():
            if key == "step":
                assert slot.state["step"].item() == value.item()
            else:
                error = ulps(slot.state[key], value, scale.state[key], dtype[key])
                worst[key] = max(worst.get(key, 0.0), error)
    return worst


def scales(
    rule: oracle.Rule,
    before: Sequence[oracle.Slot],
    after: Sequence[oracle.Slot],
    grads: Sequence[Tensor | None],
    hypers: Sequence[dict[str, Any]],
) -> list[oracle.Slot]:
    """The magnitudes that errors are measured by; numbers that cancel cannot be known better than these.

    States: what the rule makes of absolute values, where nothing cancels, or the state before where that was larger.
    Params: the larger of before and after, and at least lr, about the size of a step.
    """

    def larger(x: Tensor | None, y: Tensor) -> Tensor:
        return y.abs() if x is None else torch.maximum(x.abs(), y.abs())

    absolute = [oracle.Slot(slot.param.abs(), {k: v.abs() for k, v in slot.state.items()}) for slot in before]
    sizes = [None if g is None else oracle.as_real(g).abs() for g in grads]
    summed = oracle.step(rule, absolute, sizes, [{**hyper, "maximize": False} for hyper in hypers])
    return [
        oracle.Slot(
            larger(old.param, new.param).clamp(min=float(hyper["lr"])),
            {key: larger(old.state.get(key), value) for key, value in total.state.items()},
        )
        for old, new, total, hyper in zip(before, after, summed, hypers, strict=True)
    ]


def larger_scales(a: Sequence[oracle.Slot], b: Sequence[oracle.Slot]) -> list[oracle.Slot]:
    return [
        oracle.Slot(
            torch.maximum(one.param, other.param),
            {k: torch.maximum(one.state.get(k, v), v) for k, v in other.state.items()},
        )
        for one, other in zip(a, b, strict=True)
    ]


def checked_step(
    optimizer: Optimizer, rule: oracle.Rule, bound: float, grad_scale: float = 1.0, found_inf: float = 0.0
) -> dict[str, float]:
    """Steps once and compares with the oracle, which starts from the very numbers that were stored before."""
    before = snapshot(optimizer)
    grads = [p.grad for p in parameters(optimizer)]
    want = oracle.step(rule, before, grads, hypers(optimizer), grad_scale, found_inf)
    sizes = scales(rule, before, want, [None if g is None else g / grad_scale for g in grads], hypers(optimizer))
    optimizer.step()
    worst = errors(snapshot(optimizer), want, sizes, stored_dtypes(optimizer))
    assert max(worst.values()) <= bound, worst
    return worst


def assert_equal(ours: Any, theirs: Any) -> None:
    """Bit for bit, NaN equal to NaN; states are compared with their dtypes."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def copies(params: Sequence[Tensor]) -> list[torch.nn.Parameter]:
    """The same values and the same strides, in other memory."""
    return [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]


def train(
    optimizers: Sequence[Optimizer], steps: int, seed: int = 0, each: Callable[[int], None] | None = None
) -> None:
    """Steps optimizers of equally shaped params side by side with the same random gradients."""
    for step in range(steps):
        grads = random_grads(parameters(optimizers[0]), seed + step)
        for optimizer in optimizers:
            params = parameters(optimizer)
            set_grads(params, [g.to(p.device, p.dtype) for g, p in zip(grads, params, strict=True)])
            optimizer.step()
        if each is not None:
            each(step)


def assert_like_torch(ours: Optimizer, theirs: Optimizer, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Params and states within rounding; the same states, the same step counts.

    Squares do not cancel: next to no absolute error is granted to them.
    """
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach().cpu(), rtol=rtol, atol=atol, equal_nan=True)
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            least = atol * 1e-6 if key.endswith("_sq") else atol
            mine = ours.state[p][key].cpu()
            torch.testing.assert_close(mine, value.cpu(), rtol=rtol, atol=least, equal_nan=True)
