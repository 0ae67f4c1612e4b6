"""The learning rate range test."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.dtensor import is_same_memory, local

MEMORY = 0.8  # weight of the old value in the running average, so that one bad mini-batch is not taken for divergence


@dataclass(frozen=True)
class RangeTest:
    """The result of a range test.

    Attributes:
        lrs: learning rate at each mini-batch, of the group with the largest one.
        losses: loss of each mini-batch.
        smoothed: losses averaged with Gaussian weights over the logarithm of the learning rate.
    """

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]

    @property
    def suggestion(self) -> float:
        """The learning rate at which the smoothed loss falls most steeply over the logarithm of the learning rate."""
        if len(self.lrs) < 3:
            raise ValueError(
                f"a suggestion needs at least 3 mini-batches, but the test ran {len(self.lrs)} before the loss "
                "diverged; start at a smaller lr"
            )
        slopes = [
            (self.smoothed[i + 1] - self.smoothed[i - 1]) / math.log(self.lrs[i + 1] / self.lrs[i - 1])
            for i in range(1, len(self.lrs) - 1)
        ]
        return self.lrs[1 + slopes.index(min(slopes))]

    @property
    def minimum_over_ten(self) -> float:
        """A tenth of the learning rate at which the smoothed loss is lowest, another common rule."""
        return self.lrs[self.smoothed.index(min(self.smoothed))] / 10

    def plot(self, target: str | PathLike[str] | Any) -> Any:
        """Draws the loss over the learning rate and marks both suggestions. Needs matplotlib.

        Args:
            target: path of an image to write, or matplotlib axes to draw into.

        Returns:
            The axes.
        """
        if isinstance(target, str | PathLike):
            from matplotlib.figure import Figure

            figure = Figure(figsize=(6, 4), layout="constrained")
            axes = self.plot(figure.subplots())
            figure.savefig(target)
            return axes
        axes = target
        axes.plot(self.lrs, self.losses, color="tab:gray", alpha=0.4, label="loss")
        axes.plot(self.lrs, self.smoothed, color="tab:blue", label="smoothed")
        for lr, style, label in (
            (self.suggestion, "--", "steepest descent"),
            (self.minimum_over_ten, ":", "minimum / 10"),
        ):
            axes.axvline(lr, color="tab:red", linestyle=style, label=f"{label}: {lr:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        # One diverged loss would flatten all others.
        low, high = min(self.smoothed), max(self.smoothed[0], min(self.smoothed))
        room = 0.5 * (high - low) or 1.0
        axes.set_ylim(low - 0.2 * room, high + room)
        axes.legend()
        return axes


def lr_range_test(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Callable[..., Tensor],
    batches: Iterable[Any] | None = None,
    *,
    start_lr: float = 1e-7,
    end_lr: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.25,
    divergence: float = 4.0,
) -> RangeTest:
    """Trains on mini-batches while the learning rate grows exponentially from start_lr to end_lr. Afterwards, and after
    an exception, it restores params, buffers, gradients, training modes, the optimizer and the random generators.
    During the test model and optimizer state are in memory twice.

    Groups keep the ratios of their learning rates. The largest one goes from start_lr to end_lr. The step gets a
    closure, so LBFGS works. The model stays in the mode (train or eval) that it is in.

    Args:
        model: the module. All params of the optimizer are restored too, even if they are not the model's.
        optimizer: configured as for training, because weight decay and momentum influence the result. Its schedulers
            are not stepped.
        loss: function of a mini-batch that returns the scalar loss. If batches is None it gets no argument. The test
            calls backward().
        batches: iterable of mini-batches, which is iterated again at its end. An iterator cannot restart, so its end
            ends the test.
        start_lr, end_lr: the range, above 0.
        steps: number of mini-batches, at least 2.
        smoothing: standard deviation of the Gaussian that smooths the losses, in decades of the learning rate. It is
            symmetric; the lag of a running average would make the suggestion too large.
        divergence: the test ends if the running average of the losses is above its minimum by this factor, or if a loss
            is not finite.

    Returns:
        RangeTest: learning rates, losses, `suggestion`, `plot`.

    Raises:
        ValueError: a number is out of range, there is no mini-batch, or the first loss is not finite.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, section 3.3. The
    exponential growth, the range, the number of steps and the end at four times the lowest loss are those of fast.ai's
    lr_find.
    """
    if not 0 < start_lr < end_lr:
        raise ValueError(f"start_lr must be above 0 and below end_lr, but they are {start_lr} and {end_lr}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, but is {steps}")
    if not smoothing > 0:
        raise ValueError(f"smoothing must be larger than 0, but is {smoothing}")

    rates = [float(group["lr"]) for group in optimizer.param_groups]
    largest = max(rates)
    ratios = [rate / largest if largest > 0 else 1.0 for rate in rates]
    lrs: list[float] = []
    losses: list[float] = []
    average, lowest = 0.0, math.inf
    with put_back(model, optimizer):
        for step, arguments in zip(range(steps), _mini_batches(batches), strict=False):
            lr = start_lr * (end_lr / start_lr) ** (step / (steps - 1))
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                _set_lr(group, lr * ratio)

            def closure(arguments: tuple[Any, ...] = arguments) -> Tensor:
                optimizer.zero_grad()
                value = loss(*arguments)
                value.backward()
                return value.detach()

            value = float(optimizer.step(closure))  # type: ignore[arg-type]
            if not math.isfinite(value):
                break
            lrs.append(lr)
            losses.append(value)
            average = MEMORY * average + (1 - MEMORY) * value
            running = average / (1 - MEMORY ** (step + 1))
            lowest = min(lowest, running)
            if running > divergence * lowest > 0:
                break
    if not lrs:
        raise ValueError(
            "the range test saw no finite loss: batches is empty, or the loss of the first one is not finite"
        )
    return RangeTest(lrs, losses, _smooth(lrs, losses, smoothing))


def _smooth(lrs: list[float], losses: list[float], decades: float) -> list[float]:
    smoothed = []
    for lr in lrs:
        weights = [math.exp(-0.5 * (math.log10(other / lr) / decades) ** 2) for other in lrs]
        smoothed.append(sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights))
    return smoothed


def _mini_batches(batches: Iterable[Any] | None) -> Iterator[tuple[Any, ...]]:
    """The arguments of the loss for each mini-batch. Iterates over batches again at their end, unless there are no
    more."""
    if batches is None:
        while True:
            yield ()
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield (batch,)
        if empty:
            return


def _set_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


@contextmanager
def put_back(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Context manager that restores on exit what training changes, in the same tensors and dicts: params, buffers,
    gradients and training modes of the model, state and groups of the optimizer, and the random generators of torch,
    Python and NumPy."""
    groups = optimizer.param_groups
    options = [{key: _copied(value) for key, value in group.items()} for group in groups]
    state = copy.deepcopy(optimizer.state_dict())
    params = list(dict.fromkeys([*model.parameters(), *(param for group in groups for param in group["params"])]))
    values = [(param, param.data, param.detach().clone(), param.grad) for param in params]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    restore_random = _random_states()
    try:
        for param in params:
            param.grad = None  # optimizer.zero_grad() skips other params, so backward() would add to their gradients
        yield
    finally:
        with torch.no_grad():
            for param, data, value, grad in values:
                if not is_same_memory(param, local(data)):  # the param was converted meanwhile
                    param.grad = None  # torch refuses new data for a param with a gradient of another dtype
                    param.data = data
                param.copy_(value)
                param.grad = grad
            for module, name, buffer, value in buffers:
                if buffer is not None and value is not None:
                    buffer.copy_(value)
                module._buffers[name] = buffer
            for module, training in modes:
                module.training = training
            optimizer.load_state_dict(state)
            # load_state_dict makes new groups. Schedulers and users can hold the old groups and their lr tensors.
            optimizer.param_groups = groups
            for group, saved in zip(groups, options, strict=True):
                for key in group.keys() - saved.keys():
                    del group[key]
                for key, (old, value) in saved.items():
                    group[key] = old.copy_(value) if isinstance(old, Tensor) else old
        restore_random()


def _copied(value: Any) -> tuple[Any, Any]:
    """An option, and a copy of it if it is a tensor, which can be changed in place."""
    return value, value.clone() if isinstance(value, Tensor) else None


def _random_states() -> Callable[[], None]:
    generators: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generators.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        generators.append((numpy.random.set_state, numpy.random.get_state()))

    def restore() -> None:
        for put, state in generators:
            put(state)

    return restore
