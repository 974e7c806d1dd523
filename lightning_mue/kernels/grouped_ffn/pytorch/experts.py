"""The experts in plain PyTorch: a loop over blocks of experts, each a few GEMMs; on the CPU in worker threads.

Every block's rows are gathered into work buffers that are kept, and its weight gradients are written in place. No two blocks write
to the same memory. Where the CPU is slow at bfloat16, the buffers are float32, and what is bfloat16 is converted block by block.

Shape legend: T tokens, S rows sorted by expert, P rows in the padded layout of `blocks`, B experts of a block, C rows of
each, N = B * C, n those that are not padding, d width, h expert hidden width, E experts, G = 2 for gated activations (gate
first), else 1. A trailing 1 is a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.kernels.compute_type import bfloat16_is_slow
from lightning_mue.kernels.grouped_ffn.op import Problem
from lightning_mue.kernels.grouped_ffn.pytorch.blocks import plan_blocks
from lightning_mue.kernels.grouped_ffn.pytorch.elementwise import ELEMENTWISE
from lightning_mue.kernels.grouped_ffn.pytorch.running import (
    WeightGradients,
    cutting,
    gather,
    outer_product,
    packed,
    run_blocks,
)
from lightning_mue.kernels.scratch import Scratch, borrowed, in_large_pages

_WEIGHTS = ("w_gate", "w_up", "w_down", "b_gate", "b_up")  # in the order of `Problem.trained`


def forward(p: Problem, keep: bool) -> tuple[Tensor, Tensor]:
    """As `grouped_ffn_op`."""
    run = _Forward(p, keep)
    return run.over_blocks(products=3, gates=p.gates), run.z


def backward(p: Problem, dy: Tensor, z: Tensor, weights: bool) -> list[Tensor]:
    """As `grouped_ffn_backward_op`."""
    run = _Backward(p, dy, z, weights)
    dx_Td = run.over_blocks(products=6 if weights else 3, gates=None)
    run.grads.add_up()
    return [dx_Td, run.dgates_P[run.slots], *run.results]


def _product_dtype(x: Tensor) -> torch.dtype:
    """The type that matrices are multiplied in: x's, or float32 where that is faster in spite of conversions."""
    slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and bfloat16_is_slow()
    return torch.float32 if slow else x.dtype


class _Pass:
    """What both passes share: the layout, the loop over blocks, the sum over each token's rows."""

    def __init__(self, p: Problem) -> None:
        self.p, self.elementwise = p, ELEMENTWISE[p.activation]
        self.gated, self.hidden, self.width = ACTIVATIONS[p.activation].gated, p.w_up.shape[1], p.x.shape[1]
        ends = p.offsets.tolist()  # the one host synchronization of this backend
        self.n_routed = ends[-1]  # padding rows (masked tokens) follow
        self.dtype = _product_dtype(p.x)
        self.converts = self.dtype != p.x.dtype
        self.layout = plan_blocks(ends, len(p.order), self.hidden, cutting(p.x, self.dtype))
        source_P, slot_S = self.layout.source_P, self.layout.slot_S
        self.slots = p.inverse if slot_S is None else slot_S[p.inverse]  # the padded row of each assignment
        self.tokens_N = self.layout.by_padded_row(p.tokens if source_P is None else p.tokens[source_P])
        self.results_N: Sequence[Tensor] = []

    @property
    def idle_P(self) -> slice:
        """The masked rows, in the padded layout."""
        return slice(self.layout.n_rows - len(self.p.order) + self.n_routed, self.layout.n_rows)

    def columns(self) -> dict[str, int]:
        """Names and widths of the work buffers."""
        raise NotImplementedError

    def block(self, scratch: Scratch, i: int) -> None:
        """Compute block i; its rows of the result go to ``results_N[i]``."""
        raise NotImplementedError

    def over_blocks(self, products: int, gates: Tensor | None) -> Tensor:
        """Compute all blocks, each `products` GEMMs of [N, d, h], and sum their rows: [T, d]."""
        flops = 2 * products * self.layout.n_rows * self.hidden * self.width
        like = self.p.x.new_empty(0, dtype=self.dtype)
        largest = self.hidden * self.width if self.converts else 0  # blocks are of one expert each then
        # No mode is set here: an interrupt could leave the main thread in it. As an operator this runs below autograd.
        with borrowed("rows", like, self.layout.n_rows * self.width) as flat:
            rows_Pd = flat.view(-1, self.width)
            rows_Pd[self.idle_P].zero_()
            self.results_N = self.layout.by_padded_row(rows_Pd)
            run_blocks(self.layout, like, self.columns(), self.block, flops, largest)
            return self.combine(rows_Pd, gates)

    def combine(self, rows_Pd: Tensor, gates: Tensor | None) -> Tensor:
        """The sum over each token's rows in float32, weighted by the gates where given: [T, d], of x's type."""
        gates = None if gates is None else gates.to(rows_Pd.dtype).contiguous()
        bags = self.p.bags
        return F.embedding_bag(
            self.slots, rows_Pd, bags, mode="sum", per_sample_weights=gates, include_last_offset=bags is not None
        ).to(self.p.x.dtype)

    def in_type(self, scratch: Scratch, weight: Tensor) -> Tensor:
        """A block's weight in the type of products; a converted one lasts until the next."""
        return scratch.converted(weight) if self.converts else packed(weight)


class _Forward(_Pass):
    def __init__(self, p: Problem, keep: bool) -> None:
        super().__init__(p)
        self.keep = keep
        self.z = in_large_pages(p.x.new_empty(len(p.up), len(p.order) if keep else 0, self.hidden))
        self.z[:, self.n_routed :].zero_()
        cut = self.layout.by_expert
        self.weights = [cut(w) for w, _ in p.up]
        self.biases = [None if b is None else cut(b.unsqueeze(1)) for _, b in p.up]
        self.w_down = cut(p.w_down)
        self.z_nh = [self.layout.by_sorted_row(plane) for plane in self.z] if keep else []
        self.slots_n = None if self.layout.slot_S is None else self.layout.by_sorted_row(self.layout.slot_S)

    def columns(self) -> dict[str, int]:
        return {"x": self.width, **dict.fromkeys(("z0", "z1", "a"), self.hidden)}

    def block(self, scratch: Scratch, i: int) -> None:
        shape = self.layout.blocks[i].shape
        x_BCd = gather(scratch, "x", self.p.x, self.tokens_N[i], shape)
        z_BCh = [self._project(scratch, x_BCd, plane, i) for plane in range(len(self.weights))]
        a_BCh = self.elementwise.function(z_BCh[0], scratch.get("a", shape))
        if self.gated:
            torch.mul(a_BCh, z_BCh[1], out=a_BCh)
        torch.bmm(a_BCh, self.in_type(scratch, self.w_down[i]).mT, out=self.results_N[i].view(*shape, self.width))

    def _project(self, scratch: Scratch, x_BCd: Tensor, plane: int, i: int) -> Tensor:
        """One pre-activation, [B, C, h]; rows that are not padding are also written to z."""
        block, biases = self.layout.blocks[i], self.biases[plane]
        in_place = self.keep and not block.is_padded and not self.converts
        z_BCh = self.z_nh[plane][i].view(*block.shape, -1) if in_place else scratch.get(f"z{plane}", block.shape)
        torch.bmm(x_BCd, self.in_type(scratch, self.weights[plane][i]).mT, out=z_BCh)
        if biases is not None:
            z_BCh.add_(biases[i])
        if self.keep and block.is_padded and self.slots_n is not None:
            slots_n = self.slots_n[i] - block.padded.start
            torch.index_select(z_BCh.view(-1, self.hidden), 0, slots_n, out=self.z_nh[plane][i])
        elif self.keep and self.converts:
            self.z_nh[plane][i].copy_(z_BCh[0])
        return z_BCh


class _Backward(_Pass):
    def __init__(self, p: Problem, dy: Tensor, z: Tensor, weights: bool) -> None:
        # Gradients of fused weights are views of one tensor: joining two would write each element once more (not timed).
        self.results = [in_large_pages(torch.empty_like(t)) for t in p.trained[2:]] if weights else []
        whole: dict[str, Any] = dict(
            zip([n for n in _WEIGHTS if getattr(p, n) is not None], self.results, strict=False)
        )
        views = p._replace(**whole).separated()._asdict() if weights else {}
        p = p.separated()
        super().__init__(p)
        layout = self.layout
        self.dy, self.z = dy, z
        gates_S1 = p.gates.flatten()[p.order].to(self.dtype)[:, None]
        if layout.source_P is not None and layout.real_P is not None:
            gates_S1 = gates_S1[layout.source_P].mul_(layout.real_P[:, None])
        self.gates_N1 = layout.by_padded_row(gates_S1)
        self.dgates_P = p.gates.new_empty(layout.n_rows)
        self.dgates_P[self.idle_P].zero_()
        self.dgates_N = layout.by_padded_row(self.dgates_P)
        trained = {name: t for name, t in p._asdict().items() if name[:2] in ("w_", "b_") and t is not None}
        self.parts = {name: layout.by_expert(t) for name, t in trained.items()}
        self.grads = WeightGradients(layout, {name: views[name] for name in trained} if weights else {})
        self.z_nh = [layout.by_sorted_row(plane) for plane in z]
        self.source_N = None if layout.source_P is None else layout.by_padded_row(layout.source_P)

    def columns(self) -> dict[str, int]:
        names = ["da", "a", "dz0", "dz1", *(["z0", "z1"] if self.source_N is not None or self.converts else [])]
        return {"x": self.width, "dy": self.width, **dict.fromkeys(names, self.hidden)}

    def block(self, scratch: Scratch, i: int) -> None:
        shape = self.layout.blocks[i].shape
        x_BCd = gather(scratch, "x", self.p.x, self.tokens_N[i], shape)
        dy_BCd = gather(scratch, "dy", self.dy, self.tokens_N[i], shape)
        da_BCh, a_BCh = scratch.get("da", shape), scratch.get("a", shape)
        names = ("gate", "up") if self.gated else ("up",)
        dz = {name: scratch.get(f"dz{plane}", shape) for plane, name in enumerate(names)}
        torch.bmm(dy_BCd, self.in_type(scratch, self.parts["w_down"][i]), out=da_BCh)
        self._differentiate(scratch, i, da_BCh, a_BCh, list(dz.values()))
        if self.grads.parts:
            outer_product(dy_BCd, a_BCh, self.grads.parts["w_down"][i], scratch)
        dx_BCd = self.results_N[i].view(*shape, self.width)
        for name, dz_BCh in dz.items():
            if self.grads.parts:
                outer_product(dz_BCh, x_BCd, self.grads.parts[f"w_{name}"][i], scratch)
            if f"b_{name}" in self.grads.parts:
                grad = self.grads.parts[f"b_{name}"][i]
                grad.copy_(dz_BCh.sum(1)) if self.converts else torch.sum(dz_BCh, 1, out=grad)
            weight = self.in_type(scratch, self.parts[f"w_{name}"][i])
            dx_BCd.baddbmm_(dz_BCh, weight) if name != names[0] else torch.bmm(dz_BCh, weight, out=dx_BCd)

    def _differentiate(self, scratch: Scratch, i: int, da_BCh: Tensor, a_BCh: Tensor, dz_BCh: list[Tensor]) -> None:
        """Turn da (without gates) into gate * a, the gradients of the pre-activations and those of the gates."""
        shape = self.layout.blocks[i].shape
        z_BCh = [self._saved(scratch, plane, i) for plane in range(len(self.z))]
        gates_BC1, dgates_BC = self.gates_N1[i].view(*shape, 1), self.dgates_N[i].view(shape)
        f_BCh = self.elementwise.function(z_BCh[0], dz_BCh[0] if self.gated else a_BCh)
        if self.gated:
            torch.mul(f_BCh, z_BCh[1], out=a_BCh)
        torch.sum(torch.mul(a_BCh, da_BCh, out=dz_BCh[-1]), 2, dtype=dgates_BC.dtype, out=dgates_BC)
        a_BCh.mul_(gates_BC1)
        da_BCh.mul_(gates_BC1)
        if self.gated:
            torch.mul(da_BCh, f_BCh, out=dz_BCh[1])
            da_BCh.mul_(z_BCh[1])
        self.elementwise.derivative(da_BCh, z_BCh[0], dz_BCh[0])

    def _saved(self, scratch: Scratch, plane: int, i: int) -> Tensor:
        """One pre-activation of the block's rows, [B, C, h]."""
        block = self.layout.blocks[i]
        if not block.is_padded or self.source_N is None:
            z_BCh = self.z_nh[plane][i].view(*block.shape, self.hidden)
            return scratch.get(f"z{plane}", block.shape).copy_(z_BCh) if self.converts else z_BCh
        return gather(scratch, f"z{plane}", self.z[plane], self.source_N[i], block.shape)
