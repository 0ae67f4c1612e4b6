"""The reference that the tests compare with: each optimizer in float64 and plain PyTorch, written from its paper.

Nothing is derived or imported from the implementation. Complex tensors are pairs of reals. Each optimizer is a function
of one tensor; `step` applies it to a list of tensors. It accepts the param_groups of an optimizer: a rule reads the
options that it knows and ignores the others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Rule = Callable[..., tuple[Tensor, State]]
Pair = tuple[float | Tensor, float | Tensor]
Hypers = Sequence[dict[str, Any]]


@dataclass
class Slot:
    """One tensor and its states, in float64. stored: the real dtype in which the optimizer stores the states."""

    param: Tensor
    state: State = field(default_factory=dict)
    stored: torch.dtype = torch.float64


def as_real(x: Tensor) -> Tensor:
    """A float64 copy. A complex tensor of shape [...] becomes [..., 2]."""
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).to(torch.float64).cpu().clone()


def scalar(x: Any) -> float:
    return float(x)


def correction(beta: float, step: Tensor) -> float:
    """1 - beta**step, without a loss of digits if beta is near 1."""
    return -math.expm1(step.item() * math.log(beta)) if beta else 1.0


def next_step(state: State) -> Tensor:
    return state.get("step", torch.zeros((), dtype=torch.float64)) + 1


def shrinkage(rate: float, weight_decay: float, lr_reference: float | None, decay_period: float | None) -> float:
    """The factor of decoupled decay. Without lr_reference it is torch's, 1 - lr * weight_decay. With lr_reference it is
    the paper's (arXiv:1711.05101, algorithm 2: eta_t is the schedule alone). decay_period normalizes it (appendix B.1).
    """
    if lr_reference is None:
        return 1 - rate * weight_decay
    schedule = rate / lr_reference if lr_reference != 0 else 0.0
    return 1 - schedule * weight_decay / math.sqrt(1 if decay_period is None else decay_period)


def larger_lr(rate: float, before: Tensor | None) -> Tensor:
    """The largest lr so far. It is stored as float32, which rounds it: an lr that rounds to it is as large."""
    new = torch.tensor(rate, dtype=torch.float64)
    return new if before is None or new.float() >= before else before


def with_correction(state: State, hyper: dict[str, Any]) -> tuple[dict[str, Any], State]:
    """The options with the decay of this step where it is corrected (arXiv:2506.02285), and the state this needs."""
    if not hyper.get("corrected_decay"):
        return hyper, {}
    largest = larger_lr(scalar(hyper["lr"]), state.get("lr_max"))
    share = scalar(hyper["lr"]) / largest.item() if largest != 0 else 1.0
    return {**hyper, "weight_decay": hyper["weight_decay"] * share}, {"lr_max": largest}


def with_decay(update: Rule) -> Rule:
    """Adds weight decay, lr and maximize to an update. L2 is added to the gradient. Decoupled decay shrinks the param
    before the update is subtracted."""

    @functools.wraps(update)
    def rule(param: Tensor, grad: Tensor, state: State, **hyper: Any) -> tuple[Tensor, State]:
        rate, weight_decay = scalar(hyper["lr"]), scalar(hyper["weight_decay"])
        if hyper["maximize"]:
            grad = -grad
        if weight_decay != 0:
            if hyper.get("decoupled_weight_decay") or hyper.get("decouple_weight_decay"):
                kept = shrinkage(rate, weight_decay, hyper.get("lr_reference"), hyper.get("decay_period"))
                if hyper.get("cautious_decay"):  # arXiv:2510.12402, algorithm 1: where update and param agree in sign
                    kept = 1 - (1 - kept) * agreeing(param, update(grad, state, **hyper)[0], True)
                param = param * kept
            else:
                grad = grad + weight_decay * param
        change, new = update(grad, state, **hyper)
        return (param if rate == 0 else param - rate * change), new

    return rule


@with_decay
def adam(grad: Tensor, state: State, *, betas: Pair, eps: float, amsgrad: bool, **_: Any) -> tuple[Tensor, State]:
    """Adam (arXiv:1412.6980), AdamW (arXiv:1711.05101), AMSGrad (Reddi et al., ICLR 2018; before bias correction)."""
    beta1, beta2 = scalar(betas[0]), scalar(betas[1])
    zeros = torch.zeros_like(grad)
    step = next_step(state)
    exp_avg, exp_avg_sq = state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
    new = {
        "step": step,
        "exp_avg": beta1 * exp_avg + (1 - beta1) * grad,
        "exp_avg_sq": beta2 * exp_avg_sq + (1 - beta2) * grad**2,
    }
    second_moment = new["exp_avg_sq"]
    if amsgrad:
        second_moment = torch.maximum(state.get("max_exp_avg_sq", exp_avg_sq), second_moment)
        new["max_exp_avg_sq"] = second_moment
    elif "max_exp_avg_sq" in state:
        new["max_exp_avg_sq"] = state["max_exp_avg_sq"]
    exp_avg_hat = new["exp_avg"] / correction(beta1, step)
    second_moment_hat = second_moment / correction(beta2, step)
    return exp_avg_hat / (second_moment_hat.sqrt() + eps), new


@with_decay
def sgd(
    grad: Tensor, state: State, *, momentum: float | Tensor, dampening: float, nesterov: bool, **_: Any
) -> tuple[Tensor, State]:
    """SGD as torch.optim.SGD documents it: the first buffer is the gradient, undamped; SGDW (arXiv:1711.05101)."""
    mu = scalar(momentum)
    if mu == 0:
        return grad, dict(state)
    buffer = mu * state["momentum_buffer"] + (1 - dampening) * grad if "momentum_buffer" in state else grad
    return grad + mu * buffer if nesterov else buffer, {"momentum_buffer": buffer}


@with_decay
def qhadam(grad: Tensor, state: State, *, betas: Pair, nus: Pair, eps: float, **_: Any) -> tuple[Tensor, State]:
    """QHAdam (arXiv:1810.06801, section 4.2), with averages that start at zero and are corrected when they are read."""
    beta1, beta2 = scalar(betas[0]), scalar(betas[1])
    zeros = torch.zeros_like(grad)
    step = next_step(state)
    new = {
        "step": step,
        "exp_avg": beta1 * state.get("exp_avg", zeros) + (1 - beta1) * grad,
        "exp_avg_sq": beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad**2,
    }
    mean = nus[0] * new["exp_avg"] / correction(beta1, step) + (1 - nus[0]) * grad
    square = nus[1] * new["exp_avg_sq"] / correction(beta2, step) + (1 - nus[1]) * grad**2
    return mean / (square.sqrt() + eps), new


@with_decay
def lion(grad: Tensor, state: State, *, betas: Pair, **_: Any) -> tuple[Tensor, State]:
    """Lion (arXiv:2302.06675, algorithm 2)."""
    beta1, beta2 = scalar(betas[0]), scalar(betas[1])
    exp_avg = state.get("exp_avg", torch.zeros_like(grad))
    direction = (beta1 * exp_avg + (1 - beta1) * grad).sign()
    return direction, {"exp_avg": beta2 * exp_avg + (1 - beta2) * grad}


@with_decay
def adagrad(grad: Tensor, state: State, *, lr_decay: float, eps: float, **hyper: Any) -> tuple[Tensor, State]:
    """Adagrad (Duchi, Hazan and Singer, JMLR 2011) as torch.optim.Adagrad documents it."""
    step = next_step(state)
    total = state.get("sum", torch.full_like(grad, hyper["initial_accumulator_value"])) + grad**2
    return grad / (total.sqrt() + eps) / (1 + (step.item() - 1) * lr_decay), {"step": step, "sum": total}


def newton_schulz(update: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Muon's iteration (Jordan et al., https://kellerjordan.github.io/posts/muon) on the singular values themselves:
    each step applies the polynomial to all of them."""
    left, values, right = torch.linalg.svd(update / max(update.norm().item(), eps), full_matrices=False)
    a, b, c = coefficients
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def muon(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: Sequence[float],
    ns_steps: int,
    eps: float,
    adjust_lr_fn: str | None,
    normuon: bool,
    normuon_beta2: float,
    maximize: bool,
    **hyper: Any,
) -> tuple[Tensor, State]:
    """Muon as torch.optim.Muon documents it, with the averages that the code has; NorMuon (arXiv:2510.05491). A tensor
    of more dimensions is a matrix of its first one and all others."""
    rate = scalar(lr)
    grad = -grad if maximize else grad
    buffer = momentum * state.get("momentum_buffer", torch.zeros_like(grad)) + (1 - momentum) * grad
    new = {"momentum_buffer": buffer}
    update = (momentum * buffer + (1 - momentum) * grad if nesterov else buffer).flatten(1)
    rows, columns = update.shape
    update = newton_schulz(update, ns_coefficients, ns_steps, eps)
    if normuon:
        old = state.get("second_momentum_buffer", torch.zeros(rows, 1, dtype=torch.float64))
        moments = normuon_beta2 * old + (1 - normuon_beta2) * update.square().mean(1, keepdim=True)
        new["second_momentum_buffer"] = moments
        normalized = update / (moments.sqrt() + 1e-8)
        update = normalized * (update.norm() / normalized.norm())
    scale = 0.2 * math.sqrt(max(rows, columns)) if adjust_lr_fn else math.sqrt(max(1, rows / columns))
    decay = 1 - shrinkage(rate, weight_decay, hyper.get("lr_reference"), hyper.get("decay_period"))
    decay = decay * agreeing(param, update.view_as(param), hyper.get("cautious_decay", False))
    return (1 - decay) * param - rate * scale * update.view_as(param), new


@with_decay
def nadam(
    grad: Tensor, state: State, *, betas: Pair, eps: float, momentum_decay: float, **_: Any
) -> tuple[Tensor, State]:
    """NAdam (Dozat, ICLR 2016 workshop) as torch.optim.NAdam documents it."""
    beta1, beta2 = scalar(betas[0]), scalar(betas[1])
    zeros = torch.zeros_like(grad)
    step = next_step(state)
    now, after = (beta1 * (1 - 0.5 * 0.96 ** (momentum_decay * t)) for t in (step.item(), step.item() + 1))
    new = {
        "step": step,
        "mu_product": (state.get("mu_product", torch.ones_like(step)).float() * now).double(),  # torch's is float32
        "exp_avg": beta1 * state.get("exp_avg", zeros) + (1 - beta1) * grad,
        "exp_avg_sq": beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad**2,
    }
    product = new["mu_product"].item()
    mean = after * new["exp_avg"] / (1 - product * after) + (1 - now) * grad / (1 - product)
    return mean / ((new["exp_avg_sq"] / correction(beta2, step)).sqrt() + eps), new


@with_decay
def radam(grad: Tensor, state: State, *, betas: Pair, eps: float, **_: Any) -> tuple[Tensor, State]:
    """RAdam (arXiv:1908.03265, algorithm 2), with torch's bound of 5 and its eps, which is added before the bias
    correction."""
    beta1, beta2 = scalar(betas[0]), scalar(betas[1])
    zeros, step = torch.zeros_like(grad), next_step(state)
    new = {
        "step": step,
        "exp_avg": beta1 * state.get("exp_avg", zeros) + (1 - beta1) * grad,
        "exp_avg_sq": beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad**2,
    }
    mean = new["exp_avg"] / correction(beta1, step)
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * step.item() * beta2 ** step.item() / correction(beta2, step)
    if length <= 5:
        return mean, new
    rectification = math.sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length))
    return rectification * mean * math.sqrt(correction(beta2, step)) / (new["exp_avg_sq"].sqrt() + eps), new


def schedule_free(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    adam: bool,
    lr: float | Tensor,
    weight_decay: float,
    warmup_steps: int,
    r: float,
    weight_lr_power: float,
    maximize: bool,
    **hyper: Any,
) -> tuple[Tensor, State]:
    """Schedule-Free (arXiv:2405.15682, algorithm 1 for AdamW, equations 1 to 3 for SGD) with the average x made of y,
    which is the param, and z."""
    beta = scalar(hyper["betas"][0] if adam else hyper["momentum"])
    step = next_step(state)
    t, y, z = step.item(), param, state.get("z", param)
    beta_x = y - (1 - beta) * z
    rate = scalar(lr) * (min(1.0, t / warmup_steps) if warmup_steps else 1.0)
    new = {"step": step, "lr_max": larger_lr(rate, state.get("lr_max"))}
    weight = t**r * new["lr_max"].item() ** weight_lr_power
    new["weight_sum"] = state.get("weight_sum", torch.zeros_like(step)) + weight
    update = -grad if maximize else grad
    if adam:
        beta2 = scalar(hyper["betas"][1])
        new["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", torch.zeros_like(grad)) + (1 - beta2) * grad**2
        update = update / ((new["exp_avg_sq"] / correction(beta2, step)).sqrt() + hyper["eps"])
    new["z"] = z - rate * (update + weight_decay * y)
    share = weight / new["weight_sum"].item() if new["weight_sum"] != 0 else 0.0
    beta_x = (1 - share) * beta_x + beta * share * new["z"]
    return (1 - beta) * new["z"] + beta_x, new


def schedule_free_adamw(param: Tensor, grad: Tensor, state: State, **hyper: Any) -> tuple[Tensor, State]:
    return schedule_free(param, grad, state, adam=True, **hyper)


def schedule_free_sgd(param: Tensor, grad: Tensor, state: State, **hyper: Any) -> tuple[Tensor, State]:
    return schedule_free(param, grad, state, adam=False, **hyper)


@with_decay
def ademamix(
    grad: Tensor,
    state: State,
    *,
    betas: tuple[float, float, float],
    eps: float,
    alpha: float,
    alpha_warmup: float | None,
    beta3_warmup: float | None,
    **_: Any,
) -> tuple[Tensor, State]:
    """AdEMAMix (arXiv:2409.03137, algorithm 1), with the schedules of the authors' code."""
    beta1, beta2, beta3 = map(scalar, betas)
    zeros, step = torch.zeros_like(grad), next_step(state)
    t = step.item()
    if alpha_warmup is not None:
        alpha = alpha * min(t / alpha_warmup, 1)
    if beta3_warmup is not None and t < beta3_warmup:
        start, end = (math.log(0.5) / math.log(beta + 1e-8) - 1 for beta in (beta1, beta3))  # half-lives
        beta3 = 0.5 ** (1 / (start + (end - start) * t / beta3_warmup + 1))
    new = {
        "step": step,
        "exp_avg_fast": beta1 * state.get("exp_avg_fast", zeros) + (1 - beta1) * grad,
        "exp_avg_slow": beta3 * state.get("exp_avg_slow", zeros) + (1 - beta3) * grad,
        "exp_avg_sq": beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad**2,
    }
    mean = new["exp_avg_fast"] / correction(beta1, step) + alpha * new["exp_avg_slow"]
    return mean / ((new["exp_avg_sq"] / correction(beta2, step)).sqrt() + eps), new


def agreeing(param: Tensor, update: Tensor, cautious: bool) -> Tensor:
    """1 where cautious decay (arXiv:2510.12402) decays: where param and update have the same sign."""
    return (param * update >= 0).to(param.dtype) if cautious else torch.ones_like(param)


def adopt(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float | Tensor,
    betas: Pair,
    eps: float,
    clip_power: tuple[float, float],
    weight_decay: float,
    decouple: bool,
    maximize: bool,
    **_: Any,
) -> tuple[Tensor, State]:
    """ADOPT (arXiv:2411.02853, algorithm 2), with the choices of its authors' code for weight decay."""
    rate, beta1, beta2 = scalar(lr), scalar(betas[0]), scalar(betas[1])
    zeros, step = torch.zeros_like(param), next_step(state)
    if maximize:
        grad = -grad
    if not decouple:
        grad = grad + weight_decay * param
    if step == 1:
        return param, {"step": step, "exp_avg": zeros, "exp_avg_sq": grad**2}
    bound = clip_power[0] * (step.item() - 1) ** clip_power[1]
    normed = (grad / state["exp_avg_sq"].sqrt().clamp(min=eps)).clamp(-bound, bound)
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * normed
    new = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": beta2 * state["exp_avg_sq"] + (1 - beta2) * grad**2}
    if rate == 0:
        return param, new
    return param * (1 - rate * weight_decay * decouple) - rate * exp_avg, new


def adan(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float | Tensor,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
    no_prox: bool,
    maximize: bool,
    lr_reference: float | None = None,
    decay_period: float | None = None,
    cautious_decay: bool = False,
    **_: Any,
) -> tuple[Tensor, State]:
    """Adan (arXiv:2208.06677, algorithm 1). Here a beta is the share that an average keeps."""
    rate, (beta1, beta2, beta3) = scalar(lr), map(scalar, betas)
    zeros, step = torch.zeros_like(param), next_step(state)
    if maximize:
        grad = -grad
    change = zeros if step == 1 else grad + state["neg_pre_grad"]
    new = {
        "step": step,
        "exp_avg": beta1 * state.get("exp_avg", zeros) + (1 - beta1) * grad,
        "exp_avg_diff": beta2 * state.get("exp_avg_diff", zeros) + (1 - beta2) * change,
        "neg_pre_grad": -grad,
        "exp_avg_sq": beta3 * state.get("exp_avg_sq", zeros) + (1 - beta3) * (grad + beta2 * change) ** 2,
    }
    mean = new["exp_avg"] / correction(beta1, step) + beta2 * new["exp_avg_diff"] / correction(beta2, step)
    update = mean / ((new["exp_avg_sq"] / correction(beta3, step)).sqrt() + eps)
    if rate == 0:
        return param, new
    decay = (1 - shrinkage(rate, weight_decay, lr_reference, decay_period)) * agreeing(param, update, cautious_decay)
    return (param * (1 - decay) - rate * update if no_prox else (param - rate * update) / (1 + decay)), new


def stableadamw(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float | Tensor,
    betas: Pair,
    eps: float,
    weight_decay: float,
    maximize: bool,
    stored: torch.dtype,
    lr_reference: float | None = None,
    decay_period: float | None = None,
    cautious_decay: bool = False,
    **_: Any,
) -> tuple[Tensor, State]:
    """StableAdamW (arXiv:2304.13013, algorithm 2). The update is made of the averages as they are stored."""
    rate, beta1, beta2 = scalar(lr), scalar(betas[0]), scalar(betas[1])
    zeros, step = torch.zeros_like(param), next_step(state)
    if maximize:
        grad = -grad
    rest1, rest2 = ((1 - beta) / correction(beta, step) for beta in (beta1, beta2))  # 1 - debiased beta
    # The debiased betas themselves. They are 0 in the first step.
    kept1, kept2 = (
        beta * correction(beta, step - 1) / correction(beta, step) if step > 1 else 0.0 for beta in (beta1, beta2)
    )
    new = {
        "step": step,
        "exp_avg": kept1 * state.get("exp_avg", zeros) + rest1 * grad,
        "exp_avg_sq": kept2 * state.get("exp_avg_sq", zeros) + rest2 * grad**2,
    }
    mean, square = (new[name].to(stored).to(torch.float64) for name in ("exp_avg", "exp_avg_sq"))
    rms = (grad / square.sqrt().clamp(min=eps)).square().mean().sqrt().item() if grad.numel() else 0.0
    if rate == 0:
        return param, new
    update = mean / (square.sqrt() + eps)
    decay = (1 - shrinkage(rate, weight_decay, lr_reference, decay_period)) * agreeing(param, update, cautious_decay)
    return param - (decay * param + rate * update) / max(1.0, rms), new


def lamb(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float | Tensor,
    bias_correction: bool,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
    weight_decay: float,
    adam_w_mode: bool,
    grad_averaging: bool,
    max_grad_norm: float | None,
    use_nvlamb: bool,
    trust_clip: tuple[float, float] | None,
    maximize: bool,
    grad_norm: float,
    stored: torch.dtype,
    **_: Any,
) -> tuple[Tensor, State]:
    """LAMB (arXiv:1904.00962) with the choices of NVIDIA Apex's FusedLAMB.

    The trust ratio is a ratio of norms of whole tensors, so the step has two passes. The update is computed from the
    averages as they are stored.
    """
    rate, beta1, beta2 = scalar(lr), scalar(betas[0]), scalar(betas[1])
    zeros = torch.zeros_like(param)
    step = next_step(state)
    if maximize:
        grad = -grad
    if max_grad_norm and grad_norm > max_grad_norm:
        grad = grad * (max_grad_norm / grad_norm)
    if not adam_w_mode:
        grad = grad + weight_decay * param
    new = {
        "step": step,
        "exp_avg": beta1 * state.get("exp_avg", zeros) + (1 - beta1 if grad_averaging else 1) * grad,
        "exp_avg_sq": beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad**2,
    }
    mean, square = (new[name].to(stored).to(torch.float64) for name in ("exp_avg", "exp_avg_sq"))
    if bias_correction:
        mean, square = mean / correction(beta1, step), square / correction(beta2, step)
    update = mean / (square.sqrt() + eps)
    if adam_w_mode:
        update = update + weight_decay * param
    ratio = 1.0
    if weight_decay != 0 or use_nvlamb:
        param_norm, update_norm = param.norm().item(), update.norm().item()
        ratio = param_norm / update_norm if param_norm != 0 and update_norm != 0 else 1.0
        if trust_clip is not None:
            ratio = min(max(ratio, trust_clip[0]), trust_clip[1])
    if rate == 0:
        return param, new
    return param - rate * ratio * update, new


def grad_norm(grads: Sequence[Tensor | None], hypers: Hypers) -> dict[str, float]:
    """The norm of all gradients whose groups are clipped."""
    clipped = [g for g, hyper in zip(grads, hypers, strict=True) if g is not None and hyper["max_grad_norm"]]
    return {"grad_norm": math.sqrt(sum(g.square().sum().item() for g in clipped))}


# Further keyword arguments of a rule, computed from all gradients of a step.
OF_ALL: dict[Rule, Callable[[Sequence[Tensor | None], Hypers], dict[str, Any]]] = {lamb: grad_norm}


def step(
    rule: Rule,
    slots: Sequence[Slot],
    grads: Sequence[Tensor | None],
    hypers: Hypers,
    grad_scale: float = 1.0,
    found_inf: float = 0.0,
) -> list[Slot]:
    """One optimizer step over a list of tensors. hypers: the options of each tensor's group.

    Gradients are divided by grad_scale. A tensor without a gradient does not change, and neither does its step count.
    If found_inf is not 0, no tensor changes.
    """
    if found_inf != 0:
        return [Slot(slot.param, dict(slot.state), slot.stored) for slot in slots]
    unscaled = [None if grad is None else as_real(grad) / grad_scale for grad in grads]
    shared = OF_ALL[rule](unscaled, hypers) if rule in OF_ALL else {}
    result = []
    for slot, grad, hyper in zip(slots, unscaled, hypers, strict=True):
        if grad is None:
            result.append(Slot(slot.param, dict(slot.state), slot.stored))
        else:
            options, kept = with_correction(slot.state, hyper)
            param, state = rule(slot.param, grad, slot.state, **options, **shared, stored=slot.stored)
            result.append(Slot(param, state | kept, slot.stored))
    return result
