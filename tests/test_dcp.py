"""Checkpoints of distributed params through torch.distributed.checkpoint. Every load keeps memory and dtypes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import parameters
from compare import assert_equal
from distributed import World, in_every_world, run, worlds
from spread import (
    CLASSES,
    Spread,
    assert_close,
    assert_same,
    backward,
    build,
    in_turn,
    make_net,
    parallel_and_sharded,
    replicated,
    sharded,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from fused_optim import FusedAdamW, FusedSGD

pytestmark = pytest.mark.distributed

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
NESTED = StateDictOptions()
in_both_forms = pytest.mark.parametrize("form", [NESTED, FLAT], ids=["nested", "flat"])


def several(*sizes: int) -> list[World]:
    """Worlds of these sizes, limited to the number of GPUs."""
    device, most = worlds()[-1].device, worlds()[-1].size
    return [World(min(size, most), device) for size in sizes]


def gathered(net: nn.Module, optimizer: Any, form: StateDictOptions) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, optimizer, options=form),
    }


def resume(net: nn.Module, optimizer: Any, form: StateDictOptions, source: Path) -> None:
    state = gathered(net, optimizer, form)
    dcp.load(state, checkpoint_id=source)
    set_model_state_dict(net, state["model"])
    set_optimizer_state_dict(net, optimizer, state["optimizer"], options=form)


def go_on(net: nn.Module, optimizer: Any, part: tuple[int, int], first: int, steps: int = 2) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(net, step, *part)
        optimizer.step()


def uninterrupted(world: World, name: str, steps: int) -> Any:
    net = make_net(world.device)
    optimizer = build(name, net.parameters())
    go_on(net, optimizer, (0, 1), 0, steps)
    return optimizer


# ---- resharding


@in_every_world
def leg(
    world: World,
    spread: Spread,
    names: Sequence[str],
    form: StateDictOptions,
    first: int,
    source: Path | None,
    target: Path,
) -> None:
    """Two steps of trainings that move from world to world."""
    for name in in_turn(*names):
        net, part = spread(world)
        elsewhere = {} if source is None else {"lr": 0.77}  # loading must restore the saved lr
        optimizer = build(name, net.parameters(), **elsewhere)
        if source is not None:
            before = [whole(p.detach()).clone() for p in net.parameters()]
            get_optimizer_state_dict(net, optimizer)  # torch creates the states by a step with lr 0 and zero gradients
            for p, old in zip(net.parameters(), before, strict=True):
                assert_equal(whole(p.detach()), old)
            resume(net, optimizer, form, source / name)
        go_on(net, optimizer, part, first)
        dcp.save(gathered(net, optimizer, form), checkpoint_id=target / name)
        assert_same(optimizer, uninterrupted(world, name, first + 2))


def travel(
    ways: Sequence[Spread], sizes: Sequence[int], names: Sequence[str], form: StateDictOptions, folder: Path
) -> None:
    source = None
    for number, (spread, world) in enumerate(zip(ways, several(*sizes), strict=True)):
        target = folder / str(number)
        arguments = {"world": world, "spread": spread, "names": names, "form": form, "first": 2 * number}
        run(leg.__wrapped__, {**arguments, "source": source, "target": target}, folder)
        source = target


@in_both_forms
def test_from_two_processes_to_four_to_one(form: StateDictOptions, tmp_path: Path) -> None:
    """Each world has another number of shards. Training continues as in one uninterrupted process."""
    travel([sharded] * 3, (2, 4, 1), list(CLASSES), form, tmp_path)


@in_both_forms
def test_from_one_engine_to_another(form: StateDictOptions, tmp_path: Path) -> None:
    """DDP, then FSDP2, then tensor parallelism with FSDP2, then DDP again: names and full tensors are the same."""
    travel([replicated, sharded, parallel_and_sharded, replicated], (2, 4, 4, 2), ["adamw-amsgrad"], form, tmp_path)


@in_every_world
@in_both_forms
def test_averages_of_the_weights(world: World, form: StateDictOptions, tmp_path: Path) -> None:
    """Averages are restored bit for bit, with the states, from equal, unequal and empty shards."""
    for name in in_turn("lamb", "lion"):
        (net, part), (other, _) = sharded(world, torch.float32), sharded(world, torch.float32)
        one, two = build(name, net.parameters()), build(name, other.parameters())
        go_on(net, one, part, 0)
        dcp.save(gathered(net, one, form), checkpoint_id=tmp_path / name)
        resume(other, two, form, tmp_path / name)
        for p, q in zip(parameters(one), parameters(two), strict=True):
            assert torch.equal(one.ema[p].to_local(), two.ema[q].to_local())
            assert not torch.equal(whole(two.ema[q]), whole(q))
        go_on(net, one, part, 2)
        go_on(other, two, part, 2)
        assert_same(two, one, 0.0, 0.0)


def test_steps_of_a_decay_that_is_a_function(tmp_path: Path) -> None:
    """A checkpoint of torch.distributed.checkpoint does not store the number of steps. It is read from the states."""
    nets = [make_net() for _ in range(3)]
    one, two = (FusedAdamW(net.parameters(), lr=0.1, ema_decay=lambda steps: 0.1 * steps) for net in nets[:2])
    go_on(nets[0], one, (0, 1), 0)
    dcp.save(gathered(nets[0], one, FLAT), checkpoint_id=tmp_path)
    resume(nets[1], two, FLAT, tmp_path)
    go_on(nets[0], one, (0, 1), 2)
    go_on(nets[1], two, (0, 1), 2)
    assert_same(two, one, 0.0, 0.0)

    three = FusedSGD(nets[2].parameters(), ema_decay=lambda steps: 0.1 * steps)
    go_on(nets[2], three, (0, 1), 0)
    with pytest.warns(UserWarning, match='not their "ema_steps"'):
        set_optimizer_state_dict(nets[2], three, get_optimizer_state_dict(nets[2], three))


def test_averages_that_begin_after_a_load(tmp_path: Path) -> None:
    """The checkpoint has no averages. ema_decay is set after loading."""
    net, other = make_net(), make_net()
    one, two = FusedAdamW(net.parameters(), lr=0.1), FusedAdamW(other.parameters(), lr=0.1)
    go_on(net, one, (0, 1), 0)
    dcp.save(gathered(net, one, NESTED), checkpoint_id=tmp_path)
    resume(other, two, NESTED, tmp_path)
    two.ema_decay = 0.9
    loaded = [p.detach().clone() for p in other.parameters()]
    go_on(other, two, (0, 1), 2, steps=1)
    for p, old in zip(other.parameters(), loaded, strict=True):
        assert_close(two.ema[p], old.lerp(p.detach(), 0.1))


# ---- torch's checkpoints


def torchs(name: str, params: Any) -> Any:
    """torch's optimizer with the same rule and options."""
    ours, options = CLASSES[name]
    return {"FusedAdamW": torch.optim.AdamW, "FusedSGD": torch.optim.SGD}[ours.__name__](params, **options)


@in_every_world
@in_both_forms
def test_with_torch_in_both_directions(world: World, form: StateDictOptions, tmp_path: Path) -> None:
    """The keys are the same, and each optimizer continues from the other's checkpoint."""
    for name, ours_first in in_turn(("adamw-amsgrad", True), ("adamw-amsgrad", False), ("sgd", False)):
        makers: list[Callable[[str, Any], Any]] = [build, torchs] if ours_first else [torchs, build]
        (net, part), (other, _) = sharded(world), sharded(world)
        one, two = makers[0](name, net.parameters()), makers[1](name, other.parameters())
        go_on(net, one, part, 0)
        folder = tmp_path / f"{name}-{ours_first}"
        dcp.save(gathered(net, one, form), checkpoint_id=folder)
        resume(other, two, form, folder)
        go_on(other, two, part, 2)
        alone = uninterrupted(world, name, 4)
        for p, q in zip(parameters(two), parameters(alone), strict=True):
            assert_close(p, q)
        mine, theirs = gathered(net, one, form)["optimizer"], gathered(other, two, form)["optimizer"]
        if form.flatten_optimizer_state_dict:
            assert mine.keys() == theirs.keys()
        else:
            assert mine["state"].keys() == theirs["state"].keys()
            assert all(mine["state"][key].keys() == theirs["state"][key].keys() for key in mine["state"])
            (group,), (of_theirs,) = mine["param_groups"], theirs["param_groups"]
            assert group.keys() == of_theirs.keys()


@in_every_world
@pytest.mark.parametrize("cpu_offload", [False, True])
def test_full_state_dict(world: World, cpu_offload: bool) -> None:
    """The state_dict is gathered on the first rank and broadcast from there."""
    net, part = sharded(world)
    optimizer = build("adamw-amsgrad", net.parameters())
    go_on(net, optimizer, part, 0)
    options = StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
    model = get_model_state_dict(net, options=options)
    states = get_optimizer_state_dict(net, optimizer, options=options)
    if world.rank == 0 or not cpu_offload:
        alone = uninterrupted(world, "adamw-amsgrad", 2)
        named = dict(zip(model, parameters(alone), strict=True))
        for name, p in named.items():
            assert states["state"][name].keys() == alone.state[p].keys()
            for key, value in alone.state[p].items():
                assert_close(states["state"][name][key].to(value.device), value)
    again, _ = sharded(world)
    loaded = build("adamw-amsgrad", again.parameters(), lr=0.77)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, model if world.rank == 0 else {}, options=options)
    set_optimizer_state_dict(again, loaded, states if world.rank == 0 else {}, options=options)
    go_on(again, loaded, part, 2)
    assert_same(loaded, uninterrupted(world, "adamw-amsgrad", 4))


# ---- saving during training, and processes that die while saving


@in_every_world
def test_async_save(world: World, tmp_path: Path) -> None:
    """The checkpoint has the values at the time of the call, although training continues."""
    net, part = sharded(world)
    optimizer = build("adamw-amsgrad", net.parameters())
    go_on(net, optimizer, part, 0)
    own = dist.new_group(backend="gloo")  # keeps the saving thread's collectives apart from the training's
    saving = dcp.async_save(gathered(net, optimizer, FLAT), checkpoint_id=tmp_path / "checkpoint", process_group=own)
    go_on(net, optimizer, part, 2, steps=3)
    saving.result()
    again, _ = sharded(world)
    loaded = build("adamw-amsgrad", again.parameters())
    resume(again, loaded, FLAT, tmp_path / "checkpoint")
    assert_same(loaded, uninterrupted(world, "adamw-amsgrad", 2))
    go_on(again, loaded, part, 2, steps=3)
    assert_same(loaded, optimizer)


class Dies(dcp.FileSystemWriter):
    """Kills its process, as `kill -9` does, before the data are written, or when only the metadata are missing."""

    def __init__(self, path: Path, where: str) -> None:
        super().__init__(path)
        self.where = where

    def write_data(self, *args: Any) -> Any:
        if self.where == "data" and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_data(*args)

    def finish(self, **arguments: Any) -> None:
        if self.where == "metadata":
            os.kill(os.getpid(), signal.SIGKILL)
        super().finish(**arguments)


@in_every_world
def is_killed(world: World, where: str, folder: Path) -> None:
    net, part = sharded(world)
    optimizer = build("adamw-amsgrad", net.parameters())
    go_on(net, optimizer, part, 0)
    dcp.save(gathered(net, optimizer, FLAT), checkpoint_id=folder / "2")
    go_on(net, optimizer, part, 2)
    dcp.save(gathered(net, optimizer, FLAT), storage_writer=Dies(folder / "4", where))


@in_every_world
def comes_back(world: World, folder: Path) -> None:
    net, part = sharded(world)
    optimizer = build("adamw-amsgrad", net.parameters())
    with pytest.raises(dcp.api.CheckpointException, match="metadata"):
        resume(net, optimizer, FLAT, folder / "4")
    finished = [path for path in folder.iterdir() if (path / ".metadata").exists()]
    assert finished == [folder / "2"]
    resume(net, optimizer, FLAT, *finished)
    go_on(net, optimizer, part, 2)
    assert_same(optimizer, uninterrupted(world, "adamw-amsgrad", 4))


@pytest.mark.parametrize("world", worlds(), ids=str)
@pytest.mark.parametrize("where", ["data", "metadata"])
def test_killed_in_the_middle_of_a_save(world: World, where: str, tmp_path: Path) -> None:
    """The earlier checkpoint is complete. The interrupted one is not accepted as a checkpoint."""
    folder = tmp_path / "checkpoints"
    with pytest.raises(pytest.fail.Exception, match=f"exit code -{signal.SIGKILL.value}"):
        run(is_killed.__wrapped__, {"world": world, "where": where, "folder": folder}, tmp_path)
    run(comes_back.__wrapped__, {"world": world, "folder": folder}, tmp_path)


# ---- dtypes and packed formats


@in_every_world
def test_dtypes_of_spread_states(world: World, tmp_path: Path) -> None:
    """Dtypes survive a checkpoint. They survive load_state_dict into an optimizer with another state_dtype too, which
    uses the shards without a copy."""
    for dtype, state_dtype in in_turn((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        folder = tmp_path / f"{dtype}-{state_dtype}"
        net, part = sharded(world, dtype)
        one = build("adamw-amsgrad", net.parameters(), state_dtype=state_dtype)
        go_on(net, one, part, 0)
        again, _ = sharded(world, dtype)
        two = build("adamw-amsgrad", again.parameters(), state_dtype=state_dtype)
        dcp.save(gathered(net, one, FLAT), checkpoint_id=folder)
        resume(again, two, FLAT, folder)
        three = build("adamw-amsgrad", [nn.Parameter(p.detach().clone()) for p in net.parameters()])
        three.load_state_dict(one.state_dict())
        for p, q, r in zip(parameters(one), parameters(two), parameters(three), strict=True):
            r.grad = p.grad
            for key, value in one.state[p].items():
                assert two.state[q][key].dtype == (torch.float32 if key == "step" else state_dtype)
                assert_equal(whole(two.state[q][key]), whole(value))
        three.step()
        for p, r in zip(parameters(one), parameters(three), strict=True):
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                mine, saved = three.state[r][key], one.state[p][key]
                assert isinstance(mine, DTensor) and mine.dtype == state_dtype
                assert mine.to_local().data_ptr() == saved.to_local().data_ptr()


@in_every_world
def test_packed_states_resume_bit_for_bit(world: World, tmp_path: Path) -> None:
    """Saved and loaded as shards, in the dtypes that they are stored in."""
    options: dict[str, Any] = {"lr": 0.01, "master_weights": "exact", "state_dtype": "compact"}
    for number, form in enumerate(in_turn(NESTED, FLAT)):
        folder = tmp_path / str(number)
        first, second = (sharded(world, torch.bfloat16) for _ in range(2))
        ours, other = (FusedAdamW(net.parameters(), **options) for net, _ in (first, second))
        go_on(first[0], ours, first[1], 0)
        dcp.save(gathered(first[0], ours, form), checkpoint_id=folder)
        resume(second[0], other, form, folder)
        for net, part in (first, second):
            go_on(net, ours if net is first[0] else other, part, 2)
        for a, b in zip(ours.master_params(), other.master_params(), strict=True):
            assert_equal(a.to_local(), b.to_local())
        for p, q in zip(parameters(ours), parameters(other), strict=True):
            for name in ("exp_avg", "exp_avg_sq", "param_low"):
                assert ours.state[p][name].dtype == other.state[q][name].dtype
                assert_equal(ours.state[p][name].to_local(), other.state[q][name].to_local())
