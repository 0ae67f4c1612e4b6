"""One benchmark case: its tensors and groups, the bytes that a step must move, and the check of a peer's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from family import LR, OPTIMIZERS, WEIGHT_DECAY, Optimizer, Pass
from shapes import CASES, OWN_GROUPS, Shape
from torch import Tensor

# The gradient's factor in each step of the check. Powers of two are exact; signs and sizes differ, so that a wrong beta
# changes the result.
CHECKED_STEPS = (1.0, -0.0625, -0.25)
SAMPLED = 1024  # elements that the check takes from the head and from the tail of each tensor; twice that in between
ROUNDINGS = 8  # tolerance of an update in units of eps lr, see check
PIECE = 1 << 15  # elements of a tensor that are converted to float64 at a time

# dtype of params and gradients, dtype of the states
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-float32-states": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float16),
}


@dataclass(frozen=True)
class Config:
    """One row of the grid. groups: "one", "two" (decay and no decay), "each" (one per tensor). hot: caches are not
    flushed. optimizer: a key of family.OPTIMIZERS. crowded: a busy process for each core but one runs meanwhile."""

    case: str
    dtype: str = "float32"
    groups: str = "one"
    amsgrad: bool = False
    hot: bool = False
    optimizer: str = "adamw"
    crowded: bool = False

    def __str__(self) -> str:
        case = self.case if self.optimizer == "adamw" else f"{self.optimizer} on {self.case}"
        groups = {"one": "", "two": "two groups", "each": "one group per tensor"}[self.groups]
        options = [self.dtype, groups, *(name for name in ("amsgrad", "hot", "crowded") if getattr(self, name))]
        return ", ".join([case, *filter(None, options)])

    @property
    def spec(self) -> Optimizer:
        return OPTIMIZERS[self.optimizer]

    @property
    def state_names(self) -> tuple[str, ...]:
        return (*self.spec.states, *(["max_exp_avg_sq"] if self.amsgrad else []))

    def memory(self) -> int:
        """Bytes of params, gradients and states, of the check's copy of the gradients, and of a second set of states:
        a peer has its own until it gets the shared ones."""
        param, state = (dtype.itemsize for dtype in DTYPES[self.dtype])
        count = sum(int(torch.Size(shape).numel()) for shape in CASES[self.case]())
        return count * (3 * param + 2 * len(self.state_names) * state)


def random_gradient(like: Tensor) -> Tensor:
    """Random signs, magnitudes between 0.5 and 1.5. Squares of much smaller values underflow in float16 states."""
    uniform = torch.empty_like(like).uniform_(-1, 1)
    return uniform.add_((uniform >= 0).to(uniform.dtype).sub_(0.5))


class Workload:
    """Params, gradients and states of one case. All peers step the same memory, so page placement favours none."""

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
        """Replaces the optimizer's states by the shared ones of the same name, shape and dtype."""
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
    def streams(self) -> dict[str, list[Tensor]]:
        """The tensors by role: "param", "grad", and the states' names."""
        return {"param": [param.detach() for param in self.params], "grad": self.grads, **self.states}

    @property
    def passes(self) -> list[Pass]:
        return self.config.spec.passes(self.config.state_names)

    def bytes(self) -> int:
        """Bytes that one step must move: each walk reads each operand once, and writes each result once."""
        size = {name: sum(tensor.nbytes for tensor in stream) for name, stream in self.streams.items()}
        return sum(
            sum(size[name] for name in walk.read) + 2 * sum(size[name] for name in walk.written) for walk in self.passes
        )


class Sample:
    """The same elements of every tensor in a list, as float64: head, tail and some in between; small tensors whole."""

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


def trust_ratios(
    workload: Workload, grads: list[Tensor], decays: list[float], count: int, unit: list[Tensor]
) -> list[float]:
    """‖param‖ / ‖update‖ of each whole tensor in step `count`, in float64. The ratio is 1 without decay, as in Apex.

    grads: the gradients of the first step. Those of later steps are multiples of them.
    unit: the states before this step if the first gradient is 1. Those of a gradient g are unit[0] g and unit[1] g².
    """
    ratios = []
    for param, grad, decay in zip(workload.params, grads, decays, strict=True):
        squares = torch.zeros(2, dtype=torch.float64, device=param.device)
        pieces = zip(param.detach().view(-1).split(PIECE), grad.view(-1).split(PIECE), strict=True)
        for p, g in ((p.double(), g.double()) for p, g in pieces):
            states = [unit[0] * g, unit[1] * g**2]
            update, _ = workload.config.spec.formula(count, CHECKED_STEPS[count - 1] * g, states)
            squares += torch.stack([p.square().sum(), (update + decay * p).square().sum()])
        param_square, update_square = squares.tolist()
        ratios.append((param_square / update_square) ** 0.5 if decay else 1.0)
    return ratios


def check(workload: Workload, step: Callable[[], Any], slack: float) -> float:
    """Largest error of the params after three steps against the optimizer in float64, divided by the tolerance.

    Tolerance per step: 2 eps |param| for the roundings of the param, plus (ROUNDINGS eps + slack) lr for those of the
    update. With a trust ratio, lr is lr times the ratio. eps is that of the coarsest dtype of the case. slack is the
    allowance for a peer with quantised states.
    """
    spec, config = workload.config.spec, workload.config
    sample = Sample(workload.params)
    decay_of = {param: group["weight_decay"] for group in workload.groups() for param in group["params"]}
    decays = [decay_of[param] for param in workload.params]
    decay, param, grad = sample.spread(workload.grads, decays), sample(workload.params), sample(workload.grads)
    states, unit = ([torch.zeros_like(x) for _ in config.state_names] for x in (param, param.new_zeros(())))
    kept = [grad.clone() for grad in workload.grads]  # some peers write to the gradients
    eps = max(torch.finfo(dtype).eps for dtype in DTYPES[config.dtype])
    tolerance = torch.zeros_like(param)
    for count, scale in enumerate(CHECKED_STEPS, start=1):
        size = torch.full_like(param, LR)
        if spec.trust:
            size *= sample.spread(workload.grads, trust_ratios(workload, kept, decays, count, unit))
            _, unit = spec.formula(count, torch.full_like(unit[0], scale), unit)
        update, states = spec.formula(count, scale * grad + (0.0 if spec.decoupled else decay * param), states)
        param = param - size * (update + (decay * param if spec.decoupled else 0.0))
        tolerance += 2 * eps * param.abs() + (ROUNDINGS * eps + slack) * size
        torch._foreach_copy_(workload.grads, kept)
        torch._foreach_mul_(workload.grads, scale)
        step()
    torch._foreach_copy_(workload.grads, kept)
    error = (sample(workload.params) - param).abs() / tolerance
    return float("inf") if error.isnan().any() else error.max().item()
