"""Parameters as batches of matrices: views, norms, chunks of bounded size, and scratch memory.

Shape legend:
    B  matrices in a batch            E  matrices (experts) in one stacked parameter
    out, in  rows and columns; a parameter of more than three dimensions (a convolution) is one matrix [out, rest]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.optim.precision import math_dtype, sum_dtype

#: Longest row that a float32 sum of squares handles to about 1e-8 relative.
_LONGEST_ROW = 1 << 14


class Matrix(NamedTuple):
    """One parameter of matrices, some of the matrices of a stack (views of it), or this rank's part of either.

    Attributes:
        weight: The parameter, changed in place.
        grad: Its gradient.
        momentum: Its momentum; Adam's first moment where the direction is Adam's.
        radius: Frobenius norm that each matrix keeps, `[]` or `[E]`; None off the sphere.
        rows: Second moment of each row of the direction, `[out]` or `[E, out]`; None if rows are not normalized.
    """

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    radius: Tensor | None
    rows: Tensor | None = None


def as_matrices(x: Tensor) -> Tensor:
    """View (or, for odd strides, copy) a parameter as `[E, out, in]`; one that is not a stack has E = 1.

    Raises:
        ValueError: If `x` has fewer than two dimensions.
    """
    if x.ndim < 2:
        raise value_error("x", found=f"shape {list(x.shape)}", expected="at least two dimensions")
    return x if x.ndim == 3 else x.flatten(1).unsqueeze(0)


def write_back(weights: Sequence[Tensor], matrices: Sequence[Tensor]) -> None:
    """Copy matrices to the weights that they are not views of."""
    pairs = [(w, x_Eoi.reshape(w.shape)) for w, x_Eoi in zip(weights, matrices, strict=True)]
    # Compares addresses, not strides: those of a side of length 1 are arbitrary, and torch 2.11 refuses to copy such a
    # view onto itself.
    apart = [(w, x) for w, x in pairs if w.data_ptr() != x.data_ptr()]
    if apart:
        torch._foreach_copy_([w for w, _ in apart], [x for _, x in apart])


def peak(x_Boi: Tensor) -> Tensor:
    """Return each matrix's largest magnitude, `[B, 1, 1]`: zero for a zero matrix only, NaN if it holds a NaN."""
    # Several times faster on CPU than the infinity norm or `abs().amax()`, and without a temporary.
    return torch.maximum(x_Boi.amax((-2, -1), keepdim=True), -x_Boi.amin((-2, -1), keepdim=True))


def has_gradient(g_Boi: Tensor) -> Tensor:
    """Return which matrices have a gradient, `[B]` boolean: False where it is exactly zero."""
    if not g_Boi.numel():
        return torch.zeros(g_Boi.shape[0], dtype=torch.bool, device=g_Boi.device)
    if g_Boi.device.type == "cpu":
        # One row is nearly always enough to find a nonzero entry, and cheap. A GPU would have to be waited for.
        some_B = g_Boi[:, g_Boi.shape[1] // 2].any(-1)
        if bool(some_B.all()):
            return some_B
    return (peak(g_Boi) != 0).reshape(-1)


def moving(items: Sequence[Matrix], directions_Boi: Tensor, zero_gradient: str) -> Tensor:
    """Return which matrices take the step along their directions, `[B]` boolean, by the option `zero_gradient`.

    With "momentum" all do. On the sphere a zero direction is no step, and its matrix stays bit for bit all the same.
    """
    if zero_gradient == "skip":
        return torch.cat([has_gradient(as_matrices(item.grad)) for item in items])
    if items[0].radius is not None:
        return has_gradient(directions_Boi)
    return torch.ones(len(directions_Boi), dtype=torch.bool, device=directions_Boi.device)


def sum_squares(*parts: Tensor) -> Tensor:
    """Return the sum of squares of each matrix of the parts `[E, out, in]`, `[B]` in all, in float64.

    The error is about 1e-8 even for float32 matrices of any size. A plain float32 sum over millions of entries is off by
    1e-4 on CPU, which would change the radius at every step. So rows are summed in float32, which is fast, and the row
    norms in float64.
    """
    # A rank may hold none of a stack's matrices; at least one part is kept for its type.
    held = [x_Eoi for x_Eoi in parts if len(x_Eoi)] or parts[:1]
    norms = [torch.linalg.vector_norm(_rows(x_Eoi), dim=-1) for x_Eoi in held]
    norms_Br = norms[0] if len(norms) == 1 else torch.cat(norms)
    return torch.linalg.vector_norm(norms_Br, dim=-1, dtype=sum_dtype(parts[0].device)).square_()


def _rows(x_Eoi: Tensor) -> Tensor:
    """Reshape `[E, out, in]` to rows that are long, for speed, but not too long for a float32 sum."""
    if not x_Eoi.numel():
        return x_Eoi.new_zeros(x_Eoi.shape[0], 1, 1)
    length = math.gcd(x_Eoi[0].numel(), _LONGEST_ROW)
    if x_Eoi.shape[-1] > _LONGEST_ROW or (x_Eoi.is_contiguous() and length > x_Eoi.shape[-1]):
        return x_Eoi.reshape(x_Eoi.shape[0], -1, length)
    return x_Eoi


def dot(x_Boi: Tensor, y_Boi: Tensor) -> Tensor:
    """Return each pair's inner product, `[B]`, in float64."""
    return torch.linalg.vecdot(x_Boi, y_Boi).to(sum_dtype(x_Boi.device)).sum(-1)


def chunk_bytes(device: torch.device) -> int:
    """Return how many bytes of matrices to work on at once: what fits a core's caches on CPU, what fills a GPU elsewhere."""
    return 4 << 20 if device.type == "cpu" else 256 << 20


def chunk_count(g_Boi: Tensor) -> int:
    """Return how many of these matrices to work on at once; a multiple of the threads, which divide a batch."""
    size = g_Boi.shape[1] * g_Boi.shape[2] * math_dtype(g_Boi.dtype).itemsize
    count = chunk_bytes(g_Boi.device) // max(1, size)
    threads = torch.get_num_threads() if g_Boi.device.type == "cpu" else 1
    return max(1, count // threads * threads)


def chunks(matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """Divide matrices of one shape into batches of about `chunk_bytes`; a larger stack is sliced by expert.

    The size of a batch bounds the scratch memory of a step: a few times `chunk_bytes`.
    """
    limit = chunk_count(as_matrices(matrices[0].weight))
    if matrices[0].weight.device.type == "cpu":  # a batch for every thread, if there are so many matrices
        limit = min(limit, math.ceil(sum(len(as_matrices(item.weight)) for item in matrices) / torch.get_num_threads()))
    batch: list[Matrix] = []
    room = limit
    for item in matrices:
        for piece in _slices(item, limit):
            count = len(as_matrices(piece.weight))
            if count > room:
                yield batch
                batch, room = [], limit
            batch.append(piece)
            room -= count
    if batch:
        yield batch


def _slices(item: Matrix, limit: int) -> Iterator[Matrix]:
    """Slice a stack so that no slice holds more than `limit` matrices."""
    if item.weight.ndim != 3 or len(item.weight) <= limit:
        yield item
        return
    for start in range(0, len(item.weight), limit):
        part = slice(start, start + limit)
        radius = None if item.radius is None else item.radius[part]
        rows = None if item.rows is None else item.rows[part]
        yield Matrix(item.weight[part], item.grad[part], item.momentum[part], radius, rows)


class Pool:
    """Scratch tensors that are reused: page faults of fresh memory cost a CPU a tenth of an orthogonalization."""

    def __init__(self) -> None:
        self._free: dict[tuple[object, ...], list[Tensor]] = {}
        #: Bytes allocated so far.
        self.nbytes = 0

    def take(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialized contiguous tensor."""
        dtype = dtype or like.dtype
        if free := self._free.get((*shape, dtype, like.device)):
            return free.pop()
        x = torch.empty(*shape, dtype=dtype, device=like.device)
        self.nbytes += x.nbytes
        return x

    def give(self, *tensors: Tensor) -> None:
        """Take back tensors that are no longer used."""
        for x in tensors:
            self._free.setdefault((*x.shape, x.dtype, x.device), []).append(x)
