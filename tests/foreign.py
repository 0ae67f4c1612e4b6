"""Stand-ins for other libraries' optimizers, and comparisons with them, for the tests that convert checkpoints.

Apex and DeepSpeed need a GPU and a compiled build. The stand-ins keep states and counts in the same way, so
state_dict() has the same keys and values. They compute the kernels' formulas in plain PyTorch. Sources: Apex
(apex/optimizers, csrc/multi_tensor_adam.cu, multi_tensor_sgd_kernel.cu) and DeepSpeed 0.19.8 (deepspeed/ops, csrc).
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from cases import copies, make_params, parameters, train
from torch import Tensor

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SHAPES = [(5, 3), (), (70, 61)]
BACKEND = "reference"  # conversion only makes a state_dict; loading one is tested on every backend


def package(name: str) -> ModuleType:
    return pytest.importorskip(name, reason=f"{name}, whose checkpoints are to be read, is not installed")


def through_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def unlike(optimizer: torch.optim.Optimizer, groups: int) -> list[Any]:
    """Copies of the optimizer's params in the given number of groups, without their options: those must come from the
    checkpoint."""
    other = copies(parameters(optimizer))
    cut = len(optimizer.param_groups[0]["params"])
    return [{"params": other}] if groups == 1 else [{"params": other[:cut]}, {"params": other[cut:]}]


def goes_on(
    theirs: torch.optim.Optimizer,
    ours: Callable[..., torch.optim.Optimizer],
    converter: Callable[[Any], Any],
    rtol: float = 1e-10,
    steps: int = 4,
    **options: Any,
) -> torch.optim.Optimizer:
    """Loads the converted state_dict of theirs into ours and trains both further. The converter must not change its
    input."""
    saved = through_file(theirs.state_dict())
    kept = copy.deepcopy(saved)
    converted = converter(saved)
    torch.testing.assert_close(saved, kept, rtol=0, atol=0)
    assert saved["param_groups"] == kept["param_groups"]
    optimizer = ours(unlike(theirs, len(theirs.param_groups)), lr=123.0, backend=BACKEND, **options)
    optimizer.load_state_dict(converted)
    train([theirs, optimizer], steps, seed=50)
    for p, q in zip(parameters(theirs), parameters(optimizer), strict=True):
        torch.testing.assert_close(q.detach(), p.detach(), rtol=rtol, atol=rtol)
    return optimizer


def in_groups(dtype: torch.dtype = F64, **options: Any) -> list[dict[str, Any]]:
    params = make_params(SHAPES, dtype)
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.3, **options}]


def build_theirs(name: str, params: Any, **options: Any) -> Any:
    """An optimizer of bitsandbytes. On the CPU its paged classes warn that they cannot page."""
    if name.startswith("SGD"):
        options["momentum"] = 0.9
    return getattr(package("bitsandbytes").optim, name)(params, lr=0.01, **options)


# ---- stand-ins


def adam_update(
    p: Tensor, state: dict[str, Tensor], step: float, group: dict[str, Any], adam_w_mode: bool = True
) -> None:
    """One update as in the kernels of both FusedAdams. eps is added to the root, after bias correction."""
    beta1, beta2 = group["betas"]
    grad = p.grad if adam_w_mode else p.grad + group["weight_decay"] * p
    state["exp_avg"].mul_(beta1).add_((1 - beta1) * grad)
    state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad * grad)
    mean, square = state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
    update = mean / (square.sqrt() + group["eps"])
    p.sub_(group["lr"] * (update + group["weight_decay"] * p if adam_w_mode else update))


class Stand(torch.optim.Optimizer):
    """Base of the stand-ins. Subclasses define options and update()."""

    options: ClassVar[dict[str, Any]]

    def __init__(self, params: Any, adam_w_mode: bool = True, **options: Any) -> None:
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {**self.options, **options})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            self.update(group, [p for p in group["params"] if p.grad is not None])

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def begin(self, p: Tensor, *names: str, dtype: torch.dtype | None = None, **more: Any) -> dict[str, Any]:
        if not self.state[p]:
            self.state[p] = {**more, **{name: torch.zeros_like(p.detach(), dtype=dtype) for name in names}}
        return self.state[p]


ADAM = {"lr": 0.01, "bias_correction": True, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "nesterov": False}


class ApexAdam(Stand):
    """Keeps the step count in the group. With capturable=True, lr and step are tensors."""

    options: ClassVar[dict[str, Any]] = ADAM

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        capturable = isinstance(group["lr"], Tensor)
        group["step"] = group.get("step", torch.zeros(1, dtype=torch.int32) if capturable else 0) + 1
        for p in params:
            state = self.begin(
                p, "exp_avg", "exp_avg_sq", dtype=torch.float64 if p.dtype == torch.float64 else torch.float32
            )
            adam_update(p, state, float(group["step"]), group, self.adam_w_mode)


class ApexSGD(Stand):
    wd_after_momentum = False
    options: ClassVar[dict[str, Any]] = {
        "lr": 0.01,
        "momentum": 0.9,
        "dampening": 0.2,
        "weight_decay": 0.1,
        "nesterov": False,
    }

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            first = not self.state[p]
            buffer = self.begin(p, "momentum_buffer")["momentum_buffer"]
            decay = group["weight_decay"] * p
            grad = p.grad if self.wd_after_momentum else p.grad + decay
            if first:
                buffer.copy_(grad)
            else:
                buffer.mul_(group["momentum"]).add_((1 - group["dampening"]) * grad)
            update = grad + group["momentum"] * buffer if group["nesterov"] else buffer
            p.sub_(group["lr"] * (update + decay if self.wd_after_momentum else update))


class DeepSpeedAdam(Stand):
    """The last param of a group holds the step count of the group. It advances once for each dtype in the group."""

    options: ClassVar[dict[str, Any]] = ADAM

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        group.setdefault("step", 0)
        last = [self.begin(p, "exp_avg", "exp_avg_sq", step=group["step"]) for p in params][-1]
        for dtype in dict.fromkeys(p.dtype for p in params):
            last["step"] += 1
            for p in params:
                if p.dtype == dtype:
                    adam_update(p, self.state[p], last["step"], group, self.adam_w_mode)


class DeepSpeedCPUAdam(Stand):
    options: ClassVar[dict[str, Any]] = {**ADAM, "amsgrad": False}

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            state = self.begin(p, "exp_avg", "exp_avg_sq", step=0)
            state["step"] += 1
            adam_update(p, state, state["step"], group, self.adam_w_mode)


class DeepSpeedLamb(Stand):
    options: ClassVar[dict[str, Any]] = {**ADAM, "max_grad_norm": 0.0, "max_coeff": 10.0, "min_coeff": 0.01}

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            state = self.begin(p, "exp_avg", "exp_avg_sq", step=0)
            state["step"] += 1
            state["exp_avg"].mul_(beta1).add_((1 - beta1) * p.grad)
            state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * p.grad * p.grad)
            update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"]) + group["weight_decay"] * p
            ratio = (p.norm() / update.norm()).clamp(group["min_coeff"], group["max_coeff"])
            size = group["lr"]
            if group["bias_correction"]:
                size *= (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
            p.sub_(size * ratio * update)


class DeepSpeedLion(Stand):
    """`cpu`: keeps exp_avg_sq, which DeepSpeedCPULion allocates and never uses."""

    options: ClassVar[dict[str, Any]] = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    cpu = False

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            average = self.begin(p, "exp_avg", *["exp_avg_sq"] * self.cpu, step=1)["exp_avg"]
            direction = (beta1 * average + (1 - beta1) * p.grad).sign()
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * direction)
            average.mul_(beta2).add_((1 - beta2) * p.grad)
