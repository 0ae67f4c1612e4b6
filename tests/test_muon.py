"""Muon: the oracle, torch.optim.Muon, layouts, NorMuon, errors. Mixed groups are in test_muon_groups.py."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import oracle
import pytest
import torch
from cases import Target, copies, make_params, on_every_target, quick, random_grads, set_grads, targets
from compare import assert_equal, ulps
from muon import gradients, one_thread
from torch import Tensor
from torch.nn import Parameter

from fused_optim import FusedMuon

__all__ = ["one_thread"]  # a fixture
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
EPS = torch.finfo(BF16).eps  # Newton-Schulz runs in bfloat16
SHAPES = ((8, 24), (24, 8), (16, 16), (1, 5), (5, 1), (0, 3), (40, 136))
TORCH = getattr(torch.optim, "Muon", None)  # from torch 2.9 on
needs_torchs = pytest.mark.skipif(TORCH is None, reason="this torch has no torch.optim.Muon, which is compared with")


def build(target: Target, params: Any, **options: Any) -> FusedMuon:
    return FusedMuon(params, backend=target.backend, **{"lr": 0.02, **options})


def real(x: Tensor) -> Tensor:
    return x.detach().double().cpu().clone()


def checked_step(optimizer: FusedMuon, grads: list[Tensor | None], tolerance: float = 8 * EPS) -> None:
    """Steps once and compares with the oracle, which starts from the stored numbers. The momentum must be exact but for
    the rounding of its dtype. Newton-Schulz may be wrong by a part of the update's largest element that bfloat16 and
    its condition explain."""
    groups = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    params = [p for p, _ in groups]
    before = [real(p) for p in params]
    states = [{k: real(v) for k, v in optimizer.state.get(p, {}).items()} for p in params]
    set_grads(params, grads)
    optimizer.step()
    for (p, group), old, state, grad in zip(groups, before, states, grads, strict=True):
        if grad is None:
            assert_equal(real(p), old)
            continue
        want, new = oracle.muon(old, real(grad), state, **group)
        buffer = optimizer.state[p]["momentum_buffer"]
        size = torch.maximum(state.get("momentum_buffer", torch.zeros_like(old)).abs(), real(grad).abs())
        assert ulps(real(buffer), new["momentum_buffer"], size, buffer.dtype) <= (2.5 if p.dtype == F64 else 1.5)
        if not p.numel():
            continue
        if "second_momentum_buffer" in new:
            moments = real(optimizer.state[p]["second_momentum_buffer"])
            torch.testing.assert_close(moments, new["second_momentum_buffer"], rtol=4 * tolerance, atol=1e-9)
        change = (want - old).abs().max().item()
        store = torch.finfo(p.dtype).eps * old.abs().max().item()
        assert (real(p) - want).abs().max().item() <= tolerance * change + store


@pytest.mark.compiled
@on_every_target
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("options", [{}, {"nesterov": False, "momentum": 0.3}, {"adjust_lr_fn": "match_rms_adamw"}])
def test_against_the_oracle(target: Target, dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = make_params(SHAPES, dtype, target.device)
    optimizer = build(target, params, **options)
    for step in range(quick(target, 4, 2)):
        checked_step(optimizer, gradients(params, step))
    assert all(set(optimizer.state[p]) == {"momentum_buffer"} for p in params)


@on_every_target
def test_without_an_iteration(target: Target) -> None:
    """The update is then the momentum over its norm, rounded to bfloat16 three times at most."""
    params = make_params(SHAPES, F64, target.device)
    optimizer = build(target, params, ns_steps=0, maximize=True, weight_decay=0.5)
    for step in range(3):
        checked_step(optimizer, random_grads(params, step), tolerance=2 * EPS)


@on_every_target
@pytest.mark.parametrize("eps", [1e-7, 10.0])
def test_small_updates(target: Target, eps: float) -> None:
    """An update of zeros is not divided by 0, and a small one not by less than eps."""
    params = make_params([(4, 6), (6, 4)], F32, target.device)
    optimizer = build(target, params, eps=eps, weight_decay=0.0)
    before = copies(params)
    checked_step(optimizer, [torch.zeros_like(params[0]), gradients(params, 0)[1]], tolerance=8 * EPS)
    assert_equal(params[0].detach(), before[0].detach())


def layouts(device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return {
        "transposed wide": draw(24, 8).T,
        "transposed tall": draw(8, 24).T,
        "transposed square": draw(12, 12).T,
        "columns of a wider matrix": draw(8, 48)[:, 3:27],
        "every other row": draw(16, 24)[::2],
        "large and transposed": draw(150, 140).T,
    }


@on_every_target
def test_layouts(target: Target) -> None:
    params = [Parameter(tensor) for tensor in layouts(target.device).values()]
    optimizer = build(target, params)
    for step in range(2):
        checked_step(optimizer, gradients(params, step))


@on_every_target
def test_flattened_convolutions(target: Target) -> None:
    """As matrices of output channels and all else, in either memory format; as a matrix of the same numbers."""
    weight = make_params([(6, 4, 3, 3)], F32, target.device)[0]
    last = Parameter(weight.detach().clone().to(memory_format=torch.channels_last))
    matrix = Parameter(weight.detach().clone().flatten(1))
    optimizer = build(target, [weight, last], flatten=True)
    other = build(target, [matrix])
    for step in range(2):
        grad = gradients([weight], step)[0]
        checked_step(optimizer, [grad, grad.to(memory_format=torch.channels_last)])
        checked_step(other, [grad.flatten(1)])
    assert_equal(weight.detach().flatten(1), matrix.detach())


@needs_torchs
@on_every_target
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.8},
        {"adjust_lr_fn": "original", "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
    ],
    ids=str,
)
def test_against_torch(target: Target, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Over a hundred steps. bfloat16 params differ without Nesterov, because torch normalizes their momentum in place,
    and with decay, because torch loses a small decay when it rounds twice."""
    if dtype == BF16:
        options = {**options, "nesterov": True, "weight_decay": 0.0}
    params = make_params(((8, 24), (24, 8), (16, 16), (140, 40)), dtype, target.device)
    theirs = copies(params)
    ours, torchs = build(target, params, **options), TORCH(theirs, **{"lr": 0.02, **options})
    steps = quick(target, 100, 3)
    for step in range(steps):
        grads = gradients(params, step)
        for optimizer, members in ((ours, params), (torchs, theirs)):
            set_grads(members, grads)
            optimizer.step()
    for p, q in zip(params, theirs, strict=True):
        mine, their = ours.state[p]["momentum_buffer"], torchs.state[q]["momentum_buffer"]
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-6 if dtype == F32 else 0.05)
        assert (real(p) - real(q)).norm() <= (0.01 if dtype == F32 else 0.03) * real(q).norm()


@on_every_target
def test_bfloat16_momentum_is_not_normalized(target: Target) -> None:
    """torch.optim.Muon divides the momentum of bfloat16 params without Nesterov by its norm, in place."""
    param = make_params([(8, 24)], BF16, target.device)[0]
    optimizer = build(target, [param], nesterov=False, momentum=0.0)
    grad = gradients([param], 0)[0]
    set_grads([param], [grad])
    optimizer.step()
    assert_equal(optimizer.state[param]["momentum_buffer"], grad)


@on_every_target
def test_normuon(target: Target) -> None:
    params = make_params(SHAPES, F32, target.device)
    optimizer = build(target, params, normuon=True, normuon_beta2=0.8)
    for step in range(quick(target, 4, 2)):
        checked_step(optimizer, gradients(params, step), tolerance=8 * EPS)
    for p in params:
        moments = optimizer.state[p]["second_momentum_buffer"]
        assert (moments.shape, moments.dtype) == ((p.shape[0], 1), F32)


@on_every_target
def test_a_batch_is_its_matrices(target: Target) -> None:
    """Many matrices of one shape, in a batch, are moved as each alone, within the rounding of bfloat16. Missing
    gradients leave their matrices alone."""
    params = make_params([(8, 12)] * 5, F32, target.device)
    single = copies(params)
    together, alone = build(target, params), [build(target, [p]) for p in single]
    for step in range(4):
        grads: list[Tensor | None] = list(gradients(params, step))
        if step % 2:
            grads[step] = grads[0] = None
        checked_step(together, grads)
        for optimizer, grad in zip(alone, grads, strict=True):
            checked_step(optimizer, [grad])
    for p, q in zip(params, single, strict=True):
        assert_equal(
            together.state[p]["momentum_buffer"],
            alone[next(n for n, x in enumerate(single) if x is q)].state[q]["momentum_buffer"],
        )
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=0.02 * 4 * 4 * EPS)


@needs_torchs
@on_every_target
def test_checkpoints_of_torch(target: Target) -> None:
    params = make_params(((8, 24), (24, 8)), F32, target.device)
    theirs, again, back = copies(params), copies(params), copies(params)
    torchs: Any = TORCH(theirs, lr=0.02, momentum=0.9)
    for step in range(2):
        set_grads(theirs, gradients(theirs, step))
        torchs.step()
    ours = build(target, again, lr=1.0)
    for p, q in zip(again, theirs, strict=True):
        p.data.copy_(q.data)
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert ours.param_groups[0]["lr"] == 0.02 and ours.param_groups[0]["use_muon"]
    checked_step(ours, gradients(again, 2))
    last: Any = TORCH(back, lr=1.0)
    last.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert set(last.state[back[0]]) == {"momentum_buffer"}
    for p, q in zip(again, back, strict=True):
        assert_equal(last.state[q]["momentum_buffer"], ours.state[p]["momentum_buffer"])
    set_grads(back, gradients(back, 3))
    last.step()


@pytest.mark.parametrize("backend", [pytest.param(t.values[0], id=t.id, marks=t.marks) for t in targets()][:1])
def test_options_hold_from_the_next_step_on(backend: Target) -> None:
    params = make_params(((8, 24), (24, 8)), F32, backend.device)
    optimizer = build(backend, params)
    changes = [{}, {"ns_steps": 3}, {"adjust_lr_fn": "match_rms_adamw"}, {"nesterov": False}, {"momentum": 0.2}]
    for step, change in enumerate([*changes, {"ns_coefficients": (2.0, -1.5, 0.5)}, {"normuon": True}, {"lr": 0.5}]):
        optimizer.param_groups[0].update(change)
        checked_step(optimizer, gradients(params, step), tolerance=8 * EPS)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "Learning rate should be >= 0 but is: -1.0"),
    ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
    ({"momentum": -0.1}, ValueError, "momentum should be >= 0 but is: -0.1"),
    ({"weight_decay": -0.1}, ValueError, "weight decay should be >= 0 but is: -0.1"),
    ({"adjust_lr_fn": "other"}, ValueError, "Adjust learning rate function other is not supported"),
    ({"ns_steps": 100}, ValueError, "Number of steps must be less than 100"),
    ({"ns_steps": -1}, ValueError, "ns_steps must be 0 or more, but is -1"),
    ({"ns_coefficients": (1.0, 2.0)}, ValueError, "Coefficients must be a tuple of exactly 3 values"),
    ({"normuon_beta2": 1.0}, ValueError, r"normuon_beta2 must be in \[0, 1\), but is 1.0"),
    ({"adamw_lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"adamw_betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    ({"nesterow": True}, TypeError, 'unexpected keyword argument "nesterow"; did you mean "nesterov"'),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED, ids=str)
def test_refused_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        FusedMuon(make_params([(3, 4)]), **options)


def test_refused_params() -> None:
    for shape in ((3,), (), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"Muon only supports 2D parameters whereas .* use_muon=False"):
            FusedMuon(make_params([(3, 4), shape]))
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        FusedMuon(make_params([(3,)]), flatten=True)
    with pytest.raises(RuntimeError, match="Muon does not support complex parameters"):
        FusedMuon(make_params([(3, 4)], torch.complex64))
    between = Parameter(torch.randn(4, 3, 5).transpose(0, 1))  # dimension 0 lies between the others
    between.grad = torch.ones_like(between)
    optimizer = FusedMuon([between], flatten=True, backend="reference")
    with pytest.raises(ValueError, match=r"cannot be flattened to a matrix in its memory.*param.contiguous\(\)"):
        optimizer.step()


def test_arguments_are_torchs() -> None:
    """As positional arguments, in this order."""
    ours = FusedMuon(make_params([(3, 4)]), 0.5, 0.2, 0.8, False, (1.0, 2.0, 3.0), 1e-3, 7, "original")
    names = ["lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"]
    values = [ours.param_groups[0][name] for name in names]
    assert values == [0.5, 0.2, 0.8, False, (1.0, 2.0, 3.0), 1e-3, 7, "original"]


@needs_torchs
def test_defaults_are_torchs() -> None:
    ours, theirs = (kind(make_params([(3, 4)])).defaults for kind in (FusedMuon, TORCH))
    assert {key: ours[key] for key in theirs} == theirs


def test_scales() -> None:
    from fused_optim.engine.orthogonal import Settings

    for rows, columns, function in itertools.product((2, 8), (3, 5), (None, "original", "match_rms_adamw")):
        want = (
            0.2 * math.sqrt(max(rows, columns)) if function == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
        )
        assert Settings((1.0, 2.0, 3.0), 5, 1e-7, function, None).scale(rows, columns) == want
