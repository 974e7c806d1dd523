"""The arithmetic of one optimizer step, on plain lists of tensors: no state, no groups, no processes.

Shape legend:
    B  matrices in a batch            E  matrices (experts) in one stacked parameter
    out, in  rows and columns; a parameter of more than three dimensions (a convolution) is one matrix [out, rest]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mue.optim.coefficients import get_preset
from lightning_mue.optim.newton_schulz import Pool, chunk_count, default_dtype, math_dtype, orthogonalize_chunk, peak

#: Longest row that a float32 sum of squares handles to about 1e-8 relative.
_LONGEST_ROW = 1 << 14


class Matrix(NamedTuple):
    """One parameter of matrices, or some of the matrices of a stacked one (views of it), or a rank's part of it.

    Attributes:
        weight: The parameter, changed in place.
        grad: Its gradient.
        momentum: Its momentum; Adam's first moment where the direction is Adam's.
        radius: Frobenius norm that each matrix keeps, `[]` or `[E]`; None off the sphere.
    """

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    radius: Tensor | None


@dataclass(frozen=True)
class Step:
    """What a group of matrices is stepped with; the options of `HyperSphereOptimizer` under the same names.

    Attributes:
        factor: Muon's factor on `lr` for these matrices, from `CONVENTIONS`; on the sphere 1.
    """

    lr: float | Tensor
    momentum: float
    nesterov: bool
    weight_decay: float
    preset: str
    dtype: torch.dtype | None
    retraction: str
    maximize: bool
    compile: bool
    factor: float = 1.0

    @property
    def stands(self) -> bool:
        """Whether the rate is known to be zero; of a tensor it is not asked, which would wait for the device."""
        return not isinstance(self.lr, Tensor) and self.lr == 0

    @property
    def sign(self) -> int:
        """Sign of the gradient."""
        return -1 if self.maximize else 1


def as_matrices(x: Tensor) -> Tensor:
    """View (or, for odd strides, copy) a parameter as `[E, out, in]`; one that is not a stack has E = 1.

    Raises:
        ValueError: If `x` has fewer than two dimensions.
    """
    if x.ndim < 2:
        raise ValueError(f"A matrix needs at least two dimensions, found shape {list(x.shape)}.")
    return x if x.ndim == 3 else x.flatten(1).unsqueeze(0)


def sum_squares(*parts: Tensor) -> Tensor:
    """Return each matrix's sum of squares, `[B]`, in float64, to about 1e-8 even for float32 matrices of any size.

    A plain float32 sum over millions of entries is off by 1e-4 on CPU, which would move the sphere at every step; so
    rows are summed in float32, which is fast, and the row norms in float64.

    Args:
        parts: `[E, out, in]`, all of one shape but for E; B is the sum of the E.
    """
    # A rank may hold none of a stack's matrices; at least one part is kept for its type.
    held = [x_Eoi for x_Eoi in parts if len(x_Eoi)] or parts[:1]
    norms = [torch.linalg.vector_norm(_rows(x_Eoi), dim=-1) for x_Eoi in held]
    return torch.cat(norms).to(_wide(parts[0])).square_().sum(-1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64


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
    return torch.linalg.vecdot(x_Boi, y_Boi).to(_wide(x_Boi)).sum(-1)


def moving(g_Boi: Tensor) -> Tensor:
    """Return which matrices have a gradient, `[B]` boolean: False where it is exactly zero."""
    if not g_Boi.numel():
        return torch.zeros(g_Boi.shape[0], dtype=torch.bool, device=g_Boi.device)
    if g_Boi.device.type == "cpu":
        # A row in the middle shows nearly always that there is one, at no cost; asking a GPU would wait for it.
        some_B = g_Boi[:, g_Boi.shape[1] // 2].any(-1)
        if bool(some_B.all()):
            return some_B
    return (peak(g_Boi) != 0).reshape(-1)


def muon_update(matrices: Sequence[Matrix], step: Step, pool: Pool) -> None:
    """Take one step of Muon, on the Frobenius sphere where a radius is given, in place.

    Per matrix, with gradient G, momentum M, weight W and radius R::

        M <- mu M + G            U = mu M + G (Nesterov), else M         O = orthogonalize(U)
        sphere (arXiv:2603.28743; theory.md section 5.1)    W <- W - lr R O / ||O||      W <- R W / ||W||
        without                                             W <- (1 - lr decay) W - lr factor O

    A matrix whose gradient is exactly zero is not touched; its momentum still decays.

    Args:
        matrices: Parameters of one device and dtype, whole on this rank, whose matrices all have one shape.
        step: How to step.
        pool: Where scratch comes from; at most a few times `chunk_bytes` whatever the number of matrices.
    """
    if step.stands:
        accumulate([item.momentum for item in matrices], [item.grad for item in matrices], step)
        return
    schedule = get_preset(step.preset)
    dtype = step.dtype or default_dtype(matrices[0].weight)
    for chunk in chunks(matrices):
        u_Boi = directions(chunk, step, pool)
        o_Boi = orthogonalize_chunk(u_Boi, schedule, dtype, pool, compile=step.compile)
        _apply(chunk, u_Boi.copy_(o_Boi), step)  # converted, because elementwise work on mixed types is slower
        pool.give(u_Boi, o_Boi)


def directions(chunk: Sequence[Matrix], step: Step, pool: Pool) -> Tensor:
    """Update the momenta of a few matrices and return the directions to orthogonalize, `[B, out, in]`, from the pool."""
    weights = [as_matrices(item.weight) for item in chunk]
    shape = (sum(map(len, weights)), *weights[0].shape[1:])
    u_Boi = pool.take(shape, weights[0], math_dtype(weights[0].dtype))
    parts = u_Boi.split([len(w) for w in weights])
    if u_Boi.device.type == "cpu":  # few passes over memory
        for part_Eoi, item in zip(parts, chunk, strict=True):
            accumulate([item.momentum], [item.grad], step)
            direction(item.momentum, item.grad, step, out=part_Eoi)
        return u_Boi
    accumulate([item.momentum for item in chunk], [item.grad for item in chunk], step)  # few launches
    torch._foreach_copy_(list(parts), [as_matrices(item.momentum) for item in chunk])
    if step.nesterov:
        u_Boi.mul_(step.momentum)
        torch._foreach_add_(list(parts), [as_matrices(item.grad) for item in chunk], alpha=step.sign)
    return u_Boi


def accumulate(momenta: Sequence[Tensor], grads: Sequence[Tensor], step: Step) -> None:
    """`M <- mu M + G` for every matrix, in place."""
    m, g = momenta[0], grads[0]
    if m.device.type == "cpu" and m.dtype == g.dtype == torch.float32 and not step.maximize:
        for m, g in zip(momenta, grads, strict=True):
            torch.add(g, m, alpha=step.momentum, out=m)  # one pass; in bfloat16 it would round mu
        return
    torch._foreach_mul_(list(momenta), step.momentum)
    torch._foreach_add_(list(momenta), list(grads), alpha=step.sign)


def direction(momentum: Tensor, grad: Tensor, step: Step, *, out: Tensor) -> Tensor:
    """Write the direction before orthogonalization, `mu M + G` or `M`, to `out` in the math type.

    Args:
        momentum: The momentum, updated already.
        grad: The gradient.
        step: How to step.
        out: As many entries, of any shape.
    """
    out_like = out.view(momentum.shape)
    if not step.nesterov:
        return out_like.copy_(momentum)
    if momentum.dtype == grad.dtype == out.dtype and not step.maximize:
        return torch.add(grad, momentum, alpha=step.momentum, out=out_like)
    return out_like.copy_(momentum).mul_(step.momentum).add_(grad, alpha=step.sign)


class Batch(NamedTuple):
    """Matrices of one shape about to be stepped, or a rank's parts of them; B in all.

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
        counts = [len(w_Eoi) for w_Eoi in self.weights]
        numbers = [x_B.to(self.directions.dtype)[:, None, None].split(counts) for x_B in per_matrix]
        return zip(self.weights, self.directions.split(counts), *numbers, strict=True)


#: Adds up, matrix by matrix, what the ranks that hold parts of the same matrices have; nothing to do for whole ones.
Total = Callable[[list[Tensor]], list[Tensor]]


def _apply(chunk: Sequence[Matrix], directions_Boi: Tensor, step: Step) -> None:
    """Step whole matrices of one shape along their directions, which are overwritten."""
    weights = [as_matrices(item.weight) for item in chunk]
    radii = [item.radius.reshape(-1) for item in chunk if item.radius is not None]
    moves_B = torch.cat([moving(as_matrices(item.grad)) for item in chunk])
    on_cpu = directions_Boi.device.type == "cpu"
    # On CPU matrix by matrix, straight into the weights; elsewhere all at once, which takes few launches.
    taken = weights if on_cpu else [torch.cat(weights)]
    move([Batch(taken, directions_Boi, torch.cat(radii) if radii else None, moves_B)], step)
    parts = weights if on_cpu else taken[0].split([len(w_Eoi) for w_Eoi in weights])
    write_back([item.weight for item in chunk], parts)


def write_back(weights: Sequence[Tensor], matrices: Sequence[Tensor]) -> None:
    """Copy matrices to the weights that they are not views of."""
    pairs = [(w, x_Eoi.reshape(w.shape)) for w, x_Eoi in zip(weights, matrices, strict=True)]
    # Strides say nothing: those of a side of length 1 are arbitrary, and torch 2.11 refuses to copy such a view onto itself.
    copies = [(w, x) for w, x in pairs if w.data_ptr() != x.data_ptr()]
    if copies:
        torch._foreach_copy_([w for w, _ in copies], [x for _, x in copies])


def move(batches: Sequence[Batch], step: Step, total: Total = list) -> None:
    """Step matrices, or a rank's parts of them, along their directions, in place.

    Args:
        batches: The matrices.
        step: How to step.
        total: Adds up `[B]` sums, one tensor a batch, over the ranks that hold parts of the same matrices.
    """
    if isinstance(step.lr, Tensor):
        batches = [batch._replace(moves=batch.moves & (step.lr != 0).to(batch.moves.device)) for batch in batches]
    on_sphere = [batch for batch in batches if batch.radius is not None]
    for batch in batches:
        if batch.radius is None:
            _step_freely(batch, step)
    if not on_sphere:
        return
    lengths = [square_B.sqrt() for square_B in total([sum_squares(batch.directions) for batch in on_sphere])]
    lengths = [length_B + (length_B == 0) for length_B in lengths]
    known = step.retraction == "project" and not isinstance(step.lr, Tensor) and step.lr * step.weight_decay != 1
    if known and all(_in_place(batch) for batch in on_sphere):
        _project_in_place(on_sphere, lengths, step, total)
        return
    _step_off(on_sphere, lengths, step, total)
    squares = total([sum_squares(batch.directions) for batch in on_sphere])
    for batch, square_B in zip(on_sphere, squares, strict=True):
        assert batch.radius is not None
        # A step of one radius straight to the center (lr = 1) has no direction to come back from: stay.
        moves_B = batch.moves & (square_B != 0)
        _write(batch._replace(moves=moves_B), batch.radius.to(square_B.dtype) / square_B.sqrt())


def _in_place(batch: Batch) -> bool:
    """Whether the weights can be stepped where they are: all are known to move, in the math type."""
    return _all_move(batch) and all(w_Eoi.dtype == batch.directions.dtype for w_Eoi in batch.weights)


def _project_in_place(batches: Sequence[Batch], lengths: Sequence[Tensor], step: Step, total: Total) -> None:
    """Step off and scale back; half the traffic to memory of the way that leaves the weights until the end."""
    keep = 1 - step.lr * step.weight_decay
    paces = [_pace(batch, length_B, step) for batch, length_B in zip(batches, lengths, strict=True)]
    for batch, pace_B in zip(batches, paces, strict=True):
        for w_Eoi, o_Eoi, pace_E11 in batch.pairs(pace_B):
            if step.weight_decay:
                w_Eoi.mul_(keep)
            w_Eoi.addcmul_(o_Eoi, pace_E11)
    squares = total([sum_squares(*batch.weights) for batch in batches])
    for batch, pace_B, square_B in zip(batches, paces, squares, strict=True):
        assert batch.radius is not None
        # A step of one radius straight to the center (lr = 1) has no direction to come back from: back to where it was.
        stuck_B = square_B == 0
        scale_B = batch.radius.to(square_B.dtype) / square_B.sqrt()
        if bool(stuck_B.any()):
            for w_Eoi, o_Eoi, back_E11 in batch.pairs(-pace_B * stuck_B):
                w_Eoi.addcmul_(o_Eoi, back_E11)
            scale_B = torch.where(stuck_B, 1 / keep, scale_B)
        for w_Eoi, _, scale_E11 in batch.pairs(scale_B):
            w_Eoi.mul_(scale_E11)


def _pace(batch: Batch, length_B: Tensor, step: Step) -> Tensor:
    """Return the factors `[B]` of the directions in a step of `lr` radii."""
    assert batch.radius is not None
    return -step.lr * batch.radius.to(length_B.dtype) / length_B


def _step_off(batches: Sequence[Batch], lengths: Sequence[Tensor], step: Step, total: Total) -> None:
    """Write the matrices after the step and before the retraction to the directions."""
    keep = 1 - step.lr * step.weight_decay
    if step.retraction == "geodesic":
        for batch, (stay_B, pace_B) in zip(batches, _rotations(batches, lengths, step, total), strict=True):
            for w_Eoi, o_Eoi, stay_E11, pace_E11 in batch.pairs(stay_B * keep, pace_B):
                o_Eoi.mul_(pace_E11).addcmul_(w_Eoi.to(o_Eoi.dtype), stay_E11)
        return
    for batch, length_B in zip(batches, lengths, strict=True):
        for w_Eoi, o_Eoi, pace_E11 in batch.pairs(_pace(batch, length_B, step)):
            if step.weight_decay == 0:
                torch.addcmul(w_Eoi.to(o_Eoi.dtype), o_Eoi, pace_E11, out=o_Eoi)
            else:
                o_Eoi.mul_(pace_E11).add_(w_Eoi * keep)


def _rotations(
    batches: Sequence[Batch], lengths: Sequence[Tensor], step: Step, total: Total
) -> list[tuple[Tensor, Tensor]]:
    """Return, a batch, the factors `[B]` of W and of O in the rotation by the angle `lr` towards -O.

    With `w = W / ||W||`, `o = O / ||O||` and `c = <w, o>`, the rotation turns w in the plane of w and o, against the unit
    tangent `t = (o - c w) / sqrt(1 - c^2)`::

        W <- R (cos(lr) w - sin(lr) t)

    A direction along W has no tangent: that matrix stays.
    """
    squares = total([torch.cat([sum_squares(w_Eoi.to(o_Eoi.dtype)) for w_Eoi, o_Eoi in b.pairs()]) for b in batches])
    dots = total([torch.cat([dot(w_Eoi.to(o_Eoi.dtype), o_Eoi) for w_Eoi, o_Eoi in b.pairs()]) for b in batches])
    rotations = []
    for batch, square_B, dot_B, length_B in zip(batches, squares, dots, lengths, strict=True):
        assert batch.radius is not None
        norm_B, radius_B = square_B.sqrt(), batch.radius.to(square_B.dtype)
        cosine_B = dot_B / (norm_B * length_B)
        sine_B = (1 - cosine_B.square()).clamp_min(0).sqrt()
        # The sine comes from 1 - c^2, and the direction from rounded products: closer to W it is noise, which to divide
        # by would turn by any angle.
        products = step.dtype or default_dtype(batch.weights[0])
        noise = 1e-6 if batch.directions.dtype == torch.float64 else 2e-2 if products == torch.bfloat16 else 3e-3
        turns_B = sine_B > noise
        angle = torch.as_tensor(step.lr, dtype=sine_B.dtype, device=sine_B.device)
        tilt_B = torch.where(turns_B, angle.sin() / sine_B, 0.0)
        stay_B = torch.where(turns_B, angle.cos() + tilt_B * cosine_B, 1.0)
        rotations.append((radius_B / norm_B * stay_B, -radius_B / length_B * tilt_B))
    return rotations


def _step_freely(batch: Batch, step: Step) -> None:
    """`W <- (1 - lr decay) W - lr factor O` without a sphere."""
    keep, pace = 1 - step.lr * step.weight_decay, -step.lr * step.factor
    if _all_move(batch) and not isinstance(pace, Tensor) and batch.weights[0].dtype == batch.directions.dtype:
        for w_Eoi, o_Eoi in batch.pairs():
            if keep != 1:
                w_Eoi.mul_(keep)
            w_Eoi.add_(o_Eoi, alpha=pace)
        return
    for w_Eoi, o_Eoi in batch.pairs():
        o_Eoi.mul_(pace).add_(w_Eoi.to(o_Eoi.dtype) * keep)
    _write(batch, None)


def _write(batch: Batch, scale_B: Tensor | None) -> None:
    """Write `scale * directions` to the matrices that move."""
    if scale_B is not None and _all_move(batch):
        for w_Eoi, x_Eoi, scale_E11 in batch.pairs(scale_B):
            torch.mul(x_Eoi, scale_E11, out=w_Eoi)
        return
    if scale_B is not None:
        batch.directions.mul_(scale_B.to(batch.directions.dtype)[:, None, None])
    moves = batch.moves.split([len(w_Eoi) for w_Eoi in batch.weights])
    for (w_Eoi, x_Eoi), moves_E in zip(batch.pairs(), moves, strict=True):
        w_Eoi.copy_(torch.where(moves_E[:, None, None], x_Eoi, w_Eoi.to(x_Eoi.dtype)))


def _all_move(batch: Batch) -> bool:
    """Whether all matrices are known to move; a GPU is not asked, which would wait for it."""
    return batch.moves.device.type == "cpu" and bool(batch.moves.all())


def adam_direction(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    maximize: bool = False,
) -> Tensor:
    """Update Adam's moments and step count in place and return the bias-corrected direction, in the math type."""
    beta1, beta2 = betas
    step += 1
    if maximize:
        grad = -grad
    exp_avg.lerp_(grad.to(exp_avg.dtype), 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # On the CPU the count is read without a wait; on a device (capturable) it stays a tensor.
    t = step.item() if step.device.type == "cpu" else step
    dtype = math_dtype(grad.dtype)
    scale = exp_avg_sq.to(dtype).div(1 - beta2**t).sqrt_().add_(eps)
    return exp_avg.to(dtype).div(1 - beta1**t).div_(scale)


def chunks(matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """Cut equal matrices into batches of about a cache's size; stacks too large for one are sliced by expert.

    The batches are what bounds the step's scratch memory: a few times `chunk_bytes`.
    """
    limit = chunk_count(as_matrices(matrices[0].weight))
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
        yield Matrix(item.weight[part], item.grad[part], item.momentum[part], radius)
