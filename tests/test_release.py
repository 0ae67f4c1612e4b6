"""Gradient release: backward() steps the params bucket by bucket and frees their gradients."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ADAMW,
    AMSGRAD,
    BY_NAME,
    LAMB,
    Case,
    Target,
    build,
    for_every_rule,
    on_every_target,
    parameters,
    quick,
)
from compare import assert_equal
from torch import Tensor, nn

from fused_optim import FusedAdamW, FusedMuon, GradientRelease, groups, release_gradients
from fused_optim.optim import release as release_module

BF16 = torch.bfloat16
REFERENCE = Target("reference", "cpu")
BUCKET = 600  # bytes: several buckets, and params with a bucket of their own


class Net(nn.Module):
    """`tied` is used twice, `unused` never has a gradient, `sometimes` in every other step."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(7, 16)
        self.tied = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.unused = nn.Linear(3, 3)
        self.sometimes = nn.Linear(16, 16, bias=False)
        self.last = nn.Linear(16, 2)
        self.to(device, dtype)

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        x = self.tied(torch.tanh(self.tied(self.first(x))))
        x = torch.tanh(self.norm(x)) if step % 2 else torch.tanh(self.sometimes(self.norm(x)))
        return self.last(x)


def loss(net: nn.Module, step: int, part: int = 0) -> Tensor:
    some = next(net.parameters())
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(10 * step + part)).to(some.device, some.dtype)
    return (net(x, step).float() ** 2).mean()


def pair(case: Case, target: Target, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, ...]:
    """Two equal models with their optimizers. Only the first one releases its gradients."""
    nets = [Net(dtype, target.device) for _ in range(2)]
    ours, plain = (build(case, target, net.named_parameters(), **options) for net in nets)
    return nets[0], ours, release_gradients(nets[0], ours, bucket_bytes=BUCKET), nets[1], plain


def assert_same(ours: Any, plain: Any) -> None:
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(plain)])
    assert_equal([ours.state[p] for p in parameters(ours)], [plain.state[p] for p in parameters(plain)])


def side_by_side(net: nn.Module, ours: Any, other: nn.Module, plain: Any, steps: range | int) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        for model, optimizer in ((net, ours), (other, plain)):
            loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()


# ---- numbers


@on_every_target
@for_every_rule
def test_steps_are_plain_steps(case: Case, target: Target) -> None:
    net, ours, release, other, plain = pair(case, target, max_grad_norm=None)
    assert len(release._buckets) > 3
    side_by_side(net, ours, other, plain, quick(target, 5, 2))
    assert_same(ours, plain)


STORED: dict[str, dict[str, Any]] = {
    "masters-compact": {"master_weights": "exact", "state_dtype": "compact"},
    "24bit": {"master_weights": "24bit"},
    "dithered": {"rounding": "dithered", "ema_dtype": BF16, "ema_decay": 0.9},
}


@on_every_target
@pytest.mark.parametrize("stored", STORED)
def test_bfloat16(stored: str, target: Target) -> None:
    net, ours, _, other, plain = pair(AMSGRAD, target, BF16, **STORED[stored])
    side_by_side(net, ours, other, plain, quick(target, 4, 2))
    assert_same(ours, plain)
    assert_equal(ours.master_params(), plain.master_params())


def test_schedules_and_averages_advance_once_per_step() -> None:
    asked: list[int] = []

    def decay(step: int) -> float:
        asked.append(step)
        return min(0.9, step / 10)

    net, ours, _, other, plain = pair(ADAMW, REFERENCE, ema_decay=decay)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (ours, plain)]
    for step in range(4):
        side_by_side(net, ours, other, plain, range(step, step + 1))
        for schedule in schedules:
            schedule.step()
    assert asked == [0, 0, 1, 1, 2, 2, 3, 3]
    assert ours.state_dict()["ema_steps"] == 4
    assert_same(ours, plain)
    with ours.ema_weights(), pytest.raises(RuntimeError, match=r"step\(\) cannot be called inside of ema_weights"):
        loss(net, 0).backward()


@on_every_target
def test_accumulated_gradients(target: Target) -> None:
    """All micro-batches but the last are inside of no_release()."""
    net, ours, release, other, plain = pair(ADAMW, target)
    release.grad_scale = 3.0
    for step in range(3):
        with release.no_release():
            for part in range(2):
                loss(net, step, part).backward()
        assert net.first.weight.grad is not None and (step or not ours.state)
        loss(net, step, 2).backward()
        assert net.first.weight.grad is None
        ours.step()
        for part in range(3):
            loss(other, step, part).backward()
        plain.step(grad_scale=3.0)
        plain.zero_grad()
    assert_same(ours, plain)


# ---- memory and launches


def test_gradients_of_the_whole_model_never_live_together() -> None:
    sizes = [64] * 12
    net = nn.Sequential(*[nn.Linear(size, size, bias=False) for size in sizes])
    largest = 0

    def count(_: Tensor) -> None:
        nonlocal largest
        live = sum(p.grad.nbytes for p in net.parameters() if p.grad is not None)
        largest = max(largest, live)

    for param in net.parameters():
        param.register_post_accumulate_grad_hook(count)
    one = 64 * 64 * 4
    ours = FusedAdamW(net.parameters())
    for bucket_bytes, most in ((one, 1), (3 * one, 3), (100 * one, 12)):
        release, largest = release_gradients(net, ours, bucket_bytes=bucket_bytes), 0
        for _ in range(2):
            (net(torch.randn(2, 64)) ** 2).mean().backward()
            assert all(p.grad is None for p in net.parameters())
            ours.step()
        release.remove()
        assert largest == most * one


def test_plans_are_made_once_and_launched_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made, walked = [], []
    make, walk = release_module.make_plan, release_module.walk
    monkeypatch.setattr(release_module, "make_plan", lambda *given: made.append(0) or make(*given))
    monkeypatch.setattr(release_module, "walk", lambda tables, given: walked.append(len(tables)) or walk(tables, given))
    net, ours, release, other, plain = pair(AMSGRAD, REFERENCE, max_grad_norm=1.0)
    side_by_side(net, ours, other, plain, range(0, 8, 2))
    assert len(made) == len(release._buckets)
    assert len(walked) == 4 * len(made) and {*walked} <= {0, 1}
    for group in ours.param_groups:
        group["lr"] = 0.5
    side_by_side(net, ours, other, plain, range(0, 4, 2))
    assert len(made) == len(release._buckets)


# ---- clipping and skipping


def expected_norms(norms: list[list[float]], norm_type: float) -> list[list[float]]:
    """The norm that clips each bucket, from the norms of the buckets of each step."""
    last, found = 0.0, []
    for step in norms:
        sums = [sum(norm**2 for norm in step[: n + 1]) ** 0.5 for n in range(len(step))]
        seen = sums if norm_type == 2 else [max(step[: n + 1]) for n in range(len(step))]
        found.append([max(last, one) for one in seen])
        last = seen[-1]
    return found


@on_every_target
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_clipping(norm_type: float, target: Target) -> None:
    """By the larger of the last step's norm and the norm of this step so far."""
    torch.manual_seed(0)
    layers = [nn.Linear(9, 9, bias=False, device=target.device, dtype=torch.float64) for _ in range(4)]
    net = nn.Sequential(*layers)
    ours = build(BY_NAME["sgd-plain"], target, net.parameters(), lr=1.0, weight_decay=0.0, max_grad_norm=0.1)
    ours.norm_type = norm_type
    release_gradients(net, ours, bucket_bytes=1)
    norms, taken = [], []
    for step in range(4):
        before = [layer.weight.detach().clone() for layer in layers]
        x = torch.randn(3, 9, device=target.device, dtype=torch.float64) * (1, 30, 1, 0.01)[step]
        grads = torch.autograd.grad((net(x) ** 2).mean(), [layer.weight for layer in layers])
        (net(x) ** 2).mean().backward()
        ours.step()
        norms.append([float(grad.norm(norm_type)) for grad in grads[::-1]])
        updates = [old - layer.weight.detach() for old, layer in zip(before, layers, strict=True)]
        moved = [float(update.norm(norm_type)) for update in updates[::-1]]
        taken.append([share / norm for share, norm in zip(moved, norms[-1], strict=True)])
        whole = torch.cat([grad.flatten() for grad in grads]).norm(norm_type)
        torch.testing.assert_close(ours.last_grad_norm, whole, check_device=False, check_dtype=False)
    for shares, bounds in zip(taken, expected_norms(norms, norm_type), strict=True):
        for share, bound in zip(shares, bounds, strict=True):
            assert share == pytest.approx(min(1.0, 0.1 / (bound + 1e-6)), rel=1e-3)


def test_resuming_with_clipping_is_like_not_having_stopped() -> None:
    net, ours, _, *_ = pair(ADAMW, REFERENCE, max_grad_norm=0.01)
    for step in range(2):
        loss(net, step).backward()
        ours.step()
    file = io.BytesIO()
    torch.save([net.state_dict(), ours.state_dict()], file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    other, resumed, *_ = pair(ADAMW, REFERENCE, max_grad_norm=0.01)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    side_by_side(net, ours, other, resumed, range(2, 5))
    assert_same(ours, resumed)


@on_every_target
def test_buckets_with_nonfinite_gradients_are_skipped(target: Target) -> None:
    layers = [nn.Linear(4, 4, bias=False, device=target.device) for _ in range(3)]
    net = nn.Sequential(*layers)
    ours = build(ADAMW, target, net.parameters(), skip_nonfinite=True, max_grad_norm=1.0)
    release_gradients(net, ours, bucket_bytes=1)
    layers[1].weight.register_hook(lambda grad: grad * poison)
    for poison, moves in ((1.0, [True] * 3), (math.nan, [True, False, True]), (1.0, [True] * 3)):  # noqa: B007
        before = [layer.weight.detach().clone() for layer in layers]
        net(torch.randn(2, 4, device=target.device)).sum().backward()
        ours.step()
        assert [not torch.equal(old, layer.weight) for old, layer in zip(before, layers, strict=True)] == moves
        assert bool(ours.last_grad_norm.isfinite())
    assert int(ours.skipped_steps) == 1
    assert [float(ours.state[layer.weight]["step"]) for layer in layers] == [3, 2, 3]


def test_lamb_keeps_its_ratios() -> None:
    net, ours, _, other, plain = pair(LAMB, REFERENCE, max_grad_norm=None)
    side_by_side(net, ours, other, plain, 2)
    ratios = [optimizer.trust_ratios for optimizer in (ours, plain)]
    assert len(ratios[0]) == len(ratios[1]) > 5
    for p, q in zip(parameters(ours), parameters(plain), strict=True):
        assert_equal(ratios[0].get(p), ratios[1].get(q))


@on_every_target
def test_muon(target: Target) -> None:
    """Matrices of one shape are orthogonalized together, in batches of a bucket, which may round otherwise."""
    nets = [Net(device=target.device) for _ in range(2)]
    ours, plain = (FusedMuon(groups.muon(net), backend=target.backend) for net in nets)
    release_gradients(nets[0], ours, bucket_bytes=BUCKET)
    side_by_side(nets[0], ours, nets[1], plain, 3)
    for p, q in zip(parameters(ours), parameters(plain), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-3, atol=1e-5)


# ---- what changes between steps


def test_changes_between_steps() -> None:
    net, ours, release, other, plain = pair(ADAMW, REFERENCE)
    late = [nn.Linear(16, 16) for _ in range(2)]
    late[1].load_state_dict(late[0].state_dict())
    side_by_side(net, ours, other, plain, 2)
    for optimizer, model in ((ours, net), (plain, other)):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.rounding = "dithered"
        model.first.weight.requires_grad_(False)
    side_by_side(net, ours, other, plain, range(2, 4))
    for optimizer, model, layer in ((ours, net, late[0]), (plain, other, late[1])):
        model.first.weight.requires_grad_(True)
        model.last = nn.Sequential(layer, model.last)
        optimizer.add_param_group({"params": layer.named_parameters(prefix="late"), "lr": 0.1})
    side_by_side(net, ours, other, plain, range(4, 7))
    assert net.first.weight in release._hooks and late[0].weight in release._hooks
    loss(net, 0).backward()
    assert late[0].weight.grad is None
    ours.step()
    loss(other, 0).backward()
    plain.step()
    plain.zero_grad()
    assert_same(ours, plain)
    removed = [optimizer.param_groups.pop() for optimizer in (ours, plain)]
    side_by_side(net, ours, other, plain, range(7, 9))
    assert_same(ours, plain)
    assert removed[0]["params"][0] not in release._hooks


def test_writes_to_master_weights_are_noticed() -> None:
    net, ours, _, other, plain = pair(ADAMW, REFERENCE, BF16, master_weights="exact")
    side_by_side(net, ours, other, plain, 2)
    for model in (net, other):
        nn.init.constant_(model.tied.weight, 0.3)
    with pytest.warns(UserWarning, match="1 params have been written to"):
        side_by_side(net, ours, other, plain, range(2, 4))
    assert_same(ours, plain)


@pytest.mark.slow
def test_compiled_models() -> None:
    net, ours, _, other, plain = pair(ADAMW, REFERENCE)
    compiled = [torch.compile(model, backend="aot_eager") for model in (net, other)]
    side_by_side(compiled[0], ours, compiled[1], plain, 3)
    assert_same(ours, plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*Dynamo does not know how to trace")
def test_compiled_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles the backward pass with the hooks, and must leave the step out."""
    monkeypatch.setattr(torch._dynamo.config, "compiled_autograd", True)
    net, ours, _, other, plain = pair(ADAMW, REFERENCE)

    @torch.compile(backend="eager")
    def train(model: nn.Module, step: int) -> None:
        loss(model, step).backward()

    for step in range(0, 6, 2):
        train(net, step)
        assert net.first.weight.grad is None
        ours.step()
        loss(other, step).backward()
        plain.step()
        plain.zero_grad()
    assert_same(ours, plain)


class Checkpointed(Net):
    """`tied` is recomputed in backward."""

    reentrant = False

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(self.tied, x, use_reentrant=self.reentrant)
        return self.last(x)


def test_checkpointed_segments() -> None:
    nets = [Checkpointed() for _ in range(2)]
    ours, plain = (FusedAdamW(net.parameters()) for net in nets)
    release_gradients(nets[0], ours, bucket_bytes=BUCKET)
    side_by_side(nets[0], ours, nets[1], plain, 3)
    assert_same(ours, plain)
    nets[0].reentrant = True
    with pytest.raises(RuntimeError, match="need use_reentrant=False"):
        loss(nets[0], 3).backward()


def test_closures_and_hooks_of_step() -> None:
    net, ours, _, other, plain = pair(ADAMW, REFERENCE)
    called = []
    ours.register_step_post_hook(lambda *_: called.append(1))

    def closure(model: nn.Module, optimizer: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            optimizer.zero_grad()
            found = loss(model, 0)
            found.backward()
            return found

        return run

    for _ in range(2):
        assert torch.equal(ours.step(closure(net, ours)), plain.step(closure(other, plain)))
    assert called == [1, 1]
    plain.zero_grad()
    assert_same(ours, plain)


def test_removed() -> None:
    net, ours, release, other, plain = pair(ADAMW, REFERENCE)
    side_by_side(net, ours, other, plain, 2)
    release.remove()
    loss(net, 2).backward()
    assert net.first.weight.grad is not None
    net.zero_grad()
    side_by_side(net, ours, other, plain, range(2, 4))
    again = release_gradients(net, ours, bucket_bytes=BUCKET)
    side_by_side(net, ours, other, plain, range(4, 6))
    assert again is not release and isinstance(again, GradientRelease)
    assert_same(ours, plain)


def test_copies_do_not_release() -> None:
    net, ours, *_ = pair(ADAMW, REFERENCE)
    loss(net, 0).backward()
    ours.step()
    pickle.loads(pickle.dumps((net, ours)))
    other, copied = copy.deepcopy((net, ours))
    loss(other, 1).backward()
    assert other.first.weight.grad is not None
    copied.step()
    loss(net, 1).backward()
    ours.step()
    assert_equal([p.detach() for p in other.parameters()], [p.detach() for p in net.parameters()])


def test_an_optimizer_that_is_gone_is_not_stepped() -> None:
    net, ours, release, *_ = pair(ADAMW, REFERENCE)
    loss(net, 0).backward()
    ours.step()
    watched = [weakref.ref(ours), weakref.ref(release)]
    before = net.first.weight.detach().clone()
    del ours, release, _
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    loss(net, 1).backward()
    assert torch.equal(before, net.first.weight) and net.first.weight.grad is not None


# ---- errors


def test_a_second_backward_is_refused() -> None:
    net, ours, *_ = pair(ADAMW, REFERENCE)
    loss(net, 0).backward()
    with pytest.raises(RuntimeError, match="has got a second gradient in one step"):
        loss(net, 1).backward()
    ours.step()
    ours.zero_grad()
    loss(net, 1).backward()
    ours.step()


def test_bad_gradients_change_nothing_of_their_bucket() -> None:
    """The message is that of a plain step, and the optimizer goes on after it."""
    net = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    ours = FusedAdamW(net.parameters())
    release_gradients(net, ours, bucket_bytes=1)
    before = net[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        net(torch.tensor([1, 2])).sum().backward()
    assert torch.equal(before, net[0].weight) and net[0].weight not in ours.state
    net.zero_grad()
    ours.step()
    net[0].sparse = False
    net(torch.tensor([1, 2])).sum().backward()
    ours.step()
    assert not torch.equal(before, net[0].weight)


def test_what_cannot_be_released() -> None:
    net = Net()
    ours = FusedAdamW(net.parameters())
    with pytest.raises(TypeError, match="takes an optimizer of fused_optim, but got AdamW"):
        release_gradients(net, torch.optim.AdamW(net.parameters()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, but got list"):
        release_gradients([net], ours)  # type: ignore[arg-type]
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="bucket_bytes must be a positive integer"):
            release_gradients(net, ours, bucket_bytes=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grad_scale must be"):
        release_gradients(net, ours, grad_scale=-1.0)
    with pytest.raises(ValueError, match="has no param of the model"):
        release_gradients(nn.Linear(2, 2), ours)
    release_gradients(net, ours)
    with pytest.raises(RuntimeError, match="are released already"):
        release_gradients(net, ours)
    loss(net, 0).backward()
    with pytest.raises(ValueError, match=r"step\(\) takes no grad_scale with gradient release"):
        ours.step(grad_scale=2.0)
    ours.grad_scale = torch.ones(())
    with pytest.raises(RuntimeError, match="GradScaler does not work with gradient release"):
        ours.step()


@pytest.mark.parametrize("case", [AMSGRAD, BY_NAME["sgd-dampening-maximize"], LAMB], ids=str)
def test_without_any_gradient(case: Case) -> None:
    """step() alone counts as a step without gradients."""
    net, ours, _, other, plain = pair(case, REFERENCE, ema_decay=0.9)
    ours.step()
    plain.step()
    side_by_side(net, ours, other, plain, 2)
    assert ours._ema.steps == plain._ema.steps == 3
    if case.ours is not LAMB.ours:  # clips
        assert_same(ours, plain)
