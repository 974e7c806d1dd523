"""The choice of experts in plain PyTorch, for every device and type; on the CPU host.py does the same.

Nothing is copied to the host.

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
    largest_T1 = logits_TE.amax(1, keepdim=True)
    probabilities_TE = (logits_TE - largest_T1).exp_()
    total_T1 = probabilities_TE.sum(1, keepdim=True)
    probabilities_TE /= total_T1
    log_sum_T1 = total_T1.log_().add_(largest_T1)
    ids_TK = _select(_scores(logits_TE, probabilities_TE, bias_E, s), s)
    chosen_TK = logits_TE.gather(1, ids_TK)
    gates_TK = _log_gates(chosen_TK, log_sum_T1, s.scoring)
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


def _log_gates(chosen_TK: Tensor, log_sum_T1: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax-topk":
        return chosen_TK - log_sum_T1
    values_TK = chosen_TK if scoring == "topk-softmax" else F.logsigmoid(chosen_TK)
    if scoring == "sigmoid":
        return values_TK
    values_TK = values_TK - values_TK.amax(1, keepdim=True)
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


def _select(scores_TE: Tensor, s: Settings) -> Tensor:
    """The ids [T, K] of the experts of highest score, by descending score and ascending index."""
    if s.n_groups == 1:
        return top(scores_TE, s.top_k)
    (tokens, n_experts), groups = scores_TE.shape, s.n_groups
    size, each = n_experts // groups, s.top_k // groups
    best_TGc = top(scores_TE.view(tokens * groups, size), each).view(tokens, groups, each)
    ids_TK = best_TGc.add_(size * torch.arange(groups, device=best_TGc.device)[:, None]).view(tokens, s.top_k)
    # Of equal scores the lower index comes first here already, and the order of equals is kept.
    return ids_TK.gather(1, top(scores_TE.gather(1, ids_TK), s.top_k))


def _scores(logits_TE: Tensor, probabilities_TE: Tensor, bias_E: Tensor, s: Settings) -> Tensor:
    """What is compared: score + bias, or the logits themselves where the bias is zero."""
    score_TE = (logits_TE.sigmoid() if s.scoring.startswith("sigmoid") else probabilities_TE) + bias_E
    return torch.where(bias_E.any(), score_TE, logits_TE)


def top(values_Rn: Tensor, k: int) -> Tensor:
    """The columns of each row's k largest values, int64 [R, k]: by descending value, equal ones by ascending column.

    NaN counts as larger than everything. `torch.topk` makes no promise about equal values.
    """
    return values_Rn.sort(dim=1, descending=True, stable=True).indices[:, :k].contiguous()
