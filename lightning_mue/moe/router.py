"""Routing: which experts each token goes to, and with what weight.

Shape legend: T tokens, d width, E experts, K experts per token (top-k), C tokens per expert (expert choice), N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mue.checks import require_choice, require_non_negative, require_number, require_positive
from lightning_mue.kernels.backends import BACKENDS
from lightning_mue.kernels.dispatch.op import DispatchPlan, plan_dispatch, plan_expert_choice
from lightning_mue.kernels.routing.op import GATES, SCORINGS, route, router_logits
from lightning_mue.moe import autocast
from lightning_mue.moe.drawing import normal_
from lightning_mue.moe.settings import require_active, require_expert_choice, require_groups, warn_of_constant_gates
from lightning_mue.parameterizations.rules.roles import Role

CHOICES = ("token", "expert")


@dataclass(frozen=True)
class RoutingInfo:
    """One routing decision for T tokens.

    Attributes:
        expert_ids: int64 [T, K], the chosen experts, all different, by descending selection score; E for a masked token.
            In expert choice int64 [E, C]: row e holds e only.
        gates: float32 [T, K] (or [E, C]), the weight of each assignment; 0 for a masked token.
        logits: float32 [T, E], the router's raw scores.
        counts: int64 [E], how many assignments of real tokens went to each expert.
        mask: bool [T], False for padding tokens, which do not count; None: there are none.
        token_ids: In expert choice int64 [E, C], the tokens that each expert chose; else None.
        sequence_counts: int64 [N, E], `counts` by sequence; None in expert choice, as are the next two.
        probability_sum: float32 [N, E], sum of the softmax of the logits over a sequence's tokens.
        z_sum: float32 [N], sum of ``logsumexp(logits)^2`` over a sequence's tokens.
        assigned: int64 [E], assignments of each expert, where padding tokens have some too; None: `counts`. The two sums before
            it are None then.
    """

    expert_ids: Tensor
    gates: Tensor
    logits: Tensor
    counts: Tensor
    mask: Tensor | None = None
    token_ids: Tensor | None = None
    sequence_counts: Tensor | None = None
    probability_sum: Tensor | None = None
    z_sum: Tensor | None = None
    assigned: Tensor | None = None

    def detach(self) -> RoutingInfo:
        """The same decision without its graph."""
        return replace(
            self,
            gates=self.gates.detach(),
            logits=self.logits.detach(),
            probability_sum=None if self.probability_sum is None else self.probability_sum.detach(),
            z_sum=None if self.z_sum is None else self.z_sum.detach(),
        )

    def mean_z(self) -> Tensor:
        """The mean over tokens of ``logsumexp(logits)^2``, 0-dim float32 with a graph; 0 for no tokens."""
        if self.z_sum is not None:
            total = self.z_sum.sum()
        else:
            # Masked before, not after: a NaN of padding must not reach the gradient.
            logits = self.logits if self.mask is None else self.logits.masked_fill(~self.mask[:, None], 0)
            z_T = logits.logsumexp(-1).square()
            total = (z_T if self.mask is None else z_T.masked_fill(~self.mask, 0)).sum()
        return total / (max(len(self.logits), 1) if self.mask is None else self.mask.sum().clamp(min=1))

    def counting(self, mask_T: Tensor) -> RoutingInfo:
        """The same decision, in which only the tokens of a mask count, bool [T]; the others keep their experts."""
        if self.token_ids is not None:
            return replace(self, counts=mask_T[self.token_ids].sum(1), mask=mask_T)
        assert self.sequence_counts is not None
        sequences, n_experts = self.sequence_counts.shape
        first_T = torch.arange(sequences, device=mask_T.device).repeat_interleave(len(mask_T) // sequences) * n_experts
        # Padding counts for one expert more, which is cut off. Fixed shapes: nothing waits for the device.
        places_TK = torch.where(mask_T[:, None], first_T[:, None] + self.expert_ids, sequences * n_experts)
        places = places_TK.flatten()
        counts = self.counts.new_zeros(sequences * n_experts + 1).scatter_add_(0, places, torch.ones_like(places))
        counts_NE = counts[:-1].view(sequences, n_experts)
        return replace(
            self,
            counts=counts_NE.sum(0),
            sequence_counts=counts_NE,
            mask=mask_T,
            probability_sum=None,
            z_sum=None,
            assigned=self.counts,
        )

    def plan(self, backend: str = "auto") -> DispatchPlan:
        """The order in which the experts' rows lie. No host synchronization."""
        if self.token_ids is not None:
            return plan_expert_choice(self.token_ids, len(self.logits))
        return plan_dispatch(self.expert_ids, self.counts if self.assigned is None else self.assigned, backend=backend)

    def assignment_gates(self, plan: DispatchPlan) -> Tensor:
        """The gates in the order of the plan's assignments: of `plan.inverse`'s shape."""
        # In expert choice they are given in the order of rows.
        return self.gates if self.token_ids is None else self.gates.flatten()[plan.inverse]


class Router(nn.Module):
    """A linear router with top-k selection. Everything is computed in float32, under autocast too.

    With logits ``g = x W^T`` and the chosen set A, the k experts of highest ``score + balance_bias`` (of equal ones, the
    one with the lower index):

    | scoring              | score for selection | gate of i in A                  |
    |----------------------|---------------------|---------------------------------|
    | "softmax-topk"       | softmax(g)          | softmax(g)_i                    |
    | "topk-softmax"       | softmax(g)          | softmax of g over A             |
    | "sigmoid"            | sigmoid(g)          | sigmoid(g_i)                    |
    | "sigmoid-normalized" | sigmoid(g)          | sigmoid(g_i) / sum over A       |

    ``gate="sqrt"`` takes the square root of that gate (SqrtGate, arXiv:2603.28743; docs/theory.md section 5.3): for experts
    with independent outputs of equal RMS and normalized gates, the RMS of the sum then does not depend on k. The balance
    bias (arXiv:2408.15664) changes the selection only, never a gate's value. A token that holds a NaN gets NaN gates and
    valid expert ids, and changes no other token's route.

    With ``n_groups`` G > 1 the chosen set is group-balanced (arXiv:2605.23893): experts ``g E/G`` to ``(g+1) E/G`` form
    group g, and of each group the K/G experts of highest score are chosen. Gates are normalized over the whole set.

    With ``choice="expert"`` every expert chooses its ``ceil(T K / E)`` tokens of highest score instead (arXiv:2202.09368):
    the load is even by construction, and a token gets K experts on average. A token's route then depends on the other
    tokens of the batch, later tokens of its sequence included: do not use it in models that generate token by token.

    Args:
        width: d, size of a token.
        n_experts: E.
        top_k: K, experts per token, 1 to E.
        scoring: How gates are computed: "softmax-topk", "topk-softmax", "sigmoid" or "sigmoid-normalized". Expert choice:
            "softmax-topk" or "sigmoid".
        gate: "linear", or "sqrt" for SqrtGate.
        init_std: Standard deviation of the initial weight; None: ``width^-1/2``. Zero is accepted only if every expert is active.
        n_groups: G, groups of equal size with equally many active experts each; divides E and K. 1: free choice.
        choice: "token": each token chooses experts; "expert": each expert chooses tokens, and routes depend on later tokens.
        jitter: In training, each entry of the input is multiplied by a uniform draw from ``[1 - jitter, 1 + jitter]``
            (arXiv:2101.03961); 0 for none, below 1.
        backend: As for `Experts`.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    mue_router = True
    mue_roles: ClassVar[dict[str, Role]] = {"weight": Role.ROUTER, "balance_bias": Role.BALANCE_BIAS}
    balance_bias: Tensor

    def __init__(
        self,
        width: int,
        n_experts: int,
        top_k: int,
        *,
        scoring: str = "topk-softmax",
        gate: str = "linear",
        init_std: float | None = 0.02,
        n_groups: int = 1,
        choice: str = "token",
        jitter: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        require_positive(width=width, n_experts=n_experts, top_k=top_k, n_groups=n_groups)
        require_non_negative(init_std=0.0 if init_std is None else init_std)
        require_number("jitter", jitter, at_least=0, below=1, do="0.01 is usual.")
        require_choice("scoring", scoring, SCORINGS)
        require_choice("gate", gate, GATES)
        require_choice("choice", choice, CHOICES)
        require_choice("backend", backend, BACKENDS)
        require_active(n_experts, top_k, init_std)
        require_groups(n_groups, n_experts, top_k)
        if choice == "expert":
            require_expert_choice(scoring, n_groups)
        self.width, self.n_experts, self.top_k = width, n_experts, top_k
        self.scoring, self.gate, self.init_std, self.n_groups = scoring, gate, init_std, n_groups
        self.choice, self.jitter, self.backend = choice, jitter, backend
        self.weight = nn.Parameter(torch.empty(n_experts, width))
        self.register_buffer("balance_bias", torch.empty(n_experts, dtype=torch.float32))
        self.reset_parameters()
        warn_of_constant_gates(scoring, choice, top_k=top_k, n_experts=n_experts)

    def reset_parameters(self) -> None:
        """Draws the weight anew and clears the balance bias."""
        normal_(self.weight, self.width**-0.5 if self.init_std is None else self.init_std)
        nn.init.zeros_(self.balance_bias)

    def forward(
        self, x_Td: Tensor, mask_T: Tensor | None = None, *, n_sequences: int = 1, counted_T: Tensor | None = None
    ) -> RoutingInfo:
        """Routes each token.

        Args:
            x_Td: [T, d], any floating dtype; T may be zero.
            mask_T: bool [T], False for padding tokens: they are sent to no expert and do not count in the load.
            n_sequences: N; the tokens are N sequences of T / N tokens, one after the other.
            counted_T: bool [T], False for padding tokens that are sent to experts as all others, but do not count; not
                together with `mask_T`.

        Returns:
            The routing. `gates`, `logits`, `probability_sum` and `z_sum` carry gradients.
        """
        routing = self._route(x_Td, mask_T, n_sequences)
        return routing if counted_T is None else routing.counting(counted_T)

    def _route(self, x_Td: Tensor, mask_T: Tensor | None, n_sequences: int) -> RoutingInfo:
        if mask_T is not None:  # values of padding tokens, NaN too, must not reach the weight's gradient
            x_Td = x_Td.masked_fill(~mask_T[:, None], 0)
        if self.jitter and self.training:
            x_Td = x_Td * torch.empty_like(x_Td).uniform_(1 - self.jitter, 1 + self.jitter)
        with autocast.disabled(x_Td.device.type):
            logits_TE = router_logits(x_Td, self.weight)
            if self.choice == "expert":
                return self._route_by_expert(logits_TE, mask_T)
            routed = route(
                logits_TE,
                self.balance_bias,
                top_k=self.top_k,
                scoring=self.scoring,
                gate=self.gate,
                n_groups=self.n_groups,
                mask_T=mask_T,
                n_sequences=n_sequences,
                backend=self.backend,
            )
        return RoutingInfo(
            routed.expert_ids,
            routed.gates,
            logits_TE,
            routed.counts.sum(0),
            mask=mask_T,
            sequence_counts=routed.counts,
            probability_sum=routed.probability_sum,
            z_sum=routed.z_sum,
        )

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        groups = f", n_groups={self.n_groups}" if self.n_groups > 1 else ""
        choice = ", choice=expert" if self.choice == "expert" else ""
        return (
            f"{self.width}, n_experts={self.n_experts}, top_k={self.top_k}, {self.scoring}, gate={self.gate}"
            f"{groups}{choice}"
        )

    def _route_by_expert(self, logits_TE: Tensor, mask_T: Tensor | None) -> RoutingInfo:
        """Expert choice (arXiv:2202.09368). The balance bias cannot change the order in which an expert ranks tokens."""
        tokens = len(logits_TE)
        log_scores_TE = F.logsigmoid(logits_TE) if self.scoring == "sigmoid" else logits_TE.log_softmax(-1)
        if mask_T is not None:  # chosen last, and with gates of zero
            log_scores_TE = log_scores_TE.masked_fill(~mask_T[:, None], -torch.inf)
        capacity = min(tokens, -(-tokens * self.top_k // self.n_experts))
        # A NaN is chosen last too, or every expert would choose it.
        ranking_TE = log_scores_TE.detach().nan_to_num(nan=-torch.inf)
        # Stable, so that of equal tokens the first is chosen, on every device.
        token_ids_EC = ranking_TE.sort(dim=0, descending=True, stable=True).indices[:capacity].T.contiguous()
        log_gates_EC = log_scores_TE.T.gather(1, token_ids_EC)
        gates_EC = torch.exp(log_gates_EC if self.gate == "linear" else 0.5 * log_gates_EC)
        experts_E1 = torch.arange(self.n_experts, device=logits_TE.device)[:, None]
        counts_E = torch.full_like(experts_E1[:, 0], capacity)
        if mask_T is not None:
            counts_E = mask_T[token_ids_EC].sum(1)
        return RoutingInfo(
            experts_E1.expand_as(token_ids_EC), gates_EC, logits_TE, counts_E, mask=mask_T, token_ids=token_ids_EC
        )

    def _apply(self, fn: object, recurse: bool = True) -> Router:
        """Keeps the bias in float32 when the module is cast: its updates (about 1e-3) vanish in bfloat16."""
        bias_E = self.balance_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.balance_bias.dtype != torch.float32:
            self.balance_bias = bias_E.to(self.balance_bias.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Keeps the bias in float32 when a state of another dtype is assigned."""
        super()._load_from_state_dict(*args)
        self.balance_bias = self.balance_bias.float()
