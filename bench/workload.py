"""What one benchmark case steps: tensors, groups, the bytes a step must move, and the check of a peer's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from shapes import CASES, OWN_GROUPS, Shape
from torch import Tensor

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2
CHECKED_STEPS = 3
SAMPLED = 1024  # elements taken from the head, the tail and the middle of each tensor for the check

# dtype of params and gradients, dtype of the states
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-float32-states": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float16),
}


@dataclass(frozen=True)
class Config:
    """One row of the grid. groups: "one", "two" (decay and no decay), "each" (one per tensor). hot: no flushing."""

    case: str
    dtype: str = "float32"
    groups: str = "one"
    amsgrad: bool = False
    hot: bool = False

    def __str__(self) -> str:
        groups = {"one": "", "two": "two groups", "each": "one group per tensor"}[self.groups]
        options = [self.dtype, groups, "amsgrad" if self.amsgrad else "", "hot" if self.hot else ""]
        return ", ".join([self.case, *filter(None, options)])

    @property
    def state_names(self) -> list[str]:
        return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self.amsgrad else [])]

    def memory(self) -> int:
        """Bytes of params, gradients, states and one more set of states, which a peer holds until it shares ours."""
        param, state = (dtype.itemsize for dtype in DTYPES[self.dtype])
        count = sum(int(torch.Size(shape).numel()) for shape in CASES[self.case]())
        return count * (2 * param + 2 * len(self.state_names) * state)


def random_gradient(like: Tensor) -> Tensor:
    """Random signs, sizes between 0.5 and 1.5: squares of much smaller ones vanish from anybody's float16 states."""
    uniform = torch.empty_like(like).uniform_(-1, 1)
    return uniform.add_((uniform >= 0).to(uniform.dtype).sub_(0.5))


class Workload:
    """Params, gradients and states of one case. All peers step the same memory, so that none has luckier pages."""

    def __init__(self, config: Config, device: torch.device, shapes: list[Shape] | None = None) -> None:
        self.config, self.device = config, device
        param_dtype, self.state_dtype = DTYPES[config.dtype]
        shapes = CASES[config.case]() if shapes is None else shapes
        self.params = [
            torch.nn.Parameter(torch.randn(shape, dtype=param_dtype, device=device).mul_(0.02)) for shape in shapes
        ]
        for param in self.params:
            param.grad = random_gradient(param.detach())
        self.grads = [param.grad for param in self.params if param.grad is not None]
        self.states = {
            name: [torch.zeros_like(param, dtype=self.state_dtype).detach() for param in self.params]
            for name in config.state_names
        }

    def groups(self) -> list[dict[str, Any]]:
        kind = OWN_GROUPS.get(self.config.case, self.config.groups)
        if kind == "each":
            return [{"params": [param], "weight_decay": WEIGHT_DECAY} for param in self.params]
        if kind == "two":
            members = [[p for p in self.params if p.ndim >= 2], [p for p in self.params if p.ndim < 2]]
            decays = [WEIGHT_DECAY, 0.0]
            return [{"params": m, "weight_decay": d} for m, d in zip(members, decays, strict=True) if m]
        return [{"params": self.params, "weight_decay": WEIGHT_DECAY}]

    def share(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives the optimizer our states in place of its own, where those have the same name, shape and dtype."""
        for index, param in enumerate(self.params):
            state = optimizer.state[param]
            for name, ours in self.states.items():
                theirs = state.get(name)
                if (
                    isinstance(theirs, Tensor)
                    and theirs.shape == ours[index].shape
                    and theirs.dtype == ours[index].dtype
                ):
                    state[name] = ours[index].copy_(theirs)

    @property
    def read_and_written(self) -> list[list[Tensor]]:
        return [[param.detach() for param in self.params], *self.states.values()]

    def bytes(self) -> int:
        """What one step must move: param and states read and written, the gradient read."""

        def size(tensors: list[Tensor]) -> int:
            return sum(tensor.nbytes for tensor in tensors)

        return 2 * sum(size(stream) for stream in self.read_and_written) + size(self.grads)


class Sample:
    """The same elements of every tensor of a list, as float64: head, tail and some between, all of small ones."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.places: list[Tensor | slice] = []
        for tensor in tensors:
            count = tensor.numel()
            if count <= 4 * SAMPLED:
                self.places.append(slice(None))
                continue
            head, tail = torch.arange(SAMPLED), torch.arange(count - SAMPLED, count)
            self.places.append(torch.cat([head, torch.randint(count, (2 * SAMPLED,)), tail]).to(tensor.device))

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().view(-1)[at] for t, at in zip(tensors, self.places, strict=True)]).double().cpu()

    def spread(self, tensors: Sequence[Tensor], values: list[float]) -> Tensor:
        """values: one per tensor; returns one per sampled element."""
        counts = [
            t.numel() if isinstance(at, slice) else at.numel() for t, at in zip(tensors, self.places, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(counts))


def check(workload: Workload, step: Callable[[], Any], slack: float) -> float:
    """Largest error of the params after three steps against float64 AdamW (arXiv:1711.05101), as a share of tolerance.

    Tolerance per step: 2 eps |param| for the param's roundings and (32 eps + slack) lr for those of the update, where
    eps is that of the coarsest dtype in play, and slack is what a peer with quantised states is allowed on top.
    """
    sample = Sample(workload.params)
    decay_of = {param: group["weight_decay"] for group in workload.groups() for param in group["params"]}
    decay = sample.spread(workload.grads, [decay_of[param] for param in workload.params])
    param = sample(workload.params)
    exp_avg, exp_avg_sq, largest = torch.zeros_like(param), torch.zeros_like(param), torch.zeros_like(param)
    # Fresh gradients without fresh memory: powers of two are exact, and in the end all is as before.
    scales = [-0.5, -0.5, 4.0]
    for count, scale in enumerate(scales, start=1):
        grad = sample(workload.grads)
        param = param * (1 - LR * decay)
        exp_avg = BETAS[0] * exp_avg + (1 - BETAS[0]) * grad
        exp_avg_sq = BETAS[1] * exp_avg_sq + (1 - BETAS[1]) * grad**2
        largest = torch.maximum(largest, exp_avg_sq)
        second = largest if workload.config.amsgrad else exp_avg_sq
        param = param - LR * (exp_avg / (1 - BETAS[0] ** count)) / ((second / (1 - BETAS[1] ** count)).sqrt() + EPS)
        step()
        torch._foreach_mul_(workload.grads, scale)
    eps = max(torch.finfo(dtype).eps for dtype in DTYPES[workload.config.dtype])
    tolerance = CHECKED_STEPS * (2 * eps * param.abs() + (32 * eps + slack) * LR)
    error = (sample(workload.params) - param).abs() / tolerance
    return float("inf") if error.isnan().any() else error.max().item()
