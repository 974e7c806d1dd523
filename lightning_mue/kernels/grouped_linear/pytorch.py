"""The linear layer in plain PyTorch, in the blocks of kernels/grouped_ffn/pytorch.

Shape legend: S rows sorted by expert, P rows in the padded layout, B experts of a block, C rows of each, N = B * C, n those
that are not padding, i and o input and output width, E experts. A trailing 1 is a column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mue.kernels.grouped_ffn.pytorch.blocks import plan_blocks
from lightning_mue.kernels.grouped_ffn.pytorch.running import (
    WeightGradients,
    cutting,
    gather,
    outer_product,
    packed,
    run_blocks,
)
from lightning_mue.kernels.grouped_linear.op import LinearProblem
from lightning_mue.kernels.scratch import Scratch, in_large_pages


def forward(p: LinearProblem) -> Tensor:
    """As `grouped_linear_op`, of one row or more."""
    return _LinearForward(p).run()


def backward(p: LinearProblem, dy: Tensor, weights: bool) -> list[Tensor]:
    """As `grouped_linear_backward_op`, but the gradient of x is that of its rows, [S, i]."""
    return _LinearBackward(p, dy, weights).run()


class _Rows:
    """The layout, and rows in and out of it."""

    def __init__(self, p: LinearProblem) -> None:
        self.p = p
        _, self.n_out, self.n_in = p.weight.shape
        ends = p.offsets.tolist()  # the one host synchronization of this backend
        self.n_routed = ends[-1]
        self.layout = plan_blocks(ends, len(p.order), max(self.n_in, self.n_out), cutting(p.x))
        source_P, slot_S = self.layout.source_P, self.layout.slot_S
        self.source_N = None if source_P is None else self.layout.by_padded_row(source_P)
        self.slots_n = None if slot_S is None else self.layout.by_sorted_row(slot_S)
        self.tokens_N: Sequence[Tensor] | None = None
        if p.by_token:
            self.tokens_N = self.layout.by_padded_row(p.tokens if source_P is None else p.tokens[source_P])
        self.x_n = None if p.by_token else self.layout.by_sorted_row(p.x)

    def new_rows(self, width: int) -> Tensor:
        """[S, width], of undefined content where rows are computed, zero where they are masked."""
        rows_S = in_large_pages(self.p.x.new_empty(len(self.p.order), width))
        rows_S[self.n_routed :].zero_()
        return rows_S

    def x_of(self, scratch: Scratch, i: int) -> Tensor:
        """The block's input, [B, C, i]."""
        if self.tokens_N is not None:
            return gather(scratch, "x", self.p.x, self.tokens_N[i], self.layout.blocks[i].shape)
        assert self.x_n is not None
        return self.padded(scratch, "x", self.p.x, self.x_n, i)

    def padded(self, scratch: Scratch, name: str, rows_S: Tensor, rows_n: Sequence[Tensor], i: int) -> Tensor:
        """The block's rows, [B, C, columns]; a view where there is no padding."""
        block = self.layout.blocks[i]
        if not block.is_padded or self.source_N is None:
            return rows_n[i].view(*block.shape, -1)
        return gather(scratch, name, rows_S, self.source_N[i], block.shape)

    def multiply(self, scratch: Scratch, name: str, a: Tensor, b: Tensor, out_n: Sequence[Tensor], i: int) -> Tensor:
        """The product [B, C, columns]; `keep` brings it to `out_n` where it is padded, else it is there."""
        block = self.layout.blocks[i]
        out = scratch.get(name, block.shape) if block.is_padded else out_n[i].view(*block.shape, -1)
        return torch.bmm(a, b, out=out)

    def keep(self, product: Tensor, out_n: Sequence[Tensor], i: int) -> None:
        """Copy the rows that are not padding."""
        block = self.layout.blocks[i]
        if block.is_padded and self.slots_n is not None:
            slots_n = self.slots_n[i] - block.padded.start
            torch.index_select(product.view(-1, product.shape[-1]), 0, slots_n, out=out_n[i])

    def flops(self, products: int) -> int:
        """Of all blocks."""
        return 2 * products * self.layout.n_rows * self.n_in * self.n_out


class _LinearForward(_Rows):
    def run(self) -> Tensor:
        p, cut = self.p, self.layout.by_expert
        self.weight, self.bias = cut(p.weight), None if p.bias is None else cut(p.bias.unsqueeze(1))
        y_So = self.new_rows(self.n_out)
        self.y_n = self.layout.by_sorted_row(y_So)
        run_blocks(self.layout, p.x, {"x": self.n_in, "y": self.n_out}, self.block, self.flops(1))
        return y_So

    def block(self, scratch: Scratch, i: int) -> None:
        y_BCo = self.multiply(scratch, "y", self.x_of(scratch, i), packed(self.weight[i]).mT, self.y_n, i)
        if self.bias is not None:
            y_BCo.add_(self.bias[i])
        self.keep(y_BCo, self.y_n, i)


class _LinearBackward(_Rows):
    def __init__(self, p: LinearProblem, dy: Tensor, weights: bool) -> None:
        super().__init__(p)
        self.dy, self.dy_n = dy, self.layout.by_sorted_row(dy)
        self.weight = self.layout.by_expert(p.weight)
        real_P = self.layout.real_P
        self.real_N1 = None if real_P is None else self.layout.by_padded_row(real_P.to(dy.dtype)[:, None])
        trained = {"weight": p.weight} | ({} if p.bias is None else {"bias": p.bias})
        self.results = {name: in_large_pages(torch.empty_like(t)) for name, t in trained.items() if weights}
        self.grads = WeightGradients(self.layout, self.results)

    def run(self) -> list[Tensor]:
        dx_Si = self.new_rows(self.n_in)
        self.dx_n = self.layout.by_sorted_row(dx_Si)
        columns = {"x": self.n_in, "dx": self.n_in, "dy": self.n_out}
        run_blocks(self.layout, self.p.x, columns, self.block, self.flops(2 if self.results else 1))
        self.grads.add_up()
        return [dx_Si, *self.results.values()]

    def block(self, scratch: Scratch, i: int) -> None:
        block = self.layout.blocks[i]
        dy_BCo = self.padded(scratch, "dy", self.dy, self.dy_n, i)
        if block.is_padded and self.real_N1 is not None:  # padding repeats a row, which must count once
            dy_BCo.mul_(self.real_N1[i].view(*block.shape, 1))
        self.keep(self.multiply(scratch, "dx", dy_BCo, packed(self.weight[i]), self.dx_n, i), self.dx_n, i)
        if self.results:
            outer_product(dy_BCo, self.x_of(scratch, i), self.grads.parts["weight"][i])
        if "bias" in self.results:
            torch.sum(dy_BCo, 1, out=self.grads.parts["bias"][i])
