"""Param groups: which params each group has, that no param is lost or duplicated, and that groups need no extra
launches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import random_grads, set_grads
from torch import nn

import fused_optim
from fused_optim.groups import Group, depths, layerwise, named_group, no_decay, split


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1)
        self.norm = nn.LayerNorm(4)


class Net(nn.Module):
    """It has an embedding tied to the head, a param of its own, norms of several kinds, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 4))
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList([Block(), nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(), nn.BatchNorm1d(4))])
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.rnn = nn.LSTM(4, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight


def names(groups: list[Group]) -> dict[str, list[str]]:
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def everybody(model: nn.Module) -> list[str]:
    return [name for name, param in model.named_parameters() if param.requires_grad]


def check_complete(model: nn.Module, groups: list[Group]) -> None:
    """Every trainable param is in one group. Within a group params are in the model's order. Groups are ordered by
    their first param."""
    order = everybody(model)
    found = [[order.index(name) for name, _ in group["params"]] for group in groups]
    assert sorted(index for indices in found for index in indices) == list(range(len(order)))
    assert all(indices == sorted(indices) for indices in found)
    assert [indices[0] for indices in found] == sorted(indices[0] for indices in found)
    of_model = dict(model.named_parameters())
    assert all(of_model[name] is param for group in groups for name, param in group["params"])


# ---- no decay


def test_no_decay() -> None:
    model = Net()
    groups = no_decay(model, 0.05)
    check_complete(model, groups)
    found = names(groups)
    assert list(found) == ["decay", "no_decay"]
    assert found["decay"] == [
        "scale",
        "blocks.0.attention.in_proj_weight",
        "blocks.0.attention.out_proj.weight",
        "blocks.1.0.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
    ]
    assert {group["name"]: group["weight_decay"] for group in groups} == {"decay": 0.05, "no_decay": 0.0}


@pytest.mark.parametrize(
    "options, exempt",
    [
        ({"biases": True}, lambda name, p: "bias" in name),
        ({"norms": True}, lambda name, p: "norm" in name or name.startswith("blocks.1.2")),
        ({"embeddings": True}, lambda name, p: name == "embed.weight"),
        ({"ndim_below": 2}, lambda name, p: p.ndim < 2),
        ({"ndim_below": 3}, lambda name, p: p.ndim < 3),
        ({"modules": (nn.Conv1d, nn.LSTM)}, lambda name, p: name.startswith(("blocks.1.0", "rnn"))),
        ({"also": lambda name, p: name == "scale"}, lambda name, p: name == "scale"),
        ({}, lambda name, p: False),
    ],
)
def test_each_rule_alone(options: dict[str, Any], exempt: Callable[[str, nn.Parameter], bool]) -> None:
    model = Net()
    off: dict[str, Any] = {"biases": False, "norms": False, "embeddings": False, "ndim_below": 0}
    found = names(no_decay(model, 0.05, **{**off, **options}))
    wanted = [name for name, param in model.named_parameters() if param.requires_grad and exempt(name, param)]
    assert found.get("no_decay", []) == wanted
    assert found["decay"] == [name for name in everybody(model) if name not in wanted]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm((4, 4)),
        nn.GroupNorm(2, 4),
        nn.RMSNorm((4, 4)),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_of_torch(norm: nn.Module) -> None:
    """Including norms whose weight has two dimensions."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), norm)
    found = names(no_decay(model, 0.05, biases=False, ndim_below=0))
    assert found == {"decay": ["0.weight"], "no_decay": [name for name in everybody(model) if name.startswith("1.")]}


def test_only_own_names_count() -> None:
    model = nn.ModuleDict({"bias_net": nn.Linear(2, 2)})
    assert names(no_decay(model, 0.05)) == {"decay": ["bias_net.weight"], "no_decay": ["bias_net.bias"]}


def test_tied_params_stand_once() -> None:
    """It is exempt if either of its two modules is exempt, independent of their order."""
    model = nn.Module()
    model.head, model.embed = nn.Linear(4, 6, bias=False), nn.Embedding(6, 4)
    model.embed.weight = model.head.weight
    assert names(no_decay(model, 0.05)) == {"no_decay": ["head.weight"]}
    assert names(no_decay(model, 0.05, embeddings=False)) == {"decay": ["head.weight"]}
    assert names(layerwise(model, 1.0, 0.5)) == {"depth_0": ["head.weight"]}


# ---- learning rates by layer


def test_layerwise() -> None:
    """Seven depths: embed, block 0, convolution, batch norm, the frozen layer, LSTM, head. ReLU has no params, so it is
    not counted."""
    model = Net()
    groups = layerwise(model, 1.0, 0.5)
    check_complete(model, groups)
    found = names(groups)
    assert found["depth_0"] == ["scale", "embed.weight"]  # tied to the head's weight
    assert found["depth_1"] == [name for name in everybody(model) if name.startswith("blocks.0")]
    assert found["depth_2"] == ["blocks.1.0.weight", "blocks.1.0.bias"]
    assert found["depth_3"] == ["blocks.1.2.weight", "blocks.1.2.bias"]
    assert found["depth_5"] == [name for name in everybody(model) if name.startswith("rnn")]
    assert found["depth_6"] == ["head.bias"]
    assert {group["name"]: group["lr"] for group in groups} == {
        f"depth_{depth}": 0.5 ** (6 - depth) for depth in (0, 1, 2, 3, 5, 6)
    }


def test_freezing_changes_no_depth() -> None:
    model = Net()
    before = depths(model)
    model.blocks.requires_grad_(False)
    assert depths(model) == before
    rates = {group["name"]: group["lr"] for group in layerwise(model, 1.0, 0.5)}
    assert rates == {"depth_0": 0.5**6, "depth_5": 0.5, "depth_6": 1.0}


def test_factors_by_depth_and_depths_by_function() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    rates = [group["lr"] for group in layerwise(model, 0.1, [0.0, 0.5, 2.0])]
    assert rates == pytest.approx([0.0, 0.05, 0.2])
    groups = layerwise(model, 0.1, 0.1, depth=lambda name, param: 2 if name.endswith("bias") else 0)
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx({"depth_0": 1e-3, "depth_2": 0.1})
    with pytest.raises(ValueError, match="one number for each of the 3 depths, but got 2 numbers"):
        layerwise(model, 0.1, [1.0, 0.5])
    with pytest.raises(ValueError, match="depths must be integers from 0, but the smallest is -1"):
        layerwise(model, 0.1, 0.5, depth=lambda name, param: -1)


def test_a_model_without_layers() -> None:
    model = nn.Linear(2, 2)
    assert [(g["name"], g["lr"]) for g in layerwise(model, 0.1, 0.5)] == [("depth_0", 0.1)]


# ---- together


def test_they_compose_either_way() -> None:
    model = Net()

    def of_each(groups: list[Group]) -> dict[str, tuple[float, float]]:
        check_complete(model, groups)
        return {name: (group["lr"], group["weight_decay"]) for group in groups for name, _ in group["params"]}

    one = layerwise(model, 0.1, 0.5, groups=no_decay(model, 0.05))
    other = no_decay(model, 0.05, groups=layerwise(model, 0.1, 0.5))
    assert of_each(sorted_by_first(model, one)) == of_each(sorted_by_first(model, other))
    assert {"decay.depth_1", "no_decay.depth_1", "no_decay.depth_6"} <= names(one).keys()
    assert {"depth_1.decay", "depth_1.no_decay", "depth_6.no_decay"} <= names(other).keys()


def sorted_by_first(model: nn.Module, groups: list[Group]) -> list[Group]:
    order = everybody(model)
    return sorted(groups, key=lambda group: order.index(group["params"][0][0]))


def test_options_and_own_rates_are_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    body = named_group(model[0], name="body", lr=0.4, betas=(0.8, 0.9))
    head = named_group(model[1], name="head")
    groups = no_decay(model, 0.05, groups=[body, head])
    assert [(group["name"], group.get("betas"), group.get("lr")) for group in groups] == [
        ("body.decay", (0.8, 0.9), 0.4),
        ("body.no_decay", (0.8, 0.9), 0.4),
        ("head.decay", None, None),
        ("head.no_decay", None, None),
    ]
    assert body["name"] == "body" and len(body["params"]) == 2  # the argument is unchanged
    groups = layerwise(model, 0.1, 0.5, groups=[named_group(model, lr=0.4)])
    assert [group["lr"] for group in groups] == [0.2, 0.4]


def test_unnamed_params_cannot_be_split() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"must be \(name, param\) pairs, but hold a Parameter"):
        split([{"params": list(model.parameters())}], lambda name, param, group: ("all", {}))


# ---- in an optimizer


def test_names_survive_in_the_optimizer() -> None:
    model = Net()
    optimizer = fused_optim.FusedAdamW(layerwise(model, 0.1, 0.5, groups=no_decay(model, 0.05)))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    of_model = dict(model.named_parameters())
    for group, kept in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        assert group["name"] == kept["name"]
        assert all(of_model[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
    assert sorted(name for group in optimizer.param_groups for name in group["param_names"]) == sorted(everybody(model))


def test_one_optimizer_steps_as_many_and_with_one_launch() -> None:
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    optimizer = fused_optim.FusedAdamW(layerwise(model, 0.1, 0.5, groups=no_decay(model, 0.05)))
    # one optimizer of torch for each group, with its lr and weight_decay
    separate = [
        torch.optim.AdamW([param for _, param in group["params"]], lr=group["lr"], weight_decay=group["weight_decay"])
        for group in layerwise(twin, 0.1, 0.5, groups=no_decay(twin, 0.05))
    ]
    for step in range(5):
        for net in (model, twin):
            params = [param for param in net.parameters() if param.requires_grad]
            set_grads(params, random_grads(params, step))
        launches = count_launches(optimizer)
        assert launches == (1 if step else 0)
        for other in separate:
            other.step()
    assert len(optimizer.param_groups) > 8 and len(optimizer._tables) == 1
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def count_launches(optimizer: Any) -> int:
    """Makes a step and counts the calls to the backends of the existing tables."""
    calls = 0
    wrapped = []
    for backend in optimizer._tables:
        original = backend.step

        def counted(*args: Any, original: Any = original) -> Any:
            nonlocal calls
            calls += 1
            return original(*args)

        wrapped.append((backend, original))
        object.__setattr__(backend, "step", counted)
    optimizer.step()
    for backend, original in wrapped:
        object.__setattr__(backend, "step", original)
    return calls
