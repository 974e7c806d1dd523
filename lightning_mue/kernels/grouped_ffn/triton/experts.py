"""The experts on Triton: the order of the kernels. Grids depend on shapes alone; the host reads nothing about the routing.

Forward   up        x by index -> z, a                          up.py
          down      a -> a row of d per assignment              rows.py
          combine   rows -> tokens, by gates                    kernels/combine/triton.py
Backward  hidden    dy by index, z -> dz, gate * a, dgates      hidden.py
          dx        dz -> a row of d per assignment -> tokens   rows.py, kernels/combine/triton.py
          dw        dz, x by index; gate * a, dy by index       weights.py

Shape legend: T tokens, K experts per token, S rows sorted by expert, d width, h expert hidden width, E experts, G planes of z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from lightning_mue.kernels.combine.triton import launch_combine, launch_gather
from lightning_mue.kernels.grouped_ffn.op import Problem
from lightning_mue.kernels.grouped_ffn.triton.hidden import launch_hidden
from lightning_mue.kernels.grouped_ffn.triton.rows import launch_rows
from lightning_mue.kernels.grouped_ffn.triton.tile_map import TileMap, tile_rows
from lightning_mue.kernels.grouped_ffn.triton.tilings import ExpertTiling, TilingKey
from lightning_mue.kernels.grouped_ffn.triton.tuning import launch_chosen
from lightning_mue.kernels.grouped_ffn.triton.up import launch_up
from lightning_mue.kernels.grouped_ffn.triton.weights import launch_bias, launch_weights
from lightning_mue.kernels.triton_tools.launching import INTERPRETED, new_like, numerics

__all__ = ["INTERPRETED", "backward", "forward"]


def forward(problem: Problem, keep: bool) -> tuple[Tensor, Tensor]:
    """As `grouped_ffn_op`."""
    p = _dense(problem)
    y = new_like(problem.x)
    if not len(p.order):
        return y.zero_(), p.x.new_zeros(len(p.up), 0, p.w_up.shape[1])
    tiles = Tiles(p)
    with torch.cuda.device_of(p.x):  # Triton launches on the current device
        a, z = tiles.run("up", lambda tiling: launch_up(p, tiles(tiling), keep, tiling))
        rows = tiles.run("down", lambda tiling: launch_rows(a[None], (p.w_down,), tiles(tiling), tiling, k_last=True))
        launch_combine(rows, p.inverse, p.offsets, p.bags, p.gates, y)
    return y, z


def backward(problem: Problem, dy: Tensor, z: Tensor, weights: bool) -> list[Tensor]:
    """As `grouped_ffn_backward_op`."""
    p, dy, z = _dense(problem), dy.contiguous(), z.contiguous()
    grads = [new_like(t) for t in (problem.trained if weights else problem.trained[:2])]
    if not len(p.order):
        return [grad.zero_() for grad in grads]
    tiles = Tiles(p)
    with torch.cuda.device_of(p.x):
        dz, weighted, parts = tiles.run(
            "hidden", lambda tiling: launch_hidden(p, dy, z, tiles(tiling), weights, tiling)
        )
        dgates = launch_gather(parts, p.inverse, p.offsets)
        grads[1] = dgates if dgates.stride() == grads[1].stride() else grads[1].copy_(dgates)
        up = tuple(weight for weight, _ in p.up)
        rows = tiles.run("dx", lambda tiling: launch_rows(dz, up, tiles(tiling), tiling, k_last=False))
        launch_combine(rows, p.inverse, p.offsets, p.bags, None, grads[0])
        del rows
        if weights:
            _weight_gradients(p, dy, dz, weighted, tiles, grads[2:])
    return grads


def _weight_gradients(p: Problem, dy: Tensor, dz: Tensor, weighted: Tensor, tiles: Tiles, grads: list[Tensor]) -> None:
    """Write the gradients of the weights and biases, in `Problem.trained`'s order."""
    *dw_up, dw_down = grads[: len(dz) + 1]
    tiles.run("dw", lambda tiling: launch_weights(dz, p.x, p.tokens, p.offsets, tuple(dw_up), tiling))
    dw_dh = (dw_down.mT,)
    tiles.run("dw_down", lambda tiling: launch_weights(weighted[None], dy, p.tokens, p.offsets, dw_dh, tiling))
    biased = [plane for plane, (_, bias) in zip(dz, p.up, strict=True) if bias is not None]
    for plane, grad in zip(biased, grads[len(dz) + 1 :], strict=True):
        launch_bias(plane, p.offsets, grad)


class Tiles:
    """Chooses tilings for a problem, and makes each table of tiles once."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.maps: dict[int, TileMap] = {}
        experts, h, d = p.w_up.shape
        mean = triton.next_power_of_2(-(-len(p.order) // experts))
        self.key = ("", p.activation, mean, experts, d, h, p.x.dtype, numerics(p.x)["PRECISION"], p.x.device)

    def __call__(self, tiling: ExpertTiling) -> TileMap:
        """Return the table for a tiling."""
        if tiling.rows not in self.maps:
            self.maps[tiling.rows] = tile_rows(self.p.offsets, len(self.p.order), tiling.rows)
        return self.maps[tiling.rows]

    def run(self, kernel: str, launch: Callable[[ExpertTiling], Any]) -> Any:
        """Launch with the tiling that is chosen for this kernel."""
        return launch_chosen(TilingKey(kernel, *self.key[1:]), launch)


def _dense(p: Problem) -> Problem:
    """The same problem, with contiguous rows of x, gates and biases; weights are not copied."""
    x = p.x if p.x.stride(1) == 1 or not p.x.numel() else p.x.contiguous()
    b_gate, b_up = (None if b is None else b.contiguous() for b in (p.b_gate, p.b_up))
    return p._replace(x=x, gates=p.gates.contiguous(), inverse=p.inverse.contiguous(), b_gate=b_gate, b_up=b_up)
