"""Load balancing of experts: auxiliary losses, and the loss-free bias update.

Shape legend: T tokens, E experts, K experts per token (top-k), N sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mue.checks import require_choice

#: Over which tokens the switch loss takes the load: see `MoELayer`.
SCOPES = ("local", "global", "sequence")
#: Forms of the bias update: see `update_balance_bias`.
BIAS_UPDATES = ("proportional", "sign")


def switch_loss(logits_TE: Tensor, counts_E: Tensor, top_k: int) -> Tensor:
    """``E * sum_i f_i P_i`` (Switch Transformer, arXiv:2101.03961, equation 4): 1 when the load is uniform.

    f_i is the fraction of the T * K assignments that went to expert i, a constant of the gradient; P_i is the mean
    over tokens of the softmax probability of i.

    Args:
        logits_TE: Router logits [T, E].
        counts_E: Assignments of each expert, int64 [E], T * K in sum.
        top_k: K.

    Returns:
        0-dim float32 with a graph to the logits; 0 for no tokens.
    """
    probability_sum_1E = logits_TE.float().softmax(-1).sum(0, keepdim=True)
    return load_balancing_loss(probability_sum_1E, counts_E[None], counts_E.sum(0, keepdim=True) / top_k)


def load_balancing_loss(probability_sum_NE: Tensor, counts_NE: Tensor, tokens_N: Tensor) -> Tensor:
    """The mean over N sets of tokens, those without tokens left out, of the switch loss of each.

    Args:
        probability_sum_NE: float32 [N, E], sum over a set's tokens of the softmax of their logits.
        counts_NE: Assignments of each expert, int64 [N, E]; of these tokens, or of a larger set that gives the fractions f_i.
        tokens_N: The number of tokens in `probability_sum_NE`, [N].

    Returns:
        0-dim float32 with a graph to the probabilities; 0 if no set has tokens.
    """
    fraction_NE = counts_NE / counts_NE.sum(-1, keepdim=True).clamp(min=1)
    mean_probability_NE = probability_sum_NE / tokens_N.clamp(min=1)[:, None]
    n_experts = probability_sum_NE.shape[1]
    return n_experts * (fraction_NE * mean_probability_NE).sum() / (tokens_N > 0).sum().clamp(min=1)


def probability_sums(logits_TE: Tensor, scoring: str, n_sequences: int, mask_T: Tensor | None = None) -> Tensor:
    """The sum over each sequence's real tokens of their scores, normalized over all experts: [N, E].

    Of the sigmoid scorings these are ``sigmoid(g_i) / sum_j sigmoid(g_j)`` (DeepSeek-V3, arXiv:2412.19437, equation 19), of the
    others, and of "softmax", the softmax.

    Args:
        logits_TE: Router logits [T, E], float32 or float64.
        scoring: As for `Router`, or "softmax".
        n_sequences: N; the tokens are N sequences of T / N tokens, one after the other.
        mask_T: bool [T], False for padding, whose values, NaN too, have no influence.
    """
    if mask_T is not None:
        logits_TE = logits_TE.masked_fill(~mask_T[:, None], 0)
    # In log space, or scores that underflow would be divided by zero.
    log_scores_TE = F.logsigmoid(logits_TE) if scoring.startswith("sigmoid") else logits_TE
    probabilities_TE = log_scores_TE.softmax(-1)
    if mask_T is not None:
        probabilities_TE = probabilities_TE.masked_fill(~mask_T[:, None], 0)
    return probabilities_TE.view(n_sequences, -1 if len(logits_TE) else 0, logits_TE.shape[1]).sum(1)


def global_load(counts_E: Tensor, earlier_E: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    """The load over all ranks, for the global form of the switch loss (docs/theory.md section 5.4).

    `counts_E` are the assignments of this rank's micro-batch, `earlier_E` those of its earlier micro-batches of the optimizer
    step. With the result as arguments of `load_balancing_loss`, the mean of the ranks' losses is the loss of all their tokens
    as one batch, in value and gradient.

    Returns:
        Counts over all ranks, [1, E], and the mean over ranks of the tokens of this micro-batch, [1].
    """
    stacked_2E = torch.stack([counts_E, counts_E if earlier_E is None else counts_E + earlier_E])
    ranks = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed._functional_collectives import all_reduce

        group = torch.distributed.group.WORLD
        assert group is not None
        ranks = group.size()
        stacked_2E = all_reduce(stacked_2E, "sum", group)
    return stacked_2E[1:], stacked_2E[0].sum(0, keepdim=True) / (top_k * ranks)


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2`` (ST-MoE, arXiv:2202.08906, equation 5).

    Args:
        logits_TE: Router logits [T, E].

    Returns:
        0-dim float32 with a graph to the logits; 0 for no tokens.
    """
    return logits_TE.float().logsumexp(-1).square().sum() / max(len(logits_TE), 1)


@torch.no_grad()
def update_balance_bias(bias_E: Tensor, counts_E: Tensor, top_k: int, rate: float, form: str = "proportional") -> None:
    """Moves the balance bias against the load error ``load_i - K / E``, in place; load_i = fraction of tokens on expert i.

    | form           | update                                  | source; docs/theory.md section 5.4       |
    |----------------|-----------------------------------------|------------------------------------------|
    | "proportional" | ``b_i -= rate * (load_i - K / E)``      | arXiv:2601.20205; sums to 0 over experts |
    | "sign"         | ``b_i -= rate * sign(load_i - K / E)``  | arXiv:2408.15664, DeepSeek-V3            |

    The sign form's sum drifts, which changes no choice: what all experts share does not (some codes subtract it).
    Without tokens it does nothing.

    Args:
        bias_E: float32 [E], changed in place.
        counts_E: Assignments of each expert over the global batch, int64 [E], tokens * K in sum.
        top_k: K.
        rate: Step size eta_b.
        form: See the table. At one rate "proportional" needs about ten times as many steps.

    Raises:
        ValueError: `form` is unknown.
    """
    require_choice("form", form, BIAS_UPDATES)
    if form == "sign":  # in whole numbers, exactly
        bias_E.sub_(rate * (counts_E * len(counts_E) - counts_E.sum()).sign())
        return
    tokens = counts_E.sum() / top_k
    load_E = counts_E / tokens.clamp(min=1)
    bias_E.sub_(torch.where(tokens > 0, rate * (load_E - top_k / len(counts_E)), 0.0))
