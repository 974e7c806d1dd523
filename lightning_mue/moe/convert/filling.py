"""Fills the weights of a layer: copies from a dense network, noise, redrawn units, the router.

Shape legend: d width, h hidden width of the dense network, e of one expert, E experts, P parts of the network (1: all of it),
m hidden units of the shared expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.moe.base import MoEBase
from lightning_mue.moe.convert.dense_ffn import DenseFFN


@dataclass(frozen=True)
class Cut:
    """Which hidden units of the dense network go where: [P, e] to each part, [m] to the shared expert."""

    units_Pe: Tensor
    shared_units: Tensor

    @property
    def parts(self) -> int:
        """P, the number of parts into which the hidden units are cut."""
        return self.units_Pe.shape[0]

    @property
    def width(self) -> int:
        """Hidden width of one part."""
        return self.units_Pe.shape[1]


def permutation(ffn: DenseFFN, generator: torch.Generator | None) -> Tensor:
    """A random order of the hidden units, on the CPU."""
    return torch.randperm(
        len(ffn.w_up), generator=generator, device=None if generator is None else generator.device
    ).cpu()


def fill_experts(layer: MoEBase, ffn: DenseFFN, cut: Cut, factor: float) -> None:
    """Copies every part into its experts, and the shared units into the shared expert; `factor` scales the experts' outputs."""
    experts, copies, shared = layer.experts, layer.n_experts // cut.parts, layer.shared
    for expert in range(layer.n_experts):
        _fill(experts, expert, ffn, cut.units_Pe[expert // copies], factor)
    if experts.b_down is not None:
        with_shared = 0.0 if shared is not None else factor / cut.parts
        experts.b_down.copy_(torch.zeros_like(experts.b_down) if ffn.b_down is None else with_shared * ffn.b_down)
    if shared is not None:
        balance = math.sqrt(2) if layer.router.gate == "sqrt" else 1.0
        _fill(shared, ..., ffn, cut.shared_units, balance)
        if shared.b_down is not None:
            shared.b_down.copy_(torch.zeros_like(shared.b_down) if ffn.b_down is None else balance * ffn.b_down)


def _fill(target: nn.Module, index: Any, ffn: DenseFFN, units: Tensor, factor: float) -> None:
    """Copies some hidden units into one expert, without the output's bias, which belongs to no hidden unit."""
    units = units.to(ffn.w_up.device)
    for name in ("w_gate", "w_up", "b_gate", "b_up"):
        parameter, source = getattr(target, name), getattr(ffn, name)
        if parameter is not None:
            parameter[index] = 0.0 if source is None else source[units]
    target.w_down[index] = ffn.w_down[:, units] * factor  # type: ignore[index,operator]


def _matrices(layer: MoEBase, ffn: DenseFFN, factor: float) -> list[tuple[Tensor, Tensor, float, int]]:
    """For every stack of matrices: (stack, its source, the source's factor, the matrix dimension of the hidden units)."""
    pairs = [(layer.experts.w_up, ffn.w_up, 1.0, 0), (layer.experts.w_down, ffn.w_down, factor, 1)]
    if ffn.w_gate is not None and layer.experts.w_gate is not None:
        pairs.append((layer.experts.w_gate, ffn.w_gate, 1.0, 0))
    return pairs  # type: ignore[return-value]


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like.device)


def add_noise(layer: MoEBase, ffn: DenseFFN, std: float, factor: float, generator: torch.Generator | None) -> None:
    """Adds normal noise of `std` times the source's standard deviation to every matrix of every expert."""
    for stack, source, scale, _ in _matrices(layer, ffn, factor):
        for matrix in stack:  # one by one: noise for all experts at once would take as much memory as they do
            matrix += (std * scale * source.float().std() * _normal(matrix, generator)).to(matrix.dtype)


def redraw_units(
    layer: MoEBase, ffn: DenseFFN, fraction: float, factor: float, generator: torch.Generator | None
) -> None:
    """Draws a fraction of each expert's hidden units anew, with the mean and standard deviation of each source matrix."""
    matrices = _matrices(layer, ffn, factor)
    for expert in range(layer.n_experts):
        units = permutation(ffn, generator)[: round(fraction * len(ffn.w_up))].to(ffn.w_up.device)
        for stack, source, scale, dim in matrices:
            old, values = stack[expert].index_select(dim, units), source.float()
            new = scale * (values.mean() + values.std() * _normal(old, generator))
            stack[expert].index_copy_(dim, units, new.to(old.dtype))


def draw_router(layer: MoEBase, cut: Cut, top_k: int, generator: torch.Generator | None) -> None:
    """Draws the router's rows; the same rows for every part if a token can have all parts equally often."""
    router, copies = layer.router, layer.n_experts // cut.parts
    tied = top_k % cut.parts == 0  # otherwise ties would give all tokens the same parts
    rows = _normal(router.weight[:copies] if tied else router.weight, generator)
    std = router.width**-0.5 if router.init_std is None else router.init_std
    router.weight.copy_(std * (rows.repeat(cut.parts, 1) if tied else rows))
