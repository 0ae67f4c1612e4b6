"""The nets of the study of all optimizers. They have no batch norm, whose statistics Schedule-Free would need again."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, scaled_dot_product_attention


class ConvNet(nn.Module):
    """Three convolutions with group norm: images [N, 1, 28, 28] to logits [N, 10]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [1, width, 2 * width, 2 * width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False) for inputs, outputs in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, outputs) for outputs in widths[1:])
        self.head = nn.Linear(widths[-1] * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            images = relu(norm(convolution(images)))
        return self.head(images.flatten(1))


class Layer(nn.Module):
    """Causal attention and a net of two layers, each after an RMS norm and with a shortcut: [N, T, H] to [N, T, H]."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(size), nn.RMSNorm(size)
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.project = nn.Linear(size, size, bias=False)
        self.up, self.down = nn.Linear(size, 4 * size, bias=False), nn.Linear(4 * size, size, bias=False)

    def forward(self, steps: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(steps)).chunk(3, -1)
        )
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        steps = steps + self.project(attended.transpose(1, 2).flatten(2))
        return steps + self.down(gelu(self.up(self.norm2(steps))))


class GPT(nn.Module):
    """Decoder-only transformer: words int64 [N, T] to logits [N, T, V]. T is at most `context`."""

    def __init__(self, words: int, size: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        self.position = nn.Embedding(context, size)
        self.layers = nn.ModuleList(Layer(size, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(size)
        self.head = nn.Linear(size, words, bias=False)
        for param in self.parameters():
            if param.ndim == 2:
                nn.init.normal_(param, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        steps = self.embedding(words) + self.position(torch.arange(words.shape[1], device=words.device))
        for layer in self.layers:
            steps = layer(steps)
        return self.head(self.norm(steps))
