"""What a guard measures before an optimizer step, on the device: the loss, the norm of the gradients, over all ranks.

Shape legend: P parameters with a gradient, R ranks, F figures of a rank (`FIGURES`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_mue.sharded import cutting_dims, local

#: Of each rank: sum of the losses, number of losses, sum of squares of its share of the gradients, number of gradients, and
#: what it found amiss among its indicators (a number above 0, and the value).
FIGURES = ("loss", "losses", "square", "gradients", "alarm", "alarm_value")


class LossSum:
    """Sum of the losses that were sent backward since an optimizer stepped, on the device."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0
        self.stepped = False

    def add(self, loss: Tensor) -> None:
        """Adds a loss; the first after a step begins a new sum, so that two optimizers may share one loss."""
        if self.stepped:
            self.clear()
        value = loss.detach().float().sum()
        self.total = value if self.total is None else self.total + value
        self.count += 1

    def clear(self) -> None:
        """Forgets the losses."""
        self.total, self.count, self.stepped = None, 0, False


def gradients_of(optimizer: Any) -> list[tuple[Tensor, Tensor]]:
    """Parameters of an optimizer that have a gradient, and this rank's part of it."""
    held = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    return [(p, _values(local(p.grad))) for p in held]


def _values(grad: Tensor) -> Tensor:
    if grad.layout != torch.strided:  # an embedding with sparse=True
        grad = grad._values()
    return torch.view_as_real(grad) if grad.is_complex() else grad


def norms_of(grads: Iterable[Tensor], device: torch.device) -> Tensor:
    """Norm of each gradient, float32 [P]: not finite where a value of the gradient is not, or beyond float32's range."""
    grads = list(grads)
    if not grads:
        return torch.zeros(0, device=device)
    norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
    return torch.stack([norm if norm.device == device else norm.to(device) for norm in norms])


class Share:
    """Weights with which the squares of gradients are summed over ranks, so that replicas count once."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._weights: dict[tuple[float, ...], Tensor] = {}

    def square(self, params: list[Tensor], norms_P: Tensor) -> Tensor:
        """This rank's share of the sum of all squares, 0-dim float32; NaN and Inf stay."""
        if self.world_size == 1:
            return norms_P.square().sum()
        parts = tuple(self._part(p) for p in params)
        if parts not in self._weights:
            self._weights = {parts: torch.tensor(parts, device=norms_P.device)}
        return (norms_P.square() * self._weights[parts]).sum()

    def _part(self, param: Tensor) -> float:
        mesh, dims = cutting_dims(param)
        pieces = 1
        for dim in dims:
            pieces *= mesh.size(dim)
        return pieces / self.world_size


def gather(figures_F: Tensor, world_size: int) -> Tensor:
    """The figures of all ranks, [R, F], the same on each; one collective, none in a single process."""
    if world_size == 1:
        return figures_F.unsqueeze(0)
    ranks = figures_F.new_empty(world_size * figures_F.numel())
    torch.distributed.all_gather_into_tensor(ranks, figures_F)
    return ranks.view(world_size, -1)
