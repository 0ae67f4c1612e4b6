"""Params that no step changes: frozen params of any kind, and params on meta."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import (
    AMSGRAD,
    Case,
    Target,
    build,
    build_torch,
    copies,
    for_every_class,
    for_every_class_of_torch,
    make_params,
    on_every_target,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fused_optim import FusedAdamW

KINDS: dict[str, Any] = {
    "uint8": torch.ones(5, dtype=torch.uint8),
    "int8": torch.ones(5, dtype=torch.int8),
    "int64": torch.ones(5, dtype=torch.int64),
    "bool": torch.ones(5, dtype=torch.bool),
    "float8": torch.ones(5).to(torch.float8_e4m3fn),
    "expanded": torch.ones(1).expand(5),
    "sparse": torch.eye(5).to_sparse(),
    "wrapper": TwoTensor(torch.ones(5), torch.ones(5)),
    "meta": torch.ones(5, device="meta"),
}


def frozen(kind: str) -> nn.Parameter:
    return nn.Parameter(KINDS[kind], requires_grad=False)


@on_every_target
@for_every_class
def test_a_quantised_base_with_adapters(case: Case, target: Target) -> None:
    """As with LoRA. Frozen params are skipped; trainable params are stepped as if the frozen ones were absent."""
    base = [nn.Parameter(KINDS[kind].to(target.device), requires_grad=False) for kind in KINDS if kind != "meta"]
    versions = [p._version for p in base]
    ours, theirs = (build(case, target, make_params(device=target.device)) for _ in range(2))
    ours.add_param_group({"params": [*base, frozen("meta")]})
    for seed in range(2):
        learning = [p for group in theirs.param_groups for p in group["params"]]
        grads = random_grads(learning, seed)
        set_grads(learning, grads)
        set_grads(ours.param_groups[0]["params"], grads)
        ours.step()
        theirs.step()
    assert_equal([*ours.param_groups[0]["params"]], [*theirs.param_groups[0]["params"]])
    assert not any(p in ours.state for p in base) and [p._version for p in base] == versions
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    ours.step()


@pytest.mark.parametrize("kind", KINDS)
def test_torch_takes_them(kind: str) -> None:
    params = [frozen(kind), *make_params()]
    ours, theirs = FusedAdamW(params), torch.optim.AdamW(copies(params[1:]))
    train([theirs], 1)
    grads = [p.grad for p in theirs.param_groups[0]["params"]]
    set_grads(params[1:], grads)
    ours.step()
    torch.testing.assert_close([p.detach() for p in params[1:]], [*theirs.param_groups[0]["params"]])


@pytest.mark.parametrize(
    ("kind", "message"),
    [("float8", "params must be float32"), ("expanded", "share memory"), ("wrapper", "plain tensors or DTensors")],
)
def test_refused_when_they_begin_to_learn(kind: str, message: str) -> None:
    odd = frozen(kind)
    optimizer = FusedAdamW([odd, *make_params()])
    learning = optimizer.param_groups[0]["params"][1:]
    set_grads(learning, random_grads(learning, 0))
    optimizer.step()
    odd.requires_grad_()
    odd.grad = torch.zeros_like(odd)
    before = [p.detach().clone() for p in learning]
    with pytest.raises((TypeError, RuntimeError), match=message):
        optimizer.step()
    assert_equal([p.detach() for p in learning], before)
    assert {optimizer.state[p]["step"].item() for p in learning} == {1.0}
    odd.grad = None
    optimizer.step()
    with pytest.raises((TypeError, RuntimeError), match=message):
        FusedAdamW([odd])


def test_unfrozen_params_are_stepped() -> None:
    params = make_params()
    params[0].requires_grad_(False)
    optimizer = FusedAdamW(params)
    set_grads(params[1:], random_grads(params[1:], 0))
    optimizer.step()
    params[0].requires_grad_()
    set_grads(params, random_grads(params, 1))
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [1, 2, 2, 2, 2]


# ---- meta


def on_meta() -> list[nn.Parameter]:
    params = make_params(device="meta")
    for p in params:
        p.grad = torch.empty_like(p)
    return params


@for_every_class_of_torch
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_params_on_meta_step_as_torchs(case: Case, backend: str) -> None:
    """States are created with torch's keys, shapes and dtypes. Frameworks plan their memory this way."""
    ours = case.ours(on_meta(), backend=backend, **case.kwargs)
    theirs = build_torch(case, on_meta())
    for _ in range(2):
        ours.step()
        theirs.step()
    mine, torchs = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert mine.keys() == torchs.keys()
    for index, state in torchs.items():
        assert mine[index].keys() == state.keys()
        for key, value in state.items():
            assert value is None or (mine[index][key].shape, mine[index][key].dtype) == (value.shape, value.dtype)


@for_every_class
def test_every_option_on_meta(case: Case) -> None:
    optimizer = case.ours(on_meta(), **{**case.kwargs, "max_grad_norm": 1.0}, skip_nonfinite=True, ema_decay=0.9)
    for _ in range(2):
        optimizer.step(grad_scale=2)
    assert all(average.is_meta for average in optimizer.ema.values())
    with optimizer.ema_weights():
        pass
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


@on_every_target
def test_meta_beside_real_params(target: Target) -> None:
    real = make_params(device=target.device)
    ours = AMSGRAD.ours(
        [*on_meta(), *real], backend="auto" if target.device == "cuda" else "reference", **AMSGRAD.kwargs
    )
    theirs = build(AMSGRAD, target, copies(real))
    for seed in range(2):
        grads = random_grads(real, seed)
        set_grads(real, grads)
        set_grads(theirs.param_groups[0]["params"], grads)
        ours.step()
        theirs.step()
    torch.testing.assert_close([*real], [*theirs.param_groups[0]["params"]])


def test_params_that_leave_meta() -> None:
    """Deferred initialization: the params get their memory after a step on meta that planned the memory."""
    params = on_meta()
    optimizer = FusedAdamW(params)
    optimizer.step()
    optimizer.state.clear()
    for p, real in zip(params, make_params(), strict=True):
        p.grad = None
        torch.utils.swap_tensors(p, real)
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    assert all(optimizer.state[p]["step"].item() == 1 for p in params)
