"""Trains one small convolutional net twice on real images: with FusedAdamW and with torch.optim.AdamW.

Both start from the same weights and see the same batches in the same order, so the loss curves should coincide. The
images are scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, from the UCI repository.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_optim import FusedAdamW

BATCH = 32


def digits(seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images [N, 1, 8, 8] in -1..1, train labels [N], test images, test labels; a quarter is the test set."""
    bunch = load_digits()
    images = bunch.images[:, None] / 8.0 - 1.0
    split = train_test_split(images, bunch.target, test_size=0.25, random_state=seed, stratify=bunch.target)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in split)
    return train_x.float().to(device), train_y.to(device), test_x.float().to(device), test_y.to(device)


def convolutional_net() -> nn.Sequential:
    """A smooth net: GELU in place of ReLU, strides in place of max pooling, group norm in place of batch norm.

    Adam can turn a rounding error into a step of full size: at a kink, or if a gradient is zero except for rounding,
    such as that of a bias before batch norm. This net has neither, so rounding errors stay small.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GELU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.GELU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(4, 64), nn.GELU()),
        *(nn.Flatten(), nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 10)),
    )


@dataclass
class Trainee:
    """A model, its optimizer and the record of both. losses: one per batch. step_us: µs, one per optimizer step."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    step_us: list[float] = field(default_factory=list)

    def learn(self, images: Tensor, labels: Tensor) -> None:
        self.model.train()
        loss = cross_entropy(self.model(images), labels)
        loss.backward()
        synchronize(images.device)
        begin = time.perf_counter()
        self.optimizer.step()
        synchronize(images.device)
        self.step_us.append(1e6 * (time.perf_counter() - begin))
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        self.model.eval()
        return (self.model(images).argmax(1) == labels).double().mean().item()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(trainees: list[Trainee], data: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int, seed: int) -> None:
    """Trains all on the same batches. They take turns in going first, so that none always finds the data in cache."""
    train_x, train_y, test_x, test_y = data
    shuffle = torch.Generator().manual_seed(seed)
    print(f"{'epoch':>5}" + "".join(f"{t.name + ': loss':>26}{'test':>9}" for t in trainees), flush=True)
    for epoch in range(epochs):
        order = torch.randperm(len(train_x), generator=shuffle).to(train_x.device)
        batches = order.split(BATCH)
        for number, batch in enumerate(batches):
            for trainee in trainees if number % 2 else trainees[::-1]:
                trainee.learn(train_x[batch], train_y[batch])
            if sys.stderr.isatty():
                print(f"\r{epoch + 1:>5} batch {number + 1} of {len(batches)}\r", end="", file=sys.stderr, flush=True)
        cells = [(statistics.fmean(t.losses[-len(batches) :]), t.accuracy(test_x, test_y)) for t in trainees]
        print(f"{epoch + 1:>5}" + "".join(f"{loss:>26.5f}{accuracy:>9.2%}" for loss, accuracy in cells), flush=True)


@torch.no_grad()
def largest_difference(a: nn.Module, b: nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def draw(path: Path, trainees: list[Trainee], difference: float) -> None:
    """Plots both loss curves: the second as a broad light line, the first as a thin dark line on top of it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 5.2), height_ratios=(3, 1), layout="constrained"
    )
    steps = range(1, len(trainees[0].losses) + 1)
    for trainee, colour, width in zip(trainees[::-1], ("#f2a7a0", "#1f2d3d"), (5.0, 1.1), strict=True):
        top.plot(steps, trainee.losses, color=colour, linewidth=width, label=trainee.name)
    top.set_yscale("log")
    top.set_ylabel("training loss of the batch")
    top.set_title(f"Digits, same seed and batches: final params differ by at most {difference:.1e}", loc="left")
    top.legend(frameon=False)
    ours, theirs = (trainee.losses for trainee in trainees)
    bottom.plot(steps, [a - b for a, b in zip(ours, theirs, strict=True)], color="#1f2d3d", linewidth=0.9)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_ylabel("difference")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.grid(color="#e6e6e6", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--backend", default="auto", help="auto, triton, cuda, cpp or reference")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where the loss plot goes")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)  # enough for images of 8 x 8, and every machine sums in the same order
    device = torch.device(options.device)
    data = digits(options.seed, device)
    model = convolutional_net().to(device)
    twin = copy.deepcopy(model)
    fused = FusedAdamW(model.parameters(), lr=options.lr, backend=options.backend)
    trainees = [
        Trainee("FusedAdamW", model, fused),
        Trainee("torch.optim.AdamW", twin, torch.optim.AdamW(twin.parameters(), lr=options.lr)),
    ]
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(data[0]):,} training images, {len(data[2]):,} test images; {count:,} parameters on {device}\n")
    train(trainees, data, options.epochs, options.seed)

    print()
    for trainee in trainees:
        accuracy, median = trainee.accuracy(data[2], data[3]), statistics.median(trainee.step_us)
        print(f"{trainee.name:18} test accuracy {accuracy:.2%}, optimizer {median:7.1f} µs per step (median)")
    difference, steps = largest_difference(model, twin), len(trainees[0].losses)
    print(f"\nLargest difference between the parameters of the two models after {steps} steps: {difference:.2e}")
    draw(options.out, trainees, difference)
    print(f"Loss curves: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
