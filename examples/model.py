"""The network of the demo, and the distortions it learns from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Spread(nn.BatchNorm1d):
    """Gives every dimension the same spread, [B, D], which closes the easy way out of a hard batch: all images in
    one point."""

    def forward(self, x: Tensor) -> Tensor:
        # As [1, D, B]: torch sums over B in pieces that depend on the number of threads, but not over the last.
        return super().forward(x.T.contiguous().unsqueeze(0)).squeeze(0).T.contiguous()


class Embedder(nn.Sequential):
    """A small convolutional network, [B, channels, size, size] -> [B, dimensions]."""

    def __init__(self, channels: int, size: int, dimensions: int = 256, width: int = 64) -> None:
        layers: list[nn.Module] = []
        while True:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
            if size <= 4:
                break
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            size, width = math.ceil(size / 2), 128
        layers += [nn.Flatten(), nn.Linear(channels * size * size, dimensions), Spread(dimensions, affine=False)]
        super().__init__(*layers)


def augment(
    images: Tensor,
    generator: torch.Generator,
    quarters: Tensor | None = None,
    *,
    degrees: float = 20.0,
    shift: float = 0.1,
    scale: float = 0.2,
    shear: float = 0.3,
    noise: float = 0.1,
) -> Tensor:
    """Each image rotated, moved (in shares of its size), scaled and sheared at random within the given bounds.

    Args:
        images: [B, C, H, W].
        generator: on the CPU; what it draws does not depend on the device of the images.
        quarters: [B], which of the 8 orientations of a square each image takes: quarter turns, from 4 on
            mirrored. Default: none is turned.
        noise: standard deviation of what is added to every pixel.
    """
    turn, dx, dy, zoom, lean = 2 * torch.rand(5, len(images), generator=generator) - 1
    turn, zoom, lean, mirror = turn * math.radians(degrees), 1 + scale * zoom, shear * lean, torch.ones(len(images))
    if quarters is not None:
        turn = turn + quarters % 4 * (math.pi / 2)
        mirror = 1.0 - 2 * (quarters // 4)
    cos, sin = turn.cos() * zoom, turn.sin() * zoom
    rows = (cos * mirror, lean * cos - sin, 2 * shift * dx, sin * mirror, lean * sin + cos, 2 * shift * dy)
    grid = nn.functional.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid.to(images.device), align_corners=False)
    return moved + noise * torch.randn(images.shape, generator=generator).to(images.device)
