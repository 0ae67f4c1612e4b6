"""Muon and AdamW in one optimizer: the split of a model, mixed steps, and every option of the base with both."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from cases import Target, copies, make_params, on_every_target, parameters, quick, random_grads, set_grads
from compare import assert_equal, checked_averages, states
from muon import gradients, one_thread
from torch import Tensor, nn
from torch.nn import Parameter

from fused_optim import FusedAdamW, FusedMuon, groups
from fused_optim.backends import trial
from fused_optim.optim.release import release_gradients

__all__ = ["one_thread"]  # a fixture
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
MATRICES, OTHERS = [(8, 24), (24, 8), (8, 24)], [(10, 3), (7,), (), (0,), (2, 3, 4)]
ADAMW = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}


def build(target: Target, params: list[Parameter], **options: Any) -> FusedMuon:
    """The first three params are stepped by Muon, the others by AdamW."""
    adamw = {"params": params[3:], "use_muon": False, **ADAMW}
    return FusedMuon([{"params": params[:3]}, adamw], **{"lr": 0.02, "backend": target.backend, **options})


def draw(params: list[Parameter], seed: int) -> list[Tensor]:
    return gradients(params[:3], seed) + random_grads(params[3:], seed)


def steps(optimizer: Any, count: int, first: int = 0, scale: float = 1.0) -> None:
    params = parameters(optimizer)
    for step in range(first, first + count):
        set_grads(params, [grad * scale for grad in draw(params, step)])
        optimizer.step()


def values(optimizer: Any) -> list[Any]:
    return [[p.detach().clone() for p in parameters(optimizer)], copy.deepcopy(states(optimizer))]


def make(target: Target, dtype: torch.dtype = F32) -> list[Parameter]:
    return make_params(MATRICES + OTHERS, dtype, target.device)


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


# ---- options of the base


@on_every_target
def test_clipping_is_by_the_norm_of_all_gradients(target: Target) -> None:
    params = make(target, F64)
    grads = draw(params, 0)
    norm = math.sqrt(sum(g.square().sum().item() for g in grads))
    other = copies(params)
    clipped, scaled = build(target, params, max_grad_norm=norm / 4), build(target, other)
    set_grads(params, grads)
    set_grads(other, [g / 4 for g in grads])
    clipped.step()
    scaled.step()
    torch.testing.assert_close(clipped.last_grad_norm.item(), norm, rtol=1e-6, atol=0)
    for mine, theirs in zip(states(clipped), states(scaled), strict=True):
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=2e-6, atol=1e-12)


@on_every_target
def test_grad_scale(target: Target) -> None:
    params = make(target)
    other = copies(params)
    plain, scaled = build(target, params), build(target, other)
    for step in range(2):
        grads = draw(params, step)
        set_grads(params, grads)
        set_grads(other, [g * 8 for g in grads])
        plain.step()
        scaled.step(grad_scale=8.0)
    assert_equal(values(plain), values(scaled))


@pytest.mark.compiled
@on_every_target
@pytest.mark.parametrize("normuon", [False, True])
def test_skipped_steps_change_nothing(target: Target, normuon: bool) -> None:
    params = make(target)
    optimizer: Any = build(target, params, skip_nonfinite=True, normuon=normuon)
    steps(optimizer, 2)
    before = values(optimizer)
    bad = draw(params, 5)
    bad[4] = torch.full_like(bad[4], math.nan)
    set_grads(params, bad)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert_equal(values(optimizer), before)
    set_grads(params, draw(params, 6))
    optimizer.found_inf = torch.ones((), device=target.device)
    optimizer.step()
    del optimizer.found_inf
    assert_equal(values(optimizer), before)
    steps(optimizer, 1, first=7)
    assert not any(torch.equal(p, q) for p, q in zip(params[:3], before[0], strict=False))


@on_every_target
def test_averages(target: Target) -> None:
    params = make(target)
    checked_averages(build(target, params, ema_decay=0.75), [1.0, 0.25, 0.25])


@on_every_target
def test_master_weights(target: Target) -> None:
    """The masters of bfloat16 params are float32 params that get the same gradients, bit for bit."""
    narrow = make(target, BF16)
    wide = [Parameter(p.detach().float()) for p in narrow]
    lowered, plain = build(target, narrow, master_weights="exact"), build(target, wide)
    for step in range(3):
        grads = draw(narrow, step)
        set_grads(narrow, grads)
        set_grads(wide, [grad.float() for grad in grads])
        lowered.step()
        plain.step()
    assert_equal(lowered.master_params(), [p.detach() for p in wide])


@on_every_target
@pytest.mark.parametrize("state_dtype", ["compact", BF16, {"momentum_buffer": BF16, "exp_avg_sq": "e8m8"}], ids=str)
def test_state_dtypes(target: Target, state_dtype: Any) -> None:
    params = make(target)
    other = copies(params)
    narrow, wide = build(target, params, state_dtype=state_dtype), build(target, other)
    for optimizer in (narrow, wide):
        steps(optimizer, 2)
    assert narrow.state[params[0]]["momentum_buffer"].dtype == BF16
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0.02, atol=0.01)
    again = build(target, copies(params), state_dtype=state_dtype)
    again.load_state_dict(copy.deepcopy(narrow.state_dict()))
    for optimizer in (narrow, again):
        steps(optimizer, 1, first=2)
    for mine, theirs in zip(states(narrow), states(again), strict=True):
        kept, loaded = ({k: x.dtype for k, x in state.items() if k != "anchor"} for state in (mine, theirs))
        assert kept == loaded
    if state_dtype != "compact":  # its dithering depends on the number of updates, which a checkpoint of Muon lacks
        assert_equal(values(narrow), values(again))


def test_unknown_states_in_state_dtype() -> None:
    with pytest.raises(ValueError, match=r"the states of this optimizer are momentum_buffer, exp_avg, exp_avg_sq"):
        FusedMuon(make_params([(3, 4)]), state_dtype={"sum": BF16})


@on_every_target
def test_dithered_rounding(target: Target) -> None:
    """The same bits at every run, and small updates are not lost."""
    runs = []
    for _ in range(2):
        params = make(target, BF16)
        optimizer = build(target, params, lr=1e-5, rounding="dithered")
        before = copies(params)
        steps(optimizer, quick(target, 4, 2))
        assert not torch.equal(params[0], before[0])
        runs.append(values(optimizer))
    assert_equal(*runs)


@on_every_target
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_continue(target: Target, how: Any) -> None:
    optimizer = build(target, make(target), normuon=True, ema_decay=0.9)
    steps(optimizer, 2)
    again = how(optimizer)
    for each in (optimizer, again):
        steps(each, 2, first=2)
    assert_equal(values(optimizer), values(again))


@on_every_target
def test_checkpoints_continue(target: Target) -> None:
    optimizer = build(target, make(target), normuon=True)
    steps(optimizer, 2)
    again = build(target, copies(parameters(optimizer)), lr=9.0)
    again.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert again.param_groups[0]["normuon"] and again.param_groups[0]["lr"] == 0.02
    for each in (optimizer, again):
        steps(each, 2, first=2)
    assert_equal(values(optimizer), values(again))


@on_every_target
def test_a_checkpoint_after_skipped_steps_has_no_momentum(target: Target) -> None:
    optimizer: Any = build(target, make(target), skip_nonfinite=True, normuon=True)
    set_grads(parameters(optimizer), [torch.full_like(p, math.inf) for p in parameters(optimizer)])
    optimizer.step()
    assert [index for index in optimizer.state_dict()["state"] if index < 3] == []


@on_every_target
@pytest.mark.parametrize("decay", ["paper", "normalized"])
def test_decay_conventions(target: Target, decay: Any) -> None:
    """Without a gradient direction only the decay moves the params."""
    params = make(target)
    before = copies(params)
    period = {"decay_period": 16.0} if decay == "normalized" else {}
    optimizer = build(target, params, decay=decay, lr_reference=0.04, weight_decay=0.5, **period)
    set_grads(params, [torch.zeros_like(p) for p in params])
    optimizer.step()
    share = 0.02 / 0.04 * 0.5 / (4 if period else 1)
    for p, q in zip(params[:3], before, strict=False):
        torch.testing.assert_close(p.detach(), (1 - share) * q.detach(), rtol=1e-6, atol=0)


@on_every_target
def test_cautious_decay(target: Target) -> None:
    """Matrices decay only where their orthogonalized update has their sign."""
    params = make(target)
    ways: list[dict[str, Any]] = [{"weight_decay": 0.0}, {"weight_decay": 5.0}, {"weight_decay": 5.0}]
    optimizers = [build(target, copies(params), **way) for way in ways[:2]]
    optimizers.append(build(target, copies(params), **ways[2], cautious_decay=True))
    for optimizer in optimizers:
        steps(optimizer, 1)
    for p, free, decayed, cautious in zip(params[:3], *map(parameters, optimizers), strict=False):
        agree = (p - free) * p > 0
        assert agree.any() and not agree.all()
        torch.testing.assert_close(cautious, torch.where(agree, decayed, free), rtol=1e-6, atol=1e-6)


@on_every_target
def test_corrected_decay(target: Target) -> None:
    """With a quarter of the largest lr the decay is a sixteenth. The largest lr is a state of every param."""
    params = make(target)
    optimizer = build(target, params, weight_decay=0.5, corrected_decay=True)
    for lr in (0.02, 0.005):
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = copies(params)
        set_grads(params, [torch.zeros_like(p) for p in params])
        optimizer.step()
        for p, q in zip(params[:3], before, strict=False):
            share = lr * lr / 0.02 * 0.5
            torch.testing.assert_close(p.detach(), (1 - share) * q.detach(), rtol=1e-6, atol=1e-7)
    assert all("lr_max" in optimizer.state[p] for p in params)


@pytest.mark.slow
def test_inside_of_torch_compile() -> None:
    params = make_params(MATRICES + OTHERS)
    target = Target("reference", "cpu")
    optimizer, plain = build(target, params), build(target, copies(params))
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(2):
        for each in (optimizer, plain):
            set_grads(parameters(each), draw(parameters(each), number))
        step()
        plain.step()
    assert_equal(values(optimizer), values(plain))


@on_every_target
def test_frozen_params_and_late_gradients(target: Target) -> None:
    params = make(target)
    params[0].requires_grad_(False)
    params[3].requires_grad_(False)
    optimizer = build(target, params)
    before = copies(params)
    for step in range(2):
        grads: list[Tensor | None] = list(draw(params, step))
        grads[0] = grads[3] = None
        if step == 0:
            grads[1] = None
        set_grads(params, grads)
        optimizer.step()
    for number in (0, 3):
        assert_equal(params[number].detach(), before[number].detach())
        assert params[number] not in optimizer.state
    assert not torch.equal(params[1], before[1])


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
