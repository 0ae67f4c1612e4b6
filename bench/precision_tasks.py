"""Two small nets for bench/precision.py: a GPT on characters of Python's documentation, and a convolutional net on the
8x8 digits of scikit-learn. Forward and backward passes are in float32 with the weights as the params show them, so runs
differ in nothing but what the optimizer stores."""

from __future__ import annotations

import functools
import math

import torch
from precision_contestants import BY_NAME
from torch import Tensor, nn
from torch.func import functional_call

WIDTH, HEADS, LAYERS, CONTEXT = 64, 4, 2, 64
TASKS = {"GPT": 3e-3, "convnet": 3e-3}  # and their peak lr


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x) + self.places.weight[: x.shape[1]]))


def convnet() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4, 10))


@functools.cache
def characters() -> tuple[Tensor, Tensor, int]:
    """Training part, validation part, number of characters."""
    from pydoc_data.topics import topics

    text = "".join(topics[key] for key in sorted(topics))[:400_000]
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([known[character] for character in text])
    return numbers[:-40_000], numbers[-40_000:], len(known)


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = torch.tensor(bunch.images).float()[:, None] / 8 - 1, torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order[:1200]], labels[order[:1200]], images[order[1200:]], labels[order[1200:]]


def final_loss(task: str, name: str, seed: int, steps: int) -> float:
    """The loss on the validation part after training. The seed determines weights and batches."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    contestant = BY_NAME[name]
    model = GPT(characters()[2]) if task == "GPT" else convnet()
    params = {key: nn.Parameter(p.detach().to(contestant.dtype)) for key, p in model.named_parameters()}
    optimizer = contestant.optimizer(list(params.values()), lr=TASKS[task], weight_decay=0.01)
    draw = torch.Generator().manual_seed(1000 + seed)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        shown = {key: param.float() for key, param in params.items()}
        return nn.functional.cross_entropy(functional_call(model, shown, (x,)).flatten(0, -2), y.flatten())

    for step in range(steps):
        warm, rest = min(1.0, (step + 1) / (0.1 * steps)), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = TASKS[task] * warm * rest
        loss(*batch(task, draw)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return float(torch.stack([loss(x, y) for x, y in validation(task)]).mean())


def batch(task: str, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    if task == "convnet":
        images, labels, *_ = digits()
        chosen = torch.randint(len(labels), (64,), generator=draw)
        return images[chosen], labels[chosen]
    text = characters()[0]
    begins = torch.randint(len(text) - CONTEXT - 1, (16,), generator=draw)
    rows = text[begins[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def validation(task: str) -> list[tuple[Tensor, Tensor]]:
    if task == "convnet":
        return [digits()[2:]]
    text = characters()[1]
    rows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)[:256]
    return [(part[:, :-1], part[:, 1:]) for part in rows.split(64)]
