"""Decoupled weight decay: `Decoupled` is a base class of the optimizers here; `decoupled` decays the params of any
other optimizer before its step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base import FusedOptimizer
from .options import Convention

CONVENTIONS = "torch", "paper", "normalized"


class Decoupled(FusedOptimizer):
    r"""Base of the optimizers with decoupled weight decay. Each step multiplies every param by $1 - d$ before its
    update. The convention determines $d$. With $\lambda$ the weight_decay:

    - "torch": $d = lr \cdot \lambda$, as in torch.optim.AdamW.
    - "paper": $d = \eta \lambda$, where $\eta$ is lr / lr_reference. The schedule alone scales the decay, so the best
      decay does not depend on the base lr. If lr_reference is 0 nothing decays.
    - "normalized": $d = \eta \lambda / \sqrt{T}$, where $T$ is decay_period. The best decay does not depend on the
      length of the training either.

    With corrected_decay $d = lr^2 / lr_{\max} \cdot \lambda$, with $lr_{\max}$ the largest lr so far. This is the decay
    of AdamC, which keeps the ratio of gradient to weight in layers before a normalization from growing while lr falls.
    AdamC differs in two things. It takes the peak of the whole schedule for $lr_{\max}$, which is the same once a
    warm-up is over. And it corrects only the layers before a normalization: give these a param group with
    corrected_decay=True to do so. The largest lr is a running value of each param, the state "lr_max".

    Args:
        decay: "torch", "paper" or "normalized".
        lr_reference: the lr at which $\eta$ is 1; None: each group's lr at the start.
        decay_period: number of updates in the current restart period: batches per epoch times epochs.
        corrected_decay: multiply the decay by lr over the largest lr so far; for decay="torch". Groups may have their
            own.
        cautious_decay: decay only the elements that the update does not move away from 0: those whose param and update
            have the same sign. Groups may have their own.

    Groups hold "lr_reference" and "decay_period" only if the convention uses them, and "corrected_decay" and
    "cautious_decay" only if they are given. All four may be changed between steps.

    Raises:
        ValueError: decay is not one of the three, lr_reference is negative or not used, decay_period is missing, not
            positive or not used, or corrected_decay is True with another decay than "torch".

    Sources: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2 and appendix B.1; corrected_decay: Defazio,
    arXiv:2506.02285; cautious_decay: Chen et al., arXiv:2510.12402.
    """

    def __init__(
        self,
        *args: Any,
        decay: Convention = "torch",
        lr_reference: float | None = None,
        decay_period: float | None = None,
        corrected_decay: bool = False,
        cautious_decay: bool = False,
        **kwargs: Any,
    ) -> None:
        if decay not in CONVENTIONS:
            raise ValueError(f'decay must be "torch", "paper" or "normalized", but got {decay!r}')
        if decay == "torch" and lr_reference is not None:
            raise ValueError('lr_reference is not used with decay="torch"; leave it out, or pass decay="paper"')
        if decay != "normalized" and decay_period is not None:
            raise ValueError(f'decay_period is not used with decay="{decay}"; leave it out, or pass decay="normalized"')
        self._decay = decay
        self._decay_options = {"lr_reference": lr_reference, "decay_period": decay_period}
        self._corrected_decay = corrected_decay
        self._cautious_decay = cautious_decay
        super().__init__(*args, **kwargs)

    @property
    def decay(self) -> Convention:
        """The convention. It cannot be set, because the groups hold options for it."""
        return self._decay

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._complete(group)
        except Exception:
            self.param_groups.pop()
            raise

    def _complete(self, group: dict[str, Any]) -> None:
        if self._corrected_decay:
            group.setdefault("corrected_decay", True)
        if group.get("corrected_decay") and self._decay != "torch":
            raise ValueError(
                f'corrected_decay=True corrects a decay of lr * weight_decay, but decay="{self._decay}" has another '
                'measure, lr / lr_reference; leave corrected_decay out, or pass decay="torch"'
            )
        if self._cautious_decay:
            group.setdefault("cautious_decay", True)
        if self._decay == "torch":
            return
        reference = group.get("lr_reference", self._decay_options["lr_reference"])
        if reference is None and float(group["lr"]) == 0.0:
            warnings.warn(
                f'decay="{self._decay}" scales the decay by lr / lr_reference, and lr_reference is the initial lr, 0, '
                "so nothing will decay; pass lr_reference, for example the largest lr of the schedule",
                stacklevel=2,
            )
        reference = float(group["lr"] if reference is None else reference)
        if not reference >= 0:
            raise ValueError(f"lr_reference must be 0 or more, but got {reference}")
        group["lr_reference"] = reference
        if self._decay == "normalized":
            period = group.get("decay_period", self._decay_options["decay_period"])
            if period is None or not period > 0:
                raise ValueError(
                    'decay="normalized" needs a decay_period above 0, the number of updates in the current restart '
                    f"period (batches per epoch times epochs), but got {period}"
                )
            group["decay_period"] = period

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_decay", "_decay_options", "_corrected_decay", "_cautious_decay")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_decay", "torch")
        self.__dict__.setdefault("_decay_options", {"lr_reference": None, "decay_period": None})
        self.__dict__.setdefault("_corrected_decay", False)
        self.__dict__.setdefault("_cautious_decay", False)


# ---- around any optimizer

Schedule = Callable[..., float]

# Some operators round the factor itself to these dtypes, which turns a decay of 0.3 % into one of 0.4 %: foreach on the
# CPU (which is a loop anyway), and every operator if the factor is a tensor.
NARROW = (torch.bfloat16, torch.float16)


class Decay:
    """The handle that `decoupled` returns. It decays the params of an optimizer before each update, until `remove()`.

    Args:
        optimizer, weight_decay, schedule, convention: as in decoupled.

    Attributes:
        weight_decay: a number, or a list of one number per group. It may be changed between steps.
        updates: number of calls of the optimizer's step() so far.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weight_decay: float | Sequence[float],
        schedule: Schedule | None,
        convention: Literal["torch", "plain"],
    ) -> None:
        if convention not in ("torch", "plain"):
            raise ValueError(f'convention must be "torch" or "plain", but is {convention!r}')
        self.weight_decay = list(weight_decay) if isinstance(weight_decay, Sequence) else weight_decay
        self.schedule = schedule
        self.convention = convention
        self.updates = 0
        self._takes_step = schedule is not None and _takes_argument(schedule)
        self._check(optimizer)
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Ends the decay. The optimizer itself is unchanged."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and the weight decays. The schedule is a function and not saved."""
        decay = self.weight_decay
        return {"updates": self.updates, "weight_decay": list(decay) if isinstance(decay, list) else decay}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict() returned."""
        decay = state_dict["weight_decay"]
        self.updates = state_dict["updates"]
        self.weight_decay = list(decay) if isinstance(decay, list) else decay

    # ---- around the step

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._check(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._decay(optimizer)
            return None

        # As in AdamW, gradients are computed before the decay. LBFGS evaluates several times in one step.
        pending = True

        def evaluate_then_decay() -> Any:
            nonlocal pending
            loss = closure()
            if pending:
                pending = False
                self._decay(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": evaluate_then_decay}
        return (args[0], evaluate_then_decay, *args[2:]), kwargs

    @torch.no_grad()
    def _decay(self, optimizer: Optimizer) -> None:
        coefficients = self._coefficients(optimizer.param_groups)
        self.updates += 1
        found_inf = getattr(optimizer, "found_inf", None)  # GradScaler sets it, or else skips the call of step()
        if found_inf is not None and found_inf.device.type == "cpu":
            if found_inf.item() != 0:
                return
            found_inf = None

        # Factors known to the host: one call per device and dtype, because mixed lists leave the fused path. Otherwise
        # the factor is a tensor on the device, and a call takes one factor.
        fused: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[float]]] = {}
        for group, coefficient in zip(optimizer.param_groups, coefficients, strict=True):
            params = [param for param in group["params"] if param.grad is not None]
            if isinstance(coefficient, Tensor) or found_inf is not None:
                for device, dtype in dict.fromkeys((param.device, param.dtype) for param in params):
                    members = [param for param in params if (param.device, param.dtype) == (device, dtype)]
                    _multiply(members, _factor_on(device, coefficient, found_inf))
            elif coefficient != 0:
                for param in params:
                    members, factors = fused.setdefault((param.device, param.dtype), ([], []))
                    members.append(param)
                    factors.append(1 - coefficient)
        for (device, dtype), (members, factors) in fused.items():
            if device.type == "cpu" and dtype in NARROW:
                for param, factor in zip(members, factors, strict=True):
                    param.mul_(factor)
            else:
                torch._foreach_mul_(members, factors)

    def _decays(self, groups: list[dict[str, Any]]) -> list[float]:
        return self.weight_decay if isinstance(self.weight_decay, list) else [self.weight_decay] * len(groups)

    def _check(self, optimizer: Optimizer) -> None:
        groups = optimizer.param_groups
        for number, group in enumerate(groups):
            if group.get("weight_decay", 0) != 0:
                raise ValueError(
                    f"decoupled() decays params itself, so every group of {type(optimizer).__name__} must have "
                    f"weight_decay=0, but group {number} has {group['weight_decay']}; set it to 0"
                )
        decays = self._decays(groups)
        if len(decays) != len(groups):
            raise ValueError(
                f"weight_decay must be a number or one number for each of the optimizer's {len(groups)} param groups, "
                f"but got {len(decays)} numbers; add_param_group needs one more in the handle's weight_decay"
            )
        for decay in decays:
            if not decay >= 0:
                raise ValueError(f"weight_decay must not be negative, but is {decay}")

    def _coefficients(self, groups: list[dict[str, Any]]) -> list[float | Tensor]:
        """The decay of each group in this step, as a share of the params. A tensor if lr is one on a GPU."""
        scale = 1.0
        if self.schedule is not None:
            scale = self.schedule(self.updates) if self._takes_step else self.schedule()
        coefficients: list[float | Tensor] = []
        for group, decay in zip(groups, self._decays(groups), strict=True):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type == "cpu":
                lr = lr.item()
            if self.convention == "torch":
                coefficients.append(lr * (decay * scale))
            else:
                coefficients.append((lr != 0) * (decay * scale))
        return coefficients


def _multiply(params: list[Tensor], factor: Tensor) -> None:
    """Multiplies params of one device and dtype by a 0-dim tensor."""
    dtype = params[0].dtype
    if dtype in NARROW:
        torch._foreach_copy_(params, torch._foreach_mul([param.float() for param in params], factor.float()))
    else:
        torch._foreach_mul_(params, factor.to(dtype))


def _takes_argument(schedule: Schedule) -> bool:
    try:
        inspect.signature(schedule).bind()
    except TypeError:
        return True
    return False


def _factor_on(device: torch.device, coefficient: float | Tensor, found_inf: Tensor | None) -> Tensor:
    """1 - coefficient as a 0-dim float64 tensor on the device, or 1 if the step is skipped."""
    asynchronous = device.type != "cpu"  # a copy to the host must wait for its data
    if isinstance(coefficient, Tensor):
        lost = coefficient.to(device, torch.float64, non_blocking=asynchronous).reshape(())
    else:
        lost = torch.full((), coefficient, dtype=torch.float64, device=device)
    if found_inf is not None:
        lost = torch.where(
            found_inf.to(device, non_blocking=asynchronous).reshape(()) == 0, lost, torch.zeros_like(lost)
        )
    return 1 - lost


def decoupled(
    optimizer: Optimizer,
    weight_decay: float | Sequence[float],
    schedule: Schedule | None = None,
    *,
    convention: Literal["torch", "plain"] = "torch",
) -> Decay:
    r"""Decoupled weight decay for any torch.optim.Optimizer. Before each update every param with a gradient is
    multiplied by

    $$ 1 - lr \cdot \lambda \cdot s(t) \;\; \text{("torch")} \quad 1 - \lambda \cdot s(t) \;\; \text{("plain")} $$

    with $\lambda$ weight_decay, $s$ the schedule (1 without one) and $t$ the number of calls of step() so far. "torch"
    is the convention of torch.optim.AdamW and follows the groups' lr. "plain" is the paper's: the schedule alone scales
    the decay. If lr is 0 neither changes a param. torch's Adam with this decay equals torch's AdamW bit for bit; for
    bfloat16 and float16 its for-loop implementation.

    One fused call decays all params of a device and dtype, for any number of groups. If lr is a tensor on a GPU, or
    GradScaler passes found_inf, there is one call per group. Nothing waits for the device.

    - A step that GradScaler skips does not decay.
    - With a closure, the decay comes after its first evaluation.
    - Infinite params stay infinite. 0 times infinity, for a decay of the whole param, is NaN.
    - A bfloat16 param keeps its value if the decay is less than half a unit in the last place, as in every optimizer
      that rounds to nearest.
    - A CUDA graph replays the factors of the capture, except for lr tensors.
    - Copies of the optimizer (deepcopy, pickle) do not decay, because hooks are not copied.

    Args:
        optimizer: any optimizer whose groups have weight_decay 0, or no weight_decay.
        weight_decay: a number, or one number per group; not negative.
        schedule: function of t, or of no argument, that returns a number.
        convention: "torch" or "plain".

    Returns:
        A handle with remove(), state_dict(), load_state_dict() and weight_decay.

    Raises:
        ValueError: a group has a weight_decay of its own, or the list has another length than there are groups. Groups
            that are added later are checked in step(), before anything is changed.

    Sources: Loshchilov and Hutter, arXiv:1711.05101. Decay outside the optimizer is the idea of fast.ai's use_wd_sched.
    """
    return Decay(optimizer, weight_decay, schedule, convention)
