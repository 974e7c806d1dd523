"""One step of Muon on plain tensors: momentum, direction, update.

Knows no optimizer state, no groups and no processes.

Shape legend:
    B  matrices in a batch            E  matrices (experts) in one stacked parameter
    out, in  rows and columns; a parameter of more than three dimensions (a convolution) is one matrix [out, rest]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_mue.kernels.workers import run_in_threads
from lightning_mue.optim.matrices import Matrix, Pool, as_matrices, chunks, moving, write_back
from lightning_mue.optim.neuron import normalize_rows
from lightning_mue.optim.options import StepOptions, is_zero
from lightning_mue.optim.orthogonal.coefficients import PRESETS
from lightning_mue.optim.orthogonal.newton_schulz import orthogonalize_chunk
from lightning_mue.optim.precision import default_dtype, math_dtype
from lightning_mue.optim.retraction import MatrixBatch, apply_directions

#: Bytes of a matrix above which its products use all threads well by themselves, and scratch in every thread would be much.
_LARGEST_SIDE_BY_SIDE = 16 << 20


def muon_update(matrices: Sequence[Matrix], step: StepOptions, pool: Pool) -> None:
    """Take one step of Muon, on the Frobenius sphere where a radius is given, in place.

    Per matrix, with gradient G, momentum M, weight W and radius R::

        M <- mu M + G         U = mu M + G (Nesterov), else M         O = orthogonalize(U)
        on the sphere         W <- W - lr R O / ||O||                 W <- R W / ||W||
        off the sphere        W <- (1 - lr decay) W - lr factor O

    A matrix whose gradient is exactly zero is not changed (unless `zero_gradient` is "momentum"); its momentum decays.

    Source: arXiv:2603.28743 and docs/theory.md section 5.1 (on the sphere), docs/theory.md section 5.2 (the factor).

    Args:
        matrices: Parameters of one device and dtype, whole on this rank, whose matrices all have one shape.
        step: The options, with the factor for this shape.
        pool: Counts the scratch; in each thread a few times `chunk_bytes` at most, for any number of matrices.
    """
    if is_zero(step.lr):
        accumulate([item.momentum for item in matrices], [item.grad for item in matrices], step)
        return
    schedule = PRESETS[step.preset]
    dtype = step.dtype or default_dtype(matrices[0].weight)
    batches = list(chunks(matrices))

    def work(numbers: Iterable[int]) -> None:
        own = Pool()  # a worker's
        for number in numbers:
            u_Boi = directions(batches[number], step, own)
            o_Boi = orthogonalize_chunk(u_Boi, schedule, dtype, own, compile=step.compile)
            u_Boi.copy_(o_Boi)  # converted, because elementwise work on mixed types is slower
            normalize_rows([u_Boi], [[item.rows for item in batches[number]]], step.betas[1])
            _apply(batches[number], u_Boi, step)
            own.give(u_Boi, o_Boi)
        pool.nbytes += own.nbytes

    threads = torch.get_num_threads()
    if 1 < threads <= len(batches) and _fits_a_thread(matrices[0].weight, step):
        run_in_threads(work, range(len(batches)), threads)
    else:
        work(range(len(batches)))


def _fits_a_thread(weight: Tensor, step: StepOptions) -> bool:
    """Whether to work on matrices like this one side by side, with operators of one thread each.

    On a CPU that is faster than operators of many threads: what a batch needs stays in the caches of one core.
    """
    size = as_matrices(weight)[:1].numel() * weight.element_size()
    compiled = step.compile or torch.compiler.is_compiling()
    plain = type(weight) in (Tensor, Parameter)  # not fake, of torch.func, ...: their modes are a thread's own
    return weight.device.type == "cpu" and plain and not compiled and size <= _LARGEST_SIDE_BY_SIDE


def directions(chunk: Sequence[Matrix], step: StepOptions, pool: Pool) -> Tensor:
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


def accumulate(momenta: Sequence[Tensor], grads: Sequence[Tensor], step: StepOptions) -> None:
    """`M <- mu M + G` for every matrix, in place."""
    m, g = momenta[0], grads[0]
    if m.device.type == "cpu" and m.dtype == g.dtype == torch.float32 and not step.maximize:
        for m, g in zip(momenta, grads, strict=True):
            torch.add(g, m, alpha=step.momentum, out=m)  # one pass; in bfloat16 it would round mu
        return
    torch._foreach_mul_(list(momenta), step.momentum)
    torch._foreach_add_(list(momenta), list(grads), alpha=step.sign)


def direction(momentum: Tensor, grad: Tensor, step: StepOptions, *, out: Tensor) -> Tensor:
    """Write the direction before orthogonalization, `mu M + G` or the updated `M`, to `out` in the math type."""
    out_like = out.view(momentum.shape)
    if not step.nesterov:
        return out_like.copy_(momentum)
    if momentum.dtype == grad.dtype == out.dtype and not step.maximize:
        return torch.add(grad, momentum, alpha=step.momentum, out=out_like)
    return out_like.copy_(momentum).mul_(step.momentum).add_(grad, alpha=step.sign)


def _apply(chunk: Sequence[Matrix], directions_Boi: Tensor, step: StepOptions) -> None:
    """Step whole matrices of one shape along their directions, which are overwritten."""
    weights = [as_matrices(item.weight) for item in chunk]
    radii = [item.radius.reshape(-1) for item in chunk if item.radius is not None]
    moves_B = moving(chunk, directions_Boi, step.zero_gradient)
    on_cpu = directions_Boi.device.type == "cpu"
    # On CPU matrix by matrix, directly in the weights; elsewhere all at once, which takes few launches.
    taken = weights if on_cpu else [torch.cat(weights)]
    apply_directions([MatrixBatch(taken, directions_Boi, torch.cat(radii) if radii else None, moves_B)], step)
    parts = weights if on_cpu else taken[0].split([len(w_Eoi) for w_Eoi in weights])
    write_back([item.weight for item in chunk], parts)
