"""The optimizers of the benchmarks: hyperparameters, states, formula in float64, and the memory traffic of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, maximum

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2
MOMENTUM, NUS, LION_BETAS = 0.9, (0.7, 1.0), (0.9, 0.99)

# (count of this step, gradient, states) -> (update before lr, new states). Elementwise. The caller adds the decay.
Formula = Callable[[int, Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]


def averages(grad: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor]:
    return BETAS[0] * states[0] + (1 - BETAS[0]) * grad, BETAS[1] * states[1] + (1 - BETAS[1]) * grad**2


def adam(count: int, grad: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """arXiv:1412.6980. With a third state: amsgrad (Reddi et al., ICLR 2018)."""
    exp_avg, exp_avg_sq = averages(grad, states)
    largest = [maximum(state, exp_avg_sq) for state in states[2:]]
    denom = ([exp_avg_sq, *largest][-1] / (1 - BETAS[1] ** count)).sqrt() + EPS
    return exp_avg / (1 - BETAS[0] ** count) / denom, [exp_avg, exp_avg_sq, *largest]


def sgd(count: int, grad: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """torch.optim.SGD without dampening."""
    buffer = MOMENTUM * states[0] + grad
    return buffer, [buffer]


def qhadam(count: int, grad: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """arXiv:1810.06801, section 4.2."""
    exp_avg, exp_avg_sq = averages(grad, states)
    mean = NUS[0] * exp_avg / (1 - BETAS[0] ** count) + (1 - NUS[0]) * grad
    mean_sq = NUS[1] * exp_avg_sq / (1 - BETAS[1] ** count) + (1 - NUS[1]) * grad**2
    return mean / (mean_sq.sqrt() + EPS), [exp_avg, exp_avg_sq]


def lion(count: int, grad: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """arXiv:2302.06675, algorithm 2."""
    update = (LION_BETAS[0] * states[0] + (1 - LION_BETAS[0]) * grad).sign()
    return update, [LION_BETAS[1] * states[0] + (1 - LION_BETAS[1]) * grad]


@dataclass(frozen=True)
class Pass:
    """One walk over memory. read: names of the streams ("param", "grad", states) that it only reads. written: names of
    those that it reads and writes."""

    read: tuple[str, ...]
    written: tuple[str, ...]


@dataclass(frozen=True)
class Optimizer:
    """title: the name in text. fused: the name of our class. options: arguments for all peers. decoupled: decay is not
    added to the gradient. trust: the update of each tensor is scaled by ‖param‖ / ‖update‖, so a step takes two walks.
    """

    title: str
    fused: str
    options: dict[str, Any]
    states: tuple[str, ...]
    formula: Formula
    decoupled: bool
    trust: bool = False

    def passes(self, states: tuple[str, ...]) -> list[Pass]:
        """The walks of a step with the fewest reads and writes.

        The second walk of a trust ratio computes the update from the states again. Storing the update would not move
        fewer bytes: the first walk would write it, and the second would read it.
        """
        if self.trust:
            return [Pass(("grad", "param"), states), Pass(states, ("param",))]
        return [Pass(("grad",), ("param", *states))]


_ADAM = {"lr": LR, "betas": BETAS, "eps": EPS}
_SGD = {"lr": LR, "momentum": MOMENTUM}
_QHADAM = {**_ADAM, "nus": NUS}
_LION = {"lr": LR, "betas": LION_BETAS}
_AVERAGES = ("exp_avg", "exp_avg_sq")
_BUFFER = ("momentum_buffer",)

OPTIMIZERS = {
    "adamw": Optimizer("AdamW", "FusedAdamW", _ADAM, _AVERAGES, adam, True),
    "adam": Optimizer("Adam", "FusedAdam", _ADAM, _AVERAGES, adam, False),
    "sgd": Optimizer("SGD with momentum", "FusedSGD", _SGD, _BUFFER, sgd, False),
    "sgdw": Optimizer("SGDW", "FusedSGDW", _SGD, _BUFFER, sgd, True),
    "qhadam": Optimizer("QHAdam", "FusedQHAdam", _QHADAM, _AVERAGES, qhadam, False),
    "qhadamw": Optimizer("QHAdamW", "FusedQHAdamW", _QHADAM, _AVERAGES, qhadam, True),
    "lamb": Optimizer("LAMB", "FusedLAMB", _ADAM, _AVERAGES, adam, True, trust=True),
    "lion": Optimizer("Lion", "FusedLion", _LION, ("exp_avg",), lion, True),
}
AMSGRAD = ("adam", "adamw")
BASELINES = ("torch-fused", "torch-foreach", "foreach")  # ratios are to the first of these that passes the check
