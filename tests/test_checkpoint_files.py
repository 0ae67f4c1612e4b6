"""Checkpoints in one process: safetensors, old checkpoints of torch, the memory that loading takes."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ADAMW, build_torch, copies, make_params, parameters, train
from compare import assert_equal, assert_like_torch
from torch import Tensor

from fused_optim import FusedAdamW, backends

pytestmark = pytest.mark.slow


def test_safetensors(tmp_path: Path) -> None:
    """One file contains all tensors; the options are in its metadata. The format refuses tensors that share memory, so
    no two states may. Dtypes are preserved."""
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    params = make_params([(5, 3), (), (0,), (40,)], torch.bfloat16)
    ours = FusedAdamW(params, lr=0.1, amsgrad=True, state_dtype=torch.float32)
    train([ours], 3)
    saved = ours.state_dict()
    tensors = {f"{index}.{key}": value for index, state in saved["state"].items() for key, value in state.items()}
    file = tmp_path / "states.safetensors"
    safetensors.save_file(tensors, file, metadata={"param_groups": json.dumps(saved["param_groups"])})

    with safetensors.safe_open(file, "pt") as opened:
        groups = json.loads(opened.metadata()["param_groups"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in safetensors.load_file(file).items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    again = FusedAdamW(copies(params))
    again.load_state_dict({"state": state, "param_groups": groups})
    assert_equal(again.state_dict()["state"], saved["state"])
    train([ours, again], 2, seed=7)
    for p, q in zip(parameters(ours), parameters(again), strict=True):
        assert_equal(p, q)
        assert_equal(ours.state[p], again.state[q])


@pytest.mark.parametrize("missing", ["absent", "int", "cpu-tensor"])
def test_old_checkpoints_of_torch(missing: str) -> None:
    """`step` was once an int, and a CPU tensor for a long time. A state without it counts from 0."""
    theirs = build_torch(ADAMW, make_params([(5, 3), (40,)]))
    train([theirs], 3)
    old = copy.deepcopy(theirs.state_dict())
    for state in old["state"].values():
        step = state.pop("step")
        if missing != "absent":
            state["step"] = int(step) if missing == "int" else step.cpu()
    for name in ("foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        for group in old["param_groups"]:
            group.pop(name, None)
    ours = FusedAdamW(copies(parameters(theirs)))
    ours.load_state_dict(old)
    if missing == "absent":
        for state in theirs.state.values():
            state["step"].zero_()
    train([ours, theirs], 2, seed=7)
    assert_like_torch(ours, theirs)


def peak(work: Callable[[], Any]) -> int:
    """The peak of the memory that `work` allocates, in bytes, net of what it frees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    return max(itertools.accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))


def test_peak_is_what_it_says() -> None:
    assert peak(lambda: [torch.zeros(1000) for _ in range(3)]) == pytest.approx(12000, abs=2000)
    assert peak(lambda: [torch.zeros(1000).sum() for _ in range(3)]) < 8000


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_takes_the_tensors(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """States are used without a copy: neither load_state_dict nor the next step allocates their memory again, and no
    dtype changes."""
    if (reason := backends.available()["cpp"]) is not None:
        pytest.skip(f"the reference backend allocates temporaries, and cpp: {reason}")
    count, size = 8, 100_000
    one = FusedAdamW(make_params([(size,)] * count, dtype), state_dtype=state_dtype)
    train([one], 1)
    saved = one.state_dict()
    two = FusedAdamW(copies(parameters(one)), state_dtype=torch.float32, backend="cpp")
    for p in parameters(two):
        p.grad = torch.ones_like(p)
    states = 2 * count * size * state_dtype.itemsize
    assert peak(lambda: two.load_state_dict(saved)) < states / count
    assert peak(two.step) < states / count
    for index, p in enumerate(parameters(two)):
        for key in ("exp_avg", "exp_avg_sq"):
            mine = two.state[p][key]
            assert mine is saved["state"][index][key]
            assert mine.dtype == state_dtype
