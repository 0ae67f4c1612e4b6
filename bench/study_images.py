"""The study's image model, its training augmentation and its test-time augmentation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu


class Block(nn.Module):
    """A residual block: two convolutions, each preceded by batch norm and ReLU, and a shortcut.

    Maps [N, inputs, H, W] to [N, outputs, H / stride, W / stride], rounded up.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        active = relu(self.norm1(images))
        residual = self.conv2(relu(self.norm2(self.conv1(active))))
        return residual + (images if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """Pre-activation wide ResNet of depth 6n + 4 and width k: images [N, channels, H, W] to logits [N, classes].

    Raises:
        ValueError: the depth is not 6n + 4.
    Source: Zagoruyko and Komodakis, arXiv:1605.07146.
    """

    def __init__(self, depth: int, k: int, channels: int, classes: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"A wide ResNet's depth must be 6n + 4 with n >= 1, but got {depth}; take 10, 16, 22, ...")
        blocks = (depth - 4) // 6
        widths = [16, 16 * k, 32 * k, 64 * k]
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(outputs if n else inputs, outputs, 1 if n else stride) for n in range(blocks)))
            for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for stage in self.stages:
            features = stage(features)
        return self.head(relu(self.norm(features)).mean((2, 3)))

    def depth(self, name: str) -> int:
        """The depth of a param, by its name: 0 in the stem, then by stage; the last norm and the head are deepest."""
        first, second, *_ = name.split(".")
        return {"stem": 0, "stages": 1 + int(second) if second.isdigit() else 0}.get(first, 1 + len(self.stages))


def shifted(images: Tensor, reach: int, generator: torch.Generator, mirror: bool) -> Tensor:
    """Moves each image at random by up to `reach` pixels along both axes, with edge pixels as padding. mirror: also
    mirrors each image with probability 0.5."""
    count, _, height, width = images.shape
    windows = pad(images, (reach,) * 4, mode="replicate").unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * reach + 1, (2, count), generator=generator).to(images.device)
    moved = windows[torch.arange(count, device=images.device), :, down, right]
    if mirror:
        flipped = torch.rand(count, generator=generator).to(images.device) < 0.5
        moved = torch.where(flipped[:, None, None, None], moved.flip(3), moved)
    return moved.contiguous(memory_format=torch.channels_last)


def views(images: Tensor, reach: int, mirror: bool) -> list[Tensor]:
    """The views for test-time augmentation: the plain images, the mirrored ones if `mirror`, and the images moved by
    `reach` pixels in each of the four directions."""
    _, _, height, width = images.shape
    padded = pad(images, (reach,) * 4, mode="replicate")
    places = [(0, reach), (2 * reach, reach), (reach, 0), (reach, 2 * reach)]
    moved = [padded[:, :, down : down + height, right : right + width] for down, right in places]
    return [images, *([images.flip(3)] if mirror else []), *moved]


@torch.no_grad()
def logits(model: nn.Module, images: Tensor, batch: int = 512) -> Tensor:
    """The logits [N, classes], in evaluation mode."""
    model.eval()
    return torch.cat([model(part.contiguous(memory_format=torch.channels_last)) for part in images.split(batch)])


def averaged_logits(model: nn.Module, images: Tensor, reach: int, mirror: bool) -> Tensor:
    """The mean of the logits over the views of each image."""
    return torch.stack([logits(model, view) for view in views(images, reach, mirror)]).mean(0)
