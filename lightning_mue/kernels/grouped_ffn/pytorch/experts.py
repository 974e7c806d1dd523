"""The experts in plain PyTorch: a loop over blocks of experts, each a few GEMMs; on the CPU in worker threads.

Every block's rows are gathered into work buffers that are kept, and its weight gradients are written in place. No two blocks write
to the same memory. Where the CPU is slow at bfloat16, the buffers are float32, and what is bfloat16 is converted block by block.

Shape legend: T tokens, S rows sorted by expert, P rows in the padded layout of `blocks`, B experts of a block, C rows of
each, N = B * C, n those that are not padding, d width, h expert hidden width, E experts, G = 2 for gated activations (gate
first), else 1. A trailing 1 is a column.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.kernels.compute_type import bfloat16_is_slow
from lightning_mue.kernels.grouped_ffn.op import Problem
from lightning_mue.kernels.grouped_ffn.pytorch.blocks import Cutting, plan_blocks
from lightning_mue.kernels.grouped_ffn.pytorch.elementwise import ELEMENTWISE
from lightning_mue.kernels.scratch import Scratch, borrowed
from lightning_mue.kernels.workers import run_over_experts

#: FLOPs of a pass below which starting the workers would cost more than they gain.
_PARALLEL_FLOPS = 1e7
_BLOCKS_PER_THREAD = 4
_WEIGHTS = ("w_gate", "w_up", "w_down", "b_gate", "b_up")  # in the order of `Problem.trained`


def forward(p: Problem, keep: bool) -> tuple[Tensor, Tensor]:
    """As `grouped_ffn_op`."""
    run = _Forward(p, keep)
    return run.over_blocks(products=3, gates=p.gates), run.z


def backward(p: Problem, dy: Tensor, z: Tensor, weights: bool) -> list[Tensor]:
    """As `grouped_ffn_backward_op`."""
    run = _Backward(p, dy, z, weights)
    dx_Td = run.over_blocks(products=6 if weights else 3, gates=None)
    run.add_extra_parts()
    return [dx_Td, run.dgates_P[run.slots], *run.results]


def _product_dtype(x: Tensor) -> torch.dtype:
    """The type that matrices are multiplied in: x's, or float32 where that is faster in spite of conversions."""
    slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and bfloat16_is_slow()
    return torch.float32 if slow else x.dtype


def _cutting(x: Tensor, dtype: torch.dtype) -> Cutting:
    if x.device.type != "cpu":
        return Cutting(row_multiple=1, batch=False, parts=0)
    threads, low = torch.get_num_threads(), dtype in (torch.bfloat16, torch.float16)
    # 32: one step of AMX along the dimension that is summed over. MKL's float32 gains nothing from batches.
    return Cutting(row_multiple=32 if low else 1, batch=low, parts=_BLOCKS_PER_THREAD * threads if threads > 1 else 0)


class _Pass:
    """What both passes share: the layout, the loop over blocks, the sum over each token's rows."""

    def __init__(self, p: Problem) -> None:
        self.p, self.elementwise = p, ELEMENTWISE[p.activation]
        self.gated, self.hidden, self.width = ACTIVATIONS[p.activation].gated, p.w_up.shape[1], p.x.shape[1]
        ends = p.offsets.tolist()  # the one host synchronization of this backend
        self.n_routed = ends[-1]  # padding rows (masked tokens) follow
        self.dtype = _product_dtype(p.x)
        self.converts = self.dtype != p.x.dtype
        self.layout = plan_blocks(ends, len(p.order), self.hidden, _cutting(p.x, self.dtype))
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
        p, rows = self.p, [block.n_rows for block in self.layout.blocks]
        flops = 2 * products * sum(rows) * self.hidden * self.width
        like = p.x.new_empty(0, dtype=self.dtype)
        largest = self.hidden * self.width if self.converts else 0  # blocks are of one expert each then

        def work(indices: Iterable[int]) -> None:
            columns, longest = self.columns(), max(rows, default=0)
            size = longest * sum(columns.values())
            with borrowed("scratch", like, size) as flat, borrowed("weight", like, largest) as weight:
                scratch = Scratch(flat, columns, longest, weight)
                for i in indices:
                    self.block(scratch, i)

        # No mode is set here: an interrupt could leave the main thread in it. As an operator this runs below autograd.
        with borrowed("rows", like, self.layout.n_rows * self.width) as flat:
            rows_Pd = flat.view(-1, self.width)
            rows_Pd[self.idle_P].zero_()
            self.results_N = self.layout.by_padded_row(rows_Pd)
            run_over_experts(work, rows, parallel=p.x.device.type == "cpu" and flops > _PARALLEL_FLOPS)
            return self.combine(rows_Pd, gates)

    def combine(self, rows_Pd: Tensor, gates: Tensor | None) -> Tensor:
        """The sum over each token's rows in float32, weighted by the gates where given: [T, d], of x's type."""
        gates = None if gates is None else gates.to(rows_Pd.dtype).contiguous()
        bags = self.p.bags
        return F.embedding_bag(
            self.slots, rows_Pd, bags, mode="sum", per_sample_weights=gates, include_last_offset=bags is not None
        ).to(self.p.x.dtype)


class _Forward(_Pass):
    def __init__(self, p: Problem, keep: bool) -> None:
        super().__init__(p)
        self.keep = keep
        self.z = p.x.new_empty(len(p.up), len(p.order) if keep else 0, self.hidden)
        self.z[:, self.n_routed :].zero_()
        cut = self.layout.by_expert
        # Transposed at once: a view made between two GEMMs costs many microseconds. Not where a copy is transposed.
        turned = (lambda w: w) if self.converts else (lambda w: w.mT)
        self.weights = [cut(turned(w)) for w, _ in p.up]
        self.biases = [None if b is None else cut(b.unsqueeze(1)) for _, b in p.up]
        self.w_down = cut(turned(p.w_down))
        self.z_nh = [self.layout.by_sorted_row(plane) for plane in self.z] if keep else []
        self.slots_n = None if self.layout.slot_S is None else self.layout.by_sorted_row(self.layout.slot_S)

    def columns(self) -> dict[str, int]:
        return {"x": self.width, **dict.fromkeys(("z0", "z1", "a"), self.hidden)}

    def block(self, scratch: Scratch, i: int) -> None:
        shape = self.layout.blocks[i].shape
        x_BCd = _gather(scratch, "x", self.p.x, self.tokens_N[i], shape)
        z_BCh = [self._project(scratch, x_BCd, plane, i) for plane in range(len(self.weights))]
        a_BCh = self.elementwise.function(z_BCh[0], scratch.get("a", shape))
        if self.gated:
            torch.mul(a_BCh, z_BCh[1], out=a_BCh)
        torch.bmm(a_BCh, self._turned(scratch, self.w_down[i]), out=self.results_N[i].view(*shape, self.width))

    def _project(self, scratch: Scratch, x_BCd: Tensor, plane: int, i: int) -> Tensor:
        """One pre-activation, [B, C, h]; rows that are not padding are also written to z."""
        block, biases = self.layout.blocks[i], self.biases[plane]
        in_place = self.keep and not block.is_padded and not self.converts
        z_BCh = self.z_nh[plane][i].view(*block.shape, -1) if in_place else scratch.get(f"z{plane}", block.shape)
        torch.bmm(x_BCd, self._turned(scratch, self.weights[plane][i]), out=z_BCh)
        if biases is not None:
            z_BCh.add_(biases[i])
        if self.keep and block.is_padded and self.slots_n is not None:
            slots_n = self.slots_n[i] - block.padded.start
            torch.index_select(z_BCh.view(-1, self.hidden), 0, slots_n, out=self.z_nh[plane][i])
        elif self.keep and self.converts:
            self.z_nh[plane][i].copy_(z_BCh[0])
        return z_BCh

    def _turned(self, scratch: Scratch, weight: Tensor) -> Tensor:
        """A block's weight, transposed, in the type of products."""
        return scratch.converted(weight).mT if self.converts else weight


class _Backward(_Pass):
    def __init__(self, p: Problem, dy: Tensor, z: Tensor, weights: bool) -> None:
        # Gradients of fused weights are views of one tensor: joining two would write each element once more (not timed).
        self.results = [torch.empty_like(t) for t in p.trained[2:]] if weights else []
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
        self.grads: dict[str, Tensor] = {name: views[name] for name in trained} if weights else {}
        for e in layout.empty_experts(len(p.w_up)):
            for grad in self.grads.values():
                grad[e].zero_()
        self.parts = {name: layout.by_expert(t) for name, t in trained.items()}
        n_extra = len(layout.extra_parts)
        self.extra = {name: t.new_empty(n_extra, 1, *t.shape[1:]) for name, t in self.grads.items() if n_extra}
        self.grad_parts = {name: self._grad_parts(name) for name in self.grads}
        self.z_nh = [layout.by_sorted_row(plane) for plane in z]
        self.source_N = None if layout.source_P is None else layout.by_padded_row(layout.source_P)

    def _grad_parts(self, name: str) -> list[Tensor]:
        """Where each block writes this weight's gradient."""
        parts = list(self.layout.by_expert(self.grads[name]))
        for i, block in enumerate(self.layout.blocks):
            if block.part:
                parts[i] = self.extra[name][block.part - 1]
        return parts

    def add_extra_parts(self) -> None:
        """Add up the gradients of the parts of each split expert, in order."""
        for block in self.layout.extra_parts:
            for name, grad in self.grads.items():
                grad[block.experts] += self.extra[name][block.part - 1]

    def columns(self) -> dict[str, int]:
        names = ["da", "a", "dz0", "dz1", *(["z0", "z1"] if self.source_N is not None or self.converts else [])]
        return {"x": self.width, "dy": self.width, **dict.fromkeys(names, self.hidden)}

    def block(self, scratch: Scratch, i: int) -> None:
        shape = self.layout.blocks[i].shape
        x_BCd = _gather(scratch, "x", self.p.x, self.tokens_N[i], shape)
        dy_BCd = _gather(scratch, "dy", self.dy, self.tokens_N[i], shape)
        da_BCh, a_BCh = scratch.get("da", shape), scratch.get("a", shape)
        names = ("gate", "up") if self.gated else ("up",)
        dz = {name: scratch.get(f"dz{plane}", shape) for plane, name in enumerate(names)}
        torch.bmm(dy_BCd, self._weight(scratch, "w_down", i), out=da_BCh)
        self._differentiate(scratch, i, da_BCh, a_BCh, list(dz.values()))
        if self.grads:
            self._write_grad(scratch, "w_down", i, dy_BCd, a_BCh)
        dx_BCd = self.results_N[i].view(*shape, self.width)
        for name, dz_BCh in dz.items():
            if self.grads:
                self._write_grad(scratch, f"w_{name}", i, dz_BCh, x_BCd)
            if f"b_{name}" in self.grads:
                grad = self.grad_parts[f"b_{name}"][i]
                grad.copy_(dz_BCh.sum(1)) if self.converts else torch.sum(dz_BCh, 1, out=grad)
            weight = self._weight(scratch, f"w_{name}", i)
            dx_BCd.baddbmm_(dz_BCh, weight) if name != names[0] else torch.bmm(dz_BCh, weight, out=dx_BCd)

    def _weight(self, scratch: Scratch, name: str, i: int) -> Tensor:
        """A block's weight in the type of products."""
        return scratch.converted(self.parts[name][i]) if self.converts else self.parts[name][i]

    def _write_grad(self, scratch: Scratch, name: str, i: int, left: Tensor, right: Tensor) -> None:
        """Write ``left^T right``, a weight's gradient."""
        grad = self.grad_parts[name][i]
        if self.converts:
            grad.copy_(torch.bmm(left.mT, right, out=scratch.weight_like(grad)))
        else:
            torch.bmm(left.mT, right, out=grad)

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
        return _gather(scratch, f"z{plane}", self.z[plane], self.source_N[i], block.shape)


def _gather(scratch: Scratch, name: str, source: Tensor, index_N: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows of `source`, [*shape, columns]."""
    out_BCc = scratch.get(name, shape)
    if out_BCc.dtype != source.dtype:
        return out_BCc.copy_(source.index_select(0, index_N).view_as(out_BCc))
    torch.index_select(source, 0, index_N, out=out_BCc.view(len(index_N), -1))
    return out_BCc
