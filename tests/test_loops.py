"""Hand-written training loops: accumulation, clipping, warmup, checkpoints, several optimizers, a scaler.

As in torchtitan, each part of a model has its own optimizer under pipeline parallelism, checkpoints store states by the
names of params, and optimizers can step during backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ADAMW, Case, Target, build, build_torch, for_every_rule, on_every_target, parameters, quick
from compare import assert_equal
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from trainers import assert_stepped, assert_trained_alike, loader, loss_of, net, on_cpp, run_page

pytestmark = pytest.mark.slow
MICRO, BOUND = 2, 0.5  # batches per step; the bound for the norm of their mean gradient
Batch = list[Tensor]


def steps_of(target: Target) -> list[list[Batch]]:
    """The list of micro-batches for each step."""
    batches = [[tensor.to(target.device) for tensor in batch] for batch in loader(MICRO * quick(target, 12, 2))]
    return [batches[start : start + MICRO] for start in range(0, len(batches), MICRO)]


class Training:
    """A model, its optimizer and its warmup schedule. A checkpoint contains all three."""

    def __init__(self, target: Target, make: Callable[[Iterable[Tensor]], Optimizer]) -> None:
        self.model = net().to(target.device)
        self.optimizer: Any = make(self.model.parameters())
        self.schedule = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 4))

    def backward(self, micro: list[Batch]) -> None:
        self.optimizer.zero_grad()
        for batch in micro:
            loss_of(self.model, batch).backward()

    def step(self, micro: list[Batch]) -> None:
        """Divides and clips the gradients inside the optimizer's step."""
        self.backward(micro)
        self.optimizer.step(grad_scale=MICRO)
        self.schedule.step()

    def step_as_torch(self, micro: list[Batch]) -> None:
        self.backward(micro)
        for p in self.model.parameters():
            p.grad /= MICRO
        clip_grad_norm_(self.model.parameters(), BOUND)
        self.optimizer.step()
        self.schedule.step()

    def save(self, path: Path) -> None:
        torch.save([part.state_dict() for part in (self.model, self.optimizer, self.schedule)], path)

    def load(self, path: Path) -> None:
        for part, saved in zip((self.model, self.optimizer, self.schedule), torch.load(path), strict=True):
            part.load_state_dict(saved)


@on_every_target
def test_like_torch(target: Target) -> None:
    mine = Training(target, lambda params: build(ADAMW, target, params, eps=1e-4, max_grad_norm=BOUND))
    theirs = Training(target, lambda params: build_torch(ADAMW, params, eps=1e-4))
    for micro in steps_of(target):
        mine.step(micro)
        theirs.step_as_torch(micro)
    assert mine.optimizer.last_grad_norm > BOUND
    assert_trained_alike(mine.optimizer, theirs.optimizer)


@on_cpp
def test_page() -> None:
    batches = [[*loader(4)]] * 3
    known = run_page("A loop", model=net(), steps=batches, loss_of=loss_of)
    assert_stepped(known["optimizer"], 3)


@on_every_target
@for_every_rule
def test_resumes_to_the_bit(case: Case, target: Target, tmp_path: Path) -> None:
    def make(params: Iterable[Tensor]) -> Optimizer:
        return build(case, target, params, max_grad_norm=BOUND)

    steps = steps_of(target)
    half = len(steps) // 2
    whole, resumed = Training(target, make), Training(target, make)
    for micro in steps[:half]:
        whole.step(micro)
    whole.save(tmp_path / "checkpoint.pt")
    resumed.load(tmp_path / "checkpoint.pt")
    for micro in steps[half:]:
        whole.step(micro)
        resumed.step(micro)
    for part in ("model", "optimizer", "schedule"):
        assert_equal(getattr(resumed, part).state_dict(), getattr(whole, part).state_dict())


class PerPart:
    """One optimizer for each part of a model, and one checkpoint of all by the names of params."""

    OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, parts: list[nn.Module], make: Callable[[Iterable[Tensor]], Optimizer]) -> None:
        self.parts = parts
        self.optimizers = [make(part.parameters()) for part in parts]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = {}
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            saved |= get_optimizer_state_dict(part, optimizer, options=self.OPTIONS)
        return saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, saved, options=self.OPTIONS)


def parts_of(model: nn.Sequential) -> list[nn.Module]:
    """The params keep their names in the full model."""
    return [nn.ModuleDict({str(i): model[i] for i in chosen}) for chosen in ((0, 1), (3,))]


@on_every_target
def test_an_optimizer_for_each_part(target: Target) -> None:
    """Compared with torch's optimizers. In the middle of the training new optimizers load the checkpoint: ours from
    torch's, torch's from ours, or ours from our own."""
    batches = [batch for micro in steps_of(target) for batch in micro]

    def mine(params: Iterable[Tensor]) -> Optimizer:
        return build(ADAMW, target, params, eps=1e-4)

    def theirs(params: Iterable[Tensor]) -> Optimizer:
        return build_torch(ADAMW, params, eps=1e-4)

    def train(*makes: Callable[[Iterable[Tensor]], Optimizer]) -> PerPart:
        model, share = net().to(target.device), len(batches) // len(makes)
        saved = None
        for number, make in enumerate(makes):
            parts = PerPart(parts_of(model), make)
            if saved is not None:
                before = [p.detach().clone() for p in model.parameters()]
                parts.load_state_dict(saved)
                assert_equal([p.detach() for p in model.parameters()], before)
                assert_equal(parts.state_dict(), saved)
            for batch in batches[number * share : (number + 1) * share]:
                loss_of(model, batch).backward()
                parts.step()
            saved = parts.state_dict()
        return parts

    plain = train(theirs)
    for runs in ((mine,), (mine, theirs), (theirs, mine), (mine, mine)):
        for ours_, torchs_ in zip(train(*runs).optimizers, plain.optimizers, strict=True):
            assert_trained_alike(ours_, torchs_)


@on_every_target
def test_options_that_a_checkpoint_lacks(target: Target) -> None:
    """torch requires every option of every param in the checkpoint. Merging it into our own state_dict adds the missing
    ones."""
    model = net().to(target.device)
    theirs = PerPart(parts_of(model), lambda params: build_torch(ADAMW, params))
    for batch in steps_of(target)[0]:
        loss_of(model, batch).backward()
        theirs.step()
    mine = PerPart(parts_of(model), lambda params: build(ADAMW, target, params, max_grad_norm=BOUND))
    with pytest.raises(KeyError, match="max_grad_norm"):
        mine.load_state_dict(theirs.state_dict())
    mine.load_state_dict({**mine.state_dict(), **theirs.state_dict()})
    for one, other in zip(mine.optimizers, theirs.optimizers, strict=True):
        assert one.param_groups[0]["max_grad_norm"] == BOUND
        assert_equal(one.state_dict()["state"], other.state_dict()["state"])


@on_every_target
def test_stepping_in_backward(target: Target) -> None:
    """Each param has its own optimizer, which steps when the param's gradient is complete."""
    models = []
    for make in (
        lambda params: build(ADAMW, target, params, eps=1e-4),
        lambda params: build_torch(ADAMW, params, eps=1e-4),
    ):
        model = net().to(target.device)
        optimizers = {p: make([p]) for p in model.parameters()}

        def hook(p: Tensor, optimizers: dict[Tensor, Optimizer] = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
        for batch in steps_of(target)[0] * 2:
            loss_of(model, batch).backward()
        models.append((model, optimizers))
    for one, other in zip(models[0][1].values(), models[1][1].values(), strict=True):
        assert_trained_alike(one, other)
    assert all(p.grad is None for p in models[0][0].parameters())


@on_every_target
@pytest.mark.parametrize("unscale", [False, True])
def test_float16_with_a_scaler(unscale: bool, target: Target) -> None:
    """The first steps overflow and are skipped."""
    pair = []
    for mine in (True, False):
        scaler = torch.amp.GradScaler(target.device, init_scale=2.0**17)
        model = net().to(target.device)
        params = model.parameters()
        optimizer = (
            build(ADAMW, target, params, eps=1e-4, max_grad_norm=BOUND)
            if mine
            else build_torch(ADAMW, params, eps=1e-4)
        )
        for batch in (batch for micro in steps_of(target) * 2 for batch in micro):
            optimizer.zero_grad()
            with torch.autocast(target.device, torch.float16):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            if unscale or not mine:
                scaler.unscale_(optimizer)
            if not mine:
                clip_grad_norm_(model.parameters(), BOUND)
            scaler.step(optimizer)
            scaler.update()
        pair.append((optimizer, scaler))
    (mine_, scaler), (theirs, their_scaler) = pair
    assert scaler.get_scale() == their_scaler.get_scale() < 2.0**17
    counts = [[optimizer.state[p]["step"].item() for p in parameters(optimizer)] for optimizer in (mine_, theirs)]
    assert counts[0] == counts[1] and counts[0][0] > 0
    assert_trained_alike(mine_, theirs, bits=16)
