"""Steps weights along their directions: on the sphere a step and the way back (project or geodesic), else a plain step.

Works on plain tensors: whole matrices, or a rank's parts of them together with a function that adds sums over ranks.
Formulas: docs/derivations/hypersphere.md.

Shape legend:
    B  matrices in a batch            E  matrices (experts) in one stacked parameter
    out, in (o, i)  rows and columns
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mue.optim.matrices import dot, sum_squares
from lightning_mue.optim.options import StepOptions
from lightning_mue.optim.precision import default_dtype


class MatrixBatch(NamedTuple):
    """Matrices of one shape that are to be stepped, or a rank's parts of them; B in all.

    Attributes:
        weights: Each `[E, out, in]`, changed in place.
        directions: `[B, out, in]` in the math type, of any scale on the sphere; overwritten. Where one is zero, the
            step is zero.
        radius: `[B]`, or None off the sphere.
        moves: `[B]` boolean; matrices where it is False stay as they are, bit for bit.
    """

    weights: Sequence[Tensor]
    directions: Tensor
    radius: Tensor | None
    moves: Tensor

    def pairs(self, *per_matrix: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Iterate over the weights, their directions, and per-matrix numbers `[E, 1, 1]` in the math type."""
        numbers_B11 = [x_B.to(self.directions.dtype)[:, None, None] for x_B in per_matrix]
        if len(self.weights) == 1:
            return iter([(self.weights[0], self.directions, *numbers_B11)])
        counts = [len(w_Eoi) for w_Eoi in self.weights]
        numbers = [x_B11.split(counts) for x_B11 in numbers_B11]
        return zip(self.weights, self.directions.split(counts), *numbers, strict=True)

    @property
    def all_move(self) -> bool:
        """Whether all matrices are known to move; False on a GPU, which would have to be waited for."""
        return self.moves.device.type == "cpu" and bool(self.moves.all())

    @property
    def in_math_type(self) -> bool:
        """Whether the weights have the math type, so that they can be stepped in place."""
        return all(w_Eoi.dtype == self.directions.dtype for w_Eoi in self.weights)


#: Adds, for each matrix, the sums of the ranks that hold parts of it; `list` for whole matrices.
SumOverRanks = Callable[[list[Tensor]], list[Tensor]]


def apply_directions(batches: Sequence[MatrixBatch], step: StepOptions, total: SumOverRanks = list) -> None:
    """Step matrices, or a rank's parts of them, along their directions, in place.

    `total` adds `[B]` sums, one tensor a batch, over the ranks that hold parts of the same matrices.
    """
    if isinstance(step.lr, Tensor):
        batches = [batch._replace(moves=batch.moves & (step.lr != 0).to(batch.moves.device)) for batch in batches]
    on_sphere = [batch for batch in batches if batch.radius is not None]
    for batch in batches:
        if batch.radius is None:
            _step_off_sphere(batch, step)
    if not on_sphere:
        return
    lengths = [square_B.sqrt() for square_B in total([sum_squares(batch.directions) for batch in on_sphere])]
    lengths = [length_B.masked_fill_(length_B == 0, 1) for length_B in lengths]
    known = step.retraction == "project" and not isinstance(step.lr, Tensor) and step.lr * step.weight_decay != 1
    if known and all(batch.all_move and batch.in_math_type for batch in on_sphere):
        _project_in_place(on_sphere, lengths, step, total)
    else:
        _retract(on_sphere, lengths, step, total)


def _project_in_place(
    batches: Sequence[MatrixBatch], lengths: Sequence[Tensor], step: StepOptions, total: SumOverRanks
) -> None:
    """Step and scale back, in place: half the memory traffic of `_retract`, which writes the weights only at the end."""
    keep = 1 - step.lr * step.weight_decay
    sizes = [_step_size(batch, length_B, step) for batch, length_B in zip(batches, lengths, strict=True)]
    for batch, size_B in zip(batches, sizes, strict=True):
        for w_Eoi, o_Eoi, size_E11 in batch.pairs(size_B):
            if step.weight_decay:
                w_Eoi.mul_(keep)
            w_Eoi.addcmul_(o_Eoi, size_E11)
    squares = total([sum_squares(*batch.weights) for batch in batches])
    for batch, size_B, square_B in zip(batches, sizes, squares, strict=True):
        assert batch.radius is not None
        # A step of one radius to the center (lr = 1) leaves no direction to scale back along: undo it.
        scale_B = batch.radius / square_B.sqrt()
        if not bool(square_B.all()):
            at_center_B = square_B == 0
            for w_Eoi, o_Eoi, back_E11 in batch.pairs(-size_B * at_center_B):
                w_Eoi.addcmul_(o_Eoi, back_E11)
            scale_B = torch.where(at_center_B, 1 / keep, scale_B)
        for w_Eoi, _, scale_E11 in batch.pairs(scale_B):
            w_Eoi.mul_(scale_E11)


def _retract(batches: Sequence[MatrixBatch], lengths: Sequence[Tensor], step: StepOptions, total: SumOverRanks) -> None:
    """Compute the stepped matrices in place of the directions, and write them to the weights at the right radius."""
    if step.retraction == "geodesic":
        _rotate(batches, lengths, step, total)
    else:
        _step_from_weights(batches, lengths, step)
    squares = total([sum_squares(batch.directions) for batch in batches])
    for batch, square_B in zip(batches, squares, strict=True):
        assert batch.radius is not None
        # A step of one radius to the center (lr = 1) leaves no direction to scale back along: stay.
        moves_B = batch.moves & (square_B != 0)
        _write(batch._replace(moves=moves_B), batch.radius.to(square_B.dtype) / square_B.sqrt())


def _step_size(batch: MatrixBatch, length_B: Tensor, step: StepOptions) -> Tensor:
    """Return the factors `[B]` of the directions in a step of `lr` radii."""
    assert batch.radius is not None
    return batch.radius / length_B * -step.lr


def _step_from_weights(batches: Sequence[MatrixBatch], lengths: Sequence[Tensor], step: StepOptions) -> None:
    """Overwrite the directions with `(1 - lr decay) W - lr R O / ||O||`."""
    keep = 1 - step.lr * step.weight_decay
    for batch, length_B in zip(batches, lengths, strict=True):
        for w_Eoi, o_Eoi, size_E11 in batch.pairs(_step_size(batch, length_B, step)):
            if step.weight_decay == 0:
                torch.addcmul(w_Eoi.to(o_Eoi.dtype), o_Eoi, size_E11, out=o_Eoi)
            else:
                o_Eoi.mul_(size_E11).add_(w_Eoi * keep)


def _rotate(batches: Sequence[MatrixBatch], lengths: Sequence[Tensor], step: StepOptions, total: SumOverRanks) -> None:
    """Overwrite the directions with the weights rotated by the angle `lr` towards -O, after decay.

    With `w = W / ||W||`, `o = O / ||O||` and `c = <w, o>`, the rotation is in the plane of w and o, against the unit
    tangent `t = (o - c w) / sqrt(1 - c^2)`::

        W <- R (cos(lr) w - sin(lr) t)

    A direction along W has no tangent: that matrix stays.
    """
    squares = total([torch.cat([sum_squares(w_Eoi.to(o_Eoi.dtype)) for w_Eoi, o_Eoi in b.pairs()]) for b in batches])
    dots = total([torch.cat([dot(w_Eoi.to(o_Eoi.dtype), o_Eoi) for w_Eoi, o_Eoi in b.pairs()]) for b in batches])
    keep = 1 - step.lr * step.weight_decay
    for batch, square_B, dot_B, length_B in zip(batches, squares, dots, lengths, strict=True):
        assert batch.radius is not None
        norm_B, radius_B = square_B.sqrt(), batch.radius.to(square_B.dtype)
        cosine_B = dot_B / (norm_B * length_B)
        sine_B = (1 - cosine_B.square()).clamp_min(0).sqrt()
        turns_B = sine_B > _least_sine(batch, step)
        angle = torch.as_tensor(step.lr, dtype=sine_B.dtype, device=sine_B.device)
        tilt_B = torch.where(turns_B, angle.sin() / sine_B, 0.0)
        stay_B = torch.where(turns_B, angle.cos() + tilt_B * cosine_B, 1.0)
        of_weight_B, of_direction_B = radius_B / norm_B * stay_B * keep, -radius_B / length_B * tilt_B
        for w_Eoi, o_Eoi, of_weight_E11, of_direction_E11 in batch.pairs(of_weight_B, of_direction_B):
            o_Eoi.mul_(of_direction_E11).addcmul_(w_Eoi.to(o_Eoi.dtype), of_weight_E11)


def _least_sine(batch: MatrixBatch, step: StepOptions) -> float:
    """Return the sine below which it is rounding noise; dividing by it would rotate by an arbitrary angle.

    It comes from 1 - c^2, and the direction from rounded products.
    """
    if batch.directions.dtype == torch.float64:
        return 1e-6
    return 2e-2 if (step.dtype or default_dtype(batch.weights[0])) == torch.bfloat16 else 3e-3


def _step_off_sphere(batch: MatrixBatch, step: StepOptions) -> None:
    """`W <- (1 - lr decay) W - lr factor O`."""
    keep, size = 1 - step.lr * step.weight_decay, -step.lr * step.factor
    if batch.all_move and not isinstance(size, Tensor) and batch.in_math_type:
        for w_Eoi, o_Eoi in batch.pairs():
            if keep != 1:
                w_Eoi.mul_(keep)
            w_Eoi.add_(o_Eoi, alpha=size)
        return
    for w_Eoi, o_Eoi in batch.pairs():
        o_Eoi.mul_(size).add_(w_Eoi.to(o_Eoi.dtype) * keep)
    _write(batch, None)


def _write(batch: MatrixBatch, scale_B: Tensor | None) -> None:
    """Write `scale * directions` to the matrices that move."""
    if scale_B is not None and batch.all_move:
        for w_Eoi, x_Eoi, scale_E11 in batch.pairs(scale_B):
            torch.mul(x_Eoi, scale_E11, out=w_Eoi)
        return
    if scale_B is not None:
        batch.directions.mul_(scale_B.to(batch.directions.dtype)[:, None, None])
    moves = batch.moves.split([len(w_Eoi) for w_Eoi in batch.weights])
    for (w_Eoi, x_Eoi), moves_E in zip(batch.pairs(), moves, strict=True):
        w_Eoi.copy_(torch.where(moves_E[:, None, None], x_Eoi, w_Eoi.to(x_Eoi.dtype)))
