"""The LR range test: the lrs it runs, its suggestions, and that it restores everything."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_optim
from fused_optim.lr_finder import RangeTest, lr_range_test

pytestmark = pytest.mark.slow


class Net(nn.Module):
    """It has buffers, dropout, and a buffer that every forward replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.layers(x)[:, 0]


def data(batches: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(batches, 32, 4, generator=generator)
    return [(x, x.sum(1)) for x in inputs]


def build(name: str = "FusedAdamW", **kwargs: Any) -> tuple[Net, Any]:
    torch.manual_seed(0)
    model = Net()
    kind = getattr(fused_optim, name) if name.startswith("Fused") else getattr(torch.optim, name)
    groups = [{"params": model.layers[0].parameters(), "lr": 1e-3}, {"params": model.layers[1:].parameters()}]
    return model, kind(groups, lr=1e-2, **kwargs)


def loss_of(model: nn.Module) -> Any:
    return lambda batch: F.mse_loss(model(batch[0]), batch[1])


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    for x, y in data(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def everything(model: nn.Module, optimizer: Any) -> Any:
    """A copy of all values that training changes."""
    return copy.deepcopy(
        (
            dict(model.named_parameters()),
            dict(model.named_buffers()),
            [param.grad for param in model.parameters()],
            [module.training for module in model.modules()],
            optimizer.state_dict(),
            torch.get_rng_state(),
            random.getstate(),
        )
    )


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def identities(model: nn.Module, optimizer: Any) -> list[int]:
    objects = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    return [id(x) for x in [*objects, optimizer.param_groups, *optimizer.param_groups]]


# ---- what it runs


def test_lrs_grow_exponentially_and_groups_keep_their_ratio() -> None:
    model, optimizer = build("SGD")
    used: list[list[float]] = []
    optimizer.register_step_post_hook(lambda *_: used.append([group["lr"] for group in optimizer.param_groups]))
    result = lr_range_test(
        model, optimizer, loss_of(model), data(), start_lr=1e-5, end_lr=1e-1, steps=5, divergence=math.inf
    )
    assert result.lrs == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert [rates[1] for rates in used] == pytest.approx(result.lrs)
    assert [rates[0] for rates in used] == pytest.approx([lr / 10 for lr in result.lrs])


def test_smoothing_by_hand() -> None:
    model, optimizer = build("SGD")
    losses = iter([4.0, 2.0, 1.0])
    anchor = next(model.parameters())
    result = lr_range_test(
        model, optimizer, lambda: next(losses) + 0 * anchor.sum(), start_lr=1e-4, end_lr=1e-2, steps=3, smoothing=1.0
    )
    # Adjacent losses are one standard deviation apart, the outer two are two apart.
    one, two = math.exp(-0.5), math.exp(-2.0)
    assert result.losses == [4.0, 2.0, 1.0]
    assert result.smoothed == pytest.approx(
        [
            (4 + 2 * one + two) / (1 + one + two),
            (2 + 5 * one) / (1 + 2 * one),
            (1 + 2 * one + 4 * two) / (1 + one + two),
        ]
    )


@pytest.mark.parametrize(
    "losses, ran",
    [
        # running averages 2, (.8 * .4 + .2 * 1) / .36 = 1.4444, (.8 * .52 + .2 * 20) / .488 = 9.0492 > 4 * 1.4444
        ([2.0, 1.0, 20.0, 9.9], 3),
        ([2.0, 1.0, 11.0, 2.0], 4),  # 5.3607 < 5.7778: one bad mini-batch
        ([2.0, float("nan"), 1.0], 1),
        ([2.0, float("inf"), 1.0], 1),
    ],
)
def test_stops_when_the_loss_diverges(losses: list[float], ran: int) -> None:
    model, optimizer = build("SGD")
    values, anchor = iter(losses), next(model.parameters())
    result = lr_range_test(model, optimizer, lambda: next(values) + 0 * anchor.sum(), steps=len(losses))
    assert len(result.lrs) == len(result.losses) == len(result.smoothed) == ran


def test_batches_begin_again_unless_they_are_an_iterator() -> None:
    model, optimizer = build()
    arguments: dict[str, Any] = {"steps": 10, "end_lr": 1e-3}
    assert len(lr_range_test(model, optimizer, loss_of(model), data(3), **arguments).lrs) == 10
    assert len(lr_range_test(model, optimizer, loss_of(model), iter(data(3)), **arguments).lrs) == 3


def test_finds_the_edge_of_a_quadratic() -> None:
    """Gradient descent on 5 w**2 + 1: each step multiplies w by 1 - 10 lr. The sum of the lrs so far is lr / 0.056.
    Most of the loss is gone when this sum is about 1 / 10. From lr = 0.2 on the loss diverges."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = lr_range_test(
        model, optimizer, lambda: 5 * model.weight.square().sum() + 1, start_lr=1e-4, end_lr=10, steps=200
    )
    assert 2e-3 < result.suggestion < 8e-3
    assert 0.2 < result.lrs[-1] < 2.0 and result.losses[-1] > 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FusedAdamW", "FusedSGD", "FusedLAMB", "SGD"])
def test_suggests_rates_that_train(name: str) -> None:
    """Tests both suggestion rules with one result, because the range test restores everything."""
    result = None
    for rule in ("suggestion", "minimum_over_ten"):
        model, optimizer = build(name)
        result = result or lr_range_test(model, optimizer, loss_of(model), data(), steps=60)
        rate = getattr(result, rule)
        assert 1e-3 < rate < 0.3
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
        with torch.no_grad():
            before = sum(loss_of(model)(batch).item() for batch in data())
        train(model, optimizer, 40)
        with torch.no_grad():
            assert sum(loss_of(model)(batch).item() for batch in data()) < 0.6 * before


def test_closures_that_are_called_often() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    train_by_closure = iter(data())
    calls = 0

    def loss(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_of(model)(batch)

    before = everything(model, optimizer)
    result = lr_range_test(model, optimizer, loss, train_by_closure)
    assert len(result.lrs) == 8 and calls > 8
    assert_same(everything(model, optimizer), before)


# ---- restoring


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["FusedAdamW", "FusedSGD", "FusedSGDW", "FusedQHAdamW", "FusedLAMB", "FusedLion", "SGD", "Adam"]
)
@pytest.mark.parametrize("steps", [0, 3])
def test_leaves_no_trace(name: str, steps: int) -> None:
    """Values and objects are the same as before, and later steps equal those of a twin without a range test."""
    options = {"momentum": 0.9} if "SGD" in name else {}
    (model, optimizer), (twin, other) = build(name, **options), build(name, **options)
    torch.manual_seed(1)
    train(model, optimizer, steps)
    torch.manual_seed(1)
    train(twin, other, steps)
    model.layers[1].eval()
    twin.layers[1].eval()
    before, objects = everything(model, optimizer), identities(model, optimizer)

    def loss(batch: Any) -> Tensor:
        model.layers[1].train()
        random.random()
        return loss_of(model)(batch)

    result = lr_range_test(model, optimizer, loss, data(), steps=12, divergence=math.inf)
    assert len(result.lrs) == 12
    assert_same(everything(model, optimizer), before)
    assert identities(model, optimizer) == objects
    train(model, optimizer)
    after = everything(model, optimizer)
    torch.set_rng_state(before[5])
    train(twin, other)
    assert_same(everything(twin, other)[:5], after[:5])


@pytest.mark.parametrize("name", ["FusedAdamW", "Adam"])
def test_puts_back_when_something_raises(name: str) -> None:
    model, optimizer = build(name)
    train(model, optimizer)
    before = everything(model, optimizer)
    calls = 0

    def loss(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyError("a broken batch")
        return loss_of(model)(batch)

    with pytest.raises(KeyError, match="a broken batch"):
        lr_range_test(model, optimizer, loss, data())
    assert calls == 5
    assert_same(everything(model, optimizer), before)


def test_lr_tensors_keep_their_place() -> None:
    lr = torch.tensor(0.01)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, foreach=False, capturable=False)
    lr_range_test(model, optimizer, loss_of(model), data(), steps=5)
    assert optimizer.param_groups[0]["lr"] is lr and lr.item() == pytest.approx(0.01)


def test_gradients_of_params_that_are_not_the_optimizers() -> None:
    model, _ = build()
    optimizer = torch.optim.SGD(model.layers[-1].parameters(), lr=0.1)
    train(model, optimizer, 1)
    before = everything(model, optimizer)
    assert before[2][0] is not None
    lr_range_test(model, optimizer, loss_of(model), data(), steps=3)
    assert_same(everything(model, optimizer), before)


def test_a_scheduler_goes_on_after_it() -> None:
    model, optimizer = build()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    lr_range_test(model, optimizer, loss_of(model), data(), steps=5)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-3])


# ---- suggestions and plot


def result_by_hand() -> RangeTest:
    lrs = [10.0**k for k in range(-5, 1)]
    return RangeTest(lrs, [9.0] * 6, [5.0, 4.9, 4.0, 2.0, 1.0, 3.0])


def test_suggestions_by_hand() -> None:
    """The central slopes at 1e-4 to 1e-1 are -1, -2.9, -3 and +1, each over two decades."""
    result = result_by_hand()
    assert result.suggestion == pytest.approx(1e-2)
    assert result.minimum_over_ten == pytest.approx(1e-2)
    with pytest.raises(ValueError, match="at least 3 mini-batches, but the test ran 2"):
        _ = RangeTest([1e-3, 1e-2], [1.0, 1.0], [1.0, 1.0]).suggestion


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, which only the plot uses")
    from matplotlib.figure import Figure

    result = result_by_hand()
    axes = result.plot(tmp_path / "range.png")
    assert (tmp_path / "range.png").stat().st_size > 1000
    mine = Figure().subplots()
    assert result.plot(mine) is mine
    for drawn in (axes, mine):
        assert drawn.get_xscale() == "log"
        assert list(drawn.lines[1].get_ydata()) == result.smoothed
        assert [line.get_xdata()[0] for line in drawn.lines[2:]] == pytest.approx(
            [result.suggestion, result.minimum_over_ten]
        )


# ---- refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start_lr": 0.0}, "start_lr must be above 0 and below end_lr"),
        ({"start_lr": 1.0, "end_lr": 0.1}, "start_lr must be above 0 and below end_lr"),
        ({"steps": 1}, "steps must be at least 2, but is 1"),
        ({"smoothing": 0.0}, "smoothing must be larger than 0, but is 0.0"),
        ({"batches": []}, "no finite loss: batches is empty"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    model, optimizer = build()
    with pytest.raises(ValueError, match=message):
        lr_range_test(model, optimizer, loss_of(model), **{"batches": data(), **options})
