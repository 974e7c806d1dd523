"""A transformer from noisy images, times and classes to velocities (DiT, arXiv:2212.09748), dense or Mixture-of-Experts.

Shape legend: B batch, C channels, R rows and columns of an image, P side of a patch, S = (R / P)^2 patches, p = C P^2 values of
a patch, d width, f features of a time, n number of modulating vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mue.models.transformer import Attention
from lightning_mue.parameterizations.rules.roles import Role

#: Features of a time: cosines and sines of angles up to this many radians, wavelengths in geometric progression.
TIME_FEATURES, _LARGEST_ANGLE, _RANGE = 64, 1000.0, 10_000.0


class PatchEmbedding(nn.Module):
    """Patches to tokens: ``patch W^T + b + position``, entries of order ``std``. The size of a patch does not grow."""

    mue_roles: ClassVar[Mapping[str, Role]] = {
        "weight": Role.EMBEDDING,
        "bias": Role.BIAS,
        "position": Role.EMBEDDING,
    }

    def __init__(self, patch_values: int, n_patches: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, patch_values) * (std * patch_values**-0.5))
        self.bias = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.randn(n_patches, width) * std)

    def forward(self, patches_BSp: Tensor) -> Tensor:
        """Returns tokens [B, S, d]."""
        return F.linear(patches_BSp, self.weight, self.bias) + self.position


class TimeEmbedding(nn.Module):
    """Times in [0, 1] to vectors: ``W_out silu(W_in features(t) + b_in) + b_out``."""

    mue_roles: ClassVar[Mapping[str, Role]] = {
        "w_in": Role.EMBEDDING,  # the number of features does not grow
        "b_in": Role.BIAS,
        "w_out": Role.HIDDEN,
        "b_out": Role.BIAS,
    }

    def __init__(self, width: int, std: float, init_std: float | None) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(width, TIME_FEATURES) * (std * (TIME_FEATURES / 2) ** -0.5))
        self.b_in = nn.Parameter(torch.zeros(width))
        self.w_out = nn.Parameter(torch.randn(width, width) * (width**-0.5 if init_std is None else init_std))
        self.b_out = nn.Parameter(torch.zeros(width))

    def forward(self, t_B: Tensor) -> Tensor:
        """Returns vectors [B, d]."""
        half = TIME_FEATURES // 2
        rate = _RANGE ** (-torch.arange(half, device=t_B.device, dtype=torch.float32) / half)
        angle = _LARGEST_ANGLE * t_B.float()[:, None] * rate
        features_Bf = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.w_in.dtype)
        return F.linear(F.silu(F.linear(features_Bf, self.w_in, self.b_in)), self.w_out, self.b_out)


class Modulation(nn.Module):
    """n vectors from a condition, ``W c + b``, all zero at the start (adaLN-zero): a shift, a scale, a gate, and so on."""

    mue_roles: ClassVar[Mapping[str, Role]] = {"weight": Role.MODULATION, "bias": Role.BIAS}

    def __init__(self, width: int, n_vectors: int) -> None:
        super().__init__()
        self.n_vectors = n_vectors
        self.weight = nn.Parameter(torch.zeros(n_vectors * width, width))
        self.bias = nn.Parameter(torch.zeros(n_vectors * width))

    def forward(self, c_Bd: Tensor) -> tuple[Tensor, ...]:
        """Returns n vectors [B, 1, d]."""
        return F.linear(c_Bd, self.weight, self.bias)[:, None].chunk(self.n_vectors, dim=-1)


def _modulate(x_BSd: Tensor, shift_B1d: Tensor, scale_B1d: Tensor) -> Tensor:
    """``norm(x) (1 + scale) + shift``; the norm has no gain of its own."""
    return F.rms_norm(x_BSd, x_BSd.shape[-1:], eps=1e-6) * (1 + scale_B1d) + shift_B1d


class ConditionedBlock(nn.Module):
    """``x + m gate attention(modulated norm(x))``, then the same with the FFN or MoE; m is the residual multiplier."""

    mue_multipliers: ClassVar[Mapping[str, str]] = {"residual": "residual_multiplier"}

    def __init__(self, width: int, attention: Attention, ffn: nn.Module, residual_multiplier: float) -> None:
        super().__init__()
        self.modulation = Modulation(width, 6)
        self.attention = attention
        self.ffn = ffn
        self.residual_multiplier = residual_multiplier

    def forward(self, x_BSd: Tensor, c_Bd: Tensor) -> Tensor:
        """Applies both branches; same shape."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulation(c_Bd)
        m = self.residual_multiplier
        x_BSd = x_BSd + m * gate * self.attention(_modulate(x_BSd, shift, scale), _unrotated)
        return x_BSd + m * ffn_gate * self.ffn(_modulate(x_BSd, ffn_shift, ffn_scale))


def _unrotated(x_BNSk: Tensor) -> Tensor:
    """Positions are in the tokens already."""
    return x_BNSk


class VelocityHead(nn.Module):
    """Velocities of a patch from its token: ``W (modulated norm(x)) + b``. Not zero at the start: a sphere keeps its norm."""

    mue_role_of_output = "velocity"
    mue_roles: ClassVar[Mapping[str, Role]] = {"weight": Role.UNEMBEDDING, "bias": Role.BIAS}

    def __init__(self, patch_values: int, width: int, std: float) -> None:
        super().__init__()
        self.modulation = Modulation(width, 2)
        self.weight = nn.Parameter(torch.randn(patch_values, width) * std)
        self.bias = nn.Parameter(torch.zeros(patch_values))

    def forward(self, x_BSd: Tensor, c_Bd: Tensor) -> Tensor:
        """Returns velocities [B, S, p]."""
        return F.linear(_modulate(x_BSd, *self.modulation(c_Bd)), self.weight, self.bias)


class VelocityTransformer(nn.Module):
    """Noisy images, times and classes -> velocities. The arguments are as for `FlowMatchingTransformer`.

    Class ``n_classes`` stands for no class.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        n_channels: int,
        n_classes: int,
        width: int,
        blocks: list[ConditionedBlock],
        *,
        embedding_std: float,
        output_std: float,
        init_std: float | None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        patch_values, n_patches = n_channels * patch_size**2, (image_size // patch_size) ** 2
        self.patches = PatchEmbedding(patch_values, n_patches, width, embedding_std)
        self.time = TimeEmbedding(width, embedding_std, init_std)
        self.classes = nn.Embedding(n_classes + 1, width)
        nn.init.normal_(self.classes.weight, std=embedding_std)
        self.blocks = nn.ModuleList(blocks)
        self.head = VelocityHead(patch_values, width, output_std)

    def forward(self, x_BCRR: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        """Velocities [B, C, R, R] at noisy images [B, C, R, R], times [B] in [0, 1] and classes [B] int64."""
        patches_BpGG = F.pixel_unshuffle(x_BCRR.to(self.patches.weight.dtype), self.patch_size)
        x_BSd = self.patches(patches_BpGG.flatten(2).transpose(1, 2))
        c_Bd = F.silu(self.time(t_B) + self.classes(labels_B))
        for block in self.blocks:
            x_BSd = block(x_BSd, c_Bd)
        v_BpS = self.head(x_BSd, c_Bd).transpose(1, 2)
        side = math.isqrt(v_BpS.shape[-1])
        return F.pixel_shuffle(v_BpS.unflatten(-1, (side, side)), self.patch_size)
