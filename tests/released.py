"""Two equal models, of which one has its gradients released."""

from __future__ import annotations

from typing import Any

import torch
from cases import (
    Case,
    Target,
    build,
    parameters,
)
from compare import assert_equal
from torch import Tensor, nn

from fused_optim import release_gradients

REFERENCE = Target("reference", "cpu")
BUCKET = 600  # bytes: several buckets, and params with a bucket of their own


class Net(nn.Module):
    """`tied` is used twice, `unused` never has a gradient, `sometimes` in every other step."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(7, 16)
        self.tied = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.unused = nn.Linear(3, 3)
        self.sometimes = nn.Linear(16, 16, bias=False)
        self.last = nn.Linear(16, 2)
        self.to(device, dtype)

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        x = self.tied(torch.tanh(self.tied(self.first(x))))
        x = torch.tanh(self.norm(x)) if step % 2 else torch.tanh(self.sometimes(self.norm(x)))
        return self.last(x)


def loss(net: nn.Module, step: int, part: int = 0) -> Tensor:
    some = next(net.parameters())
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(10 * step + part)).to(some.device, some.dtype)
    return (net(x, step).float() ** 2).mean()


def pair(case: Case, target: Target, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, ...]:
    """Two equal models with their optimizers. Only the first one releases its gradients."""
    nets = [Net(dtype, target.device) for _ in range(2)]
    ours, plain = (build(case, target, net.named_parameters(), **options) for net in nets)
    return nets[0], ours, release_gradients(nets[0], ours, bucket_bytes=BUCKET), nets[1], plain


def assert_same(ours: Any, plain: Any) -> None:
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(plain)])
    assert_equal([ours.state[p] for p in parameters(ours)], [plain.state[p] for p in parameters(plain)])


def side_by_side(net: nn.Module, ours: Any, other: nn.Module, plain: Any, steps: range | int) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        for model, optimizer in ((net, ours), (other, plain)):
            loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
