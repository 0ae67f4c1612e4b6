"""torch.compile around a training step: the step is a graph break, the numbers equal eager mode, and a change of a
hyperparameter recompiles nothing."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import (
    ADAMW,
    LAMB,
    ONE_EACH,
    Case,
    Target,
    build,
    for_every_class,
    on_every_target,
    parameters,
    targets,
)
from commands import run
from compare import assert_equal, states
from torch import Tensor
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import fused_optim
from fused_optim.decay import decoupled
from fused_optim.schedules import OneCycle

pytestmark = [pytest.mark.once, pytest.mark.slow]  # once: Dynamo does not trace into backends
STEPS, WARM = 5, 2
USABLE = [row for row in targets() if not row.marks]
ON_GPU = [row for row in USABLE if row.values[0].device == "cuda"]
on_one_target = pytest.mark.parametrize("target", (ON_GPU or USABLE or targets())[:1])
Call = Callable[[Any], Any]


class Graphs(list[Any]):
    """A Dynamo backend that records its graphs and runs them unchanged."""

    def __call__(self, graph: Any, _: Any) -> Callable[..., Any]:
        self.append(graph)
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model(device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(device)


def batches(device: str, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(4, 5), (4, 3)]
    return [tuple(torch.randn(s, generator=generator).to(device) for s in sizes) for _ in range(steps)]


def loss_of(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def step_of(optimizer: Any) -> Any:
    return optimizer.step()


def training_step(
    model: torch.nn.Module, optimizer: Any, call: Call = step_of, loss_of: Callable[..., Tensor] = loss_of
) -> Callable[..., Tensor]:
    def training_step(batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        call(optimizer)
        return loss

    return training_step


def train(function: Callable[..., Any], device: str, each: Callable[[int], None] | None = None) -> list[Any]:
    """Returns the losses. After the first WARM steps a recompilation raises an error."""
    losses = []
    for step, batch in enumerate(batches(device)):
        with torch.compiler.set_stance("fail_on_recompile" if step >= WARM else "default"):
            losses.append(function(batch))
        if each is not None:
            each(step)
    return losses


def pair(case: Case, target: Target, **kwargs: Any) -> tuple[list[torch.nn.Module], list[Any]]:
    models = [make_model(target.device) for _ in range(2)]
    return models, [build(case, target, model.parameters(), **kwargs) for model in models]


def assert_same(optimizers: list[Any]) -> None:
    assert_equal(parameters(optimizers[0]), parameters(optimizers[1]))
    assert_equal(states(optimizers[0]), states(optimizers[1]))
    assert any(p.grad is not None and p.grad.any() for p in parameters(optimizers[0]))


def change(optimizer: Any, step: int) -> None:
    """Changes hyperparameters in Python, as schedulers and training loops do."""
    for group in optimizer.param_groups:
        group["lr"] = 0.02 / (step + 1)
        group["weight_decay"] = 0.01 * step
        if "betas" in group:
            group["betas"] = (0.9 - 0.03 * step, 0.99 - 0.01 * step, *group["betas"][2:])
        if group.get("momentum"):
            group["momentum"] = 0.9 - 0.1 * step


@on_every_target
@for_every_class
def test_compiled_step_like_eager(case: Case, target: Target) -> None:
    """Bitwise equal while lr, betas, momentum and weight_decay change. There is one graph in total, that of the
    model."""
    models, optimizers = pair(case, target)
    graphs = Graphs()
    eager, function = (training_step(*each) for each in zip(models, optimizers, strict=True))
    losses = train(eager, target.device, lambda step: change(optimizers[0], step))
    compiled = torch.compile(function, backend=graphs)
    assert_equal(train(compiled, target.device, lambda step: change(optimizers[1], step)), losses)
    assert len(graphs) == 1
    assert_same(optimizers)


@on_one_target
def test_through_autograds_compiler(target: Target) -> None:
    models, optimizers = pair(LAMB, target)
    eager, function = (training_step(*each) for each in zip(models, optimizers, strict=True))
    train(eager, target.device)
    train(torch.compile(function, backend="aot_eager"), target.device)
    assert_same(optimizers)


@on_one_target
def test_nothing_below_step_is_compiled(target: Target) -> None:
    """Dynamo inspects every frame that runs while it is active. Of our frames it may compile only `step`, without any
    operation."""
    model = make_model(target.device)
    optimizer = build(LAMB, target, model.parameters(), skip_nonfinite=True)
    clear_compilation_metrics()
    compiled = torch.compile(training_step(model, optimizer), backend=Graphs())
    train(compiled, target.device, lambda step: change(optimizer, step))
    folder = str(fused_optim.__path__[0])
    ours = [entry for entry in get_compilation_metrics() if str(entry.co_filename).startswith(folder)]
    assert ours and all("step" in entry.co_name and not entry.graph_op_count for entry in ours), ours
    assert len(ours) <= 2, ours  # before and after the graph break


@on_one_target
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
        lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1),
        lambda optimizer: OneCycle(optimizer, max_lr=0.1, total_steps=STEPS + 1),
    ],
    ids=["LambdaLR", "torch's OneCycleLR", "OneCycle"],
)
def test_schedulers(schedule: Callable[[Any], Any], inside: bool, target: Target) -> None:
    """Schedulers change lr and betas inside or outside the compiled function."""
    models, optimizers = pair(ADAMW, target)
    for model, optimizer, is_compiled in zip(models, optimizers, (False, True), strict=True):
        scheduler = schedule(optimizer)

        def step_both(optimizer: Any, scheduler: Any = scheduler) -> None:
            optimizer.step()
            scheduler.step()

        function = training_step(model, optimizer, step_both if inside else step_of)
        if is_compiled:
            function = torch.compile(function, backend=Graphs())
        train(function, target.device, None if inside else lambda _, scheduler=scheduler: scheduler.step())
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
    assert_same(optimizers)


@on_one_target
@pytest.mark.parametrize(
    ("kwargs", "call"),
    [
        ({"max_grad_norm": 0.1}, step_of),
        ({"max_grad_norm": 0.1, "norm_type": math.inf, "skip_nonfinite": True}, step_of),
        ({}, lambda optimizer: optimizer.step(grad_scale=4)),
        ({"max_grad_norm": 0.1}, lambda optimizer: optimizer.step(None, torch.tensor(4.0))),
    ],
    ids=["clipping", "largest gradient, skipping", "number", "tensor"],
)
def test_scaled_steps(kwargs: dict[str, Any], call: Call, target: Target) -> None:
    models, optimizers = pair(ADAMW, target, **kwargs)
    eager, function = (training_step(*each, call) for each in zip(models, optimizers, strict=True))
    train(eager, target.device)
    train(torch.compile(function, backend=Graphs()), target.device)
    assert_same(optimizers)
    assert_equal(optimizers[1].last_grad_norm, optimizers[0].last_grad_norm)


@on_one_target
@pytest.mark.parametrize("unscale", [False, True], ids=["step-unscales", "unscale_-called"])
def test_grad_scaler(unscale: bool, target: Target) -> None:
    """GradScaler sets two attributes of the optimizer before its step and removes them afterwards. One step
    overflows."""
    models, optimizers = pair(ADAMW, target)
    for model, optimizer, is_compiled in zip(models, optimizers, (False, True), strict=True):
        scaler = torch.amp.GradScaler(target.device, init_scale=1024.0, growth_interval=2)

        def function(
            batch: Any, model: Any = model, optimizer: Any = optimizer, scaler: torch.amp.GradScaler = scaler
        ) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            return loss

        if is_compiled:
            function = torch.compile(function, backend=Graphs())
        for number, (x, y) in enumerate(batches(target.device)):
            function((x, y * (math.inf if number == 3 else 1.0)))
        assert all(state["step"] == STEPS - 1 for state in optimizer.state.values())
    assert_same(optimizers)


@on_one_target
def test_closures_are_compiled(target: Target) -> None:
    models, optimizers = pair(ADAMW, target)
    graphs = Graphs()
    losses = []
    for model, optimizer, is_compiled in zip(models, optimizers, (False, True), strict=True):

        def function(batch: Any, model: Any = model, optimizer: Any = optimizer) -> Any:
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            return optimizer.step(closure)

        losses.append(train(torch.compile(function, backend=graphs) if is_compiled else function, target.device))
    assert_equal(losses[1], losses[0])
    assert len(graphs) == 1
    assert_same(optimizers)


@on_one_target
def test_hooks_run(target: Target) -> None:
    model = make_model(target.device)
    optimizer = build(ADAMW, target, model.parameters())
    seen = []
    before = torch.compiler.disable(lambda own, args, kwargs: seen.append(("before", own, len(args))))
    after = torch.compiler.disable(lambda own, args, kwargs: seen.append(("after", own, len(args))))
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    train(torch.compile(training_step(model, optimizer), backend=Graphs()), target.device)
    assert seen == [("before", optimizer, 1), ("after", optimizer, 1)] * STEPS


@on_one_target
def test_decay_around_the_step(target: Target) -> None:
    """Dynamo may compile the hook that decays."""
    models, optimizers = pair(ADAMW, target, weight_decay=0.0)
    for optimizer in optimizers:
        decoupled(optimizer, 0.1)
    eager, function = (training_step(*each) for each in zip(models, optimizers, strict=True))
    train(eager, target.device)
    train(torch.compile(function, backend=Graphs()), target.device)
    assert_same(optimizers)


@on_one_target
def test_the_step_alone(target: Target) -> None:
    models, optimizers = pair(ADAMW, target)
    compiled = torch.compile(optimizers[1].step, backend=Graphs())
    train(training_step(models[0], optimizers[0]), target.device, lambda step: change(optimizers[0], step))
    function = training_step(models[1], optimizers[1], lambda _: compiled())
    train(function, target.device, lambda step: change(optimizers[1], step))
    assert_same(optimizers)


@on_one_target
def test_many_optimizers_through_one_function(target: Target) -> None:
    """There are more optimizers, of every class, than Dynamo's recompile limit: all must reuse the code compiled for
    the first."""
    models = [make_model(target.device) for _ in range(2 * len(ONE_EACH))]
    optimizers = [build(ONE_EACH[i // 2], target, model.parameters()) for i, model in enumerate(models)]
    assert len(models) > torch._dynamo.config.recompile_limit

    def function(model: torch.nn.Module, optimizer: Any, batch: Any) -> Tensor:
        return training_step(model, optimizer)(batch)

    compiled = torch.compile(function, backend=Graphs())
    for batch in batches(target.device):
        for number, each in enumerate(zip(models, optimizers, strict=True)):
            (compiled if number % 2 else function)(*each, batch)
    for first in range(0, len(models), 2):
        assert_same(optimizers[first : first + 2])


@on_one_target
@pytest.mark.parametrize("variant", ONE_EACH, ids=str)
def test_made_where_it_steps(variant: Case, target: Target) -> None:
    """A compiled function may create its optimizer, as it may create torch's."""
    models = [make_model(target.device) for _ in range(2)]
    batch = batches(target.device)[0]

    def made_and_stepped(model: torch.nn.Module) -> Any:
        optimizer = build(variant, target, model.parameters())
        loss_of(model, batch).backward()
        optimizer.step()
        return optimizer

    assert_same([torch.compile(made_and_stepped, backend=Graphs())(models[0]), made_and_stepped(models[1])])


@on_one_target
def test_no_break_allowed(target: Target) -> None:
    """Dynamo raises its own error, which contains our reason. Nothing has changed."""
    model = make_model(target.device)
    optimizer = build(ADAMW, target, model.parameters())
    loss_of(model, batches(target.device)[0]).backward()
    before = copy.deepcopy(parameters(optimizer))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="step is a kernel of its own"):
        torch.compile(optimizer.step, fullgraph=True, backend=Graphs())()
    assert_equal(parameters(optimizer), before)
    assert not optimizer.state


@on_one_target
def test_compiled_models(target: Target) -> None:
    """torch's default compiler. The usual setup compiles the model and its loss. Compiling the step as well gives
    bitwise equal results; eager mode is equal within rounding."""
    models, optimizers = pair(ADAMW, target)
    models.append(make_model(target.device))
    optimizers.append(build(ADAMW, target, models[2].parameters()))
    functions = [
        training_step(models[0], optimizers[0], loss_of=torch.compile(loss_of)),
        torch.compile(training_step(models[1], optimizers[1])),
        training_step(models[2], optimizers[2]),
    ]
    losses = [train(function, target.device) for function in functions]
    assert_equal(losses[1], losses[0])
    assert_same(optimizers[:2])
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-4, atol=1e-5)


def test_dynamo_is_left_alone_by_the_import() -> None:
    code = "import sys, fused_optim; print('torch._dynamo' in sys.modules)"
    assert run([sys.executable, "-c", code]).split()[-1] == "False"
