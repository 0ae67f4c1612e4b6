"""Schedule-Free AdamW and SGD: an average of the iterates takes the place of a learning rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Option, Rule
from .base import FusedOptimizer
from .checks import check_adam_like
from .options import Common

OPTIONS: tuple[Option, ...] = (
    ("warmup_steps", "option_a", 1),
    ("r", "option_b", 1),
    ("weight_lr_power", "option_c", 1),
    ("weight_decay", "option_d", 1),
)
RUNNING = {"weight_sum": 0.0, "lr_max": 0.0}


class ScheduleFree(FusedOptimizer):
    r"""Base of the Schedule-Free optimizers. They keep three points: $z$, where the steps of the inner optimizer are
    taken; $x$, an average of all $z$, which is the result of the training; and $y$, between the two, at which gradients
    are computed:

    $$ y = (1-\beta) z + \beta x, \quad z = z - \gamma_t u(y), \quad x = (1-c_t) x + c_t z, \quad
       c_t = \frac{w_t}{w_1 + \cdots + w_t}, \quad w_t = t^r \gamma_{\max}^{p} $$

    with $u$ the update of the inner optimizer, $\gamma_t$ lr, multiplied by t / warmup_steps during the first
    warmup_steps updates, $\gamma_{\max}$ the largest $\gamma$ so far, and $p$ weight_lr_power.

    $x$ is not stored. The params hold $y$ in train mode, and $x$ in eval mode. An optimizer starts in train mode.
    In eval mode step() raises a RuntimeError. Evaluate the model, or save its weights, in eval mode:

        optimizer.eval()
        evaluate(model)
        optimizer.train()

    States are z, step, weight_sum (the sum of the $w$) and lr_max. The mode is the option "train_mode" of every param
    group, and checkpoints have it. For the arguments see FusedOptimizer.

    Source: Defazio et al., arXiv:2405.15682.
    """

    # ---- modes

    @property
    def train_mode(self) -> bool:
        """Whether the params hold $y$, at which gradients are computed. Set it with train() and eval()."""
        return bool(self.param_groups[0]["train_mode"]) if self.param_groups else True

    def train(self) -> None:
        """Makes the params $y$, in place. Does nothing in train mode. In bfloat16 and float16 each change of the mode
        rounds the params, unless they have master weights.

        Raises:
            RuntimeError: the call is inside of ema_weights().
            ValueError: the momentum of a group is not above 0 and below 1.
        """
        self._set_mode(True)

    def eval(self) -> None:
        """Makes the params $x$, the average, in place. Does nothing in eval mode. Raises what train() raises."""
        self._set_mode(False)

    def _set_mode(self, train: bool) -> None:
        self._check_not_swapped("train() and eval() cannot be called")
        groups = [group for group in self.param_groups if bool(group["train_mode"]) != train]
        shares = [_share_of_z(group, train) for group in groups]
        if not groups:
            return
        self._settle_masters()
        for group, share in zip(groups, shares, strict=True):
            for param in group["params"]:
                state = self.state.get(param, {})
                if "z" in state:
                    self._masters.move(param, state, state["z"], share)
            group["train_mode"] = train
        if covered := [*self._masters.seen]:
            self._forget()
            self._masters.remember(covered)

    def _begin(self) -> None:
        """Raises RuntimeError in eval mode."""
        if not self.train_mode:
            raise RuntimeError(
                f"step() of {type(self).__name__} needs train mode, but the optimizer is in eval mode, in which its "
                "params hold the average; call optimizer.train() first"
            )
        super()._begin()

    # ---- groups and checkpoints

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        mode = self.train_mode if getattr(self, "param_groups", ()) else True
        if param_group.setdefault("train_mode", mode) != mode:
            raise ValueError(
                f"a new param group must have the mode of the optimizer, train_mode={mode}, but has "
                f"{param_group['train_mode']}; leave train_mode out"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if not group["warmup_steps"] >= 0:
                raise ValueError(f"warmup_steps must be 0 or more, but got {group['warmup_steps']}")
        except Exception:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As FusedOptimizer.load_state_dict. Takes checkpoints of the package schedulefree, too, which counts steps per
        group. The optimizer gets the mode in which the checkpoint was saved. Load the weights that the model had then.

        Raises:
            ValueError: some groups of the checkpoint are in train mode, and others in eval mode.
        """
        state_dict = from_schedulefree(state_dict)
        modes = {bool(group["train_mode"]) for group in state_dict["param_groups"] if "train_mode" in group}
        if len(modes) > 1:
            raise ValueError(
                "the param groups of the checkpoint must be all in train mode or all in eval mode, but their values of "
                '"train_mode" differ; call eval() of the optimizer that is saved before its state_dict()'
            )
        super().load_state_dict(state_dict)


def _share_of_z(group: Mapping[str, Any], train: bool) -> float:
    """The share of the way to z by which x is moved to become y, or (train=False) y to become x.

    Raises:
        ValueError: the momentum is not above 0 and below 1.
    """
    momentum = float(group["betas"][0] if "betas" in group else group["momentum"])
    if not 0.0 < momentum < 1.0:
        name = "betas[0]" if "betas" in group else "momentum"
        raise ValueError(f"{name} must be between 0 and 1 exclusive, or the average cannot be computed: {momentum}")
    return 1.0 - momentum if train else 1.0 - 1.0 / momentum


def from_schedulefree(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the package schedulefree as one of this module. Any other is returned with the same content."""
    groups, states = [], dict(state_dict["state"])
    for group in state_dict["param_groups"]:
        if "k" in group:
            numbers = {"step": group["k"], "weight_sum": group["weight_sum"], "lr_max": max(0.0, group["lr_max"])}
            scalars = {name: torch.tensor(float(number)) for name, number in numbers.items()}
            for index in group["params"]:
                if states.get(index):
                    states[index] = {**{name: scalar.clone() for name, scalar in scalars.items()}, **states[index]}
            own = ("k", "weight_sum", "lr_max", "scheduled_lr")
            group = {key: value for key, value in group.items() if key not in own}
        groups.append(group)
    return {**state_dict, "state": states, "param_groups": groups}


class FusedScheduleFreeAdamW(ScheduleFree):
    r"""Schedule-Free AdamW in one pass over memory. Its arguments are those of AdamWScheduleFree of the package
    schedulefree, and it loads its checkpoints; convert.to_schedulefree writes such.

    The points $x$, $y$ and $z$ and the modes are described at ScheduleFree. The update of $z$ is Adam's without an
    average of the gradient, with $\hat v$ the average of its squares after bias correction, and decay at $y$:

    $$ z = z - \gamma_t \left( \frac{g}{\sqrt{\hat v} + \epsilon} + \lambda y \right) $$

    Its states are z, exp_avg_sq, step, weight_sum and lr_max. A param that joins late counts its own steps. The package
    counts those of its group.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of groups; float32, bfloat16, float16, float64 or complex, any
            shape and memory layout. bfloat16 params need master weights, or state_dtype=torch.float32 and
            rounding="dithered": small steps of z are lost otherwise.
        lr: learning rate; a one-element tensor is read at every step, where it lies.
        betas: $\beta$ and the decay rate of the average of squares, each in [0, 1). With $\beta = 0$ there is no eval
            mode.
        eps: added to the root, after bias correction.
        weight_decay: $\lambda$.
        warmup_steps: number of updates in which lr grows linearly.
        r: power of the update's number in the weights of the average.
        weight_lr_power: power of the largest lr so far in the weights of the average.
        foreach: accepted and without effect.
        maximize: ascend.
        capturable: allow the step in a CUDA graph.
        ours: options of every class, see FusedOptimizer: backend="auto", state_dtype=None, master_weights=None,
            rounding="nearest", max_grad_norm=None, norm_type=2.0, skip_nonfinite=False, norm_group=None,
            ema_decay=None, ema_dtype=None. state_dtype="compact" stores exp_avg_sq in 2 bytes, and z as the params.

    Raises:
        ValueError: a hyperparameter is out of range.

    Sources: Defazio et al., arXiv:2405.15682; the package schedulefree 1.4.1.
    """

    rule = Rule(
        "schedule_free_adamw",
        ("z", "exp_avg_sq"),
        (("betas", "beta1", 2), ("eps", "eps", 1), *OPTIONS),
        squares=("exp_avg_sq",),
        copies=("z",),
        running=RUNNING,
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **ours: Unpack[Common],
    ) -> None:
        check_adam_like(lr, betas, weight_decay, eps)
        options: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
        }
        options |= {"r": r, "weight_lr_power": weight_lr_power, "foreach": foreach, "train_mode": True}
        super().__init__(params, {**options, "maximize": maximize, "capturable": capturable}, **ours)


class FusedScheduleFreeSGD(ScheduleFree):
    r"""Schedule-Free SGD in one pass over memory. Its arguments are those of SGDScheduleFree of the package
    schedulefree, and it loads its checkpoints; convert.to_schedulefree writes such.

    The points $x$, $y$ and $z$ and the modes are described at ScheduleFree. Decay is taken at $y$:

    $$ z = z - \gamma_t (g + \lambda y) $$

    Its states are z, step, weight_sum and lr_max. A param that joins late counts its own steps. The package counts
    those of its group.

    Args:
        params, weight_decay, warmup_steps, r, weight_lr_power, foreach, maximize, capturable: as
            FusedScheduleFreeAdamW's.
        lr: learning rate; a one-element tensor is read at every step, where it lies.
        momentum: $\beta$, above 0 and below 1.
        ours: options of every class, see FusedOptimizer: backend="auto", state_dtype=None, master_weights=None,
            rounding="nearest", max_grad_norm=None, norm_type=2.0, skip_nonfinite=False, norm_group=None,
            ema_decay=None, ema_dtype=None. state_dtype="compact" changes nothing: z is stored as the params.

    Raises:
        ValueError: a hyperparameter is out of range.

    Sources: Defazio et al., arXiv:2405.15682; the package schedulefree 1.4.1.
    """

    rule = Rule("schedule_free_sgd", ("z",), (("momentum", "beta1", 1), *OPTIONS), copies=("z",), running=RUNNING)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **ours: Unpack[Common],
    ) -> None:
        check_adam_like(lr, (0.0, 0.0), weight_decay)
        if not 0.0 < momentum < 1.0:
            raise ValueError(f"Momentum must be between 0 and 1 exclusive: {momentum}")
        options: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
        }
        options |= {"r": r, "weight_lr_power": weight_lr_power, "foreach": foreach, "train_mode": True}
        super().__init__(params, {**options, "maximize": maximize, "capturable": capturable}, **ours)
