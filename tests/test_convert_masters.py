"""Converted checkpoints of FlashOptim and Transformer Engine, which keep master weights of bfloat16 params.

FlashOptim's package trains here on the CPU without quantization. Quantized states and Transformer Engine need a GPU:
their checkpoints are made by hand, with the keys, dtypes and shapes of the libraries."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cases import copies, make_params, parameters, random_grads, set_grads, train
from compare import assert_equal, states
from foreign import ADAM, BACKEND, BF16, F32, Stand, adam_update, package, through_file
from pages import examples
from torch import Tensor, nn

from fused_optim import FusedAdam, FusedAdamW, FusedLion, FusedSGD, convert

SHAPES = [(5, 3), (), (70, 61)]


# ---- Transformer Engine


class TransformerEngineAdam(Stand):
    """Counts steps per group. The master weights of bfloat16 params are float32, or with `remainders` their lower
    halves. Its kernel joins and splits them as integers."""

    options: ClassVar[dict[str, Any]] = ADAM
    remainders = True

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        group["step"] = group.get("step", 0) + 1
        for p in params:
            state = self.begin(p, "exp_avg", "exp_avg_sq", dtype=F32)
            high = p.detach().view(torch.int16).int()
            if "master_param" not in state:
                state["master_param"] = (
                    torch.zeros_like(p, dtype=torch.int16) if self.remainders else p.detach().float()
                )
            master = state["master_param"]
            if self.remainders:
                low = master.int()
                master = ((high - (low < 0).int()) << 16 | (low & 0xFFFF)).view(F32)
            wide = nn.Parameter(master.clone())
            wide.grad = p.grad.float()
            adam_update(wide, state, float(group["step"]), group, self.adam_w_mode)
            if self.remainders:
                bits = wide.detach().view(torch.int32)
                low = bits.short()
                state["master_param"] = low
                p.copy_(((bits >> 16) + (low < 0).int()).short().view(BF16))
            else:
                state["master_param"] = wide.detach()
                p.copy_(wide.to(BF16))

    def masters(self) -> list[Tensor]:
        found = []
        for p in parameters(self):
            low = self.state[p]["master_param"]
            if low.dtype == torch.int16:
                joined = (p.detach().view(torch.int16).long() << 16) + low.long()
                found.append(joined.int().view(F32))
            else:
                found.append(low)
        return found


def trained(remainders: bool, adam_w_mode: bool = True) -> TransformerEngineAdam:
    params = make_params(SHAPES, BF16)
    theirs = TransformerEngineAdam([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], adam_w_mode)
    theirs.remainders = remainders
    train([theirs], 4)
    return theirs


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("key", ["master_param", "param"])
def test_transformer_engine_with_remainders(key: str, adam_w_mode: bool) -> None:
    """Lower halves are the same numbers there and here. Megatron calls them "param"."""
    theirs = trained(True, adam_w_mode)
    saved = through_file(theirs.state_dict())
    for state in saved["state"].values():
        state[key] = state.pop("master_param")
    kept = copy.deepcopy(saved)
    ours = (FusedAdamW if adam_w_mode else FusedAdam)(
        copies(parameters(theirs)), lr=123.0, backend=BACKEND, master_weights="exact"
    )
    ours.add_param_group({"params": [ours.param_groups[0]["params"].pop()]})
    ours.load_state_dict(convert.transformer_engine(saved))
    torch.testing.assert_close(saved, kept, rtol=0, atol=0)
    assert_equal(ours.master_params(), theirs.masters())
    assert [group["lr"] for group in ours.param_groups] == [0.01, 0.02]
    assert all({"step", "bias_correction"}.isdisjoint(group) for group in ours.param_groups)
    train([theirs, ours], 4, seed=50)
    for mine, other in zip(ours.master_params(), theirs.masters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert [float(state["step"]) for state in states(ours)] == [8.0] * 3


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_transformer_engine_with_float32_masters(dtype: torch.dtype) -> None:
    """They go into the params: whole, or their upper halves. Values half-way between two bfloat16 numbers too."""
    theirs = trained(False)
    with torch.no_grad():
        first = theirs.param_groups[0]["params"][0]
        half_way = torch.tensor([1 + 2**-8, -1 - 3 * 2**-8, 2**-130, 3.0])
        theirs.state[first]["master_param"].view(-1)[:4] = half_way
        first.view(-1)[:4] = half_way.to(BF16)
    params = [nn.Parameter(p.detach().to(dtype)) for p in parameters(theirs)]
    ours = FusedAdamW(params, backend=BACKEND, master_weights="exact")
    saved = theirs.state_dict()
    saved["param_groups"] = [{**saved["param_groups"][0], "params": [0, 1, 2]}]
    ours.load_state_dict(convert.transformer_engine(saved, params))
    assert_equal(ours.master_params(), theirs.masters())
    with pytest.warns(UserWarning, match=r"the master weights of 3 params \('master_param'\) are left out"):
        convert.transformer_engine(saved)


def test_transformer_engine_errors() -> None:
    saved = trained(False).state_dict()
    with pytest.raises(ValueError, match="params must be those of the optimizer, 3 in the checkpoint, but are 1"):
        convert.transformer_engine(saved, [torch.zeros(3)])
    params = [torch.zeros(shape, dtype=BF16) for shape in SHAPES]
    with pytest.raises(ValueError, match=r"param 0 must have the shape of its master weights, \(5, 3\)"):
        convert.transformer_engine(saved, params[::-1])
    with pytest.raises(ValueError, match=r"and is torch.float16"):
        convert.transformer_engine(saved, [p.half() for p in params])
    for dtype in (torch.float16, torch.uint8):
        scaled = copy.deepcopy(saved)
        scaled["state"][0]["exp_avg"] = scaled["state"][0]["exp_avg"].to(dtype)
        with pytest.raises(ValueError, match=r"has lost its scale; save what state_dict\(\)"):
            convert.transformer_engine(scaled, params)
    saved["param_groups"][0]["bias_correction"] = False
    with pytest.raises(ValueError, match="bias_correction=False"):
        convert.transformer_engine(saved, params)


# ---- FlashOptim


def quantized(value: Tensor, signed: bool, root: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of groups of 32, in numpy, by the formulas of FlashOptim's paper and code."""
    flat = value.detach().double().numpy().ravel()
    flat = np.sqrt(flat) if root else flat
    padded = np.zeros(-(-flat.size // 32) * 32)
    padded[: flat.size] = flat
    groups = padded.reshape(-1, 32)
    largest = np.maximum(np.abs(groups).max(1), 1e-12)
    share = groups / largest[:, None]
    if signed:
        share = 2 * share / (1 + np.abs(share))
    codes = np.floor(share * (127 if signed else 255) + 0.5).ravel()[: flat.size]
    return (
        torch.from_numpy(codes).to(torch.int8 if signed else torch.uint8).view(value.shape),
        torch.from_numpy(largest).half(),
    )


def corrections(master: Tensor, param: Tensor, width: int) -> Tensor:
    """FlashOptim's error_bits, as state_dict() stores them: in the param's dtype."""
    error = (master.double() - param.detach().double()).numpy()
    exponent = np.maximum(param.detach().view(torch.int16).int().numpy() >> 7 & 255, 1) - 127
    largest = 127 if width == 3 else 32767
    units = np.clip(error / 2.0 ** (exponent - 8), -1, 1) * largest
    found = torch.from_numpy(np.asarray(np.copysign(np.floor(np.abs(units) + 0.5), units)))
    return found.to(BF16) if width == 3 else found.to(torch.int16).view(BF16)


def checkpoint(masters: list[Tensor], params: list[Tensor], width: int, names: dict[str, bool]) -> dict[str, Any]:
    """names: of the states, and whether they are signed."""
    state = {}
    for index, (master, param) in enumerate(zip(masters, params, strict=True)):
        generator = torch.Generator().manual_seed(index)
        entry: dict[str, Any] = {"step": torch.tensor(7)} if "exp_avg_sq" in names else {}
        for name, signed in names.items():
            value = torch.randn(param.shape, generator=generator)
            codes, scales = quantized(value if signed else value.square(), signed, not signed)
            entry |= {f"{name}::quantized": codes, f"{name}::scales": scales.view(BF16)}
        state[index] = {**entry, "error_bits": corrections(master, param, width)}
    options = {"lr": 0.01, "initial_lr": 0.5, "master_bytewidth": width, "quantize": True, "weight_decay": 0.1}
    options |= {"betas": (0.9, 0.95), "eps": 1e-6} if "exp_avg_sq" in names else {}
    options |= {"momentum": 0.9, "dampening": 0.0} if "momentum_buffer" in names else {}
    return {"state": state, "param_groups": [{**options, "params": [*range(len(params))]}]}


ADAMS = {"exp_avg": True, "exp_avg_sq": False}


@pytest.mark.parametrize("width", [3, 4])
def test_flashoptim_with_quantized_states(width: int) -> None:
    masters = [p.detach() for p in make_params(SHAPES)]
    masters[0].view(-1)[:3] = torch.tensor([1 + 2**-8, -1 - 3 * 2**-8, 0.0])  # half-way between bfloat16 numbers
    params = [nn.Parameter(master.to(BF16)) for master in masters]
    saved = checkpoint(masters, params, width, ADAMS)
    kept = copy.deepcopy(saved)
    ours = FusedAdamW(params, backend=BACKEND, master_weights="exact")
    ours.load_state_dict(convert.flashoptim(saved, params))
    torch.testing.assert_close(saved, kept, rtol=0, atol=0, equal_nan=True)
    # A correction is a whole number of 1 / 127 (1 / 32767) of half a unit in the last place.
    for mine, master in zip(ours.master_params(), masters, strict=True):
        torch.testing.assert_close(mine, master, rtol=2**-8 / (127 if width == 3 else 32767), atol=1e-40)
    assert float(ours.master_params()[0].view(-1)[0]) == 1 + 2**-8
    for index, state in enumerate(states(ours)):
        generator = torch.Generator().manual_seed(index)
        mean, square = (torch.randn(SHAPES[index], generator=generator) for _ in range(2))
        torch.testing.assert_close(state["exp_avg"], mean, rtol=0.02, atol=0.02)
        torch.testing.assert_close(state["exp_avg_sq"].sqrt(), square.abs(), rtol=0, atol=0.02)
        assert state["exp_avg"].dtype == F32 and float(state["step"]) == 7
    (group,) = ours.param_groups
    assert (group["lr"], group["betas"], group["initial_lr"]) == (0.01, (0.9, 0.95), 0.5)
    set_grads(params, random_grads(params, 0))
    ours.step()


@pytest.mark.parametrize(("kind", "name"), [(FusedSGD, "momentum_buffer"), (FusedLion, "exp_avg")])
def test_flashoptim_sgd_and_lion(kind: Any, name: str) -> None:
    params = make_params(SHAPES, BF16)
    saved = checkpoint([p.detach().float() for p in params], params, 3, {name: True})
    with pytest.warns(UserWarning, match=r"the master weights of 3 params \('error_bits'\) are left out"):
        converted = convert.flashoptim(saved)
    ours = kind(params, backend=BACKEND, **({"momentum": 0.9} if kind is FusedSGD else {}))
    ours.load_state_dict(converted)
    assert [[*state] for state in states(ours)] == [[name]] * 3
    set_grads(params, random_grads(params, 0))
    ours.step()


@pytest.mark.filterwarnings("ignore:.*master_weight_bits")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_flashoptim_continues(dtype: torch.dtype) -> None:
    """The package itself, as it runs on a CPU."""
    flash = package("flashoptim")
    params = make_params(SHAPES, dtype)
    theirs = flash.FlashAdamW(params, lr=0.01, quantize=False, master_weight_bits=None, fused=False)
    train([theirs], 3)
    ours = FusedAdamW(copies(params), backend=BACKEND)
    saved = through_file(theirs.state_dict())
    ours.load_state_dict(convert.flashoptim(saved))
    for mine, other in zip(states(ours), saved["state"].values(), strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in ADAMS)
    if dtype == F32:
        train([theirs, ours], 3, seed=50)
        for p, q in zip(parameters(ours), parameters(theirs), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_flashoptim_errors() -> None:
    params = make_params(SHAPES, BF16)
    saved = checkpoint([p.detach().float() for p in params], params, 3, ADAMS)
    saved["state"][0]["exp_avg::scales"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"a scale for each 32 elements, but is torch.int8 with 15 elements and 3"):
        convert.flashoptim(saved, params)
    with pytest.raises(ValueError, match="is of no optimizer of FlashOptim known here: it has no 'master_bytewidth'"):
        convert.flashoptim(FusedAdamW(params).state_dict(), params)


def test_the_example_of_the_page() -> None:
    (block,) = [block for block in examples("docs/migration.md") if block.section == "FlashOptim"]
    model = nn.Linear(4, 3).to(BF16)
    params = list(model.parameters())
    saved = checkpoint([p.detach().float() for p in params], params, 3, ADAMS)
    names: dict[str, Any] = {"model": model, "checkpoint": {"optimizer": saved}}
    block.run(names)
    optimizer = names["optimizer"]
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    assert {float(state["step"]) for state in states(optimizer)} == {8.0}
    assert {state["exp_avg"].dtype for state in states(optimizer)} == {torch.uint8}
