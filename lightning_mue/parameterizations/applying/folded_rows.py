"""Rows of a weight that carry a forward multiplier: drawn with it, and trained as if it stood behind them.

For a weight W whose rows carry the factor m, an optimizer sees the weight W' = W / m and its gradient dL/dW' = m dL/dW, in
every family the same as for a module that multiplies by m itself (docs/theory.md section 2). Between its steps there is W alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mue.parameterizations.applying.drawing import local_part
from lightning_mue.parameterizations.planning.parameter_plan import FoldedRows, ParameterPlan
from lightning_mue.sharded import local


def row_indices(tensor: Tensor, entry: ParameterPlan, rows: FoldedRows) -> Tensor:
    """Which indices along ``rows.dim`` of this rank's part carry the multiplier, int64, ascending."""
    part, offset = local_part(tensor, entry.name)
    index = torch.arange(part.shape[rows.dim]) + offset[rows.dim]
    return (index % rows.period < rows.count).nonzero().flatten().to(part.device)


@torch.no_grad()
def multiply_rows(tensor: Tensor, entry: ParameterPlan) -> None:
    """Multiplies the rows of a parameter that has just been drawn by the factor that they carry."""
    if entry.rows is None or entry.init.kind == "keep":
        return
    part = local(tensor)
    index = row_indices(tensor, entry, entry.rows)
    part.index_copy_(entry.rows.dim, index, part.index_select(entry.rows.dim, index) * entry.rows.factor)


class _Out(NamedTuple):
    """What is needed to fold one parameter's rows again."""

    parameter: Tensor
    gradient: Tensor
    rows: FoldedRows
    places: Tensor
    weight: Tensor  # with the multiplier, before the step
    unfolded: Tensor  # without it
    slope: Tensor  # the gradient's rows, as they were


class RowFolds:
    """Takes the multipliers out of the rows of some parameters for an optimizer's step, and puts them back.

    Args:
        entries: Parameters with their plans; those without rows are left alone.
    """

    def __init__(self, entries: Iterable[tuple[Tensor, ParameterPlan]]) -> None:
        self._all = [
            (parameter, entry.rows, row_indices(parameter, entry, entry.rows))
            for parameter, entry in entries
            if entry.rows is not None
        ]
        self._out: list[_Out] = []

    @torch.no_grad()
    def unfold(self) -> None:
        """Divides the rows by their factor and multiplies their gradients by it; parameters without a gradient keep theirs."""
        for parameter, rows, index in self._all:
            if parameter.grad is None or not parameter.requires_grad:
                continue
            weight, gradient = local(parameter), local(parameter.grad)
            old, slope = weight.index_select(rows.dim, index), gradient.index_select(rows.dim, index)
            unfolded = old / rows.factor
            self._out.append(_Out(parameter, parameter.grad, rows, index, old, unfolded, slope))
            weight.index_copy_(rows.dim, index, unfolded)
            gradient.index_copy_(rows.dim, index, slope * rows.factor)

    @torch.no_grad()
    def fold(self) -> None:
        """Adds ``factor`` times the step to the rows as they were, and restores the gradients; does nothing if they are in."""
        out, self._out = self._out, []
        for parameter, gradient, rows, index, old, unfolded, slope in out:
            weight = local(parameter)
            math = torch.float64 if old.dtype == torch.float64 else torch.float32
            # The step, not the weight, is multiplied: a weight of few bits would otherwise change by rounding alone.
            step = weight.index_select(rows.dim, index).to(math) - unfolded.to(math)
            weight.index_copy_(rows.dim, index, (old.to(math) + rows.factor * step).to(old.dtype))
            if parameter.grad is gradient:
                local(gradient).index_copy_(rows.dim, index, slope)
