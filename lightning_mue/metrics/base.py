"""What all metrics of this room share: exact sums, and the traps of `torchmetrics.Metric` that they avoid.

- Sums are kept in float64 and counts in int64. A float32 count stands still at 16.8 million tokens, and
  ``module.to(torch.bfloat16)`` (``precision="bf16-true"``) would round the states of a plain `Metric` to 8 bits.
- The name of a state holds the settings on which it depends. A `MetricCollection` lets metrics share a state when name and
  FIRST value agree, which two outlier thresholds do as long as there are no outliers; and `merge_state` compares names only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


def _sum_type(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's devices have no float64


class DiagnosticMetric(Metric):
    """Base class. States are sums (or merge as exactly), so batches, ranks and `merge_state` may come in any order.

    `compute` returns float32. It is NaN when nothing was measured; torchmetrics warns when `update` was never called.
    Inputs are detached: a loss uses the functions of `lightning_mue.diagnostics`, which have gradients.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = None

    def add_sum(self, name: str, shape: tuple[int, ...] = (), merge: str | Callable[[Tensor], Tensor] = "sum") -> None:
        """Adds a state of zeros that is wide enough for sums; ``merge`` reduces a stack [N, *shape] to [*shape]."""
        device = self._real_device()
        self.add_state(name, torch.zeros(shape, dtype=_sum_type(device), device=device), dist_reduce_fx=merge)

    def add_count(self, name: str) -> None:
        """Adds a state that counts, an int64 scalar."""
        self.add_state(name, torch.zeros((), dtype=torch.int64, device=self._real_device()), dist_reduce_fx="sum")

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Takes in what another metric measured; a value computed before is forgotten (torchmetrics 1.9 returns it again)."""
        super().merge_state(incoming_state)
        self._computed = None
        self._update_count += incoming_state.update_count if isinstance(incoming_state, Metric) else 1

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plots a value, or a list of values of `forward`; as every torchmetrics metric does, with matplotlib."""
        return self._plot(val, ax)

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        """As torchmetrics, but not traced by torch.compile, which would compile the step anew at each count of updates."""
        return torch.compiler.disable(super()._wrap_update(update))

    def _real_device(self) -> torch.device:
        """The default device; the CPU for a model that is built without memory, whose zeros would become anything."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Moves the states, but leaves their type, unless `set_dtype` asks for one."""

        def move(state: Tensor) -> Tensor:
            if self._dtype_convert and state.is_floating_point():
                return fn(state)
            device = fn(torch.empty(0, device=state.device)).device
            dtype = _sum_type(device) if state.dtype == torch.float64 else state.dtype
            if state.is_meta:  # holds no values; every state begins with zeros
                return torch.zeros(state.shape, dtype=dtype, device=device)
            return state.to(device, dtype)

        return super()._apply(move, exclude_state)


class MeanOverPositions(DiagnosticMetric):
    """Mean over all positions of all batches, each position with the same weight.

    Args:
        of: What is averaged, and every setting on which it depends: a part of the states' names.
        **kwargs: Those of `torchmetrics.Metric`.
    """

    def __init__(self, of: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._total, self._count = f"{of}_total", f"{of}_count"
        self.add_sum(self._total)
        self.add_count(self._count)

    def add(self, mean: Tensor, positions: int) -> None:
        """Takes in the mean over so many positions; over none it is not looked at."""
        if positions:
            total, count = getattr(self, self._total), getattr(self, self._count)
            setattr(self, self._total, total + mean.to(total.dtype) * positions)
            setattr(self, self._count, count + positions)

    def compute(self) -> Tensor:
        """The mean, float32 scalar."""
        return (getattr(self, self._total) / getattr(self, self._count)).float()
