"""The buckets of gradient release: which params are stepped together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..engine.dtensor import groups_of, local
from .plans import Plan

BUCKET_BYTES = 25 << 20


class Bucket:
    """Params that are stepped together.

    expected: how many of them have hooks; 0: the bucket waits for step(). arrived: how many have their gradient in this
    step. updated: whether the bucket was updated in this step. stale: whether other buckets have replaced it.
    """

    def __init__(self, params: list[Tensor], expected: int) -> None:
        self.params = params
        self.expected = expected
        self.arrived = 0
        self.updated = self.stale = False
        self.plan: Plan | None = None


def divided(params: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """The params in lists of at most `size` bytes, or of one param. All params of a list are on one device, and their
    elements are spread over the same processes. All processes make the same lists: the bytes of a shard are those of an
    even one."""
    parts: list[list[Tensor]] = []
    current: dict[Any, list[Tensor]] = {}
    bytes_of: dict[Any, int] = {}
    for param in params:
        groups = groups_of(param)
        place = local(param).device, groups
        share = math.ceil(param.numel() / math.prod(group.size() for group in groups)) * param.element_size()
        if place not in current or bytes_of[place] + share > size:
            current[place], bytes_of[place] = [], 0
            parts.append(current[place])
        current[place].append(param)
        bytes_of[place] += share
    return parts


def parts_of(optimizer: Optimizer, params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The optimizer's groups with these params alone."""
    wanted = {*params}
    parts = [{**group, "params": [p for p in group["params"] if p in wanted]} for group in optimizer.param_groups]
    for part, group in zip(parts, optimizer.param_groups, strict=True):
        if "param_names" in group:
            pairs = zip(group["param_names"], group["params"], strict=True)
            part["param_names"] = [name for name, param in pairs if param in wanted]
    return parts
