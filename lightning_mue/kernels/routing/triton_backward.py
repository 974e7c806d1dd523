"""Triton kernel of the gradient of the logits, one pass over them. The formula is in pytorch.py.

Shape legend: T tokens, E experts, K experts per token (top-k), N sequences of `length` tokens, BT tokens of a block; EP and KP are
E and K rounded up to powers of two.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_mue.kernels.routing.op import Settings
from lightning_mue.kernels.routing.triton_functions import _sigmoid, _sum, constants_for, mask_bytes
from lightning_mue.kernels.triton_tools.launching import new_empty


@triton.jit(do_not_specialize=["length"])
def route_backward_kernel(
    dgates_ptr,
    dprobability_ptr,
    dz_ptr,
    logits_ptr,
    ids_ptr,
    gates_ptr,
    log_sum_ptr,
    mask_ptr,
    dlogits_ptr,
    length,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SIGMOID: tl.constexpr,
    OVER_SET: tl.constexpr,
    SQRT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DGATES: tl.constexpr,
    HAS_DPROBABILITY: tl.constexpr,
    HAS_DZ: tl.constexpr,
    BT: tl.constexpr,
):
    """The gradient of the logits of BT tokens, a whole row at a time."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = t < length
    row = tl.program_id(1).to(tl.int64) * length + t
    real = inside
    if HAS_MASK:
        real = tl.load(mask_ptr + row, mask=inside, other=0) != 0
    e = tl.arange(0, EP)
    at = row[:, None] * E + e[None, :]
    tile = inside[:, None] & (e < E)[None, :]
    x = tl.load(logits_ptr + at, mask=tile, other=0.0)
    log_sum = tl.load(log_sum_ptr + row, mask=inside, other=0.0)
    p = tl.where(tile, tl.exp(x - log_sum[:, None]), 0.0)
    through_chosen = tl.full((BT, EP), 0.0, tl.float32)
    every = tl.full((BT, EP), 0.0, tl.float32)  # what multiplies p, but for what a whole row shares
    shared = tl.full((BT,), 0.0, tl.float32)
    if HAS_DGATES:
        k = tl.arange(0, KP)
        spots, kept = row[:, None] * K + k[None, :], real[:, None] & (k < K)[None, :]
        gates = tl.load(gates_ptr + spots, mask=kept, other=0.0)
        whole = _sum(gates * tl.load(dgates_ptr + spots, mask=kept, other=0.0), 1)
        if SQRT:
            whole *= 0.5
        if not SIGMOID and not OVER_SET:
            shared -= whole
        for i in range(0, K):
            gate = tl.load(gates_ptr + row * K + i, mask=real, other=0.0)
            grad = gate * tl.load(dgates_ptr + row * K + i, mask=real, other=0.0)
            share = gate
            if SQRT:
                grad *= 0.5
                share = gate * gate
            if OVER_SET:
                grad -= share * whole
            expert = tl.load(ids_ptr + row * K + i, mask=real, other=E)
            through_chosen = tl.where(e[None, :] == expert[:, None], grad[:, None], through_chosen)
        if SIGMOID:
            through_chosen *= _sigmoid(-x)
    if HAS_DPROBABILITY:
        dprobability = tl.load(dprobability_ptr + tl.program_id(1).to(tl.int64) * E + e, mask=e < E, other=0.0)
        every += dprobability[None, :]
        shared -= _sum(p * dprobability[None, :], 1)
    if HAS_DZ:
        shared += 2.0 * log_sum * tl.load(dz_ptr + tl.program_id(1))
    dlogits = p * (every + shared[:, None]) + through_chosen
    tl.store(dlogits_ptr + at, tl.where(real[:, None], dlogits, 0.0), mask=tile)


def backward(
    dgates_TK: Tensor | None,
    dprobability_NE: Tensor | None,
    dz_N: Tensor | None,
    logits_TE: Tensor,
    ids_TK: Tensor,
    gates_TK: Tensor,
    log_sum_T: Tensor,
    mask_T: Tensor | None,
    s: Settings,
) -> Tensor:
    """As the operator `route_backward`."""
    dlogits_TE = new_empty(logits_TE, *logits_TE.shape)
    if not len(logits_TE):
        return dlogits_TE
    constants, length = constants_for(logits_TE, mask_T, s), len(logits_TE) // s.n_sequences
    given = (dgates_TK, dprobability_NE, dz_N)
    has = {name: g is not None for name, g in zip(("HAS_DGATES", "HAS_DPROBABILITY", "HAS_DZ"), given, strict=True)}
    grads = [logits_TE if g is None else g for g in given]
    tensors = (*grads, logits_TE, ids_TK, gates_TK, log_sum_T, mask_bytes(mask_T, logits_TE), dlogits_TE)
    with torch.cuda.device_of(logits_TE):
        route_backward_kernel[(-(-length // constants["BT"]), s.n_sequences)](*tensors, length, **has, **constants)
    return dlogits_TE
