"""Schedules: values computed by hand, every class with torch's OneCycleLR and ours, and resuming."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import oracle
import pytest
import torch
from cases import random_grads, set_grads
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, LinearLR, OneCycleLR, SequentialLR

import fused_optim
from fused_optim import schedules
from fused_optim.schedules import OneCycle, WarmRestarts, adamwr, cosine_restarts, one_cycle, sgdwr

CLASSES: dict[str, tuple[oracle.Rule, dict[str, Any]]] = {
    "FusedSGD": (oracle.sgd, {"momentum": 0.9, "weight_decay": 0.1}),
    "FusedSGDW": (oracle.sgd, {"momentum": 0.9}),
    "FusedAdam": (oracle.adam, {"weight_decay": 0.1}),
    "FusedAdamW": (oracle.adam, {}),
    "FusedQHAdam": (oracle.qhadam, {"nus": (0.7, 1.0)}),
    "FusedQHAdamW": (oracle.qhadam, {"nus": (0.7, 1.0), "weight_decay": 0.1}),
    "FusedLAMB": (oracle.lamb, {}),
    "FusedLion": (oracle.lion, {"weight_decay": 0.1}),
}
TORCH = {"FusedSGD": torch.optim.SGD, "FusedAdam": torch.optim.Adam, "FusedAdamW": torch.optim.AdamW}


def params_of(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (13,), ())]


def two_groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.02}]


def values(optimizer: Optimizer) -> list[Tensor]:
    return [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]


def make(name: str, params: list[torch.nn.Parameter], **kwargs: Any) -> Any:
    return getattr(fused_optim, name)(two_groups(params), **{"lr": 0.01, **CLASSES[name][1], **kwargs})


class Truth:
    """The oracle in float64. It takes its hyperparameters from an optimizer's param groups."""

    def __init__(self, name: str, optimizer: Optimizer) -> None:
        self.rule = CLASSES[name][0]
        self.slots = [oracle.Slot(oracle.as_real(value)) for value in values(optimizer)]

    def step(self, optimizer: Optimizer) -> None:
        """Makes the same step that the optimizer makes next."""
        hypers = [group for group in optimizer.param_groups for _ in group["params"]]
        grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
        self.slots = oracle.step(self.rule, self.slots, grads, hypers)

    def compare(self, optimizer: Optimizer) -> None:
        for mine, slot in zip(values(optimizer), self.slots, strict=True):
            torch.testing.assert_close(mine.double(), slot.param, rtol=2e-5, atol=1e-6)


# ---- pure functions


def test_one_cycle_by_hand() -> None:
    # 13 steps have 12 intervals: 1 up, 5 at the top, 5 down, 1 of annihilation.
    lrs = [one_cycle(step, 13) for step in range(15)]
    expected = [0.1, *[1.0] * 6, 0.82, 0.64, 0.46, 0.28, 0.1, 0.001, 0.001, 0.001]
    assert lrs == pytest.approx(expected, abs=1e-12)
    momentums = [schedules.one_cycle_momentum(step, 13) for step in range(15)]
    expected = [0.95, *[0.85] * 6, 0.87, 0.89, 0.91, 0.93, 0.95, 0.95, 0.95, 0.95]
    assert momentums == pytest.approx(expected, abs=1e-12)


def test_one_cycle_cosine_by_hand() -> None:
    # 17 steps: 4 intervals up, 4 at the top, 4 down, 4 to zero. (1 - cos(k pi / 4)) / 2 is 0, .1464, .5, .8536, 1.
    quarter, half, most = (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2
    options: dict[str, Any] = {"phases": (0.25, 0.25, 0.25), "anneal_strategy": "cos", "final_strategy": "cos"}
    lrs = [one_cycle(step, 17, div_factor=5, final_div_factor=math.inf, **options) for step in range(17)]
    rise = [0.2, 0.2 + 0.8 * quarter, 0.2 + 0.8 * half, 0.2 + 0.8 * most]
    fall = [1.0, 0.2 + 0.8 * most, 0.2 + 0.8 * half, 0.2 + 0.8 * quarter]
    end = [0.2, 0.2 * most, 0.2 * half, 0.2 * quarter, 0.0]
    assert lrs == pytest.approx([*rise, *[1.0] * 4, *fall, *end], abs=1e-12)


@pytest.mark.parametrize(
    "phases, expected",
    [
        ((0.5, 0.0, 0.5), [0.1, 0.55, 1.0, 0.55, 0.001]),  # only the last step is left for the annihilation
        ((0.0, 0.5, 0.25), [1.0, 1.0, 1.0, 0.1, 0.001]),
        ((0.0, 0.0, 0.0), [0.1, 0.07525, 0.0505, 0.02575, 0.001]),
    ],
)
def test_phases_of_no_length(phases: tuple[float, float, float], expected: list[float]) -> None:
    assert [one_cycle(step, 5, phases=phases) for step in range(5)] == pytest.approx(expected, abs=1e-12)
    assert one_cycle(0, 1, phases=phases) == pytest.approx(0.001)  # the only step is the last one


def test_cosine_restarts_by_hand() -> None:
    factors = [cosine_restarts(step, 2, 2) for step in range(7)]
    most, least = (1 + math.sqrt(0.5)) / 2, (1 - math.sqrt(0.5)) / 2
    assert factors == pytest.approx([1.0, 0.5, 1.0, most, 0.5, least, 1.0])
    assert [cosine_restarts(step, 2, 1) for step in range(6)] == pytest.approx([1.0, 0.5] * 3)


def test_periods_of_the_paper() -> None:
    # arXiv:1711.05101, appendix C: with T_0 = 100 and T_mult = 2, periods end at epochs 100, 300, 700 and 1500.
    starts = [schedules.restart_period(step, 100).start for step in range(1501)]
    assert sorted(set(starts)) == [0, 100, 300, 700, 1500]
    assert schedules.restart_period(1499, 100) == (3, 700, 800)
    assert schedules.restart_period(299, 100, 1) == (2, 200, 100)
    assert schedules.restart_period(10**9, 1, 1) == (10**9, 10**9, 1)


def test_normalized_decay_by_hand() -> None:
    # 0.025 * sqrt(1 / (4 * epochs)), and CIFAR-10's 391 batches of 128 over 100 epochs
    decays = [schedules.normalized_decay(0.025, 4, epochs) for epochs in (1, 2, 4)]
    assert decays == pytest.approx([0.0125, 0.008838834764831844, 0.00625], rel=1e-12)
    assert schedules.normalized_decay(0.025, 391, 100) == pytest.approx(0.025 / 197.73719933285188, rel=1e-12)


# ---- 1cycle as a scheduler


def train(
    optimizer: Optimizer, scheduler: Any, steps: int, start: int = 0, truth: Truth | None = None
) -> list[tuple[list[float], list[float]]]:
    """Steps the optimizer and the scheduler. Returns the learning rates and momentums of each update."""
    used = []
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(start, start + steps):
        set_grads(params, random_grads(params, step))
        groups = optimizer.param_groups
        momentums = [float(group["betas"][0] if "betas" in group else group["momentum"]) for group in groups]
        used.append(([float(group["lr"]) for group in groups], momentums))
        if truth is not None:
            truth.step(optimizer)
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("three_phase", [False, True])
def test_torch_one_cycle_works_as_it_stands(name: str, three_phase: bool) -> None:
    """Compares learning rates, momentums, the other betas and the params. No step may rebuild a table."""
    ours = make(name, params_of())
    stand_in = TORCH.get(name, torch.optim.SGD if "momentum" in ours.param_groups[0] else torch.optim.Adam)
    arguments = CLASSES[name][1] if name in TORCH else {"momentum": 0.9} if stand_in is torch.optim.SGD else {}
    theirs = stand_in(two_groups(params_of()), lr=0.01, **arguments)
    options: dict[str, Any] = {"max_lr": [0.1, 0.02], "total_steps": 20, "three_phase": three_phase}
    mine, other = OneCycleLR(ours, **options), OneCycleLR(theirs, **options)
    truth = Truth(name, ours)
    beta2 = [group["betas"][1] for group in ours.param_groups if "betas" in group]

    used = train(ours, mine, 2, truth=truth)
    tables = [bound.table for bound in ours._tables]
    used += train(ours, mine, 18, start=2, truth=truth)
    assert [bound.table for bound in ours._tables] == tables and len(tables) == 1

    assert used == train(theirs, other, 20)
    truth.compare(ours)
    if name in TORCH:
        for a, b in zip(values(ours), values(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
    assert [group["betas"][1] for group in ours.param_groups if "betas" in group] == beta2


@pytest.mark.parametrize("name", CLASSES)
def test_one_cycle_on_every_class(name: str) -> None:
    ours = make(name, params_of())
    tails = [group["betas"][1:] for group in ours.param_groups if "betas" in group]
    scheduler = OneCycle(ours, [0.1, 0.02], 13, max_momentum=[0.95, 0.9], base_momentum=0.85)
    truth = Truth(name, ours)
    used = train(ours, scheduler, 13, truth=truth)
    truth.compare(ours)
    shape = [0.1, *[1.0] * 6, 0.82, 0.64, 0.46, 0.28, 0.1, 0.001]
    falling = [1.0, *[0.0] * 6, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    for step, (lrs, momentums) in enumerate(used):
        assert lrs == pytest.approx([0.1 * shape[step], 0.02 * shape[step]], rel=1e-9)
        assert momentums == pytest.approx([0.85 + 0.1 * falling[step], 0.85 + 0.05 * falling[step]], rel=1e-9)
    assert [group["betas"][1:] for group in ours.param_groups if "betas" in group] == tails
    assert all(isinstance(group["betas"], tuple) for group in ours.param_groups if "betas" in group)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.AdamW])
def test_one_cycle_on_torch_optimizers(optimizer: Any) -> None:
    theirs = optimizer(two_groups(params_of()), lr=0.01)
    used = train(theirs, OneCycle(theirs, 0.1, epochs=2, steps_per_epoch=5), 10)
    assert [lrs[1] for lrs, _ in used] == pytest.approx([0.1 * one_cycle(step, 10) for step in range(10)])
    assert [m[1] for _, m in used] == pytest.approx([schedules.one_cycle_momentum(step, 10) for step in range(10)])
    assert theirs.param_groups[1]["initial_lr"] == pytest.approx(0.01)


def test_one_cycle_without_momentum() -> None:
    optimizer = torch.optim.Adagrad(params_of(), lr=0.01)
    with pytest.raises(ValueError, match='Adagrad has neither "momentum" nor "betas" to cycle'):
        OneCycle(optimizer, 0.1, 10)
    scheduler = OneCycle(optimizer, 0.1, 10, cycle_momentum=False)
    assert scheduler.get_last_lr() == pytest.approx([0.01])
    adam = fused_optim.FusedAdamW(params_of(), betas=(0.8, 0.99))
    OneCycle(adam, 0.1, 10, cycle_momentum=False)
    assert adam.param_groups[0]["betas"] == (0.8, 0.99)


def test_one_cycle_fills_tensors_in_place() -> None:
    lr, beta1 = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.9)
    optimizer = torch.optim.Adam(params_of(), lr=lr, betas=(beta1, torch.tensor(0.99)), capturable=True, foreach=False)
    OneCycle(optimizer, 0.1, 10)
    assert lr.item() == pytest.approx(0.01) and beta1.item() == pytest.approx(0.95)
    assert optimizer.param_groups[0]["lr"] is lr and optimizer.param_groups[0]["betas"][0] is beta1


@pytest.mark.parametrize("kind", ["OneCycle", "WarmRestarts"])
@pytest.mark.parametrize("name", ["FusedAdamW", "FusedSGDW"])
def test_resuming_gives_the_same_run(kind: str, name: str) -> None:
    def build() -> tuple[Any, Any]:
        normalized = {"decay": "normalized", "decay_period": 3, "weight_decay": 0.3} if kind == "WarmRestarts" else {}
        optimizer = make(name, params_of(), **normalized)
        if kind == "OneCycle":
            return optimizer, OneCycle(optimizer, [0.1, 0.02], 13)
        return optimizer, WarmRestarts(optimizer, 1, 2, 1e-4, batches_per_epoch=3)

    straight, scheduler = build()
    used = train(straight, scheduler, 13)
    broken, scheduler = build()
    head = train(broken, scheduler, 5)
    file = io.BytesIO()
    torch.save((broken.state_dict(), scheduler.state_dict(), values(broken)), file)
    saved = torch.load(io.BytesIO(file.getvalue()))  # torch.load accepts only plain types
    resumed, scheduler = build()
    with torch.no_grad():
        for group in resumed.param_groups:
            for param in group["params"]:
                param.copy_(saved[2].pop(0))
    resumed.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert head + train(resumed, scheduler, 8, start=5) == used
    for a, b in zip(values(resumed), values(straight), strict=True):
        assert torch.equal(a, b)
    assert scheduler.get_last_lr() == [group["lr"] for group in straight.param_groups]


def test_last_epoch_goes_on_too() -> None:
    optimizer = make("FusedAdamW", params_of())
    with pytest.raises(KeyError, match="initial_lr"):
        OneCycle(optimizer, 0.1, 13, last_epoch=6)
    OneCycle(optimizer, 0.1, 13)
    resumed = OneCycle(optimizer, 0.1, 13, last_epoch=6)
    assert resumed.last_epoch == 7 and resumed.get_last_lr() == pytest.approx([0.082, 0.082])


def test_in_a_sequence_and_a_chain() -> None:
    optimizer = make("FusedAdamW", params_of())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about step() with an epoch
        warm_up = LinearLR(optimizer, start_factor=0.5, total_iters=2)
        cycle = WarmRestarts(optimizer, 1, 2, batches_per_epoch=2)
        sequence = SequentialLR(optimizer, [warm_up, cycle], milestones=[2])
        used = train(optimizer, sequence, 6)
    assert [lrs[0] for lrs, _ in used] == pytest.approx([0.005, 0.0075, 0.01, 0.005, 0.01, 0.01 * (2 + 2**0.5) / 4])
    optimizer = make("FusedAdamW", params_of())
    chain = ChainedScheduler([OneCycle(optimizer, 0.1, 13), ConstantLR(optimizer, factor=1.0)])
    assert [lrs[0] for lrs, _ in train(optimizer, chain, 2)] == pytest.approx([0.01, 0.1])


def test_one_cycle_ends() -> None:
    optimizer = make("FusedAdamW", params_of())
    scheduler = OneCycle(optimizer, 0.1, 3)
    train(optimizer, scheduler, 3)
    with pytest.raises(ValueError, match="a cycle of 3 steps is over, but step"):
        scheduler.step()


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "needs total_steps, or both epochs and steps_per_epoch"),
        ({"total_steps": 0}, "must be a positive integer, but is 0"),
        ({"total_steps": 2.5}, "must be a positive integer, but is 2.5"),
        ({"total_steps": 5, "phases": (0.5, 0.5, 0.5)}, "together at most 1"),
        ({"total_steps": 5, "phases": (-0.1, 0.5, 0.5)}, "none below 0"),
        ({"total_steps": 5, "div_factor": 0}, "div_factor must be larger than 0"),
        ({"total_steps": 5, "anneal_strategy": "poly"}, 'must be "linear" or "cos"'),
        ({"total_steps": 5, "max_lr": [0.1]}, "max_lr must be a number or one number for each of the optimizer's 2"),
    ],
)
def test_one_cycle_refuses(options: dict[str, Any], message: str) -> None:
    optimizer = make("FusedAdamW", params_of())
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        OneCycle(optimizer, **{"max_lr": 0.1, **options})
    assert optimizer.param_groups == before


# ---- warm restarts


@pytest.mark.parametrize("recipe, name", [(adamwr, "FusedAdamW"), (sgdwr, "FusedSGDW")])
def test_recipe_against_a_table_by_hand(recipe: Any, name: str) -> None:
    """T_0 is one epoch of 4 batches. Checks learning rates, decay periods, and the decay of a param with a zero
    gradient."""
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer, scheduler = recipe([param], batches_per_epoch=4, lr=0.1, T_0=1)
    assert type(optimizer).__name__ == name
    cosines = [1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]
    eighths = [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    table = [
        *((eta, 4, 0.0125) for eta in cosines),
        *((eta, 8, 0.008838834764831844) for eta in eighths),
        (1.0, 16, 0.00625),
    ]
    value = 1.0
    for eta, period, decay in table:
        (group,) = optimizer.param_groups
        assert (group["lr"], group["decay_period"]) == pytest.approx((0.1 * eta, period), rel=1e-12)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        scheduler.step()
        value *= 1 - eta * decay
        assert param.tolist() == pytest.approx([value] * 3, rel=1e-6)


@pytest.mark.parametrize("recipe, name", [(adamwr, "FusedAdamW"), (sgdwr, "FusedSGDW")])
def test_recipe_trains_as_the_oracle(recipe: Any, name: str) -> None:
    optimizer, scheduler = recipe(two_groups(params_of()), batches_per_epoch=3, T_0=1)
    truth = Truth(name, optimizer)
    train(optimizer, scheduler, 12, truth=truth)
    truth.compare(optimizer)
    assert scheduler.period == (2, 3, 4)


def test_published_defaults() -> None:
    optimizer, scheduler = adamwr(params_of(), batches_per_epoch=391)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 1e-8, 0.025)
    assert (scheduler.T_0, scheduler.T_mult, scheduler.eta_min, group["decay_period"]) == (100, 2, 0.0, 39100)
    optimizer, scheduler = sgdwr(params_of(), batches_per_epoch=391)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.05, 0.9, 0.025, False)
    assert (scheduler.T_0, scheduler.T_mult, scheduler.eta_min, group["decay_period"]) == (100, 2, 0.0, 39100)


def test_restarts_build_no_tables() -> None:
    optimizer, scheduler = adamwr(two_groups(params_of()), batches_per_epoch=2, T_0=1)
    train(optimizer, scheduler, 1)
    tables = [bound.table for bound in optimizer._tables]
    train(optimizer, scheduler, 9, start=1)
    assert [bound.table for bound in optimizer._tables] == tables and len(tables) == 1


def test_other_optimizers_get_weight_decay() -> None:
    optimizer = torch.optim.AdamW(two_groups(params_of()), lr=0.01)
    scheduler = WarmRestarts(optimizer, 1, 2, 1e-3, batches_per_epoch=4, wd_norm=[0.025, 0.0])
    seen = []
    for _ in range(13):
        seen.append((optimizer.param_groups[0]["lr"], [group["weight_decay"] for group in optimizer.param_groups]))
        optimizer.step()
        scheduler.step()
    assert [decay for _, (decay, _) in seen] == pytest.approx([0.0125] * 4 + [0.008838834764831844] * 8 + [0.00625])
    assert all(decay == 0 for _, (_, decay) in seen)
    assert [lr for lr, _ in seen[:5]] == pytest.approx(
        [0.01, 1e-3 + 9e-3 * (2 + 2**0.5) / 4, 5.5e-3, 1e-3 + 9e-3 * (2 - 2**0.5) / 4, 0.01]
    )
    without = torch.optim.AdamW(params_of(), lr=0.01)
    WarmRestarts(without, 1, batches_per_epoch=4)
    assert without.param_groups[0]["weight_decay"] == 1e-2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"T_0": 0}, "T_0 must be an integer from 1, but is 0"),
        ({"T_mult": 1.5}, "T_mult must be an integer from 1, but is 1.5"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be an integer from 1"),
        ({"wd_norm": [0.1]}, "wd_norm must be a number or one number for each of the optimizer's 2 param groups"),
    ],
)
def test_warm_restarts_refuse(options: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.AdamW(two_groups(params_of()))
    with pytest.raises(ValueError, match=message):
        WarmRestarts(optimizer, **{"T_0": 1, "batches_per_epoch": 4, **options})


def test_decay_is_not_normalized_twice() -> None:
    optimizer, _ = adamwr(params_of(), batches_per_epoch=4)
    with pytest.raises(ValueError, match='these groups have a "decay_period" and normalize it'):
        WarmRestarts(optimizer, 1, batches_per_epoch=4, wd_norm=0.025)
