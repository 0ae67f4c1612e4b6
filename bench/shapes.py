"""The tensor lists that the benchmarks step: real architectures from their formulas, and many small tensors."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """161 tensors, 25.6M elements: He et al., arXiv:1512.03385, with torchvision's names in mind."""

    def conv_and_norm(out: int, into: int, kernel: int) -> list[Shape]:
        return [(out, into, kernel, kernel), (out,), (out,)]

    shapes = conv_and_norm(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += (
                conv_and_norm(width, into, 1) + conv_and_norm(width, width, 3) + conv_and_norm(4 * width, width, 1)
            )
            if block == 0:
                shapes += conv_and_norm(4 * width, into, 1)
            into = 4 * width
    return [*shapes, (1000, into), (1000,)]


def transformer_block(width: int) -> list[Shape]:
    """Pre-norm attention and a four times wider MLP, all with biases: 12 tensors."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp: list[Shape] = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return norm + attention + norm + mlp


def gpt2() -> list[Shape]:
    """148 tensors, 124M elements; the output layer is the token embedding."""
    return [(50257, 768), (1024, 768), *transformer_block(768) * 12, (768,), (768,)]


def vit_large() -> list[Shape]:
    """ViT-L/16 at 224 pixels: 296 tensors, 304M elements; Dosovitskiy et al., arXiv:2010.11929."""
    width = 1024
    stem: list[Shape] = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [*stem, *transformer_block(width) * 24, (width,), (width,), (1000, width), (1000,)]


def llama(width: int, layers: int, keys: int, hidden: int, tied: bool, shards: int = 1) -> list[Shape]:
    """A Llama 3 model, or one of `shards` equal slices along dimension 0, as FSDP2 lays them out."""
    norm: Shape = (width,)
    attention: list[Shape] = [(width, width), (keys, width), (keys, width), (width, width)]
    mlp: list[Shape] = [(hidden, width), (hidden, width), (width, hidden)]
    embedding: Shape = (128256, width)
    whole = [embedding, *[*attention, *mlp, norm, norm] * layers, norm, *([] if tied else [embedding])]
    return [(shape[0] // shards, *shape[1:]) for shape in whole]


CASES: dict[str, Callable[[], list[Shape]]] = {
    "one-tensor-100m": lambda: [(100_000_000,)],
    "resnet50": resnet50,
    "gpt2-124m": gpt2,
    "vit-l": vit_large,
    "llama-1b": lambda: llama(width=2048, layers=16, keys=512, hidden=8192, tied=True),
    "llama-8b-shard": lambda: llama(width=4096, layers=32, keys=1024, hidden=14336, tied=False, shards=8),
    "2000x1000": lambda: [(1000,)] * 2000,
    "1000x1024": lambda: [(1024,)] * 1000,
    "10000x64": lambda: [(64,)] * 10000,
    "465x1000": lambda: [(1000,)] * 465,
    "465-groups": lambda: [(1000,)] * 465,
}

# Cases that say themselves how their tensors are grouped, whatever --groups says.
OWN_GROUPS = {"465-groups": "each"}


def elements(shapes: list[Shape]) -> int:
    return sum(prod(shape) for shape in shapes)


if __name__ == "__main__":
    for name, case in CASES.items():
        print(f"{name:16} {len(case()):6,} tensors {elements(case()):14,} elements")
