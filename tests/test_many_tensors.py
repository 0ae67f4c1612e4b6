"""Many tensors on the CPU, where all threads poll and walk them: the results are those of each tensor alone, and no
change is missed in any row."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from looks import LOOKS, choose
from torch import Tensor

from fused_optim import FusedAdamW, FusedLAMB, FusedOptimizer, FusedScheduleFreeAdamW, FusedSGD, backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COUNT = 600  # more than one thread is used

if "cpp" not in backends.available():
    pytest.skip("the C++ kernel for CPUs is not built", allow_module_level=True)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


def parameters(generator: random.Random) -> list[torch.nn.Parameter]:
    """Each size from 0 to 130 and a few that span several pieces, in mixed dtypes."""
    sizes = [*range(131), 4096, 4097, 80_000] + [generator.randint(1, 130) for _ in range(COUNT - 134)]
    generator.shuffle(sizes)
    return [torch.nn.Parameter(torch.randn(size).to(generator.choice(DTYPES))) for size in sizes]


OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    (FusedAdamW, {}),
    (FusedAdamW, {"amsgrad": True, "cautious_decay": True, "ema_decay": 0.9}),
    (FusedSGD, {"momentum": 0.9}),
    (FusedScheduleFreeAdamW, {"warmup_steps": 3}),
    (FusedLAMB, {"max_grad_norm": None}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=["adamw", "averaged", "sgd", "running", "trust"])
def test_many_tensors_step_as_each_alone(kind: Any, options: dict[str, Any]) -> None:
    """Groups, dtypes, step counts and missing gradients vary from row to row, so neighbours must not share scalars that
    differ. Params are added between steps, and some never have a gradient."""
    torch.manual_seed(0)
    generator = random.Random(0)
    together = parameters(generator)
    alone = [torch.nn.Parameter(param.detach().clone()) for param in together]
    rates = [generator.choice((1e-2, 3e-3, 1e-3)) for _ in together]
    first = [generator.choice((0, 0, 0, 1, 2)) for _ in together]  # the step before which a param is added
    frozen = {number for number in range(COUNT) if number % 37 == 5}
    groups = [
        {"params": [p for p, r, f in zip(together, rates, first, strict=True) if r == rate and f == 0], "lr": rate}
        for rate in sorted(set(rates))
    ]
    optimizer = kind(groups, **options)
    singles = [kind([param], lr=rate, **options) for param, rate in zip(alone, rates, strict=True)]
    for step in range(5):
        for rate in sorted(set(rates)):
            late = [p for p, r, f in zip(together, rates, first, strict=True) if r == rate and f == step > 0]
            if late:
                optimizer.add_param_group({"params": late, "lr": rate})
        for number, (a, b) in enumerate(zip(together, alone, strict=True)):
            a.grad = b.grad = None
            if number not in frozen and first[number] <= step and generator.random() < 0.9:
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
        optimizer.step()
        for single in singles:
            if single.param_groups[0]["params"][0].grad is not None:
                single.step()
    for a, b, single in zip(together, alone, singles, strict=True):
        assert torch.equal(a, b)
        theirs = single.state.get(b, {})
        for name, value in optimizer.state.get(a, {}).items():
            if isinstance(value, Tensor) and theirs:
                torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, equal_nan=True)


def replace_grad(optimizer: FusedOptimizer, param: Tensor) -> None:
    assert param.grad is not None
    param.grad = param.grad.clone()


def drop_grad(optimizer: FusedOptimizer, param: Tensor) -> None:
    param.grad = None


def transpose_grad(optimizer: FusedOptimizer, param: Tensor) -> None:
    assert param.grad is not None
    param.grad = param.grad.t().contiguous().t()


def negate_grad(optimizer: FusedOptimizer, param: Tensor) -> None:
    assert param.grad is not None
    param.grad = torch._neg_view(param.grad)


def replace_param(optimizer: FusedOptimizer, param: Tensor) -> None:
    param.data = param.data.clone()


def replace_state(optimizer: FusedOptimizer, param: Tensor) -> None:
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"] * 2


def replace_step(optimizer: FusedOptimizer, param: Tensor) -> None:
    optimizer.state[param]["step"] = torch.tensor(7.0)


def replace_memory(optimizer: FusedOptimizer, param: Tensor) -> None:
    state = optimizer.state[param]["exp_avg_sq"]
    state.set_(state.clone())


def replace_dict(optimizer: FusedOptimizer, param: Tensor) -> None:
    optimizer.state[param] = dict(optimizer.state[param])


CHANGES: list[Callable[[FusedOptimizer, Tensor], None]] = [
    replace_grad,
    drop_grad,
    transpose_grad,
    negate_grad,
    replace_param,
    replace_state,
    replace_step,
    replace_memory,
    replace_dict,
]


@pytest.mark.parametrize("look", LOOKS)
def test_changes_in_any_row_are_noticed(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with an optimizer that builds new tables at each step."""
    choose(monkeypatch, look)
    torch.manual_seed(0)
    generator = random.Random(1)
    params = [torch.nn.Parameter(torch.randn(8, 12)) for _ in range(COUNT)]
    for param in params:
        param.grad = torch.randn_like(param)
    watching = FusedAdamW(params)
    copied: Any = copy.deepcopy((params, watching))
    others, rebuilding = copied
    for param, other in zip(params, others, strict=True):
        other.grad = param.grad.clone()
    for step in range(len(CHANGES)):
        for change in generator.sample(CHANGES, 4) if step else []:
            number = generator.randrange(COUNT)
            if params[number].grad is not None:
                change(watching, params[number])
                change(rebuilding, others[number])
        watching.step()
        rebuilding._forget()
        rebuilding.step()
        for param, other in zip(params, others, strict=True):
            assert torch.equal(param, other)
            assert all(torch.equal(watching.state[param][name], rebuilding.state[other][name]) for name in ("step",))


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("row", [0, 63, 64, 300, COUNT - 1])
def test_a_bad_gradient_in_any_row_changes_nothing(row: int, look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, look)
    params = [torch.nn.Parameter(torch.randn(100)) for _ in range(COUNT)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = FusedAdamW(params)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    versions = [param._version for param in params]
    bad = params[row]
    assert bad.grad is not None
    good, bad.grad = bad.grad, torch.sparse_coo_tensor([[3]], [1.0], (100,))
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert all(map(torch.equal, params, before)) and [param._version for param in params] == versions
    assert all(optimizer.state[param]["step"] == 1 for param in params)
    bad.grad = good
    optimizer.step()
    assert all(optimizer.state[param]["step"] == 2 for param in params)
    assert all(param._version > version for param, version in zip(params, versions, strict=True))
