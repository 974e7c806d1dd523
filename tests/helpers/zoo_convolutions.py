"""Conv nets of the zoo: a U-Net of diffusion models, and a residual conv net."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from helpers.zoo_models import ZooModel, images, noise
from torch import Tensor, nn


class ResBlock(nn.Module):
    """A diffusion U-Net's: two convolutions and a shift by the time."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(times, width)
        self.norm2, self.conv2 = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(t))[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """Two levels: ``depth`` blocks down, a strided convolution, ``depth`` blocks in the middle, and up over a skip connection."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        times = 4 * width
        self.time_embedding = nn.Sequential(nn.Linear(16, times), nn.SiLU(), nn.Linear(times, times))
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down_blocks = nn.ModuleList(ResBlock(width, times) for _ in range(depth))
        self.downsample = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.mid_blocks = nn.ModuleList(ResBlock(2 * width, times) for _ in range(depth))
        self.upsample = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.merge = nn.Conv2d(2 * width, width, 1)
        self.up_blocks = nn.ModuleList(ResBlock(width, times) for _ in range(depth))
        self.norm_out, self.conv_out = nn.GroupNorm(4, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time_embedding(torch.sin(t[:, None] * torch.arange(1, 17)))
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, c)
        y = self.downsample(x)
        for block in self.mid_blocks:
            y = block(y, c)
        x = self.merge(torch.cat([x, self.upsample(y)], dim=1))
        for block in self.up_blocks:
            x = block(x, c)
        return self.conv_out(F.silu(self.norm_out(x)))


class ConvBlock(nn.Module):
    """A pre-activation residual block of a conv net."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class ConvNet(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(ConvBlock(width) for _ in range(depth)))
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


def unet_loss(model: Any, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0], torch.tensor([0.3, 0.8])), noise(2, 3, 8, 8))


CONVOLUTIONS = {
    "U-Net": ZooModel(lambda w, depth, e: UNet(w, depth), images, unet_loss),
    "conv net": ZooModel(
        lambda w, depth, e: ConvNet(w, depth), images, lambda model, b: F.cross_entropy(model(b[0]), b[1])
    ),
}
