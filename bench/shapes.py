"""Tensor shapes of the benchmark cases: real architectures, and many small tensors."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from fused_optim.cost.shapes import MODELS, Shape


def shard(shapes: list[Shape], shards: int) -> list[Shape]:
    """One of `shards` equal slices along dimension 0, as in FSDP2."""
    return [(shape[0] // shards, *shape[1:]) for shape in shapes]


def model(name: str) -> Callable[[], list[Shape]]:
    return lambda: list(MODELS[name]().values())


CASES: dict[str, Callable[[], list[Shape]]] = {
    "one-tensor-100m": lambda: [(100_000_000,)],
    "resnet50": model("resnet50"),
    "gpt2-124m": model("gpt2-124m"),
    "vit-l": model("vit-l"),
    "llama-1b": model("llama-1b"),
    "llama-8b-shard": lambda: shard(model("llama-8b")(), 8),
    "2000x1000": lambda: [(1000,)] * 2000,
    "600x1000": lambda: [(1000,)] * 600,
    "1000x1024": lambda: [(1024,)] * 1000,
    "10000x64": lambda: [(64,)] * 10000,
    "465x1000": lambda: [(1000,)] * 465,
    "465-groups": lambda: [(1000,)] * 465,
}

# Cases with fixed param groups; --groups does not change them.
OWN_GROUPS = {"465-groups": "each"}


def elements(shapes: list[Shape]) -> int:
    return sum(prod(shape) for shape in shapes)


if __name__ == "__main__":
    for name, case in CASES.items():
        print(f"{name:16} {len(case()):6,} tensors {elements(case()):14,} elements")
