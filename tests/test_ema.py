"""The average of the weights that the step keeps: its numbers, its place in the params, its checkpoints."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
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
from compare import assert_equal, checked_step, states, ulps
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_optim
from fused_optim import FusedAdamW, FusedSGD, backends
from fused_optim.lr_finder import put_back

SHAPES = [(3, 5), (), (0,), (4500,), (7, 1, 9)]
DECAY = 0.9
REFERENCE = Target("reference", "cpu")


def make(target: Target, case: Case = ADAMW, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    params = make_params(SHAPES, dtype, target.device)
    return build(case, target, params, **{"ema_decay": DECAY, **kwargs})


def stored(tensor: Tensor) -> Tensor:
    return oracle.as_real(tensor)


def checked_average(optimizer: Any, step: Callable[[], Any], weight: float | None = 1 - DECAY) -> None:
    """Steps once. The averages must move by `weight` (None: not at all) towards the params as they are stored, with no
    more than two roundings of the arithmetic and that of the store."""
    params = parameters(optimizer)
    before = {p: stored(average) for p, average in optimizer.ema.items()}
    step()
    for p in params:
        if p.grad is None and p not in before:
            assert p not in optimizer.ema
            continue
        average, new = optimizer.ema[p], stored(p)
        old = before.get(p, new)
        moves = weight is not None and p.grad is not None
        want = old + weight * (new - old) if moves else old
        bound = 2.0 if average.dtype.to_real() in (torch.float32, torch.float64) else 0.6
        assert ulps(stored(average), want, torch.maximum(old.abs(), new.abs()), average.dtype) <= bound * moves


def checked_training(optimizer: Any, steps: int, dtype: torch.dtype | None = None, seed: int = 0) -> None:
    """Random gradients; the first update of all params makes copies of them."""
    for number in range(steps):
        set_grads(parameters(optimizer), random_grads(parameters(optimizer), seed + number, dtype))
        checked_average(optimizer, optimizer.step, 1.0 if number == 0 else 1 - DECAY)


# ---- numbers


@on_every_target
@for_every_case
def test_each_step_against_the_oracle(case: Case, target: Target) -> None:
    optimizer = make(target, case)
    for number in range(quick(target, 4, 2)):
        set_grads(parameters(optimizer), random_grads(parameters(optimizer), number))
        checked_average(
            optimizer, lambda: checked_step(optimizer, case.rule, bound=3.0), 1.0 if number == 0 else 1 - DECAY
        )


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
    (torch.bfloat16, {}, torch.bfloat16),
    (torch.bfloat16, {"ema_dtype": torch.float32}, torch.float32),
    (torch.bfloat16, {"state_dtype": torch.float32, "ema_dtype": torch.float32}, torch.float32),
    (torch.bfloat16, {"state_dtype": torch.float32}, torch.bfloat16),
    (torch.float16, {}, torch.float16),
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
    checked_training(optimizer, 2)
    assert {average.dtype for average in optimizer.ema.values()} == {expected}


@on_every_target
def test_kinds_side_by_side(target: Target) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64)
    params = [p for seed, dtype in enumerate(kinds) for p in make_params([(40,), (3, 3)], dtype, target.device, seed)]
    optimizer = build(ADAMW, target, params, ema_decay=DECAY, ema_dtype=torch.float32)
    checked_training(optimizer, 2)


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
    checked_training(optimizer, 3)
    assert torch.equal(buffer[1000:3000:2], holes)
    for p in views:
        average = optimizer.ema[p]
        assert average.stride() == torch.empty_like(p).stride()
        with optimizer.ema_weights():
            assert average.data_ptr() == optimizer.ema[p].data_ptr()
    assert torch.equal(buffer[1000:3000:2], holes)


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
        want = new if old is None else old.lerp(new, 1 - DECAY)
        torch.testing.assert_close(optimizer.ema[params[0]], want, equal_nan=True)
        old = optimizer.ema[params[0]].clone()


# ---- which averages move


@on_every_target
@for_every_rule
def test_params_without_gradient(case: Case, target: Target) -> None:
    optimizer = make(target, case)
    params = parameters(optimizer)
    weight = 1.0
    for missing in ((0, 3), (3,), (0,)):
        grads = random_grads(params, len(missing))
        set_grads(params, [None if index in missing else grad for index, grad in enumerate(grads)])
        kept = {
            p: optimizer.ema[p].clone() for index, p in enumerate(params) if index in missing and p in optimizer.ema
        }
        optimizer.step()
        assert set(optimizer.ema) >= {p for p in params if p.grad is not None}
        assert params[3] not in optimizer.ema or missing == (0,)
        for p, average in kept.items():
            assert torch.equal(optimizer.ema[p], average)
        weight = 1 - DECAY
    assert weight != 1.0
    assert torch.equal(optimizer.ema[params[3]], params[3])  # the first update, whenever it comes
    assert not torch.equal(optimizer.ema[params[4]], params[4])


@on_every_target
def test_late_groups(target: Target) -> None:
    optimizer = make(target)
    checked_training(optimizer, 2)
    late = make_params([(50,)], device=target.device, seed=5)
    optimizer.add_param_group({"params": late, "lr": 0.5})
    grads = random_grads(parameters(optimizer), 7)
    set_grads(parameters(optimizer), grads)
    optimizer.step()
    assert torch.equal(optimizer.ema[late[0]], late[0])
    set_grads(parameters(optimizer), grads)
    checked_average(optimizer, optimizer.step)


@on_every_target
@for_every_rule
def test_skipped_steps(case: Case, target: Target) -> None:
    optimizer = make(target, case, skip_nonfinite=True)
    for number, bad in enumerate((True, False, True, False)):
        grads = random_grads(parameters(optimizer), number)
        grads[0][0, 0] = math.nan if bad else 1.0
        set_grads(parameters(optimizer), grads)
        checked_average(optimizer, optimizer.step, None if bad else 1.0 if number == 1 else 1 - DECAY)
    optimizer.found_inf = torch.ones((), device=target.device)
    set_grads(parameters(optimizer), random_grads(parameters(optimizer), 9))
    checked_average(optimizer, optimizer.step, None)
    del optimizer.found_inf
    checked_average(optimizer, optimizer.step)


@on_every_target
@for_every_rule
def test_with_clipping_and_scales(case: Case, target: Target) -> None:
    ours, theirs = (make(target, case, max_grad_norm=0.5, ema_decay=decay) for decay in (DECAY, None))
    for number in range(2):
        grads = random_grads(parameters(ours), number)
        set_grads(parameters(ours), grads)
        set_grads(parameters(theirs), grads)
        checked_average(ours, lambda: ours.step(grad_scale=4.0), 1.0 if number == 0 else 1 - DECAY)
        theirs.step(grad_scale=4.0)
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(theirs)])


@on_every_target
def test_moved_params_keep_their_averages(target: Target) -> None:
    optimizer = make(target)
    checked_training(optimizer, 2)
    for p in parameters(optimizer):
        p.data = p.data.clone()
    checked_average(optimizer, optimizer.step)


@on_every_target
def test_momentum_may_begin_later(target: Target) -> None:
    """Then SGD begins to count anew, and the averages do not."""
    optimizer = make(target, BY_NAME["sgd-plain"])
    checked_training(optimizer, 2)
    optimizer.param_groups[0]["momentum"] = 0.9
    checked_average(optimizer, optimizer.step)
    checked_average(optimizer, optimizer.step)


# ---- decay


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


def test_a_function_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "extension", lambda: "there is none")
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


# ---- the averages in the place of the params


def values(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


@on_every_target
@pytest.mark.parametrize(
    ("dtype", "ema_dtype"),
    [(torch.float32, None), (torch.bfloat16, torch.float32), (torch.float16, None), (torch.complex64, None)],
    ids=str,
)
def test_in_the_place_of_params(dtype: torch.dtype, ema_dtype: torch.dtype | None, target: Target) -> None:
    optimizer = make(target, dtype=dtype, ema_dtype=ema_dtype)
    params = parameters(optimizer)
    train([optimizer], 2)
    with torch.no_grad():
        params[3][:3] = torch.tensor([math.nan, math.inf, -0.0], dtype=dtype)
    own, averages = values(params), values([optimizer.ema[p] for p in params])
    addresses, versions = [p.data_ptr() for p in params], [p._version for p in params]
    with optimizer.ema_weights():
        assert torch.is_grad_enabled()
        assert_equal(values(params), [average.to(dtype) for average in averages])
        assert [p.data_ptr() for p in params] == addresses
        assert all(p._version > version for p, version in zip(params, versions, strict=True))
        versions = [p._version for p in params]
    assert_equal(values(params), own)
    assert params[3][2].real.signbit()
    assert_equal(values([optimizer.ema[p] for p in params]), averages)
    assert [p.data_ptr() for p in params] == addresses
    assert all(p._version > version for p, version in zip(params, versions, strict=True))


@on_every_target
@pytest.mark.parametrize("ema_dtype", [None, torch.bfloat16], ids=str)
def test_training_goes_on_as_if_nothing_had_been(ema_dtype: torch.dtype | None, target: Target) -> None:
    ours, theirs = make(target, ema_dtype=ema_dtype), make(target, ema_dtype=ema_dtype)

    def evaluate(_: int) -> None:
        with ours.ema_weights():
            pass

    train([ours, theirs], quick(target, 4, 2), each=evaluate)
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(theirs)])
    assert_equal(list(ours.ema.values()), list(theirs.ema.values()))


@pytest.mark.parametrize("ema_dtype", [None, torch.bfloat16], ids=str)
def test_params_come_back_after_errors(ema_dtype: torch.dtype | None) -> None:
    optimizer = make(REFERENCE, ema_dtype=ema_dtype)
    train([optimizer], 2)
    own = values(parameters(optimizer))
    with pytest.raises(ZeroDivisionError), optimizer.ema_weights():
        raise ZeroDivisionError
    assert_equal(values(parameters(optimizer)), own)

    # Halfway in, one param turns out to have another shape.
    last = parameters(optimizer)[-1]
    data = last.data
    last.data = torch.zeros(2)
    with pytest.raises(RuntimeError, match="size"), optimizer.ema_weights():
        pass
    last.data = data
    assert_equal(values(parameters(optimizer)), own)
    train([optimizer], 1, seed=5)


def test_what_is_refused_inside() -> None:
    optimizer = make(REFERENCE)
    train([optimizer], 2)
    own, saved = values(parameters(optimizer)), optimizer.ema_state_dict()
    refused: list[Callable[[], Any]] = [
        optimizer.step,
        optimizer.ema_weights().__enter__,
        optimizer.ema_state_dict,
        lambda: optimizer.load_ema_state_dict(saved),
        lambda: copy.deepcopy(optimizer),
        lambda: pickle.dumps(optimizer),
    ]
    with optimizer.ema_weights():
        for call in refused:
            with pytest.raises(RuntimeError, match=r"inside of ema_weights\(\)"):
                call()
    assert_equal(values(parameters(optimizer)), own)
    train([optimizer], 1, seed=5)


def test_params_without_average_stay_as_they_are() -> None:
    optimizer = make(REFERENCE)
    params = parameters(optimizer)
    with optimizer.ema_weights():  # none has one
        pass
    grads = random_grads(params, 0)
    for _ in range(2):
        set_grads(params, [None, *grads[1:]])
        optimizer.step()
    own = values(params)
    with optimizer.ema_weights():
        assert torch.equal(params[0], own[0])
        assert not torch.equal(params[3], own[3])
    assert set(optimizer.ema) == set(params[1:])


def test_optimizers_without_averages() -> None:
    optimizer = make(REFERENCE, ema_decay=None)
    calls: list[Callable[[], Any]] = [
        optimizer.ema_weights().__enter__,
        optimizer.ema_state_dict,
        lambda: optimizer.load_ema_state_dict({"steps": 0, "averages": {}}),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="make it with an ema_decay"):
            call()


def test_the_mapping_is_to_be_read() -> None:
    optimizer = make(REFERENCE)
    train([optimizer], 1)
    with pytest.raises(TypeError):
        optimizer.ema[parameters(optimizer)[0]] = torch.zeros(3, 5)


# ---- checkpoints and copies


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@on_every_target
@for_every_rule
def test_a_resumed_training_is_the_same(case: Case, target: Target) -> None:
    def decay(steps: int) -> float:
        return 0.5 + 0.1 * steps

    whole = make(target, case, ema_decay=decay, ema_dtype=torch.bfloat16)
    train([whole], 2)
    params = copies(parameters(whole))
    states_, averages = (through_a_file(x) for x in (whole.state_dict(), whole.ema_state_dict()))
    assert averages["steps"] == 2 and set(averages["averages"]) == set(range(len(SHAPES)))
    resumed = build(case, target, params, ema_decay=decay)  # dtypes are those that were saved
    resumed.load_state_dict(states_)
    resumed.load_ema_state_dict(averages)
    train([whole, resumed], 2, seed=2)
    assert_equal(list(resumed.ema.values()), list(whole.ema.values()))
    assert_equal(values(parameters(resumed)), values(parameters(whole)))


@on_every_target
@for_every_rule
def test_averages_go_on_without_the_states(case: Case, target: Target) -> None:
    saved = make(target, case)
    train([saved], 2)
    fresh = build(case, target, copies(parameters(saved)), ema_decay=DECAY)
    fresh.load_ema_state_dict(saved.ema_state_dict())
    assert all(fresh.ema[p] is not saved.ema[q] for p, q in zip(parameters(fresh), parameters(saved), strict=True))
    set_grads(parameters(fresh), random_grads(parameters(fresh), 5))
    checked_average(fresh, fresh.step)


@on_every_target
def test_a_checkpoint_without_averages(target: Target) -> None:
    """They start with the params that are there."""
    theirs = build_torch(ADAMW, make_params(SHAPES, device=target.device))
    train([theirs], 3)
    ours = build(ADAMW, target, copies(parameters(theirs)), ema_decay=DECAY)
    ours.load_state_dict(theirs.state_dict())
    before = values(parameters(ours))
    train([ours], 1, seed=3)
    for p, old in zip(parameters(ours), before, strict=True):
        torch.testing.assert_close(ours.ema[p], old.lerp(p.detach(), 1 - DECAY))


def test_the_state_dict_remains_torchs() -> None:
    ours, theirs = make(REFERENCE), build_torch(ADAMW, make_params(SHAPES))
    train([ours, theirs], 1)
    mine, torchs = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == torchs.keys()
    assert [list(state) for state in mine["state"].values()] == [list(state) for state in torchs["state"].values()]
    assert mine["param_groups"][0].keys() >= torchs["param_groups"][0].keys()
    assert not any("ema" in key for key in mine["param_groups"][0])


def test_averages_are_numbered_as_torch_does() -> None:
    params = make_params([(2,), (3,), (4,)])
    optimizer = FusedSGD([{"params": params[1:]}, {"params": params[:1]}], ema_decay=DECAY, backend="reference")
    set_grads(params, [None, torch.ones(3), torch.ones(4)])
    optimizer.step()
    saved = optimizer.ema_state_dict()
    assert {index: tuple(average.shape) for index, average in saved["averages"].items()} == {0: (3,), 1: (4,)}


def test_averages_of_other_params_are_refused() -> None:
    optimizer = make(REFERENCE)
    train([optimizer], 2)
    before, saved = values(list(optimizer.ema.values())), optimizer.ema_state_dict()
    for averages, message in [
        ({**saved["averages"], 5: torch.zeros(3)}, "the optimizer has 5 params"),
        ({0: saved["averages"][0], 3: torch.zeros(3)}, r"must have its shape, \(4500,\), but has \(3,\)"),
        ({-1: torch.zeros(7, 1, 9)}, "have one of param -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_ema_state_dict({"steps": 7, "averages": averages})
        assert_equal(list(optimizer.ema.values()), before)
        assert optimizer.ema_state_dict()["steps"] == 2


def test_loaded_dtypes_stay_where_they_can() -> None:
    for dtype, loaded, expected in [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ]:
        optimizer = FusedAdamW(make_params([(4,)], dtype), ema_decay=DECAY, backend="reference")
        optimizer.load_ema_state_dict({"steps": 1, "averages": {0: torch.ones(4, dtype=loaded)}})
        checked_training_from_loaded(optimizer)
        assert {average.dtype for average in optimizer.ema.values()} == {expected}


def checked_training_from_loaded(optimizer: Any) -> None:
    for number in range(2):
        set_grads(parameters(optimizer), random_grads(parameters(optimizer), number))
        checked_average(optimizer, optimizer.step)


@on_every_target
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))], ids=["deepcopy", "pickle"]
)
def test_copies_have_averages_of_their_own(copied: Callable[[Any], Any], target: Target) -> None:
    optimizer = make(target, BY_NAME["lion-paper-maximize"])
    train([optimizer], 2)
    twin = copied(optimizer)
    assert set(twin.ema) == set(parameters(twin)) and not set(twin.ema) & set(parameters(optimizer))
    before = values(list(optimizer.ema.values()))
    train([twin], 1, seed=2)
    assert_equal(values(list(optimizer.ema.values())), before)
    train([optimizer], 1, seed=2)
    assert_equal(list(twin.ema.values()), list(optimizer.ema.values()))


def test_trials_leave_the_averages_alone() -> None:
    """The lr finder's steps are taken back."""
    optimizer = make(REFERENCE)
    model = torch.nn.ParameterList(parameters(optimizer))
    train([optimizer], 2)
    before, saved = values(list(optimizer.ema.values())), optimizer.ema_state_dict()["steps"]
    with put_back(model, optimizer):
        train([optimizer], 3, seed=5)
    assert_equal(list(optimizer.ema.values()), before)
    assert optimizer.ema_state_dict()["steps"] == saved
    set_grads(parameters(optimizer), random_grads(parameters(optimizer), 9))
    checked_average(optimizer, optimizer.step)
