"""Triton kernels of routing: one pass over the logits forward, one backward, and one that adds up the statistics.

A program takes whole rows of logits into registers. The experts of a token come from K rounds of a maximum over 64-bit keys,
the score in the upper half as an integer of the same order and the expert's index, reversed, in the lower: no two are equal,
so that of equal scores the lower index wins. Statistics are written as one partial sum a program and added in a fixed order.
No atomics: repeating a call gives the same bits.

Shape legend: T tokens, E experts, K experts per token (top-k), N sequences of `length` tokens, B programs a sequence; EP and
KP are E and K rounded up to powers of two.

Library functions of `triton.language` (`tl.sum`, `tl.max`) are avoided as in `symmetric.py`; `tl.reduce` with the library's
own combiners is what the interpreter knows by name and runs fast.
"""

# Triton reads annotations of kernel arguments, and only `tl.constexpr` means something to it.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_mue.kernels.routing.op import Settings
from lightning_mue.kernels.triton_tools.launching import new_empty

_TAKEN = tl.constexpr(-(2**63))  # below the key of every score


@triton.jit
def _sum(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._sum_combine)


@triton.jit
def _max(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._elementwise_max)


@triton.jit
def _logsumexp(x):
    """Along the last dimension; and the exponentials over their sum. A NaN makes both NaN."""
    # The maximum must not see a NaN: what it then is differs between the interpreter and a device.
    top = _max(tl.where(x == x, x, float("-inf")), 1)
    exponentials = tl.exp(x - top[:, None])
    total = _sum(exponentials, 1)
    return top + tl.log(total), exponentials / total[:, None]


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # at most 1
    return tl.where(x > 0, 1.0, small) / (1.0 + small)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


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
    """The gradient of BT tokens' logits, all of a row at once; the formula is in pytorch.py."""
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


#: Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when this module was imported).
INTERPRETED = not isinstance(route_kernel, triton.JITFunction)

#: Elements of a tile [BT, EP]: at 4 warps 16 a thread, of which some six copies live at once, keys counting twice. More
#: would spill at E = 128 and above; fewer leaves too little in flight to hide the rounds' latency.
TILE = 2048
#: Programs that run at a time: at 168 registers a thread (E = 64 to 256, Triton 3.9) three on each of an H200's 132
#: multiprocessors. Beyond that a program takes several blocks of tokens, so that there are fewer partial sums.
PROGRAMS = 396


def forward(logits_TE: Tensor, bias_E: Tensor, mask_T: Tensor | None, s: Settings) -> tuple[Tensor, ...]:
    """As the operator `route`."""
    (tokens, n_experts), length = logits_TE.shape, len(logits_TE) // s.n_sequences
    ids = new_empty(logits_TE, tokens, s.top_k, dtype=torch.int64)
    gates, log_sum = new_empty(logits_TE, tokens, s.top_k), new_empty(logits_TE, tokens)
    constants = _constants(logits_TE, mask_T, s)
    steps, blocks = _cut(length, s.n_sequences, constants["BT"])
    parts = [
        new_empty(logits_TE, s.n_sequences, blocks, n_experts, dtype=torch.int32),
        new_empty(logits_TE, s.n_sequences, blocks, n_experts),
        new_empty(logits_TE, s.n_sequences, blocks),
    ]
    sums = [
        new_empty(logits_TE, s.n_sequences, n_experts, dtype=torch.int64),
        new_empty(logits_TE, s.n_sequences, n_experts),
        new_empty(logits_TE, s.n_sequences),
    ]
    with torch.cuda.device_of(logits_TE):  # Triton launches on the current device
        if tokens:
            route_kernel[(blocks, s.n_sequences)](
                logits_TE,
                bias_E.contiguous(),
                _mask(mask_T, logits_TE),
                ids,
                gates,
                *parts,
                log_sum,
                length,
                steps,
                SIZE=n_experts // s.n_groups,
                EACH=s.top_k // s.n_groups,
                **constants,
            )
        wide = min(constants["EP"], 32)
        grid = (-(-n_experts // wide), s.n_sequences)
        sum_parts_kernel[grid](*parts, *sums, blocks if tokens else 0, E=n_experts, BE=wide, BP=32, num_warps=4)
    return gates, ids, *sums, log_sum


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
    constants, length = _constants(logits_TE, mask_T, s), len(logits_TE) // s.n_sequences
    given = {
        "HAS_DGATES": dgates_TK is not None,
        "HAS_DPROBABILITY": dprobability_NE is not None,
        "HAS_DZ": dz_N is not None,
    }
    grads = [logits_TE if g is None else g for g in (dgates_TK, dprobability_NE, dz_N)]
    with torch.cuda.device_of(logits_TE):
        route_backward_kernel[(-(-length // constants["BT"]), s.n_sequences)](
            *grads,
            logits_TE,
            ids_TK,
            gates_TK,
            log_sum_T,
            _mask(mask_T, logits_TE),
            dlogits_TE,
            length,
            **given,
            **constants,
        )
    return dlogits_TE


def _mask(mask_T: Tensor | None, logits_TE: Tensor) -> Tensor:
    """What the kernel gets for a mask: bytes, or something that it does not read."""
    return logits_TE if mask_T is None else mask_T.contiguous().view(torch.uint8)


def _constants(logits_TE: Tensor, mask_T: Tensor | None, s: Settings) -> dict[str, Any]:
    n_experts = logits_TE.shape[1]
    padded = triton.next_power_of_2(n_experts)
    return {
        "E": n_experts,
        "EP": padded,
        "K": s.top_k,
        "KP": triton.next_power_of_2(s.top_k),
        "SIGMOID": s.scoring.startswith("sigmoid"),
        "OVER_SET": s.scoring in ("topk-softmax", "sigmoid-normalized"),
        "SQRT": s.gate == "sqrt",
        "HAS_MASK": mask_T is not None,
        "BT": max(1, min(128, TILE // padded)),
        "num_warps": 4,
    }


def _cut(length: int, n_sequences: int, block: int) -> tuple[int, int]:
    """How many blocks of tokens a program takes, and how many programs a sequence has."""
    blocks = max(1, -(-length // block))
    steps = -(-blocks * n_sequences // PROGRAMS)
    return steps, -(-blocks // steps)
