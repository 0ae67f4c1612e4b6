"""The average of the weights that the step keeps: its numbers, and when it moves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from averaged import DECAY, REFERENCE, WEIGHT, make
from cases import (
    ADAMW,
    BY_NAME,
    LAMB,
    Case,
    Target,
    build,
    build_torch,
    copies,
    for_every_case,
    for_every_case_of_torch,
    for_every_rule,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, checked_average, checked_averages, states
from looks import LOOKS, choose
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_optim

# ---- numbers


@pytest.mark.compiled
@on_every_target
@for_every_case
def test_each_step(case: Case, target: Target) -> None:
    checked_averages(make(target, case), [1.0] + [WEIGHT] * quick(target, 3, 1))


@pytest.mark.slow
@on_every_target
@for_every_case_of_torch
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_like_torchs_averaged_model(case: Case, decay: float, target: Target) -> None:
    ours = make(target, case, ema_decay=decay)
    model = torch.nn.ParameterList(copies(parameters(ours)))
    theirs = build_torch(case, model.parameters())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for number in range(quick(target, 5, 2)):
        train([ours, theirs], 1, seed=number)
        averaged.update_parameters(model)
    for p, average in zip(parameters(ours), averaged.parameters(), strict=True):
        torch.testing.assert_close(ours.ema[p], average.detach(), rtol=1e-5, atol=1e-6)


@on_every_target
@for_every_case
def test_params_and_states_know_nothing_of_it(case: Case, target: Target) -> None:
    with_average, without = make(target, case), make(target, case, ema_decay=None)
    train([with_average, without], quick(target, 4, 2))
    assert without.ema is None
    assert_equal([p.detach() for p in parameters(with_average)], [p.detach() for p in parameters(without)])
    assert_equal(states(with_average), states(without))


DTYPES: list[tuple[torch.dtype, dict[str, torch.dtype], torch.dtype]] = [
    (torch.float32, {"ema_dtype": torch.bfloat16}, torch.bfloat16),
    (torch.bfloat16, {}, torch.float32),
    (torch.bfloat16, {"ema_dtype": torch.bfloat16}, torch.bfloat16),
    (torch.bfloat16, {"state_dtype": torch.float32}, torch.float32),
    (torch.bfloat16, {"state_dtype": torch.float32, "ema_dtype": torch.bfloat16}, torch.bfloat16),
    (torch.float16, {}, torch.float32),
    (torch.float16, {"ema_dtype": torch.float16}, torch.float16),
    (torch.float16, {"ema_dtype": torch.float32}, torch.float32),
    (torch.float64, {"ema_dtype": torch.float32}, torch.float64),
    (torch.complex64, {"ema_dtype": torch.bfloat16}, torch.complex64),
    (torch.complex128, {}, torch.complex128),
]


@on_every_target
@pytest.mark.parametrize("case", [BY_NAME["adamw-amsgrad"], BY_NAME["sgd-plain"], LAMB], ids=str)
@pytest.mark.parametrize(("dtype", "options", "expected"), DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, options: dict[str, Any], expected: torch.dtype, case: Case, target: Target) -> None:
    optimizer = make(target, case, dtype, **options)
    checked_averages(optimizer, [1.0, WEIGHT])
    assert {average.dtype for average in optimizer.ema.values()} == {expected}


@pytest.mark.compiled
@on_every_target
def test_kinds_side_by_side(target: Target) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64)
    params = [p for seed, dtype in enumerate(kinds) for p in make_params([(40,), (3, 3)], dtype, target.device, seed)]
    optimizer = build(ADAMW, target, params, ema_decay=DECAY, ema_dtype=torch.float32)
    checked_averages(optimizer, [1.0, WEIGHT])


@pytest.mark.compiled
@on_every_target
@for_every_rule
def test_layouts(case: Case, target: Target) -> None:
    buffer = torch.randn(3000, device=target.device)
    views = [
        torch.randn(6, 40, device=target.device).t(),
        torch.randn(2, 3, 4, 4, device=target.device).contiguous(memory_format=torch.channels_last),
        buffer[1:900],
        buffer[1001:2999:2],  # has holes, which nobody may touch
        buffer[3000:],
    ]
    optimizer = build(case, target, [view.requires_grad_() for view in views], ema_decay=DECAY)
    holes = buffer[1000:3000:2].clone()
    checked_averages(optimizer, [1.0, WEIGHT, WEIGHT])
    assert torch.equal(buffer[1000:3000:2], holes)
    for p in views:
        average = optimizer.ema[p]
        assert average.stride() == torch.empty_like(p).stride()
        with optimizer.ema_weights():
            assert average.data_ptr() == optimizer.ema[p].data_ptr()
    assert torch.equal(buffer[1000:3000:2], holes)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@on_every_target
@for_every_rule
def test_what_is_not_finite(case: Case, target: Target) -> None:
    """Once the first copy is made, what comes is torch's lerp of what was stored."""
    params = make_params([(6,)], device=target.device)
    optimizer = build(case, target, params, **{"ema_decay": DECAY, **case.known(weight_decay=0.0)})
    with torch.no_grad():
        params[0][0] = math.inf
    grads = [torch.tensor([1.0, math.nan, 1.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, math.inf, 1.0, math.nan, 0.0])]
    old = None
    for grad in grads:
        set_grads(params, [grad.to(target.device)])
        optimizer.step()
        new = params[0].detach()
        want = new if old is None else old.lerp(new, WEIGHT)
        torch.testing.assert_close(optimizer.ema[params[0]], want, equal_nan=True)
        old = optimizer.ema[params[0]].clone()


# ---- which averages move


@pytest.mark.host
@on_every_target
@for_every_rule
def test_params_without_gradient(case: Case, target: Target) -> None:
    optimizer = make(target, case)
    params = parameters(optimizer)
    for number, missing in enumerate(((0, 3), (3,), (0,))):
        grads = random_grads(params, number)
        set_grads(params, [None if index in missing else grad for index, grad in enumerate(grads)])
        kept = {params[i]: optimizer.ema[params[i]].clone() for i in missing if params[i] in optimizer.ema}
        optimizer.step()
        assert set(optimizer.ema) >= {p for p in params if p.grad is not None}
        assert params[3] not in optimizer.ema or missing == (0,) or case.is_eager
        for p, average in kept.items():
            assert torch.equal(optimizer.ema[p], average)
    assert torch.equal(optimizer.ema[params[3]], params[3])  # the first update, whenever it comes
    assert not torch.equal(optimizer.ema[params[4]], params[4])


@on_every_target
def test_late_groups(target: Target) -> None:
    optimizer = make(target)
    checked_averages(optimizer, [1.0, WEIGHT])
    late = make_params([(50,)], device=target.device, seed=5)
    optimizer.add_param_group({"params": late, "lr": 0.5})
    grads = random_grads(parameters(optimizer), 7)
    set_grads(parameters(optimizer), grads)
    optimizer.step()
    assert torch.equal(optimizer.ema[late[0]], late[0])
    set_grads(parameters(optimizer), grads)
    checked_average(optimizer, optimizer.step, WEIGHT)


@on_every_target
@for_every_rule
def test_skipped_steps(case: Case, target: Target) -> None:
    optimizer = make(target, case, skip_nonfinite=True)
    for number, bad in enumerate((True, False, True, False)):
        grads = random_grads(parameters(optimizer), number)
        grads[0][0, 0] = math.nan if bad else 1.0
        set_grads(parameters(optimizer), grads)
        checked_average(optimizer, optimizer.step, None if bad else 1.0 if number == 1 else WEIGHT)
    optimizer.found_inf = torch.ones((), device=target.device)
    set_grads(parameters(optimizer), random_grads(parameters(optimizer), 9))
    checked_average(optimizer, optimizer.step, None)
    del optimizer.found_inf
    checked_average(optimizer, optimizer.step, WEIGHT)


@on_every_target
@for_every_rule
def test_with_clipping_and_scales(case: Case, target: Target) -> None:
    ours, theirs = (make(target, case, max_grad_norm=0.5, ema_decay=decay) for decay in (DECAY, None))
    for number in range(2):
        grads = random_grads(parameters(ours), number)
        set_grads(parameters(ours), grads)
        set_grads(parameters(theirs), grads)
        checked_average(ours, lambda: ours.step(grad_scale=4.0), 1.0 if number == 0 else WEIGHT)
        theirs.step(grad_scale=4.0)
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(theirs)])


@on_every_target
def test_moved_params_keep_their_averages(target: Target) -> None:
    optimizer = make(target)
    checked_averages(optimizer, [1.0, WEIGHT])
    for p in parameters(optimizer):
        p.data = p.data.clone()
    checked_average(optimizer, optimizer.step, WEIGHT)


@on_every_target
def test_momentum_may_begin_later(target: Target) -> None:
    """Then SGD begins to count anew, and the averages do not."""
    optimizer = make(target, BY_NAME["sgd-plain"])
    checked_averages(optimizer, [1.0, WEIGHT])
    optimizer.param_groups[0]["momentum"] = 0.9
    checked_average(optimizer, optimizer.step, WEIGHT)
    checked_average(optimizer, optimizer.step, WEIGHT)


# ---- decay


@pytest.mark.host
@on_every_target
@for_every_rule
def test_a_function_of_the_steps_so_far(case: Case, target: Target) -> None:
    asked: list[int] = []

    def decay(steps: int) -> float:
        asked.append(steps)
        return min(0.99, (1 + steps // 2) / (10 + steps // 2))

    optimizer = make(target, case, ema_decay=decay)
    for number in range(quick(target, 6, 3)):
        set_grads(parameters(optimizer), random_grads(parameters(optimizer), number))
        weight = 1.0 if number == 0 else 1 - (1 + number // 2) / (10 + number // 2)
        checked_average(optimizer, optimizer.step, weight)
    assert asked == list(range(quick(target, 6, 3)))


@pytest.mark.parametrize("look", LOOKS)
def test_a_function_under_every_look(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, look)
    optimizer = make(REFERENCE, ema_decay=lambda steps: 0.5 if steps < 3 else 0.25)
    for number in range(5):
        set_grads(parameters(optimizer), random_grads(parameters(optimizer), number))
        if number == 4:
            optimizer.param_groups[0]["lr"] = 0.1
        checked_average(optimizer, optimizer.step, 1.0 if number == 0 else 0.5 if number < 3 else 0.75)


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan, "0.9", torch.tensor(0.9)])
@on_every_target
def test_functions_that_return_no_decay(bad: Any, target: Target) -> None:
    optimizer = make(target, ema_decay=lambda steps: bad if steps == 1 else 0.5)
    train([optimizer], 1)
    before = [p.detach().clone() for p in parameters(optimizer)]
    with pytest.raises(ValueError, match="ema_decay must be a number from 0 to 1"):
        optimizer.step()
    assert_equal([p.detach() for p in parameters(optimizer)], before)
    assert float(optimizer.state[parameters(optimizer)[0]]["step"]) == 1


@pytest.mark.parametrize("name", ["FusedAdamW", "FusedSGD", "FusedLAMB", "FusedLion", "FusedQHAdamW"])
def test_bad_options(name: str) -> None:
    for decay in (-0.1, 1.1, math.nan, "0.9"):
        with pytest.raises(ValueError, match="ema_decay must be a number from 0 to 1"):
            getattr(fused_optim, name)([torch.zeros(3)], ema_decay=decay)
    with pytest.raises(ValueError, match="ema_dtype must be None"):
        getattr(fused_optim, name)([torch.zeros(3)], ema_decay=0.9, ema_dtype=torch.float64)
    with pytest.raises(ValueError, match="only with ema_decay"):
        getattr(fused_optim, name)([torch.zeros(3)], ema_dtype=torch.float32)
