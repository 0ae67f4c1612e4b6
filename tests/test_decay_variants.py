"""Decoupled weight decay in three conventions: torch's, the paper's, and the paper's normalized decay."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from cases import (
    DECOUPLED,
    Case,
    Target,
    copies,
    every,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, checked_step, states

from fused_optim import FusedAdamW, FusedSGD

SHAPES = [(5, 3), (), (0,), (40,)]
CONVENTIONS: dict[str, dict[str, Any]] = {
    "torch": {},
    "paper": {"decay": "paper"},
    "paper-reference": {"decay": "paper", "lr_reference": 0.1},
    "normalized": {"decay": "normalized", "decay_period": 50},
    "normalized-reference": {"decay": "normalized", "decay_period": 12.5, "lr_reference": 0.02},
}
for_every_decoupled = every(DECOUPLED)
for_every_convention = pytest.mark.parametrize("convention", CONVENTIONS)


def build(case: Case, params: Any, target: Target, convention: str = "torch", **options: Any) -> Any:
    """The optimizer of the case, with the decay of `convention` in place of the case's own."""
    kept = {key: value for key, value in case.kwargs.items() if key not in ("decay", "lr_reference", "decay_period")}
    options = {**kept, "weight_decay": 0.3, **CONVENTIONS[convention], **options}
    return case.ours(params, backend=target.backend, **options)


@pytest.mark.shared
@on_every_target
@for_every_decoupled
@for_every_convention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_against_the_oracle(case: Case, target: Target, convention: str, dtype: torch.dtype) -> None:
    params = make_params(SHAPES, dtype, target.device)
    ours = build(case, params, target, convention)
    for step in range(quick(target, 5, 2)):
        ours.param_groups[0]["lr"] = 0.01 / (1 + step)
        set_grads(params, random_grads(params, step))
        checked_step(ours, case.rule, {torch.bfloat16: 0.6, torch.float64: 200.0}.get(dtype, 3.0))


def share_taken(optimizer: Any) -> float:
    """The fraction by which one step with a zero gradient shrinks a param. With zero states this is the decay alone."""
    (p,) = parameters(optimizer)
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    return (1 - p.detach() / before).mean().item()


@on_every_target
@for_every_decoupled
def test_shares_by_hand(case: Case, target: Target) -> None:
    """With lr 0.01 and weight_decay 0.3, for each of the conventions above."""
    wanted = {
        "torch": 0.003,
        "paper": 0.3,
        "paper-reference": 0.03,
        "normalized": 0.3 / math.sqrt(50),
        "normalized-reference": 0.15 / math.sqrt(12.5),
    }
    for convention, share in wanted.items():
        params = make_params([(40,)], torch.float64, target.device)
        ours = build(case, params, target, convention, lr=0.01, **case.known(no_prox=True))
        assert share_taken(ours) == pytest.approx(share, rel=1e-12)


@on_every_target
@for_every_decoupled
@pytest.mark.parametrize(
    ("convention", "options"),
    [
        ("torch", {}),
        ("paper", {"lr_reference": None}),
        ("paper", {"lr_reference": 0.0}),
        ("paper", {"lr_reference": 0.1}),
        ("normalized", {}),
    ],
    ids=str,
)
def test_lr_zero_moves_nothing(case: Case, target: Target, convention: str, options: dict[str, Any]) -> None:
    """torch.distributed.checkpoint creates states by one step with lr 0 and zero gradients."""
    params = make_params(SHAPES, device=target.device)
    before = copies(params)
    ours = build(case, params, target, convention, lr=0.0, **options)
    for grads in ([torch.zeros_like(p) for p in params], random_grads(params, 0)):
        set_grads(params, grads)
        ours.step()
        assert_equal([p.detach() for p in params], [p.detach() for p in before])


@on_every_target
@for_every_decoupled
@pytest.mark.parametrize("convention", ["paper", "normalized"])
def test_reference_of_zero_decays_nothing(case: Case, target: Target, convention: str) -> None:
    ours = build(case, make_params([(40,)], torch.float64, target.device), target, convention, lr_reference=0.0)
    assert share_taken(ours) == 0.0
    params = parameters(ours)
    set_grads(params, random_grads(params, 0))
    checked_step(ours, case.rule, 200.0)


@on_every_target
@for_every_decoupled
def test_period_and_reference_changed_between_steps(case: Case, target: Target) -> None:
    """A scheduler changes them at a restart. Each group has its own values."""
    params = make_params([(5, 3), (40,)], device=target.device)
    groups = [{"params": params[:1]}, {"params": params[1:], "decay_period": 9, "lr_reference": 0.5, "lr": 0.25}]
    ours = build(case, groups, target, "normalized", decay_period=4)
    references = [group["lr_reference"] for group in ours.param_groups]
    assert references == [case.kwargs["lr"], 0.5]
    assert [group["decay_period"] for group in ours.param_groups] == [4, 9]
    for step, change in enumerate([{}, {"decay_period": 400}, {"lr_reference": 2.0}, {"decay_period": 1, "lr": 0.0}]):
        ours.param_groups[0].update(change)
        set_grads(params, random_grads(params, step))
        checked_step(ours, case.rule, 3.0)


@pytest.mark.host
@on_every_target
@for_every_decoupled
def test_groups_hold_only_what_their_convention_reads(case: Case, target: Target) -> None:
    keys = {"torch": set(), "paper": {"lr_reference"}, "normalized": {"lr_reference", "decay_period"}}
    plain = set(build(case, make_params(SHAPES, device=target.device), target).param_groups[0])
    for convention, added in keys.items():
        ours = build(case, make_params(SHAPES, device=target.device), target, convention)
        ours.add_param_group({"params": make_params([(3,)], device=target.device, seed=5), "lr": 0.125})
        assert [set(group) - plain for group in ours.param_groups] == [added] * 2
        if added:
            assert ours.param_groups[1]["lr_reference"] == 0.125
        assert not {"decay", "lr_reference", "decay_period"} & plain


@pytest.mark.host
@on_every_target
@for_every_decoupled
@for_every_convention
def test_checkpoints_keep_the_convention(case: Case, target: Target, convention: str) -> None:
    params = make_params(SHAPES, device=target.device)
    ours = build(case, params, target, convention)
    train([ours], 2)
    saved = ours.state_dict()
    loaded = build(case, copies(params), target, convention, lr=0.7, weight_decay=0.0)
    loaded.load_state_dict(copy.deepcopy(saved))
    others = [loaded, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    for other in others:
        assert other.state_dict()["param_groups"] == saved["param_groups"]
        other.add_param_group({"params": make_params([(3,)], device=target.device)})
        added, first = other.param_groups[1], other.param_groups[0]
        assert ("lr_reference" in added, "decay_period" in added) == ("lr_reference" in first, "decay_period" in first)
        set_grads(other.param_groups[1]["params"], [None])
    train_alike([ours, *others])


def train_alike(optimizers: list[Any]) -> None:
    """Makes two more steps with the params of each first group. All optimizers must agree bit for bit."""
    for optimizer in optimizers:
        params = optimizer.param_groups[0]["params"]
        for step in range(2):
            set_grads(params, random_grads(params, 70 + step))
            optimizer.step()
        assert_equal([p.detach() for p in params], [p.detach() for p in optimizers[0].param_groups[0]["params"]])
        assert_equal(states(optimizer)[: len(params)], states(optimizers[0]))


@pytest.mark.host
@on_every_target
@for_every_decoupled
def test_checkpoints_without_the_keys_leave_ours(case: Case, target: Target) -> None:
    """For example a checkpoint of torch's class, or one saved with another convention."""
    params = make_params(SHAPES, device=target.device)
    plain = build(case, params, target)
    train([plain], 2)
    ours = build(case, copies(params), target, "normalized-reference")
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert (ours.param_groups[0]["lr_reference"], ours.param_groups[0]["decay_period"]) == (0.02, 12.5)
    set_grads(parameters(ours), random_grads(parameters(ours), 1))
    checked_step(ours, case.rule, 3.0)


@on_every_target
@for_every_decoupled
def test_tensor_lr(case: Case, target: Target) -> None:
    """lr_reference is a number, read once from the tensor. Later changes of the tensor are the schedule."""
    lr = torch.tensor(0.02)
    params = make_params(SHAPES, device=target.device)
    ours = build(case, params, target, "paper", lr=lr)
    for step in range(3):
        assert isinstance(ours.param_groups[0]["lr_reference"], float)
        assert ours.param_groups[0]["lr_reference"] == pytest.approx(0.02, rel=1e-6)
        lr.fill_(0.02 / (2 + step))
        set_grads(params, random_grads(params, step))
        checked_step(ours, case.rule, 3.0)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"decay": "cosine"}, "decay must be .*, but got 'cosine'"),
    ({"decay": None}, "decay must be .*, but got None"),
    ({"decay": "normalized"}, "needs a decay_period above 0.* got None"),
    ({"decay": "normalized", "decay_period": 0}, "needs a decay_period above 0.* got 0"),
    ({"decay": "normalized", "decay_period": -3}, "needs a decay_period above 0.* got -3"),
    ({"decay": "normalized", "decay_period": math.nan}, "needs a decay_period above 0.* got nan"),
    ({"decay": "paper", "lr_reference": -0.1}, "lr_reference must be 0 or more, but got -0.1"),
    ({"decay": "paper", "lr_reference": math.nan}, "lr_reference must be 0 or more, but got nan"),
    ({"decay": "torch", "lr_reference": 0.1}, 'lr_reference is not used with decay="torch"'),
    ({"decay": "paper", "decay_period": 10}, 'decay_period is not used with decay="paper"'),
]


@for_every_decoupled
@pytest.mark.parametrize(("options", "message"), BROKEN, ids=str)
def test_refused_options(case: Case, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(case, make_params(), Target("reference", "cpu"), **options)


@for_every_decoupled
@pytest.mark.parametrize("options", [{"lr_reference": -1.0}, {"decay_period": 0}], ids=str)
def test_a_refused_group_is_not_added(case: Case, options: dict[str, Any]) -> None:
    ours = build(case, make_params(), Target("reference", "cpu"), "normalized")
    with pytest.raises(ValueError, match="but got"):
        ours.add_param_group({"params": make_params([(3,)]), **options})
    assert len(ours.param_groups) == 1


def test_classes_with_l2_know_no_convention() -> None:
    with pytest.raises(TypeError, match="decay"):
        FusedSGD(make_params(), decay="paper")


# ---- corrected decay


@on_every_target
@for_every_decoupled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_corrected_decay_against_the_oracle(case: Case, target: Target, dtype: torch.dtype) -> None:
    """lr grows and falls, so the largest lr is of another step."""
    params = make_params(SHAPES, dtype, target.device)
    ours = build(case, params, target, corrected_decay=True)
    for step, lr in enumerate([0.003, 0.01, 0.004, 0.0][: quick(target, 4, 3)]):
        ours.param_groups[0]["lr"] = lr
        set_grads(params, random_grads(params, step))
        checked_step(ours, case.rule, {torch.bfloat16: 0.6, torch.float64: 200.0}.get(dtype, 3.0))
    assert [float(ours.state[p]["lr_max"]) for p in params] == [pytest.approx(0.01)] * len(params)


@on_every_target
@for_every_decoupled
def test_corrected_decay_of_a_constant_lr_is_torchs(case: Case, target: Target) -> None:
    """Bit for bit, although the largest lr is stored as float32; and its share by hand."""
    params = make_params(SHAPES, device=target.device)
    ours, plain = (
        build(case, p, target, lr=0.007, **o) for p, o in ((params, {"corrected_decay": True}), (copies(params), {}))
    )
    train([ours, plain], 3)
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(plain)])

    options = case.known(no_prox=True)  # else Adan divides by 1 + decay
    wide = make_params([(40,)], torch.float64, target.device)
    other = build(case, wide, target, lr=0.01, corrected_decay=True, **options)
    assert share_taken(other) == pytest.approx(0.003, rel=1e-7)
    other.state[parameters(other)[0]].get("exp_avg", torch.zeros(())).zero_()
    other.param_groups[0]["lr"] = 0.005
    assert share_taken(other) == pytest.approx(0.00075, rel=1e-7)


@on_every_target
def test_corrected_decay_per_group_and_in_checkpoints(target: Target) -> None:
    """A group may have its own, also later. The largest lr is a state."""
    params = make_params(SHAPES, device=target.device)
    groups = [{"params": params[:2], "corrected_decay": True}, {"params": params[2:]}]
    ours = FusedAdamW(groups, lr=0.01, weight_decay=0.3, backend=target.backend)
    train([ours], 1)
    assert ["lr_max" in ours.state[p] for p in params] == [True, True, False, False]
    for group in ours.param_groups:
        group["lr"] = 0.002
    ours.param_groups[1]["corrected_decay"] = True
    train([ours], 1, seed=1)
    assert [float(ours.state[p]["lr_max"]) for p in params] == [pytest.approx(x) for x in (0.01, 0.01, 0.002, 0.002)]
    back = FusedAdamW(copies(params), lr=0.5, backend=target.backend, corrected_decay=True)
    back.add_param_group({"params": [back.param_groups[0]["params"].pop() for _ in range(2)][::-1]})
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    train([ours, back], 2, seed=2)
    assert_equal(states(ours), states(back))
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(back)])
    again = pickle.loads(pickle.dumps(ours))
    assert again.param_groups[0]["corrected_decay"]


@pytest.mark.parametrize("decay", ["paper", "normalized"])
def test_corrected_decay_needs_torchs_convention(decay: Any) -> None:
    options = {"decay_period": 5} if decay == "normalized" else {}
    with pytest.raises(ValueError, match='corrected_decay=True corrects a decay of lr \\* weight_decay, but decay="'):
        FusedAdamW(make_params([(3,)]), decay=decay, corrected_decay=True, **options)
    ours = FusedAdamW(make_params([(3,)]), decay=decay, **options)
    with pytest.raises(ValueError, match='leave corrected_decay out, or pass decay="torch"'):
        ours.add_param_group({"params": make_params([(2,)]), "corrected_decay": True})
    assert len(ours.param_groups) == 1
