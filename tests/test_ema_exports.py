"""The averages of the weights beyond a training: exported, taken over from AveragedModel, pickled, and forgotten."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from averaged import DECAY, REFERENCE, SHAPES, WEIGHT, make
from cases import (
    ADAMW,
    BY_NAME,
    Target,
    build,
    make_params,
    on_every_target,
    parameters,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, checked_average
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_optim import FusedAdamW, FusedSGD
from fused_optim.lr_finder import put_back

# ---- models that are converted while they hold the averages


def values(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def half(model: nn.Module) -> None:
    model.half()


def double(model: nn.Module) -> None:
    model.double()


def assigned(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.detach().clone()


@on_every_target
@pytest.mark.parametrize("convert", [half, double, assigned])
@pytest.mark.parametrize("ema_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_converted_model_holds_the_averages(
    convert: Callable[[nn.Module], None], ema_dtype: torch.dtype, target: Target
) -> None:
    optimizer = make(target, ema_dtype=ema_dtype)
    model = nn.ParameterList(parameters(optimizer))
    train([optimizer], 2)
    averages = values(optimizer.ema.values())
    said = r"[45] params were converted .* copy\.deepcopy\(model\)"  # the empty one has no memory to be replaced
    with pytest.warns(UserWarning, match=said) as caught, optimizer.ema_weights():
        convert(model)
        inside = values(model.parameters())
    assert Path(caught[0].filename) == Path(__file__)
    assert_equal(values(model.parameters()), inside)
    assert_equal(inside, [average.to(p.dtype) for average, p in zip(averages, inside, strict=True)])
    assert_equal(values(optimizer.ema.values()), averages)


@pytest.mark.parametrize("swaps", ["set_swap_module_params_on_conversion", "set_overwrite_module_params_on_conversion"])
def test_conversions_in_torchs_other_ways(swaps: str) -> None:
    """Tensors that are swapped, and params that are replaced by new ones."""
    model = nn.Linear(3, 5)
    optimizer = FusedAdamW(model.parameters(), ema_decay=DECAY)
    train([optimizer], 2)
    own, averages = values(parameters(optimizer)), values(optimizer.ema.values())
    switch = getattr(torch.__future__, swaps)
    switch(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with optimizer.ema_weights():
                model.half()
    finally:
        switch(False)
    assert_equal(values(model.parameters()), [average.half() for average in averages])
    assert_equal(values(optimizer.ema.values()), averages)
    replaced = "overwrite" in swaps  # then the optimizer still has the old ones
    assert len(caught) == (not replaced)
    if replaced:
        assert_equal(values(parameters(optimizer)), own)


def test_the_others_are_restored() -> None:
    optimizer = make(REFERENCE)
    train([optimizer], 2)
    params = parameters(optimizer)
    own, averages = values(params), values(optimizer.ema.values())
    with pytest.warns(UserWarning, match="1 params were converted"), optimizer.ema_weights():
        params[3].data = params[3].data.half()
    expected = [
        average.half() if index == 3 else p for index, (p, average) in enumerate(zip(own, averages, strict=True))
    ]
    assert_equal(values(params), expected)
    assert_equal(values(optimizer.ema.values()), averages)


def test_a_copy_is_exported_without_a_word() -> None:
    optimizer = make(REFERENCE)
    model = nn.ParameterList(parameters(optimizer))
    train([optimizer], 2)
    own, averages = values(model.parameters()), values(optimizer.ema.values())
    with warnings.catch_warnings(), optimizer.ema_weights():
        warnings.simplefilter("error")
        exported = copy.deepcopy(model).half()
    assert_equal(values(exported.parameters()), [average.half() for average in averages])
    assert_equal(values(model.parameters()), own)


def test_a_model_converted_in_a_trial_comes_back() -> None:
    """The lr finder puts params back into the memory that they had."""
    model = nn.Linear(3, 5)
    optimizer = FusedAdamW(model.parameters())
    train([optimizer], 2)
    own, addresses = values(model.parameters()), [p.data_ptr() for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]
    with put_back(model, optimizer):
        model.half()
    assert_equal(values(model.parameters()), own)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    train([optimizer], 1)


# ---- averages in 16 bits


@on_every_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_averages_of_narrow_params_move(dtype: torch.dtype, target: Target) -> None:
    """At 0.999 an average in 16 bits stays where it started, because each of its moves is rounded away."""
    p = nn.Parameter(torch.ones(32, dtype=dtype, device=target.device))
    optimizer = build(BY_NAME["sgd-plain"], target, [p], lr=1.0, weight_decay=0.0, maximize=False, ema_decay=0.999)
    for step in range(20):
        p.grad = torch.full_like(p, -1.0 if step == 0 else 0.0)
        if step == 0:
            p.grad.zero_()
        if step == 1:
            p.grad.fill_(-1.0)
        optimizer.step()
    assert torch.equal(p, torch.full_like(p, 2.0))
    expected = torch.full_like(p, 2.0 - 0.999**19, dtype=torch.float32)
    torch.testing.assert_close(optimizer.ema[p].float(), expected, rtol=1e-5, atol=0)


# ---- torch's AveragedModel


def averaged_model(updates: int) -> AveragedModel:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(updates):
        for p in model.parameters():
            p.data += 1.0
        averaged.update_parameters(model)
    return averaged


@pytest.mark.parametrize("updates", [0, 3])
def test_averages_of_an_averaged_model(updates: int) -> None:
    averaged = averaged_model(updates)
    model = copy.deepcopy(averaged.module)
    optimizer = FusedAdamW(model.named_parameters(), ema_decay=DECAY)
    optimizer.load_ema_state_dict(averaged.state_dict())
    saved = optimizer.ema_state_dict()
    assert saved["steps"] == updates
    if updates == 0:  # its module is a copy that no update has made
        assert not optimizer.ema
        return
    assert_equal(list(saved["averages"].values()), values(averaged.module.parameters()))
    set_grads(parameters(optimizer), random_grads(parameters(optimizer), 1))
    checked_average(optimizer, optimizer.step, WEIGHT)


def test_averages_that_cannot_be_told_apart() -> None:
    averaged = averaged_model(1)
    for params, state, message in [
        (averaged.module.parameters(), averaged.state_dict(), r"model\.named_parameters\(\)"),
        ([("other", nn.Parameter(torch.ones(2)))], averaged.state_dict(), r"module\.0\.weight.*other"),
        ([("0.weight", nn.Parameter(torch.ones(2)))], averaged.state_dict(), r"must have its shape, \(2,\)"),
        (averaged.module.named_parameters(), averaged.module.state_dict(), r"keys \['0\.weight'"),
        (averaged.module.named_parameters(), {"averages": {}}, r"keys \['averages'\]"),
    ]:
        optimizer = FusedAdamW(params, ema_decay=DECAY)
        with pytest.raises(ValueError, match=message):
            optimizer.load_ema_state_dict(state)
        assert not optimizer.ema


# ---- what is kept, and what can be saved


@pytest.mark.slow
@on_every_target
def test_params_that_were_taken_out_are_let_go(target: Target) -> None:
    for case in (ADAMW, BY_NAME["sgdw-nesterov"]):  # the second one counts out of sight
        optimizer = make(target, case)
        train([optimizer], 2)
        gone = optimizer.param_groups[0]["params"].pop(1)
        reference = weakref.ref(optimizer.ema[gone])
        optimizer.state.pop(gone)
        train([optimizer], 1)
        assert set(optimizer.ema) == set(parameters(optimizer))
        watched = weakref.ref(gone)
        del gone
        gc.collect()
        assert reference() is None and watched() is None


def reloaded(optimizer: Any) -> Any:
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())
    twin.load_ema_state_dict(optimizer.ema_state_dict())
    return twin


def rebuilt(optimizer: Any) -> Any:
    optimizer.add_param_group({"params": make_params([(2,)], device=parameters(optimizer)[0].device.type)})
    return optimizer


@on_every_target
@pytest.mark.parametrize("name", ["adamw", "sgdw-nesterov", "lamb"])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer)), reloaded, rebuilt],
    ids=["deepcopy", "pickle", "reloaded", "rebuilt"],
)
def test_the_first_update_copies_although_steps_were_skipped(
    copied: Callable[[Any], Any], name: str, target: Target
) -> None:
    optimizer = make(target, BY_NAME[name], skip_nonfinite=True)
    set_grads(parameters(optimizer), random_grads(parameters(optimizer), 0))
    optimizer.step(grad_scale=0)
    assert not optimizer.ema_state_dict()["averages"]
    twin = copied(optimizer)
    params = parameters(twin)[: len(SHAPES)]
    set_grads(params, random_grads(params, 1))
    twin.step()
    assert_equal([twin.ema[p] for p in params], values(params))
    set_grads(params, random_grads(params, 2))
    checked_average(twin, twin.step, WEIGHT)
    assert len(twin.ema_state_dict()["averages"]) == len(SHAPES)


def linear(steps: int) -> float:
    return min(0.9, steps / 10)


def test_functions_that_pickle_knows() -> None:
    optimizer = make(REFERENCE, ema_decay=linear)
    train([optimizer], 2)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.ema_decay is linear
    train([optimizer, twin], 1)
    assert_equal(list(twin.ema.values()), list(optimizer.ema.values()))


def test_functions_that_pickle_does_not_know() -> None:
    optimizer = make(REFERENCE, ema_decay=lambda steps: 0.5)
    train([optimizer], 1)
    with pytest.raises(pickle.PicklingError, match=r"because its ema_decay.*lambda.*save state_dict\(\)"):
        pickle.dumps(optimizer)
    twin = copy.deepcopy(optimizer)
    train([optimizer, twin], 1)
    assert_equal(list(twin.ema.values()), list(optimizer.ema.values()))


def test_skipped_steps_are_in_checkpoints() -> None:
    params = make_params(SHAPES)
    optimizer = FusedAdamW(params, skip_nonfinite=True)
    for bad in (True, True, False):
        set_grads(params, random_grads(params, 0))
        if bad:
            params[0].grad[0, 0] = torch.nan  # type: ignore[index]
        optimizer.step()
    saved = optimizer.state_dict()
    assert saved["skipped_steps"].item() == 2
    for skips in (True, False):
        resumed = FusedAdamW(make_params(SHAPES), skip_nonfinite=skips)
        before = resumed.skipped_steps
        resumed.load_state_dict(copy.deepcopy(saved))
        assert resumed.skipped_steps.item() == 2 and before.item() == 0
    theirs = torch.optim.AdamW(make_params(SHAPES))
    theirs.load_state_dict(saved)
    optimizer.load_state_dict(theirs.state_dict())  # says nothing of it
    assert optimizer.skipped_steps.item() == 2
    assert "skipped_steps" not in FusedSGD(make_params(SHAPES)).state_dict()
