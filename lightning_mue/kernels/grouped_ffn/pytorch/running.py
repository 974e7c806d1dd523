"""What every pass over blocks shares: how rows are cut, the loop in worker threads, where weight gradients are written.

Shape legend: B experts of a block, C rows of each, N = B * C, i and o input and output width, E experts. A trailing c is any
number of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lightning_mue.kernels.grouped_ffn.pytorch.blocks import Cutting, RowLayout
from lightning_mue.kernels.scratch import Scratch, borrowed
from lightning_mue.kernels.workers import run_over_experts

#: FLOPs of a pass below which starting the workers would cost more than they gain.
_PARALLEL_FLOPS = 1e7
_BLOCKS_PER_THREAD = 4


def cutting(x: Tensor, dtype: torch.dtype | None = None) -> Cutting:
    """How rows are cut on x's device, with this many threads, for products in a type (x's, if None)."""
    if x.device.type != "cpu":
        return Cutting(row_multiple=1, batch=False, parts=0)
    threads, low = torch.get_num_threads(), (dtype or x.dtype) in (torch.bfloat16, torch.float16)
    # 32: one step of AMX along the dimension that is summed over. MKL's float32 gains nothing from batches.
    return Cutting(row_multiple=32 if low else 1, batch=low, parts=_BLOCKS_PER_THREAD * threads if threads > 1 else 0)


def run_blocks(
    layout: RowLayout,
    like: Tensor,
    columns: Mapping[str, int],
    block: Callable[[Scratch, int], None],
    flops: float,
    largest_weight: int = 0,
) -> None:
    """Call `block` with work buffers and the number of each block, in worker threads where `flops` are many.

    Args:
        layout: Of the blocks.
        like: Of the buffers' type and device.
        columns: Names and widths of the buffers, each as long as the longest block.
        block: Writes its results to places of its own.
        flops: Of all blocks.
        largest_weight: Elements of the largest weight that a block converts.
    """
    rows = [each.n_rows for each in layout.blocks]

    def work(indices: Iterable[int]) -> None:
        longest = max(rows, default=0)
        size = longest * sum(columns.values())
        with borrowed("scratch", like, size) as flat, borrowed("weight", like, largest_weight) as weight:
            scratch = Scratch(flat, columns, longest, weight)
            for i in indices:
                block(scratch, i)

    run_over_experts(work, rows, parallel=like.device.type == "cpu" and flops > _PARALLEL_FLOPS)


def gather(scratch: Scratch, name: str, source: Tensor, index_N: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows of `source`, [B, C, c], in the type of the buffers."""
    out_BCc = scratch.get(name, shape)
    if out_BCc.dtype != source.dtype:
        return out_BCc.copy_(source.index_select(0, index_N).view_as(out_BCc))
    torch.index_select(source, 0, index_N, out=out_BCc.view(len(index_N), -1))
    return out_BCc


def packed(w_Boi: Tensor) -> Tensor:
    """The same weights without gaps, in rows or in columns as they are; as given in float32 and float64.

    oneDNN takes low-precision batches without gaps alone, and PyTorch fills others into rows: an expert's half of fused weights
    in its other orientation, 9 % of a training step of wide experts. One matrix needs no copy, only another stride.
    """
    if w_Boi.dtype not in (torch.bfloat16, torch.float16):
        return w_Boi
    if w_Boi.stride(-1) != 1:
        return packed(w_Boi.mT).mT if w_Boi.stride(-2) == 1 else w_Boi
    n_batch, n_out, n_in = w_Boi.shape
    if n_batch == 1 and w_Boi.stride(1) == n_in:
        return w_Boi.as_strided(w_Boi.shape, (n_out * n_in, n_in, 1))
    return w_Boi.contiguous()


def outer_product(dy_BCo: Tensor, x_BCi: Tensor, out_Boi: Tensor, scratch: Scratch | None = None) -> None:
    """Write ``dy^T x`` whichever way the result lies, in rows or (for weights kept transposed) in columns.

    A low-precision product written into columns leaves the library: measured 2000 times as slow on AVX512-BF16. A result
    of another type goes through `scratch`.
    """
    if scratch is not None and out_Boi.dtype != dy_BCo.dtype:
        out_Boi.copy_(torch.bmm(dy_BCo.mT, x_BCi, out=scratch.weight_like(out_Boi)))
    elif out_Boi.stride(-1) == 1:
        torch.bmm(dy_BCo.mT, x_BCi, out=out_Boi)
    else:
        torch.bmm(x_BCi.mT, dy_BCo, out=out_Boi.mT)


class WeightGradients:
    """Where each block writes the gradients of its experts' weights.

    Attributes:
        parts: By name, of each block, [B, ...]: in place, or for a further part of an expert in a tensor of its own.
    """

    def __init__(self, layout: RowLayout, grads: Mapping[str, Tensor]) -> None:
        """`grads` are [E, ...], of undefined content; those of experts without rows become zero."""
        self._layout, self._grads = layout, grads
        n_extra = len(layout.extra_parts)
        self._extra = {name: t.new_empty(n_extra, 1, *t.shape[1:]) for name, t in grads.items() if n_extra}
        self.parts = {name: self._parts(name) for name in grads}
        for grad in grads.values():
            for e in layout.empty_experts(len(grad)):
                grad[e].zero_()

    def _parts(self, name: str) -> list[Tensor]:
        parts = list(self._layout.by_expert(self._grads[name]))
        for i, block in enumerate(self._layout.blocks):
            if block.part:
                parts[i] = self._extra[name][block.part - 1]
        return parts

    def add_up(self) -> None:
        """Add up the gradients of the parts of each split expert, in order."""
        for block in self._layout.extra_parts:
            for name, grad in self._grads.items():
                grad[block.experts] += self._extra[name][block.part - 1]
