"""The arithmetic of one optimizer step, on plain lists of tensors: no state, no groups.

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

from lightning_mue.optim.newton_schulz import chunk_bytes, math_dtype, orthogonalize, peak

#: Longest row that a float32 sum of squares handles to about 1e-8 relative.
_LONGEST_ROW = 1 << 14


class Spherical(NamedTuple):
    """One parameter on the sphere, or some of the matrices of a stacked one (views of it).

    Attributes:
        weight: The parameter, changed in place.
        grad: Its gradient.
        buffer: What the direction is made of: the momentum, in the step of Muon; the direction itself, in Adam's.
        radius: Frobenius norm that each matrix keeps, `[]` or `[E]`.
    """

    weight: Tensor
    grad: Tensor
    buffer: Tensor
    radius: Tensor


def as_matrices(x: Tensor) -> Tensor:
    """View (or, for odd strides, copy) a parameter as `[E, out, in]`; one that is not a stack has E = 1.

    Raises:
        ValueError: If `x` has fewer than two dimensions.
    """
    if x.ndim < 2:
        raise ValueError(f"A matrix needs at least two dimensions, found shape {list(x.shape)}.")
    return x if x.ndim == 3 else x.reshape(1, x.shape[0], -1)


def matrix_norm(x_Boi: Tensor) -> Tensor:
    """Return each matrix's Frobenius norm, `[B]`, to about 1e-8 relative even for float32 matrices of any size.

    A plain float32 sum over millions of entries is off by 1e-4 on CPU, which would move the sphere at every step; so
    rows are summed in float32, which is fast, and the row norms in float64.
    """
    if x_Boi.shape[-1] > _LONGEST_ROW:
        x_Boi = x_Boi.reshape(x_Boi.shape[0], -1, math.gcd(x_Boi[0].numel(), _LONGEST_ROW))
    row_Bo = torch.linalg.vector_norm(x_Boi, dim=-1)
    wide = torch.float32 if x_Boi.device.type == "mps" else torch.float64  # MPS has no float64
    return torch.linalg.vector_norm(row_Bo, dim=-1, dtype=wide).to(x_Boi.dtype)


def radius_of(param: Tensor, what: str) -> Tensor:
    """Return the norm of the parameter's matrices in the math type: `[]`, or `[E]` for a stack.

    Args:
        param: The parameter.
        what: How to call it in an error.

    Raises:
        ValueError: If it is a vector or scalar, or one of its matrices is zero (not asked of meta tensors).
    """
    if param.ndim < 2:
        raise ValueError(
            f"{what} is not a matrix, so it cannot be in a group of kind 'sphere' or 'adam_sphere'. Give it to a "
            "group of kind 'adamw', or leave `kind` out."
        )
    with torch.no_grad():
        norm_E = matrix_norm(as_matrices(param).to(math_dtype(param.dtype)))
    if not param.is_meta and bool((norm_E == 0).any()):
        which = f", matrix {int((norm_E == 0).nonzero()[0])} of the stack," if param.ndim == 3 else ""
        raise ValueError(
            f"{what}{which} is zero (its Frobenius norm is 0), so it has no direction to keep on a sphere. Initialize "
            "it with random values, or put it in a group of kind 'adamw'."
        )
    return norm_E if param.ndim == 3 else norm_E[0]


def sphere_update(
    items: Sequence[Spherical],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    preset: str,
    dtype: torch.dtype | None,
) -> None:
    """Take one step of Muon on the Frobenius sphere (arXiv:2603.28743; theory.md section 5.1), in place.

    Per matrix, with gradient G, momentum M, weight W and radius R::

        M <- mu M + G            U = mu M + G (Nesterov), else M
        O = orthogonalize(U)     W <- W - lr R O / ||O||         W <- R W / ||W||

    A matrix whose gradient is exactly zero is not touched; its momentum still decays.

    Args:
        items: Parameters of one device and dtype, whose matrices all have one shape.
        lr: Relative size of the step: the angle in radians, to first order, if O is orthogonal to W.
        momentum: mu, in [0, 1).
        nesterov: Whether to look one step ahead.
        weight_decay: Subtracts `lr * weight_decay * W` before the projection, which undoes it to first order.
        preset: Name of the Newton-Schulz schedule.
        dtype: Type of the Newton-Schulz products; None chooses by device.
    """
    momenta = [item.buffer for item in items]
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, [item.grad for item in items])
    if lr == 0:
        return
    for chunk in chunks(items):
        g_Boi = _batch([item.grad for item in chunk])
        m_Boi = _batch([item.buffer for item in chunk])
        u_Boi = torch.add(g_Boi, m_Boi, alpha=momentum) if nesterov else m_Boi
        project(chunk, orthogonalize(u_Boi, preset, dtype), peak(g_Boi) != 0, lr=lr, weight_decay=weight_decay)


def adam_direction(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *, betas: tuple[float, float], eps: float
) -> Tensor:
    """Update Adam's moments and step count in place and return the bias-corrected direction, in the math type."""
    beta1, beta2 = betas
    step += 1
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    t = step.item()  # the count lives on the CPU: no wait for the device
    dtype = math_dtype(grad.dtype)
    scale = exp_avg_sq.to(dtype).div(1 - beta2**t).sqrt_().add_(eps)
    return exp_avg.to(dtype).div(1 - beta1**t).div_(scale)


def project(items: Sequence[Spherical], o_Boi: Tensor, moves_B11: Tensor, *, lr: float, weight_decay: float) -> None:
    """Step every matrix along `-o_Boi` by `lr` radii and scale it back to its radius, in place.

    Args:
        items: Parameters whose matrices, in order, are the B of the batch.
        o_Boi: Directions in the math type, of any scale; overwritten. Where zero, the step is zero.
        moves_B11: Boolean; the matrices where it is False stay as they are, bit for bit.
        lr: Length of the step, in radii.
        weight_decay: See `sphere_update`.
    """
    w_Boi = _batch([item.weight for item in items])
    radius_B = torch.cat([item.radius.reshape(-1) for item in items])
    norm_B = matrix_norm(o_Boi)
    pace_B = -lr * radius_B / (norm_B + (norm_B == 0))
    moved_Boi = o_Boi.mul_(pace_B[:, None, None]).add_(w_Boi, alpha=1 - lr * weight_decay)
    norm_B = matrix_norm(moved_Boi)
    # A step of one radius straight to the center (lr = 1) has no direction to come back from: stay.
    moves_B11 = moves_B11 & (norm_B != 0)[:, None, None]
    moved_Boi.mul_((radius_B / norm_B)[:, None, None])
    parts = torch.where(moves_B11, moved_Boi, w_Boi).split([len(as_matrices(item.weight)) for item in items])
    weights = [item.weight for item in items]
    torch._foreach_copy_(weights, [part.reshape(w.shape) for w, part in zip(weights, parts, strict=True)])


def chunks(items: Sequence[Spherical]) -> Iterator[list[Spherical]]:
    """Cut equal matrices into batches of about a cache's size; stacks too large for one are sliced by expert.

    The batches are what bounds the step's scratch memory: a few times `chunk_bytes`.
    """
    weight = items[0].weight
    size = as_matrices(weight)[0].numel() * math_dtype(weight.dtype).itemsize
    limit = max(1, chunk_bytes(weight.device) // max(1, size))
    batch: list[Spherical] = []
    room = limit
    for item in items:
        stacked = item.weight.ndim == 3
        for piece in zip(*(t.split(limit) for t in item), strict=True) if stacked else [item]:
            count = len(piece[0]) if stacked else 1
            if count > room:
                yield batch
                batch, room = [], limit
            batch.append(Spherical(*piece))
            room -= count
    if batch:
        yield batch


def _batch(tensors: Sequence[Tensor]) -> Tensor:
    """Join parameters' matrices to `[B, out, in]` in the math type; may share memory with a single parameter."""
    matrices = [as_matrices(t) for t in tensors]
    batch_Boi = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    return batch_Boi.to(math_dtype(batch_Boi.dtype))
