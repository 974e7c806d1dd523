"""The choice of experts in plain PyTorch, for every device and type.

Shape legend: T tokens, E experts, K experts per token (top-k), N sequences, G groups of experts, c = K / G; R rows and n
columns of any matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mue.kernels.dispatch.op import count_by_expert
from lightning_mue.kernels.routing.op import Settings


def forward(logits_TE: Tensor, bias_E: Tensor, mask_T: Tensor | None, s: Settings) -> tuple[Tensor, ...]:
    """As the operator `route`. Softmaxes are written out: torch's take 0.2 us a row, even for short rows."""
    n_experts, length = logits_TE.shape[1], len(logits_TE) // s.n_sequences
    scratch_TE = torch.empty_like(logits_TE)
    # On the CPU reading the bias costs no synchronization. Without one, logits are compared: the first choice is the largest.
    direct = logits_TE.device.type == "cpu" and not bias_E.any()
    if direct:
        ids_TK = _select(logits_TE, s, scratch_TE)
        chosen_TK = logits_TE.gather(1, ids_TK)
        largest_T1 = chosen_TK[:, :1]
    else:
        largest_T1 = logits_TE.amax(1, keepdim=True)
    probabilities_TE = torch.sub(logits_TE, largest_T1, out=scratch_TE).exp_()
    total_T1 = probabilities_TE.sum(1, keepdim=True)
    probabilities_TE /= total_T1
    log_sum_T1 = total_T1.log_().add_(largest_T1)
    if not direct:
        ids_TK = _select(_scores(logits_TE, probabilities_TE, bias_E, s), s)
        chosen_TK = logits_TE.gather(1, ids_TK)
    gates_TK = _log_gates(chosen_TK, log_sum_T1, s.scoring, direct)
    gates_TK += log_sum_T1 - log_sum_T1  # 0, or NaN: in all of a token's gates, chosen or not
    gates_TK = (gates_TK if s.gate == "linear" else gates_TK.mul_(0.5)).exp_()
    if mask_T is not None:
        padding_T1 = ~mask_T[:, None]
        ids_TK.masked_fill_(padding_T1, n_experts)
        for values in (gates_TK, probabilities_TE, log_sum_T1):
            values.masked_fill_(padding_T1, 0)
    probability_sum_NE = probabilities_TE.view(s.n_sequences, length, n_experts).sum(1)
    z_sum_N = log_sum_T1.square().view(s.n_sequences, length).sum(1)
    counts_NE = count_by_expert(ids_TK, n_experts, s.n_sequences)
    return gates_TK, ids_TK, counts_NE, probability_sum_NE, z_sum_N, log_sum_T1[:, 0]


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
    """As the operator `route_backward`: the gradient of the logits.

        dlogits_te = p_te (dP_e + r_t) + dchosen_te,    r_t = 2 L_t dz - <p_t, dP> [- sum of dchosen_t, softmax-topk]

    with p the softmax, L its logsumexp, and dchosen the gates' gradient at the K chosen experts.
    """
    n_experts, length = logits_TE.shape[1], len(logits_TE) // s.n_sequences
    dchosen_TK = row_T1 = None
    if dgates_TK is not None:
        if mask_T is not None:
            ids_TK = ids_TK.clamp(max=n_experts - 1)  # masked tokens are set to zero below
        dchosen_TK = _chosen_grad(dgates_TK, logits_TE, ids_TK, gates_TK, s)
        if s.scoring == "softmax-topk":
            row_T1 = -dchosen_TK.sum(1, keepdim=True)
    if dz_N is not None:
        from_z_T1 = log_sum_T[:, None] * (2 * dz_N).repeat_interleave(length)[:, None]
        row_T1 = from_z_T1 if row_T1 is None else row_T1.add_(from_z_T1)
    dlogits_TE = _through_probabilities(dprobability_NE, row_T1, logits_TE, log_sum_T)
    if dchosen_TK is not None:
        dlogits_TE.scatter_add_(1, ids_TK, dchosen_TK)
    return dlogits_TE if mask_T is None else dlogits_TE.masked_fill_(~mask_T[:, None], 0)


def _through_probabilities(
    dprobability_NE: Tensor | None, row_T1: Tensor | None, logits_TE: Tensor, log_sum_T: Tensor
) -> Tensor:
    """``p (dP + r - <p, dP>)``."""
    if dprobability_NE is None and row_T1 is None:
        return torch.zeros_like(logits_TE)
    p_TE = (logits_TE - log_sum_T[:, None]).exp_()
    if dprobability_NE is None:
        assert row_T1 is not None
        return p_TE.mul_(row_T1)
    n_sequences, n_experts = dprobability_NE.shape
    pdp_TE = (p_TE.view(n_sequences, -1, n_experts) * dprobability_NE[:, None]).view_as(p_TE)
    dot_T1 = pdp_TE.sum(1, keepdim=True)
    return pdp_TE.addcmul_(p_TE, dot_T1.neg_() if row_T1 is None else row_T1 - dot_T1)


def _log_gates(chosen_TK: Tensor, log_sum_T1: Tensor, scoring: str, largest_first: bool) -> Tensor:
    if scoring == "softmax-topk":
        return chosen_TK - log_sum_T1
    values_TK = chosen_TK if scoring == "topk-softmax" else F.logsigmoid(chosen_TK)
    if scoring == "sigmoid":
        return values_TK
    largest_T1 = values_TK[:, :1] if largest_first else values_TK.amax(1, keepdim=True)
    values_TK = values_TK - largest_T1
    return values_TK.sub_(values_TK.exp().sum(1, keepdim=True).log_())


def _chosen_grad(dgates_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, gates_TK: Tensor, s: Settings) -> Tensor:
    """The part of the logits' gradient that comes through the chosen experts' own logits, [T, K]."""
    grad_TK = dgates_TK * gates_TK  # of log gates
    if s.gate == "sqrt":
        grad_TK *= 0.5
    if s.scoring in ("topk-softmax", "sigmoid-normalized"):
        shares_TK = gates_TK if s.gate == "linear" else gates_TK.square()
        grad_TK.addcmul_(shares_TK, grad_TK.sum(1, keepdim=True), value=-1)
    if s.scoring in ("sigmoid", "sigmoid-normalized"):
        grad_TK *= logits_TE.gather(1, ids_TK).neg_().sigmoid_()
    return grad_TK


def _select(scores_TE: Tensor, s: Settings, scratch_TE: Tensor | None = None) -> Tensor:
    """The ids [T, K] of the experts of highest score, by descending score and ascending index."""
    if s.n_groups == 1:
        return top(scores_TE, s.top_k, scratch_TE)
    (tokens, n_experts), groups = scores_TE.shape, s.n_groups
    size, each = n_experts // groups, s.top_k // groups
    best_TGc = top(scores_TE.view(tokens * groups, size), each, scratch_TE).view(tokens, groups, each)
    ids_TK = best_TGc.add_(size * torch.arange(groups, device=best_TGc.device)[:, None]).view(tokens, s.top_k)
    # Of equal scores the lower index comes first here already, and the order of equals is kept.
    return ids_TK.gather(1, top(scores_TE.gather(1, ids_TK), s.top_k))


def _scores(logits_TE: Tensor, probabilities_TE: Tensor, bias_E: Tensor, s: Settings) -> Tensor:
    """What is compared: score + bias, or the logits themselves where the bias is zero."""
    score_TE = (logits_TE.sigmoid() if s.scoring.startswith("sigmoid") else probabilities_TE) + bias_E
    return score_TE if logits_TE.device.type == "cpu" else torch.where(bias_E.any(), score_TE, logits_TE)


def top(values_Rn: Tensor, k: int, scratch: Tensor | None = None) -> Tensor:
    """The columns of each row's k largest values, int64 [R, k]: by descending value, equal ones by ascending column.

    NaN counts as larger than everything. `torch.topk` makes no promise about equal values, and a stable sort of whole rows
    takes 3 times as long; so on the CPU rows are sorted only where equal values meet among the k + 1 largest.
    """
    if values_Rn.device.type != "cpu":
        return values_Rn.sort(dim=1, descending=True, stable=True).indices[:, :k].contiguous()
    # Rounds cost about 20 us each, however few the rows.
    fast = values_Rn.dtype == torch.float32 and values_Rn.numel() > _FEW
    ids_Rk, clear_R = _by_rounds(values_Rn, k, scratch) if fast else _by_topk(values_Rn, k)
    if not clear_R.all():
        rows = clear_R.logical_not_().nonzero()[:, 0]
        ids_Rk[rows] = values_Rn[rows].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return ids_Rk


_FEW = 16384


def _by_topk(values_Rn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `_by_rounds`."""
    best, ids = values_Rn.topk(min(k + 1, values_Rn.shape[1]))
    return ids[:, :k].contiguous(), (best[:, :-1] > best[:, 1:]).all(1)


def _by_rounds(values_Rn: Tensor, k: int, scratch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of each row by k + 1 maxima, and in which rows these are sure: [R, k] and bool [R].

    Several times faster than `torch.topk`, whose inner loop is scalar: a maximum over rows is not, and the column's number is
    stored in the lowest bits of its value, so that no index has to be searched for. Rows where that may have changed the
    order (the largest k + 1 values are not clearly apart, or not finite) are reported as unsure.
    """
    rows, columns = values_Rn.shape
    digits = (1 << (columns - 1).bit_length()) - 1
    column = torch.arange(columns, dtype=torch.int32)
    # Short rows are faster transposed: a maximum then runs over all rows at once.
    across = columns <= 16
    bits = values_Rn.contiguous().view(torch.int32)
    keys = torch.empty_like(bits) if scratch is None else scratch.view(torch.int32)
    keys = keys.view((columns, rows) if across else (rows, columns))
    torch.bitwise_and(bits.T if across else bits, ~digits, out=keys)
    keys.bitwise_or_(column[:, None] if across else column)
    first = torch.arange(rows) * (1 if across else columns)
    best = keys.new_empty(min(k + 1, columns), rows)
    keys_f, best_f = keys.view(torch.float32), best.view(torch.float32)
    removed = torch.tensor(-torch.inf).expand(rows)
    for i in range(len(best)):
        torch.amax(keys_f, 0 if across else 1, out=best_f[i])
        if i + 1 < len(best):
            at = best[i] & digits
            if columns <= digits:
                at.clamp_(max=columns - 1)  # the digits of a NaN may be anything
            keys_f.put_(torch.add(first, at, alpha=rows if across else 1), removed)
    ids_Rk = (best[:k] & digits).T.long()
    apart = best.bitwise_and_(~digits).view(torch.float32)
    return ids_Rk.contiguous(), (apart[:-1] > apart[1:]).all(0)
