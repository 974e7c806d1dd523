"""Parameters of every form, given gradients and a reference orthogonalization, for the tests of a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mue.optim import PRESETS, HyperSphereOptimizer

SHAPES = [(16, 16), (12, 40), (40, 12), (5, 12, 20), (8, 3, 3, 3)]


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(normal(shape, seed, dtype)) for seed, shape in enumerate(SHAPES)]


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range = range(3), sign: int = 1) -> None:
    for step in steps:
        for i, param in enumerate(params):
            param.grad = sign * normal(tuple(param.shape), 100 * (step + 1) + i, param.dtype)
        optimizer.step()


def build(params: list[nn.Parameter], kind: str, **options) -> HyperSphereOptimizer:
    return HyperSphereOptimizer([{"params": params, "kind": kind}], **{"lr": 0.05, **options})


def matrices(x: Tensor) -> Tensor:
    """`[E, out, in]` in float64."""
    x = x.detach().double().clone()
    return x if x.ndim == 3 else x.reshape(1, x.shape[0], -1)


def orth(u: Tensor, preset: str) -> Tensor:
    x = u / u.norm()
    for a, b, c in PRESETS[preset].steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def furthest(a: list[nn.Parameter], b: list[nn.Parameter]) -> float:
    """Largest distance of an entry, over the parameter's root mean square."""
    return max(
        float((x - y).detach().abs().max() / y.detach().square().mean().sqrt()) for x, y in zip(a, b, strict=True)
    )
