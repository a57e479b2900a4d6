"""Images to train on without a download: gratings in noise, whose direction is the class."""

import math

import torch
from torch import Tensor

CLASSES = 8


def made_images(count: int, seed: int, size: int = 16, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Images (count, channels, size, size) and labels (count,), always the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = (math.pi * labels / CLASSES)[:, None, None]
    phase = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = torch.sin(1.2 * (x * angle.cos() + y * angle.sin()) + phase)
    noise = 2 * torch.randn(count, channels, size, size, generator=generator)
    return waves[:, None] + noise, labels
