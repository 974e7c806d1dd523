"""The choice of experts on the CPU, in numpy, whose operations run in the calling thread.

Arrays of a router are small: a threaded operator of torch takes less time for them than waking its threads, which sleep while
workers compute experts. With the same formulas on whole arrays, numpy takes half the time.

Shape legend: T tokens, E experts, K experts per token (top-k), N sequences of L tokens, G groups; R rows and n columns
of any matrix. A trailing 1 is a column.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mue.kernels.routing.op import Settings
from lightning_mue.kernels.scratch import borrowed

Array = np.ndarray[Any, np.dtype[Any]]


def forward(logits_TE: Tensor, bias_E: Tensor, mask_T: Tensor | None, s: Settings) -> tuple[Tensor, ...]:
    """As the operator `route`. Without a bias, logits are compared: the first choice is the largest."""
    x_TE, direct = logits_TE.detach().numpy(), not bias_E.any()
    padding_T = None if mask_T is None else ~mask_T.numpy()
    # Infinite and NaN logits are legal.
    with np.errstate(all="ignore"), borrowed("routing", logits_TE, logits_TE.numel()) as flat:
        work_TE = flat.numpy().reshape(x_TE.shape)
        if direct:
            ids_TK = _select(x_TE, s, work_TE)
            chosen_TK = _take(x_TE, ids_TK)
            largest_T1 = chosen_TK[:, :1]
        else:
            largest_T1 = x_TE.max(1, keepdims=True)
        exp_TE = np.exp(np.subtract(x_TE, largest_T1, out=work_TE), out=work_TE)
        total_T1 = np.einsum("te->t", exp_TE)[:, None]
        if not direct:
            scores_TE = _sigmoid(x_TE) if s.scoring.startswith("sigmoid") else exp_TE / total_T1
            ids_TK = _select(scores_TE + bias_E.detach().numpy(), s)
            chosen_TK = _take(x_TE, ids_TK)
        log_sum_T1 = np.log(total_T1) + largest_T1
        gates_TK = _log_gates(chosen_TK, log_sum_T1, s.scoring, direct)
        gates_TK += log_sum_T1 - log_sum_T1  # 0, or NaN: in all of a token's gates, chosen or not
        gates_TK = np.exp(gates_TK if s.gate == "linear" else 0.5 * gates_TK)
        share_T1 = 1 / total_T1
        if padding_T is not None:
            ids_TK[padding_T] = x_TE.shape[1]
            for values in (gates_TK, log_sum_T1, exp_TE, share_T1):
                values[padding_T] = 0
        sums_NE = _weighted_sums(share_T1, exp_TE, s.n_sequences)
    z_sum_N = np.square(log_sum_T1).reshape(s.n_sequences, -1 if len(x_TE) else 0).sum(1)
    arrays = (gates_TK, ids_TK, _counts(ids_TK, x_TE.shape[1], s.n_sequences), sums_NE, z_sum_N, log_sum_T1[:, 0])
    return tuple(torch.from_numpy(array) for array in arrays)


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
    """As the operator `route_backward`; the formula stands in pytorch.py."""
    x_TE, log_sum_T1 = logits_TE.detach().numpy(), log_sum_T.detach().numpy()[:, None]
    length = len(x_TE) // s.n_sequences
    dchosen_TK = row_T1 = None
    dlogits_TE = torch.empty_like(logits_TE)
    out_TE = dlogits_TE.numpy()
    with np.errstate(all="ignore"):
        if dgates_TK is not None:
            if mask_T is not None:
                ids_TK = ids_TK.clamp(max=x_TE.shape[1] - 1)  # masked tokens are set to zero below
            dchosen_TK = _chosen_grad(dgates_TK.numpy(), x_TE, ids_TK.numpy(), gates_TK.detach().numpy(), s)
            if s.scoring == "softmax-topk":
                row_T1 = -np.einsum("tk->t", dchosen_TK)[:, None]
        if dz_N is not None:
            from_z_T1 = log_sum_T1 * np.repeat(2 * dz_N.numpy(), length)[:, None]
            row_T1 = from_z_T1 if row_T1 is None else row_T1 + from_z_T1
        _through_probabilities(
            None if dprobability_NE is None else dprobability_NE.numpy(), row_T1, x_TE, log_sum_T1, out_TE
        )
        if dchosen_TK is not None:
            dlogits_TE.scatter_add_(1, ids_TK, torch.from_numpy(dchosen_TK))
        if mask_T is not None:
            out_TE[~mask_T.numpy()] = 0
    return dlogits_TE


def _through_probabilities(
    dprobability_NE: Array | None, row_T1: Array | None, x_TE: Array, log_sum_T1: Array, out_TE: Array
) -> None:
    """Write ``p (dP + r - <p, dP>)``."""
    if dprobability_NE is None and row_T1 is None:
        out_TE.fill(0)
        return
    p_TE = np.exp(np.subtract(x_TE, log_sum_T1, out=out_TE), out=out_TE)
    if dprobability_NE is None:
        p_TE *= row_T1
        return
    n_sequences, n_experts = dprobability_NE.shape
    p_NLE = p_TE.reshape(n_sequences, -1 if len(x_TE) else 0, n_experts)
    shift_T1 = -np.einsum("nle,ne->nl", p_NLE, dprobability_NE).reshape(-1, 1)
    if row_T1 is not None:
        shift_T1 += row_T1
    with borrowed("routing", torch.from_numpy(out_TE), out_TE.size) as flat:
        factor_NLE = flat.numpy().reshape(p_NLE.shape)
        np.add(dprobability_NE[:, None], shift_T1.reshape(*p_NLE.shape[:2], 1), out=factor_NLE)
        p_NLE *= factor_NLE


def _weighted_sums(weight_T1: Array, values_TE: Array, n_sequences: int) -> Array:
    """The weighted sum of each sequence's rows, [N, E]; in blocks where the length allows, which loses fewer digits."""
    length = len(values_TE) // n_sequences
    blocks = gcd(length, 64) if length else 1
    shape = (n_sequences, blocks, length // blocks)
    sums = np.einsum("nbl,nble->nbe", weight_T1.reshape(shape), values_TE.reshape(*shape, values_TE.shape[1]))
    return sums.sum(1)  # type: ignore[no-any-return]


def _counts(ids_TK: Array, n_experts: int, n_sequences: int) -> Array:
    """How often each expert occurs in each sequence, int64 [N, E]. Id E, no expert, is left out."""
    columns = n_experts + 1
    places_NA = ids_TK.reshape(n_sequences, -1 if ids_TK.size else 0)
    if n_sequences > 1:
        places_NA = places_NA + columns * np.arange(n_sequences)[:, None]
    counts = np.bincount(places_NA.ravel(), minlength=n_sequences * columns)
    return np.ascontiguousarray(counts.reshape(n_sequences, columns)[:, :n_experts])


def _log_gates(chosen_TK: Array, log_sum_T1: Array, scoring: str, largest_first: bool) -> Array:
    if scoring == "softmax-topk":
        return chosen_TK - log_sum_T1
    values_TK = chosen_TK
    if scoring != "topk-softmax":  # the logarithm of the sigmoid
        values_TK = np.minimum(chosen_TK, 0) - np.log1p(np.exp(-np.abs(chosen_TK)))
    if scoring == "sigmoid":
        return values_TK
    largest_T1 = values_TK[:, :1] if largest_first else values_TK.max(1, keepdims=True)
    values_TK = values_TK - largest_T1
    values_TK -= np.log(np.einsum("tk->t", np.exp(values_TK)))[:, None]
    return values_TK


def _chosen_grad(dgates_TK: Array, x_TE: Array, ids_TK: Array, gates_TK: Array, s: Settings) -> Array:
    """The part of the logits' gradient that comes through the chosen experts' own logits, [T, K]."""
    grad_TK = dgates_TK * gates_TK  # of log gates
    if s.gate == "sqrt":
        grad_TK *= 0.5
    if s.scoring in ("topk-softmax", "sigmoid-normalized"):
        shares_TK = gates_TK if s.gate == "linear" else np.square(gates_TK)
        grad_TK -= shares_TK * np.einsum("tk->t", grad_TK)[:, None]
    if s.scoring in ("sigmoid", "sigmoid-normalized"):
        grad_TK *= _sigmoid(-_take(x_TE, ids_TK))
    return grad_TK


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))  # type: ignore[no-any-return]


def _take(values_Rn: Array, columns_Rk: Array) -> Array:
    """`np.take_along_axis` along rows, in half the time."""
    rows, n = values_Rn.shape
    return values_Rn.reshape(-1)[columns_Rk + np.arange(0, rows * n, n)[:, None]]  # type: ignore[no-any-return]


def _select(scores_TE: Array, s: Settings, scratch_TE: Array | None = None) -> Array:
    """The ids [T, K] of the experts of highest score, by descending score and ascending index."""
    if s.n_groups == 1:
        return top(scores_TE, s.top_k, scratch_TE)
    (tokens, n_experts), groups = scores_TE.shape, s.n_groups
    size, each = n_experts // groups, s.top_k // groups
    best_TGc = top(scores_TE.reshape(tokens * groups, size), each, scratch_TE).reshape(tokens, groups, each)
    ids_TK = (best_TGc + size * np.arange(groups)[:, None]).reshape(tokens, s.top_k)
    # Of equal scores the lower index comes first here already, and the order of equals is kept.
    return _take(ids_TK, top(_take(scores_TE, ids_TK), s.top_k))


def top(values_Rn: Array, k: int, scratch: Array | None = None) -> Array:
    """The columns of each row's k largest values, int64 [R, k]: by descending value, equal ones by ascending column.

    NaN counts as larger than everything. A stable sort of whole rows takes 10 times as long as `_by_keys`: rows are sorted so
    only where equal values meet among the k + 1 largest.
    """
    if values_Rn.dtype != np.float32:
        return _by_stable_sort(values_Rn, k)
    ids_Rk, clear_R = _by_keys(values_Rn, k, scratch)
    if not clear_R.all():
        rows = np.flatnonzero(~clear_R)
        ids_Rk[rows] = _by_stable_sort(values_Rn[rows], k)
    return ids_Rk


def _by_stable_sort(values_Rn: Array, k: int) -> Array:
    order = torch.from_numpy(values_Rn).sort(dim=1, descending=True, stable=True).indices
    return order[:, :k].numpy().copy()


def _by_keys(values_Rn: Array, k: int, scratch: Array | None = None) -> tuple[Array, Array]:
    """The k largest of each row, and in which rows these are sure: [R, k] and bool [R].

    The column's number is stored in the lowest bits of its value, so that sorting numbers, which numpy does with vector
    instructions, sorts columns. Rows where that may have changed the order (the largest k + 1 values are not clearly apart, or
    not finite) are reported as unsure.
    """
    columns = values_Rn.shape[1]
    digits = (1 << (columns - 1).bit_length()) - 1
    keys = np.empty(values_Rn.shape, np.int32) if scratch is None else scratch.reshape(values_Rn.shape).view(np.int32)
    np.bitwise_and(np.ascontiguousarray(values_Rn).view(np.int32), ~digits, out=keys)
    keys |= np.arange(columns, dtype=np.int32)
    keys.view(np.float32).sort(axis=1)
    best = keys[:, ::-1][:, : k + 1]
    # The digits of a NaN may be anything.
    ids_Rk = np.minimum(best[:, :k] & digits, columns - 1).astype(np.int64)
    apart = (best & ~digits).view(np.float32)
    return ids_Rk, (apart[:, :-1] > apart[:, 1:]).all(1)
