"""Users change tensors, states and groups between steps. The step must never use stale data."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from cases import (
    AMSGRAD,
    ONE_EACH,
    SCALARS,
    Case,
    Target,
    build,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
)
from compare import checked_step

from fused_optim import FusedAdamW

SHAPES = [(5, 3), (), (40,), (9,)]

pytestmark = pytest.mark.host
Change = Callable[[list[torch.nn.Parameter], torch.optim.Optimizer], None]


def averages(p: torch.Tensor, optimizer: torch.optim.Optimizer) -> list[str]:
    return [key for key in optimizer.state[p] if key not in SCALARS]


def swap_param_data(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[2].data = params[2].data.clone() * 2


def swap_grad_data(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    assert params[2].grad is not None
    params[2].grad.data = params[2].grad.data.clone() * 3


def replace_state(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[params[2]][averages(params[2], optimizer)[0]] = torch.full_like(params[2], 0.5)


def swap_state_data(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state[params[2]]
    last = averages(params[2], optimizer)[-1]
    state[last].data = state[last].data.clone() * 4


def fill_step(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[params[2]]["step"].fill_(40)


def replace_step(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[params[2]]["step"] = torch.tensor(17.0, device=params[2].device)


def replace_state_dict_of_param(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[params[2]] = {key: value.clone() for key, value in optimizer.state[params[2]].items()}


def drop_state(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    del optimizer.state[params[2]]


def clear_states(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def resize_param(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[2].data = torch.randn(55, device=params[2].device)
    params[2].grad = torch.randn(55, device=params[2].device)
    del optimizer.state[params[2]]


def halve_param(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[2].data = params[2].data.to(torch.bfloat16)
    params[2].grad = torch.ones_like(params[2])
    del optimizer.state[params[2]]


def halve_states(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state[params[2]]
    for key in averages(params[2], optimizer):
        state[key] = state[key].to(torch.bfloat16)


def drop_param(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"] = [p for p in params if p is not params[2]]


def swap_order(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"].reverse()


def move_to_other_group(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"] = params[:2]
    optimizer.add_param_group({"params": params[2:], "lr": 0.4})


def replace_group(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.4}


def replace_groups(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups = [{**optimizer.param_groups[0], "lr": 0.4}]


CHANGES: list[Change] = [
    swap_param_data,
    swap_grad_data,
    replace_state,
    swap_state_data,
    fill_step,
    replace_step,
    replace_state_dict_of_param,
    drop_state,
    clear_states,
    resize_param,
    halve_param,
    halve_states,
    drop_param,
    swap_order,
    move_to_other_group,
    replace_group,
    replace_groups,
]


for_every_rule_and_change = pytest.mark.parametrize(
    ("case", "change"),
    [
        pytest.param(case, change, id=f"{case}-{change.__name__}")
        for case in ONE_EACH
        for change in CHANGES
        if change not in (fill_step, replace_step) or case.rule in (oracle.adam, oracle.qhadam, oracle.lamb)
    ],
)


@pytest.mark.shared
@on_every_target
@for_every_rule_and_change
def test_changes_between_steps_are_noticed(case: Case, target: Target, change: Change) -> None:
    params = make_params(SHAPES, device=target.device)
    optimizer = build(case, target, params)
    for step in range(2):
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, case.rule, 3.0)
    set_grads(params, random_grads(params, 2))
    change(params, optimizer)
    checked_step(optimizer, case.rule, 3.0)
    for p in parameters(optimizer):
        p.grad = torch.ones_like(p)
    checked_step(optimizer, case.rule, 3.0)


@on_every_target
def test_gradients_in_reused_memory(target: Target) -> None:
    """The allocator reuses an address for a gradient of another param, with another shape or layout."""
    params = make_params([(64,), (8, 8)], device=target.device)
    optimizer = build(AMSGRAD, target, params)
    generator = torch.Generator().manual_seed(0)
    for step in range(quick(target, 40, 4)):
        for p in params:
            p.grad = None
        for p in params if step % 2 else params[::-1]:
            if step % 5 != 4 or p is params[0]:
                values = torch.randn(p.shape, generator=generator).to(target.device)
                p.grad = values.t().contiguous().t() if p.dim() == 2 and step % 3 == 1 else values
        checked_step(optimizer, AMSGRAD.rule, 3.0)


@on_every_target
def test_params_in_reused_memory(target: Target) -> None:
    """Optimizers are created and freed. A new param can get the address of an old one."""
    for seed in range(quick(target, 20, 3)):
        params = make_params([(64,), (8, 8)], device=target.device, seed=seed)
        optimizer = build(AMSGRAD, target, params)
        for step in range(2):
            set_grads(params, random_grads(params, step))
            checked_step(optimizer, AMSGRAD.rule, 3.0)
        del params, optimizer


@on_every_target
def test_another_default_device(target: Target) -> None:
    ours = make_params(SHAPES, device=target.device)
    before = [p.detach().clone() for p in ours]
    set_grads(ours, random_grads(before, 0))
    with torch.device("meta"):
        optimizer = FusedAdamW(ours, backend=target.backend, max_grad_norm=1.0, skip_nonfinite=True)
        optimizer.step()
        optimizer.step(grad_scale=2.0)
    assert all(not torch.equal(p, q) for p, q in zip(ours, before, strict=True))
