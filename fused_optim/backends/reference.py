"""The reference backend: prepare and the walks in plain PyTorch, one tensor at a time, on any device. It is slow and
simple, and the other backends are tested against it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..engine.backend import Backend, Scaling
from ..engine.formats import DITHER_PARAM
from ..engine.layout import GroupHparams, TensorScalars, column
from ..engine.table import Row, Table
from .formats import load, load_param, load_states, real_view, store_param, store_rounded, store_states
from .reference_rules import RULES, BiasCorrections, largest_lr, with_decay

SKIP = column(TensorScalars, "skip")


# ---- prep


def quotient(x: float, y: float) -> float:
    return x / y if y else math.inf


def bias_correction(beta: float, step: float) -> float:
    """1 - beta**step as csrc/prep.h computes it, without a loss of digits when beta is near 1."""
    result, doubled, bits = 0.0, 1 - beta, int(step)
    while bits:
        if bits & 1:
            result += (1 - result) * doubled
        doubled *= 2 - doubled
        bits >>= 1
    return result


def decoupled_decay(group: GroupHparams, scaled: bool) -> float:
    """The fraction of a param that a step subtracts. scaled: without lr."""
    if not group.lr_reference:
        return 0.0
    if scaled:
        return group.weight_decay / group.lr_reference / math.sqrt(group.decay_period)
    return group.lr / group.lr_reference * group.weight_decay / math.sqrt(group.decay_period)


def scalars_of(table: Table, row: Row, grad_scale: float = 1.0, norm: float | None = None) -> TensorScalars:
    """The scalars of a tensor whose step has been counted, as csrc/prep.h computes them. Updates the running scalars.

    norm: the norm of all gradients that are clipped, after the division by grad_scale.
    """
    group, step = table.hparams.of(row.group_index), float(row.step)
    betas = group.beta1, group.beta2, group.beta3
    at = BiasCorrections(step, *(bias_correction(beta, step) for beta in betas))
    factor = quotient(1.0, grad_scale)
    if norm is not None and group.max_norm > 0:
        bound = quotient(group.max_norm, norm + group.clip_eps)
        factor *= 1.0 if bound >= 1 else bound
    scalars, running = RULES[table.rule.name].scalars, [float(scalar) for scalar in row.running]
    decays = group.decoupled and step >= group.first_decay
    decay = decoupled_decay(group, RULES[table.rule.name].scales_decay) if decays else 0.0
    if len(running) > len(table.rule.running):  # corrected decay: the largest lr comes last
        running[-1] = largest_lr(group.lr, running[-1])
        decay *= group.lr / running[-1] if running[-1] else 1.0
    if not group.no_prox:  # (param - update) / (1 + decay)
        decay /= 1 + decay
        group = group._replace(lr=group.lr * (1 - decay))
    own = () if scalars is None else scalars(group, at, running) if table.rule.running else scalars(group, at)
    for stored, scalar in zip(row.running, running, strict=True):
        stored.fill_(scalar)
    return TensorScalars(
        group.lr,
        group.eps,
        weight1=1 - group.beta1,
        weight2=1 - group.beta2,
        small_beta1=group.beta1 if group.beta1 < 0.5 else 0.0,
        small_beta2=group.beta2 if group.beta2 < 0.5 else 0.0,
        step_size=quotient(group.lr, at.correction1),
        debias=quotient(1.0, at.correction1),
        denom_scale=1 / math.sqrt(at.correction2),
        grad_factor=-factor if group.maximize else factor,
        l2=0.0 if group.decoupled else group.weight_decay,
        decay=decay,
        cautious_decay=group.cautious_decay,
        ema_weight=1.0 if step == 1 and not row.ema_begun else 1 - group.ema_decay,
        skip=0.0,
        **{f"own_{name}": number for name, number in zip("abcdef", own, strict=False)},
    )


# ---- walks


def step_row(table: Table, row: Row, number: int, grad_scale: float, norm: float | None) -> None:
    grad = row.grad
    table.tensor_scalars[number, SKIP] = grad is None
    if grad is None:
        return
    row.step += 1
    h = scalars_of(table, row, grad_scale, norm)
    table.tensor_scalars[number] = torch.tensor(h, dtype=torch.float64, device=table.tensor_scalars.device)
    param, grad = load_param(row), load(grad) * h.grad_factor
    if h.l2:
        grad = grad + h.l2 * param
    rule = RULES[table.rule.name]
    update, states = rule.update(h, param, grad, load_states(row))
    store_states(row, states)
    if rule.measure is not None and table.sums is not None:
        # Of the states as they are stored: a float16 state may have become 0. Norms, because torch's sums depend on the
        # number of threads.
        measured = rule.measure(h, param, grad, load_states(row))
        table.sums[number] = torch.stack([x.double().norm() for x in measured]).square()
    else:
        write(row, h, param - with_decay(h, param, update))


def write(row: Row, h: TensorScalars, param: Tensor) -> None:
    """Stores the new param, and updates the average of the weights with it."""
    store_param(row, param)
    if row.ema is not None:
        old, new = load(row.ema), load_param(row)
        average = new if h.ema_weight == 1 else old - h.ema_weight * old + h.ema_weight * new
        store_rounded(row, row.ema, average, "ema", DITHER_PARAM)


class Reference(Backend):
    name = "reference"
    reads_tensors = True

    @staticmethod
    def why_not(device: torch.device | None) -> str | None:
        return None

    @torch.no_grad()
    def sum_squares(self, out: Tensor) -> None:
        out.zero_()
        for row in self.table.rows_list:
            bound = self.table.hparams.of(row.group_index).max_norm
            grad = row.grad
            if grad is not None and bound:
                out += load(grad).double().square().sum() * (bound > 0)

    @torch.no_grad()
    def step(self, scaling: Scaling) -> None:
        table = self.table
        if table.is_meta:
            return
        if scaling.found_inf is not None and scaling.found_inf.item():
            table.tensor_scalars[:, SKIP] = 1.0
            return
        scale = 1.0 if scaling.grad_scale is None else float(scaling.grad_scale)
        # Divided as a tensor: a scale of 0 gives inf or NaN, as in the kernels. Python's division would raise an error.
        norm = None if scaling.squares is None else float(scaling.squares.double().sqrt() / scale)
        for number, row in enumerate(table.rows_list):
            step_row(table, row, number, scale, norm)

    @torch.no_grad()
    def apply_update(self) -> None:
        table, rule = self.table, RULES[self.table.rule.name]
        if table.trust is None or table.sums is None or table.is_meta:
            return
        assert rule.ratio is not None and rule.direction is not None
        for number, row in enumerate(table.rows_list):
            if table.tensor_scalars[number, SKIP]:
                continue
            h, param = TensorScalars(*table.tensor_scalars[number].tolist()), load_param(row)
            table.trust[number] = rule.ratio(table.hparams.of(row.group_index), *table.sums[number].tolist())
            rate, direction = h.lr * float(table.trust[number]), rule.direction(h, load_states(row))
            if rule.scales_decay:
                write(row, h, param - rate * with_decay(h, param, direction))
            else:
                write(row, h, param - with_decay(h, param, rate * direction))

    @torch.no_grad()
    def scale_grads(self, squares: Tensor) -> None:
        norm = math.sqrt(float(squares))
        for row in self.table.rows_list:
            grad, group = row.grad, self.table.hparams.of(row.group_index)
            bound = quotient(group.max_norm, norm + group.clip_eps)
            if grad is None or not group.max_norm > 0 or bound >= 1:
                continue
            real_view(grad.conj() if grad.is_conj() else grad).mul_(bound)
