"""Muon and AdamW in one optimizer: mixed steps and the split of a model. Options of the base are in
test_muon_options.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Target, copies, make_params, on_every_target, set_grads
from compare import assert_equal, states
from mixed_groups import ADAMW, BF16, F32, F64, MATRICES, OTHERS, build, draw, make, steps, values
from muon import one_thread
from torch import Tensor, nn
from torch.nn import Parameter

from fused_optim import FusedAdamW, FusedMuon, groups
from fused_optim.backends import trial
from fused_optim.optim.release import release_gradients

__all__ = ["one_thread"]  # a fixture
# ---- the step


@pytest.mark.compiled
@on_every_target
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_each_half_is_its_own_optimizer(target: Target, dtype: torch.dtype) -> None:
    """To the bit: one optimizer of both does what FusedMuon does with the matrices and FusedAdamW with the rest."""
    params = make(target, dtype)
    other = copies(params)
    mixed = build(target, params)
    muon = FusedMuon(other[:3], lr=0.02, backend=target.backend)
    adamw = FusedAdamW(other[3:], **ADAMW, backend=target.backend)
    for step in range(3):
        grads: list[Tensor | None] = list(draw(params, step))
        if step == 1:
            grads[0] = grads[4] = None
        set_grads(params, grads)
        set_grads(other, grads)
        for optimizer in (mixed, muon, adamw):
            optimizer.step()
    assert_equal(values(mixed)[0], [p.detach() for p in other])
    assert_equal(states(mixed), states(muon) + states(adamw))
    assert [set(state) for state in states(mixed)[:4:3]] == [{"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}]


@on_every_target
def test_one_half_alone(target: Target) -> None:
    """All params with AdamW, also by the option of the whole optimizer."""
    params = make(target)
    other, third = copies(params), copies(params)
    ours = FusedMuon([{"params": params, "use_muon": False}], adamw_lr=0.01, backend=target.backend)
    again = FusedMuon(third, use_muon=False, adamw_lr=0.01, backend=target.backend)
    adamw = FusedAdamW(other, lr=0.01, backend=target.backend)
    for optimizer in (ours, again, adamw):
        steps(optimizer, 2)
    assert_equal(values(ours), values(adamw))
    assert_equal(values(again), values(adamw))


def test_defaults_of_adamw_groups() -> None:
    params = make_params(MATRICES + OTHERS)
    adamw: dict[str, Any] = {"params": params[3:5], "use_muon": False}
    optimizer = FusedMuon(
        [{"params": params[:3]}, adamw, {"params": params[5:], "use_muon": False, "lr": 7.0}],
        lr=0.02,
        adamw_lr=0.3,
        adamw_betas=(0.5, 0.6),
        adamw_eps=0.1,
        adamw_weight_decay=0.4,
    )
    found = [[group[key] for key in ("lr", "eps", "weight_decay")] for group in optimizer.param_groups]
    assert found == [[0.02, 1e-7, 0.1], [0.3, 0.1, 0.4], [7.0, 0.1, 0.4]]
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)
    assert adamw.keys() == {"params", "use_muon"}
    again = copy.deepcopy(optimizer)
    again.add_param_group({"params": make_params([(3,)]), "use_muon": False})
    assert again.param_groups[-1]["lr"] == 0.3
    with pytest.raises(ValueError, match="Invalid epsilon value: -1"):
        optimizer.add_param_group({"params": make_params([(3,)]), "use_muon": False, "eps": -1})
    with pytest.raises(ValueError, match="Learning rate should be >= 0 but is: -1"):
        optimizer.add_param_group({"params": make_params([(3, 2)]), "lr": -1})
    assert len(optimizer.param_groups) == 3


@on_every_target
def test_a_group_changes_its_algorithm(target: Target) -> None:
    params = make_params(MATRICES, F32, target.device)
    optimizer = FusedMuon(params, lr=0.02, backend=target.backend)
    steps(optimizer, 1)
    optimizer.param_groups[0]["use_muon"] = False
    before = copies(params)
    adamw = FusedAdamW(before, lr=0.02, eps=1e-7, weight_decay=0.1, backend=target.backend)
    steps(optimizer, 1, first=1)
    steps(adamw, 1, first=1)
    assert_equal([p.detach() for p in params], [p.detach() for p in before])
    assert all({"momentum_buffer", "exp_avg"} <= set(optimizer.state[p]) for p in params)


# ---- the split of a model


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.pos_embed = Parameter(torch.randn(5, 8))
        self.conv = nn.Conv1d(8, 8, 3)
        self.inner = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False)])
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight


def split(*args: Any, **kwargs: Any) -> dict[str, list[str]]:
    return {group["name"]: [name for name, _ in group["params"]] for group in groups.muon(*args, **kwargs)}


def test_the_split_of_a_model() -> None:
    model = Tiny()
    rest = ["embed.weight", "conv.bias", "inner.0.bias", "inner.1.weight", "inner.1.bias"]
    matrices = ["inner.0.weight", "inner.2.weight"]
    assert split(model) == {"adamw": ["pos_embed", rest[0], "conv.weight", *rest[1:]], "muon": matrices}
    assert split(model, flatten=True) == {"adamw": ["pos_embed", *rest], "muon": ["conv.weight", *matrices]}
    assert split(model, also=lambda name, _: name == matrices[1])["muon"] == matrices[:1]
    assert split(model, modules=(nn.ModuleList, nn.Linear)).keys() == {"adamw"}
    assert split(model, heads=[model.inner[0]])["muon"] == matrices[1:]


def test_output_layers() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert groups.output_layers(plain) == [plain[3]]
    named = nn.ModuleDict({"classifier": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "body": nn.Linear(3, 4)})
    assert groups.output_layers(named) == list(named["classifier"])
    plain.get_output_embeddings = lambda: plain[1]  # type: ignore[assignment]
    assert groups.output_layers(plain) == [plain[1]]
    assert groups.output_layers(nn.Conv1d(2, 3, 4)) == []


def test_the_groups_train_a_model() -> None:
    model = Tiny()
    made = groups.muon(model, muon={"lr": 0.02}, adamw={"lr": 3e-3, "betas": (0.9, 0.95)}, flatten=True)
    optimizer = FusedMuon(groups.no_decay(model, 0.1, groups=made))
    assert {group["name"]: (group["use_muon"], group["lr"]) for group in optimizer.param_groups} == {
        "adamw.no_decay": (False, 3e-3),
        "adamw.decay": (False, 3e-3),
        "muon.decay": (True, 0.02),
    }
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@on_every_target
def test_a_trial_has_the_signatures_of_the_steps(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where states are dithered and workspaces are not."""
    trials = []
    made = trial._table_of
    monkeypatch.setattr(trial, "_table_of", lambda *args: trials.append(made(*args)) or trials[-1])
    monkeypatch.setattr(trial, "is_tried", lambda backend, device: True)
    monkeypatch.setattr(trial, "_passed", set())
    optimizer = build(target, make(target), state_dtype="compact", ema_decay=0.5)
    steps(optimizer, 1)
    found = {table.rule.name: table.dtype_signatures for table in trials}
    assert found == {bound.table.rule.name: bound.table.dtype_signatures for bound in optimizer._tables}
    assert found.keys() == {"muon", "adam"}


@on_every_target
def test_gradient_release(target: Target) -> None:
    """backward() steps matrices and other params bucket by bucket."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 8)).to(target.device)
    other = copy.deepcopy(model)
    for net in (model, other):
        optimizer = FusedMuon(groups.muon(net), lr=0.02, adamw_lr=0.01, backend=target.backend)
        if net is model:
            release_gradients(net, optimizer, bucket_bytes=700)
        for step in range(2):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(target.device)
            net(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-3)
