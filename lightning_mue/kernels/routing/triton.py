"""Triton kernels of routing: one pass over the logits, and one that adds up the statistics; `triton_backward.py` has the gradient.

A program takes whole rows of logits into registers. The experts of a token come from K rounds of a maximum over 64-bit keys: the
upper half is the score as an integer of the same order, the lower half the expert's index in reverse. So no two keys are equal,
and of equal scores the lower index wins. Statistics are written as one partial sum a program and added in a fixed order, without
atomics: repeating a call gives the same bits.

Shape legend: T tokens, E experts, K experts per token (top-k), N sequences of `length` tokens, B programs a sequence, BT tokens of
a block; EP and KP are E and K rounded up to powers of two.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_mue.kernels.routing.op import Settings
from lightning_mue.kernels.routing.triton_backward import backward
from lightning_mue.kernels.routing.triton_functions import (
    _log_sigmoid,
    _logsumexp,
    _max,
    _sigmoid,
    _sum,
    constants_for,
    mask_bytes,
)
from lightning_mue.kernels.triton_tools.launching import new_empty

__all__ = ["backward", "forward"]

_TAKEN = tl.constexpr(-(2**63))  # below the key of every score


@triton.jit
def _keys(score, e, E: tl.constexpr, EP: tl.constexpr):
    """Keys [BT, EP] whose order is that of the scores, of equal ones that of descending indices. NaN is the largest."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # both zeros are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(score == score, ordered, 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) | (EP - 1 - e)[None, :].to(tl.int64)
    return tl.where((e < E)[None, :], keys, _TAKEN)


@triton.jit
def _choose(
    keys,
    e,
    k,
    BT: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SIZE: tl.constexpr,
    EACH: tl.constexpr,
):
    """The ids [BT, KP] of each row's K largest keys, and int32 [BT, EP], 1 where an expert is among them.

    SIZE experts form a group, and of each EACH are taken: a group is closed once it has given that many.
    """
    ids = tl.full((BT, KP), -1, tl.int32)
    taken = tl.full((BT, EP), 0, tl.int32)
    for i in range(0, K):
        best = (EP - 1 - (_max(keys, 1) & (EP - 1))).to(tl.int32)
        ids = tl.where((k == i)[None, :], best[:, None], ids)
        hit = e[None, :] == best[:, None]
        taken = tl.where(hit, 1, taken)
        if EACH < K:
            group = best // SIZE
            given = _sum(tl.where((ids >= 0) & (ids // SIZE == group[:, None]), 1, 0), 1)
            hit = hit | ((e // SIZE)[None, :] == group[:, None]) & (given == EACH)[:, None]
        keys = tl.where(hit, _TAKEN, keys)
    return ids, taken


@triton.jit
def _log_gates(chosen, log_sum, k, K: tl.constexpr, SIGMOID: tl.constexpr, OVER_SET: tl.constexpr):
    """Log gates [BT, KP] from the chosen logits; NaN for all experts of a token with a NaN logit."""
    inside = (k < K)[None, :]
    log_gates = chosen
    if SIGMOID:
        log_gates = _log_sigmoid(chosen)
    if OVER_SET:
        of_set, _ = _logsumexp(tl.where(inside, log_gates, float("-inf")))
        log_gates -= of_set[:, None]
    elif not SIGMOID:
        log_gates -= log_sum[:, None]
    return log_gates + (log_sum - log_sum)[:, None]


@triton.jit(do_not_specialize=["length", "steps"])
def route_kernel(
    logits_ptr,
    bias_ptr,
    mask_ptr,
    ids_ptr,
    gates_ptr,
    counts_ptr,
    probability_ptr,
    z_ptr,
    log_sum_ptr,
    length,
    steps,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SIZE: tl.constexpr,
    EACH: tl.constexpr,
    SIGMOID: tl.constexpr,
    OVER_SET: tl.constexpr,
    SQRT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BT: tl.constexpr,
):
    """`steps` times BT tokens of one sequence: their ids and gates, and partial sums [N, B, E] and [N, B]."""
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    e = tl.arange(0, EP)
    k = tl.arange(0, KP)
    bias = tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    biased = _max(tl.where(bias != 0.0, 1, 0), 0) > 0
    counts = tl.full((EP,), 0, tl.int32)
    probability = tl.full((EP,), 0.0, tl.float32)
    z = tl.full((BT,), 0.0, tl.float32)
    for step in range(0, steps):
        t = (tl.program_id(0) * steps + step) * BT + tl.arange(0, BT)
        inside = t < length
        row = tl.program_id(1).to(tl.int64) * length + t
        real = inside
        if HAS_MASK:
            real = tl.load(mask_ptr + row, mask=inside, other=0) != 0
        at = logits_ptr + row[:, None] * E
        x = tl.load(at + e[None, :], mask=inside[:, None] & (e < E)[None, :], other=0.0)
        x = tl.where((e < E)[None, :], x, float("-inf"))
        log_sum, p = _logsumexp(x)
        score = p
        if SIGMOID:
            score = _sigmoid(x)
        score = tl.where(biased, score + bias[None, :], x)
        ids, taken = _choose(_keys(score, e, E, EP), e, k, BT, EP, K, KP, SIZE, EACH)

        kept = inside[:, None] & (k < K)[None, :]
        chosen = tl.load(at + ids, mask=kept, other=0.0)
        log_gates = _log_gates(chosen, log_sum, k, K, SIGMOID, OVER_SET)
        if SQRT:
            log_gates *= 0.5
        out = row[:, None] * K + k[None, :]
        tl.store(gates_ptr + out, tl.where(real[:, None], tl.exp(log_gates), 0.0), mask=kept)
        tl.store(ids_ptr + out, tl.where(real[:, None], ids, E).to(tl.int64), mask=kept)
        counts += _sum(tl.where(real[:, None], taken, 0), 0)
        probability += _sum(tl.where(real[:, None], p, 0.0), 0)
        log_sum = tl.where(real, log_sum, 0.0)
        z += log_sum * log_sum
        tl.store(log_sum_ptr + row, log_sum, mask=inside)
    tl.store(counts_ptr + part * E + e, counts, mask=e < E)
    tl.store(probability_ptr + part * E + e, probability, mask=e < E)
    tl.store(z_ptr + part, _sum(z, 0))


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(
    counts_ptr,
    probability_ptr,
    z_ptr,
    counts_out,
    probability_out,
    z_out,
    parts,
    E: tl.constexpr,
    BE: tl.constexpr,
    BP: tl.constexpr,
):
    """Add up the partial sums of a sequence, for BE experts, BP parts at a time in order."""
    n = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    p = tl.arange(0, BP)
    counts = tl.full((BP, BE), 0, tl.int32)
    probability = tl.full((BP, BE), 0.0, tl.float32)
    z = tl.full((BP,), 0.0, tl.float32)
    for done in range(0, parts, BP):
        part = n * parts + done + p
        inside = done + p < parts
        tile = inside[:, None] & (e < E)[None, :]
        at = part[:, None] * E + e[None, :]
        counts += tl.load(counts_ptr + at, mask=tile, other=0)
        probability += tl.load(probability_ptr + at, mask=tile, other=0.0)
        z += tl.load(z_ptr + part, mask=inside, other=0.0)
    tl.store(counts_out + n * E + e, _sum(counts, 0).to(tl.int64), mask=e < E)
    tl.store(probability_out + n * E + e, _sum(probability, 0), mask=e < E)
    if tl.program_id(0) == 0:
        tl.store(z_out + n, _sum(z, 0))


#: Programs that run at a time: at 168 registers a thread (E = 64 to 256, Triton 3.9) three on each of an H200's 132
#: multiprocessors. Beyond that a program takes several blocks of tokens, so that there are fewer partial sums.
PROGRAMS = 396


def forward(logits_TE: Tensor, bias_E: Tensor, mask_T: Tensor | None, s: Settings) -> tuple[Tensor, ...]:
    """As the operator `route`."""
    (tokens, n_experts), length = logits_TE.shape, len(logits_TE) // s.n_sequences
    ids = new_empty(logits_TE, tokens, s.top_k, dtype=torch.int64)
    gates, log_sum = new_empty(logits_TE, tokens, s.top_k), new_empty(logits_TE, tokens)
    constants = constants_for(logits_TE, mask_T, s)
    steps, blocks = _cut(length, s.n_sequences, constants["BT"])
    parts = _new_sums(logits_TE, torch.int32, s.n_sequences, blocks)
    sums = _new_sums(logits_TE, torch.int64, s.n_sequences)
    with torch.cuda.device_of(logits_TE):  # Triton launches on the current device
        if tokens:
            tensors = (logits_TE, bias_E.contiguous(), mask_bytes(mask_T, logits_TE), ids, gates, *parts, log_sum)
            groups = {"SIZE": n_experts // s.n_groups, "EACH": s.top_k // s.n_groups}
            route_kernel[(blocks, s.n_sequences)](*tensors, length, steps, **groups, **constants)
        wide = min(constants["EP"], 32)
        grid = (-(-n_experts // wide), s.n_sequences)
        sum_parts_kernel[grid](*parts, *sums, blocks if tokens else 0, E=n_experts, BE=wide, BP=32, num_warps=4)
    return gates, ids, *sums, log_sum


def _new_sums(like_TE: Tensor, counts_dtype: torch.dtype, *shape: int) -> list[Tensor]:
    """Memory for the counts, the sums of probabilities and those of z, of each element of `shape`."""
    n_experts = like_TE.shape[1]
    counts = new_empty(like_TE, *shape, n_experts, dtype=counts_dtype)
    return [counts, new_empty(like_TE, *shape, n_experts), new_empty(like_TE, *shape)]


def _cut(length: int, n_sequences: int, block: int) -> tuple[int, int]:
    """How many blocks of tokens a program takes, and how many programs a sequence has."""
    blocks = max(1, -(-length // block))
    steps = -(-blocks * n_sequences // PROGRAMS)
    return steps, -(-blocks // steps)
