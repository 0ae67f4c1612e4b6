"""Comparisons: with the oracle in ulps, with torch within rounding, and of two optimizers bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import torch
from cases import CASES, SCALARS, hypers, parameters, random_grads, set_grads
from torch import Tensor
from torch.optim import Optimizer


def states(optimizer: Optimizer) -> list[dict[str, Tensor]]:
    """The states of every parameter as in a checkpoint: without buffers that no update has reached yet. Averages of the
    weights are left out; checked_average compares them."""
    params = parameters(optimizer)
    if set(optimizer.state) <= set(params):
        saved = optimizer.state_dict()["state"]
        found = [saved.get(index, {}) for index in range(len(params))]
    else:  # a param taken out leaves its state, and torch cannot save that
        found = [optimizer.state.get(p, {}) for p in params]
    return [{key: value for key, value in state.items() if key != "ema"} for state in found]


def updates(optimizer: Any, params: Sequence[Tensor]) -> list[float]:
    """The number of updates of each param. Rules without a state `step` are counted by the optimizer."""
    found = [optimizer.state.get(p, {}).get("step", optimizer._steps.get(p, 0.0)) for p in params]
    return [0.0 if isinstance(count, Tensor) and count.is_meta else float(count) for count in found]


def snapshot(optimizer: Any) -> list[oracle.Slot]:
    """The present params and states in float64."""
    slots = []
    for p, state in zip(parameters(optimizer), states(optimizer), strict=True):
        narrow = p.dtype in (torch.float32, torch.bfloat16, torch.float16)
        dtypes = [value.dtype for key, value in state.items() if key not in SCALARS]
        dtype = (dtypes or [optimizer.state_dtype if narrow and optimizer.state_dtype else p.dtype])[0]
        reals = {key: oracle.as_real(value) for key, value in state.items()}
        slots.append(oracle.Slot(oracle.as_real(p), reals, dtype.to_real()))
    return slots


def stored_dtypes(optimizer: Optimizer) -> list[dict[str, torch.dtype]]:
    return [
        {"param": p.dtype, **{key: value.dtype for key, value in state.items()}}
        for p, state in zip(parameters(optimizer), states(optimizer), strict=True)
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
    """The largest error in ulps of the params and of each state. sizes: the result of `scales`."""
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
    """The magnitudes by which errors are measured. Results of a cancellation cannot be more exact than these.

    States: the rule applied to absolute values, so that nothing cancels, or the old state if it is larger.
    Params: the largest of the old param, the new param and the step that absolute values give. At least lr if the rule
        divides by a root, because that cancels, too.
    LAMB: it rounds the clipped gradients, which matters where L2 cancels them. Clipped float64 gradients are as exact
        as the norm, and the CPU sums squares of narrower gradients in float32.
    Lion: where rounding can change the sign, any result is accepted. These are at most one in a hundred of all elements
        of a step, so none in a step of a single scalar.
    """

    def larger(x: Tensor | None, y: Tensor) -> Tensor:
        return y.abs() if x is None else torch.maximum(x.abs(), y.abs())

    absolute = [oracle.Slot(slot.param.abs(), {k: v.abs() for k, v in slot.state.items()}) for slot in before]
    sizes = [None if g is None else oracle.as_real(g).abs() for g in grads]
    summed = oracle.step(rule, absolute, sizes, [{**hyper, "maximize": False} for hyper in hypers])
    result = []
    for old, new, start, total, hyper in zip(before, after, absolute, summed, hypers, strict=True):
        param = torch.maximum(larger(old.param, new.param), (start.param - total.param).abs())
        param = param.clamp(min=float(hyper["lr"])) if "eps" in hyper else param
        magnitudes = {key: larger(old.state.get(key), value) for key, value in total.state.items()}
        for key in COPIES & magnitudes.keys():  # the first step makes them of the param
            magnitudes[key] = torch.maximum(larger(magnitudes[key], new.state[key]), param)
        result.append(oracle.Slot(param, magnitudes))
    if rule in (oracle.lion, oracle.lamb):
        doubtful_elements = 0
        for slot, moved, hyper in zip(result, swayed(rule, before, grads, hypers), hypers, strict=True):
            if rule is oracle.lamb:
                slot.param = torch.maximum(slot.param, moved / (2 * NUDGE))
                continue
            doubtful = moved > 0.5 * float(hyper["lr"])
            doubtful_elements += int(doubtful.sum())
            slot.param[doubtful] = math.inf
        assert doubtful_elements <= 0.01 * sum(slot.param.numel() for slot in result)
    if rule is oracle.lamb and any(g is not None and not is_wide(g) for g in grads):
        for slot, grad in zip(result, grads, strict=True):
            if grad is not None and is_wide(grad):
                slot.param *= NORM_ULPS
                slot.state = {key: value * NORM_ULPS for key, value in slot.state.items()}
    return result


COPIES = {state for case in CASES for state in case.ours.rule.copies}  # states that are moved as params are
NORM_ULPS = 2.0**26  # of float64, in the norm of float32 gradients


def is_wide(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float64, torch.complex128)


NUDGE = 2.0**-19  # of a gradient, many times its roundings


def swayed(
    rule: oracle.Rule, before: Sequence[oracle.Slot], grads: Sequence[Tensor | None], hypers: Sequence[dict[str, Any]]
) -> list[Tensor]:
    """The difference of each new param between steps with slightly smaller and slightly larger gradients. Adjacent
    elements are changed in opposite directions, which keeps the norms."""

    def nudge(grad: Tensor | None, size: float) -> Tensor | None:
        if grad is None:
            return None
        real = oracle.as_real(grad)
        turns = torch.arange(real.numel(), device=real.device).reshape(real.shape) % 2
        return real * (1 + size * (1 - 2 * turns))

    less, more = (oracle.step(rule, before, [nudge(g, size) for g in grads], hypers) for size in (-NUDGE, NUDGE))
    return [(a.param - b.param).abs() for a, b in zip(less, more, strict=True)]


def larger_scales(a: Sequence[oracle.Slot], b: Sequence[oracle.Slot]) -> list[oracle.Slot]:
    return [
        oracle.Slot(
            torch.maximum(one.param, other.param),
            {k: torch.maximum(one.state.get(k, v), v) for k, v in other.state.items()},
        )
        for one, other in zip(a, b, strict=True)
    ]


# LAMB multiplies gradients by the clipping coefficient. This is one more rounding, and a square doubles its error. LAMB
# computes the update from the stored averages, which in a 16-bit dtype can be rounded to the other side of a tie.
# Schedule-Free AdamW adds decay to a quotient before both z and y are moved by it.
MORE = {oracle.lamb: 1.0, oracle.schedule_free_adamw: 1.0}


def checked_step(
    optimizer: Optimizer, rule: oracle.Rule, bound: float, grad_scale: float = 1.0, found_inf: float = 0.0
) -> dict[str, float]:
    """Steps once and compares with the oracle's step from the same stored numbers. bound: in ulps."""
    before = snapshot(optimizer)
    grads = [p.grad for p in parameters(optimizer)]
    want = oracle.step(rule, before, grads, hypers(optimizer), grad_scale, found_inf)
    sizes = scales(rule, before, want, [None if g is None else g / grad_scale for g in grads], hypers(optimizer))
    optimizer.step()
    worst = errors(snapshot(optimizer), want, sizes, stored_dtypes(optimizer))
    assert max(worst.values()) <= bound + MORE.get(rule, 0.0), worst
    return worst


def checked_average(optimizer: Any, step: Callable[[], Any], weight: float | None) -> None:
    """Steps once. The averages of the weights must move by `weight` towards the stored params, or not at all if it is
    None. Two roundings of the arithmetic and one of the store are allowed."""
    before = {p: oracle.as_real(average) for p, average in optimizer.ema.items()}
    step()
    for p in parameters(optimizer):
        if p.grad is None and p not in before:
            assert p not in optimizer.ema
            continue
        average, new = optimizer.ema[p], oracle.as_real(p)
        old = before.get(p, new)
        moves = weight is not None and p.grad is not None
        want = old + weight * (new - old) if moves else old
        bound = 2.0 if average.dtype.to_real() in (torch.float32, torch.float64) else 0.6
        assert ulps(oracle.as_real(average), want, torch.maximum(old.abs(), new.abs()), average.dtype) <= bound * moves


def checked_averages(optimizer: Any, weights: Sequence[float | None]) -> None:
    """Steps with random gradients, once for each weight."""
    for number, weight in enumerate(weights):
        set_grads(parameters(optimizer), random_grads(parameters(optimizer), number))
        checked_average(optimizer, optimizer.step, weight)


def assert_equal(ours: Any, theirs: Any) -> None:
    """Asserts equal bits and dtypes. NaN is equal to NaN."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


SQUARES = {state for case in CASES for state in case.ours.rule.squares}


def assert_like_torch(ours: Optimizer, theirs: Optimizer, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Asserts the same states, and params and states equal within rounding. States of squares do not cancel, so their
    absolute error must be a million times smaller."""
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach().cpu(), rtol=rtol, atol=atol, equal_nan=True)
    for mine, torchs in zip(states(ours), states(theirs), strict=True):
        assert mine.keys() == torchs.keys()
        for key, value in torchs.items():
            least = atol * 1e-6 if key in SQUARES else atol
            torch.testing.assert_close(mine[key].cpu(), value.cpu(), rtol=rtol, atol=least, equal_nan=True)
