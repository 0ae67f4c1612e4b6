"""Optimizers that torch lacks, in plain PyTorch: one _foreach_ call per operation for all tensors of a group.

They are the baseline for optimizers without a fused kernel in torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


class Foreach(torch.optim.Optimizer):
    """Base class. A group holds "step", the number of updates so far. Subclasses name their states and define `update`
    for one group."""

    states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(self, groups: list[Group], **options: Any) -> None:
        super().__init__(groups, {"step": 0, **options})

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param] = {name: torch.zeros_like(param) for name in self.states}
            group["step"] += 1
            states = [[self.state[param][name] for param in params] for name in self.states]
            self.update(group, params, [param.grad for param in params], states)


def advance(group: Group, grads: list[Tensor], states: list[list[Tensor]]) -> tuple[float, float]:
    """Updates the running averages of the gradients and of their squares. Returns both bias corrections."""
    beta1, beta2 = group["betas"]
    torch._foreach_lerp_(states[0], grads, 1 - beta1)
    torch._foreach_mul_(states[1], beta2)
    torch._foreach_addcmul_(states[1], grads, grads, value=1 - beta2)
    return 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]


class ForeachQHAdam(Foreach):
    """arXiv:1810.06801, section 4.2."""

    def __init__(self, groups: list[Group], decoupled: bool = False, **options: Any) -> None:
        self.decoupled = decoupled
        super().__init__(groups, **options)

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]]) -> None:
        nu1, nu2 = group["nus"]
        if self.decoupled:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        correction1, correction2 = advance(group, grads, states)
        mean = torch._foreach_mul(states[0], nu1 / correction1)
        torch._foreach_add_(mean, grads, alpha=1 - nu1)
        denom = torch._foreach_mul(states[1], nu2 / correction2)
        if nu2 != 1:
            torch._foreach_addcmul_(denom, grads, grads, value=1 - nu2)
        torch._foreach_sqrt_(denom)
        torch._foreach_add_(denom, group["eps"])
        torch._foreach_addcdiv_(params, mean, denom, -group["lr"])


class ForeachLAMB(Foreach):
    """arXiv:1904.00962, with decoupled decay and without clipping."""

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]]) -> None:
        correction1, correction2 = advance(group, grads, states)
        denom = torch._foreach_div(states[1], correction2)
        torch._foreach_sqrt_(denom)
        torch._foreach_add_(denom, group["eps"])
        update = torch._foreach_div(states[0], correction1)
        torch._foreach_div_(update, denom)
        if group["weight_decay"]:
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
            ratios = torch._foreach_norm(params, dtype=torch.float32)
            torch._foreach_div_(ratios, torch._foreach_norm(update, dtype=torch.float32))
            for tensor, ratio in zip(update, ratios, strict=True):
                tensor.mul_(ratio)
        torch._foreach_add_(params, update, alpha=-group["lr"])


class ForeachLion(Foreach):
    """arXiv:2302.06675, algorithm 2."""

    states = ("exp_avg",)

    def update(self, group: Group, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]]) -> None:
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        update = torch._foreach_lerp(states[0], grads, 1 - beta1)
        torch._foreach_sign_(update)
        torch._foreach_add_(params, update, alpha=-group["lr"])
        torch._foreach_lerp_(states[0], grads, 1 - beta2)


class TorchSGDW(torch.optim.SGD):
    """Decoupled decay of the params, then torch's SGD in any of its implementations."""

    def __init__(self, groups: list[Group], **options: Any) -> None:
        super().__init__(
            [{**group, "weight_decay": 0.0, "decay": group["weight_decay"]} for group in groups], **options
        )

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 1 - group["lr"] * group["decay"])
        super().step()
