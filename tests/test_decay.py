"""decay.decoupled: the same result as decay inside the step, in one call. A skipped step does not decay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import HAS_CUDA, random_grads, set_grads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_optim
from fused_optim.decay import decoupled
from fused_optim.optim import decay

DEVICES = ["cpu"] + ["cuda"] * HAS_CUDA


def params_of(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", shapes: Any = ((7, 5), (13,), (), (0,))
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def values(params: list[torch.nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Calls(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def run(optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(start, start + steps):
        set_grads(params, random_grads(params, step))
        optimizer.step()


# ---- numbers


@pytest.mark.parametrize(
    "foreach, dtype",
    [(False, torch.float32), (True, torch.float32), (True, torch.float64), (False, torch.bfloat16)],
)
def test_torch_adam_with_it_is_torch_adamw(foreach: bool, dtype: torch.dtype) -> None:
    inside, outside = params_of(dtype=dtype), params_of(dtype=dtype)
    run(torch.optim.AdamW(inside, lr=0.1, weight_decay=0.3, foreach=foreach), 10)
    adam = torch.optim.Adam(outside, lr=0.1, foreach=foreach)
    handle = decoupled(adam, 0.3)
    run(adam, 10)
    assert equal(values(inside), values(outside))
    assert handle.updates == 10


@pytest.mark.parametrize(
    "decaying, plain, kwargs",
    [
        ("FusedAdamW", "FusedAdam", {}),
        ("FusedSGDW", "FusedSGD", {"momentum": 0.9}),
        ("FusedQHAdamW", "FusedQHAdam", {"nus": (0.7, 1.0)}),
    ],
)
def test_ours_outside_as_inside(decaying: str, plain: str, kwargs: dict[str, Any]) -> None:
    inside, outside = params_of(), params_of()
    run(getattr(fused_optim, decaying)(inside, lr=0.1, weight_decay=0.3, **kwargs), 10)
    optimizer = getattr(fused_optim, plain)(outside, lr=0.1, **kwargs)
    decoupled(optimizer, 0.3)
    run(optimizer, 10)
    for a, b in zip(inside, outside, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Rprop", "NAdam", "Adamax", "Adadelta", "RAdam"])
@pytest.mark.parametrize("convention", ["torch", "plain"])
def test_any_optimizer_by_hand(name: str, convention: str) -> None:
    """With zero gradients only the decay changes params, by the factor 1 - share. Each group has its own number, and a
    schedule depends on the step."""
    first, second = params_of(0, torch.float64), params_of(1, torch.float64)
    optimizer = getattr(torch.optim, name)([{"params": first}, {"params": second, "lr": 0.2}], lr=0.1)
    decoupled(optimizer, [0.3, 0.5], lambda step: 1 / (1 + step), convention=convention)
    expected = [[x.clone() for x in values(params)] for params in (first, second)]
    for step in range(3):
        set_grads(first + second, [torch.zeros_like(param) for param in first + second])
        optimizer.step()
        for group, (lr, share) in enumerate([(0.1, 0.3), (0.2, 0.5)]):
            share = share * (lr if convention == "torch" else 1) / (1 + step)
            expected[group] = [x * (1 - share) for x in expected[group]]
    for params, truth in zip((first, second), expected, strict=True):
        for param, value in zip(params, truth, strict=True):
            torch.testing.assert_close(param.detach(), value, rtol=1e-12, atol=0)


def test_schedule_of_nothing_follows_a_scheduler() -> None:
    (param,) = params_of(shapes=[(4,)], dtype=torch.float64)
    start = param.detach().clone()
    optimizer = torch.optim.SGD([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    decoupled(optimizer, 0.3, lambda: optimizer.param_groups[0]["lr"] / 0.1, convention="plain")
    for _ in range(2):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(param.detach(), start * (1 - 0.3) * (1 - 0.15), rtol=1e-12, atol=0)


@pytest.mark.parametrize("convention", ["torch", "plain"])
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_lr_zero_moves_nothing(convention: str, lr: float | Tensor) -> None:
    params = params_of()
    before = values(params)
    optimizer = torch.optim.SGD(params, lr=lr)
    decoupled(optimizer, 0.3, convention=convention)
    run(optimizer, 2)
    assert equal(values(params), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("convention", ["torch", "plain"])
def test_lr_as_a_tensor(device: str, convention: str) -> None:
    lr = torch.tensor(0.5, device=device)
    (param,) = params_of(device=device, shapes=[(4,)])
    start = param.detach().clone()
    optimizer = torch.optim.SGD([param], lr=lr)
    decoupled(optimizer, 0.25, convention=convention)
    for rate in (0.5, 0.25):
        lr.fill_(rate)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        start = start * (1 - 0.25 * (rate if convention == "torch" else 1))
    assert torch.equal(param.detach(), start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["host", "device"])
def test_narrow_params_are_rounded_once(dtype: torch.dtype, where: str) -> None:
    """In bfloat16 0.997 rounds to 0.996. A rounded factor would decay a third faster."""
    params = params_of(dtype=dtype)
    expected = [(value.double() * 0.997).to(dtype) for value in values(params)]
    if where == "host":
        optimizer = torch.optim.SGD(params, lr=0.1)
        decoupled(optimizer, 0.03)
        set_grads(params, [torch.zeros_like(param) for param in params])
        optimizer.step()
    else:
        with torch.no_grad():
            decay._multiply(list(params), torch.tensor(0.997, dtype=torch.float64))
    assert equal(values(params), expected)


def test_infinite_params_stay() -> None:
    param = torch.nn.Parameter(torch.tensor([float("inf"), -float("inf"), 1.0]))
    optimizer = torch.optim.SGD([param], lr=0.1)
    decoupled(optimizer, 0.3)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert param.tolist() == pytest.approx([float("inf"), -float("inf"), 0.97])


# ---- which params, and how often


def test_params_without_a_gradient_rest() -> None:
    params = params_of()
    before = values(params)
    optimizer = torch.optim.SGD(params, lr=0.1)
    decoupled(optimizer, 0.5)
    params[1].grad = torch.zeros_like(params[1])
    optimizer.step()
    assert torch.equal(params[1].detach(), before[1] * (1 - 0.05))
    assert all(torch.equal(params[i].detach(), before[i]) for i in (0, 2, 3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 50])
def test_one_call_for_all_groups(device: str, groups: int) -> None:
    params = params_of(device=device, shapes=[(3,)] * 100)
    size = 100 // groups
    optimizer = torch.optim.SGD([{"params": params[i : i + size], "lr": 0.1 + i} for i in range(0, 100, size)])
    decoupled(optimizer, [0.1 * (1 + i) for i in range(groups)])
    set_grads(params, [torch.zeros_like(param) for param in params])
    with Calls() as calls:
        optimizer.step()
    multiplications = [name for name in calls.names if "mul" in name]
    assert multiplications == ["aten._foreach_mul_.ScalarList"]


def test_one_call_per_dtype() -> None:
    params = params_of() + params_of(dtype=torch.float64)
    before = values(params)
    optimizer = torch.optim.SGD(params, lr=0.5)
    decoupled(optimizer, 0.5)
    set_grads(params, [torch.zeros_like(param) for param in params])
    with Calls() as calls:
        optimizer.step()
    assert [name for name in calls.names if "mul" in name] == ["aten._foreach_mul_.ScalarList"] * 2
    assert equal(values(params), [value * 0.75 for value in before])


@pytest.mark.parametrize("in_keyword", [False, True])
def test_closure_sees_the_params_before_they_decay(in_keyword: bool) -> None:
    """The closure runs before the decay, as in torch's AdamW."""
    seen: dict[str, list[Tensor]] = {"inside": [], "outside": []}

    def trained(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], log: list[Tensor]) -> list[Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sum((param**2).sum() for param in params)
            loss.backward()
            log.append(loss.detach())
            return loss

        for _ in range(4):
            loss = optimizer.step(closure=closure) if in_keyword else optimizer.step(closure)
            assert loss.item() == log[-1].item()
        return values(params)

    params = params_of()
    inside = trained(torch.optim.AdamW(params, lr=0.1, weight_decay=0.3), params, seen["inside"])
    params = params_of()
    adam = torch.optim.Adam(params, lr=0.1)
    handle = decoupled(adam, 0.3)
    assert equal(inside, trained(adam, params, seen["outside"]))
    assert equal(seen["inside"], seen["outside"]) and handle.updates == 4


def test_lbfgs_decays_once_a_step() -> None:
    (param,) = params_of(shapes=[(4,)], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([param], lr=0.5, max_iter=5)
    handle = decoupled(optimizer, 0.1)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = ((param - 1) ** 4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert evaluations > 1 and handle.updates == 1


# ---- skipped steps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["FusedAdam", "FusedSGD"])
@pytest.mark.parametrize("convention", ["torch", "plain"])
def test_skipped_steps_do_not_decay(device: str, name: str, convention: str) -> None:
    params = params_of(device=device, shapes=[(7, 5), (13,)])
    optimizer = getattr(fused_optim, name)(params, lr=0.1)
    decoupled(optimizer, 0.3, convention=convention)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    for bad in (True, False):
        before = values(params)
        optimizer.zero_grad()
        loss = sum((param**2).sum() for param in params) * (float("inf") if bad else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert equal(values(params), before) == bad


def test_skipped_steps_of_torch_optimizers() -> None:
    params = params_of()
    before = values(params)
    optimizer = torch.optim.RMSprop(params, lr=0.1)
    handle = decoupled(optimizer, 0.3)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(sum((param**2).sum() for param in params) * float("inf")).backward()
    scaler.step(optimizer)
    assert equal(values(params), before) and handle.updates == 0


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device: torch reports synchronizations only for CUDA")
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_no_wait_for_the_device(tensor_lr: bool) -> None:
    params = params_of(device="cuda")
    lr = torch.tensor(0.1, device="cuda") if tensor_lr else 0.1
    optimizer = fused_optim.FusedAdam(params, lr=lr)
    handle = decoupled(optimizer, 0.3)
    run(optimizer, 1)
    before = values(params)
    optimizer.found_inf = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        handle._decay(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(values(params), before)


# ---- the handle


def test_remove_ends_it() -> None:
    params = params_of()
    optimizer = torch.optim.SGD(params, lr=0.1)
    decoupled(optimizer, 0.3).remove()
    before = values(params)
    set_grads(params, [torch.zeros_like(p) for p in params])
    optimizer.step()
    assert equal(values(params), before)


def test_resuming() -> None:
    def build() -> tuple[list[torch.nn.Parameter], Any, Any]:
        params = params_of()
        optimizer = fused_optim.FusedAdam(params, lr=0.1)
        return params, optimizer, decoupled(optimizer, [0.1], lambda step: 1 / (1 + step))

    straight, optimizer, _ = build()
    run(optimizer, 8)
    params, optimizer, handle = build()
    run(optimizer, 4)
    saved = copy.deepcopy((values(params), optimizer.state_dict(), handle.state_dict()))
    assert saved[2] == {"updates": 4, "weight_decay": [0.1]}
    params, optimizer, handle = build()
    with torch.no_grad():
        for param, value in zip(params, saved[0], strict=True):
            param.copy_(value)
    optimizer.load_state_dict(saved[1])
    handle.load_state_dict(saved[2])
    run(optimizer, 4, start=4)
    assert equal(values(params), values(straight))


def test_decays_may_change() -> None:
    (param,) = params_of(shapes=[(4,)])
    optimizer = torch.optim.SGD([param], lr=1.0)
    handle = decoupled(optimizer, 0.5)
    handle.weight_decay = 0.25
    start = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param.detach(), start * 0.75)


# ---- refusals


@pytest.mark.parametrize("name", ["FusedAdamW", "FusedSGDW", "FusedLAMB"])
def test_refuses_what_decays_already(name: str) -> None:
    optimizer = getattr(fused_optim, name)(params_of())
    with pytest.raises(ValueError, match=f"every group of {name} must have weight_decay=0, but group 0 has 0.01"):
        decoupled(optimizer, 0.1)
    decoupled(getattr(fused_optim, name)(params_of(), weight_decay=0.0), 0.1)


@pytest.mark.parametrize("with_closure", [False, True])
def test_refuses_a_group_that_decays_added_later(with_closure: bool) -> None:
    params = params_of()
    optimizer = torch.optim.SGD(params[:1], lr=0.1)
    handle = decoupled(optimizer, 0.1)
    optimizer.add_param_group({"params": params[1:], "weight_decay": 0.2})
    set_grads(params, random_grads(params, 0))
    before = values(params)
    closure = (lambda: pytest.fail("the closure ran")) if with_closure else None
    with pytest.raises(ValueError, match=r"but group 1 has 0\.2; set it to 0"):
        optimizer.step(closure)
    assert equal(values(params), before) and handle.updates == 0


def test_refuses_a_group_without_a_number() -> None:
    params = params_of()
    optimizer = torch.optim.SGD(params[:1], lr=0.1)
    with pytest.raises(ValueError, match="optimizer's 1 param groups, but got 2 numbers"):
        decoupled(optimizer, [0.1, 0.2])
    handle = decoupled(optimizer, [0.1])
    optimizer.add_param_group({"params": params[1:]})
    with pytest.raises(ValueError, match="add_param_group needs one more in the handle's weight_decay"):
        optimizer.step()
    handle.weight_decay = [0.1, 0.2]
    optimizer.step()


@pytest.mark.parametrize("number", [-0.1, float("nan")])
def test_refuses_numbers_out_of_range(number: float) -> None:
    with pytest.raises(ValueError, match="weight_decay must not be negative"):
        decoupled(torch.optim.SGD(params_of()), number)
    with pytest.raises(ValueError, match='convention must be "torch" or "plain"'):
        decoupled(torch.optim.SGD(params_of()), 0.1, convention="paper")  # type: ignore[arg-type]
