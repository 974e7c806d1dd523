"""Routing: which experts each token goes to, and with what weight.

Shape legend: T tokens, d width, E experts, K experts per token (top-k), G groups of experts, e = E / G, c = K / G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mue.moe import _autocast
from lightning_mue.moe._checks import require_choice, require_non_negative, require_positive
from lightning_mue.parameterizations.roles import Role

SCORINGS = ("softmax-topk", "topk-softmax", "sigmoid", "sigmoid-normalized")
GATES = ("linear", "sqrt")


@dataclass(frozen=True)
class RoutingInfo:
    """One routing decision for T tokens.

    Attributes:
        expert_ids: int64 [T, K], the chosen experts, all different, by descending selection score.
        gates: float32 [T, K], the weight of each chosen expert.
        logits: float32 [T, E], the router's raw scores.
        counts: int64 [E], how many of the T * K assignments went to each expert.
    """

    expert_ids: Tensor
    gates: Tensor
    logits: Tensor
    counts: Tensor

    def detach(self) -> RoutingInfo:
        """The same decision without its graph."""
        return RoutingInfo(self.expert_ids, self.gates.detach(), self.logits.detach(), self.counts)


def require_groups(n_groups: int, n_experts: int, top_k: int, name: str = "n_groups") -> None:
    """Raise unless experts and active experts fall into equal groups.

    Args:
        n_groups: G.
        n_experts: E.
        top_k: K.
        name: How the user's argument is called.

    Raises:
        ValueError: G does not divide E, or not K.
    """
    for what, size in (("n_experts", n_experts), ("top_k", top_k)):
        if size % n_groups:
            fitting = [g for g in range(1, min(n_experts, top_k) + 1) if n_experts % g == 0 and top_k % g == 0]
            raise ValueError(
                f"{name} is {n_groups}, but {what} is {size}: every group has as many experts, and as many active ones, as "
                f"every other, so {name} must divide both. With n_experts={n_experts} and top_k={top_k} it may be "
                f"{', '.join(map(str, fitting))}."
            )


class Router(nn.Module):
    """Linear router with top-k selection. Everything is computed in float32, under autocast too.

    With logits ``g = x W^T`` and the chosen set A, the k experts of highest ``score + balance_bias``:

    | scoring              | score for selection | gate of i in A                  |
    |----------------------|---------------------|---------------------------------|
    | "softmax-topk"       | softmax(g)          | softmax(g)_i                    |
    | "topk-softmax"       | softmax(g)          | softmax of g over A             |
    | "sigmoid"            | sigmoid(g)          | sigmoid(g_i)                    |
    | "sigmoid-normalized" | sigmoid(g)          | sigmoid(g_i) / sum over A       |

    ``gate="sqrt"`` takes the square root of that gate (SqrtGate, arXiv:2603.28743): for experts with independent
    outputs of equal RMS and normalized gates, the RMS of the sum then does not depend on k. The balance bias
    (arXiv:2408.15664) takes part in the selection only, never in a gate's value. A token that holds a NaN gets NaN
    gates and valid expert ids, and changes no other token's route.

    With ``n_groups`` G > 1 the chosen set is group-balanced (arXiv:2605.23893): experts ``g E/G`` to ``(g+1) E/G`` form
    group g, and of each group the K/G experts of highest score are chosen. Gates are normalized over the whole set.

    Args:
        width: d, size of a token.
        n_experts: E.
        top_k: K, experts per token, 1 to E.
        scoring: A row of the table above.
        gate: "linear" or "sqrt".
        init_std: Standard deviation of the initial weight; None: ``width^-1/2``. Zero is accepted only if every expert is active.
        n_groups: G, groups of equal size with equally many active experts each; divides E and K. 1: free choice.

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
    ) -> None:
        super().__init__()
        require_positive(width=width, n_experts=n_experts, top_k=top_k, n_groups=n_groups)
        require_non_negative(init_std=init_std or 0.0)
        require_choice("scoring", scoring, SCORINGS)
        require_choice("gate", gate, GATES)
        if top_k > n_experts:
            raise ValueError(
                f"top_k is {top_k}, but n_experts is {n_experts}: a token cannot choose more experts than there are. "
                f"Lower top_k to at most {n_experts}, or add experts."
            )
        require_groups(n_groups, n_experts, top_k)
        if init_std == 0 and top_k < n_experts:
            raise ValueError(
                f"The router's init_std (router_init_std of MoELayer) is 0 with top_k={top_k} of n_experts={n_experts}: "
                "all experts then tie for every token, and the same ones always win. Give a positive value such as "
                "0.02, or make every expert active (top_k = n_experts)."
            )
        self.width, self.n_experts, self.top_k = width, n_experts, top_k
        self.scoring, self.gate, self.init_std, self.n_groups = scoring, gate, init_std, n_groups
        self.weight = nn.Parameter(torch.empty(n_experts, width))
        self.register_buffer("balance_bias", torch.empty(n_experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew and clear the balance bias."""
        nn.init.normal_(self.weight, std=self.width**-0.5 if self.init_std is None else self.init_std)
        nn.init.zeros_(self.balance_bias)

    def forward(self, x_Td: Tensor) -> RoutingInfo:
        """Route each token.

        Args:
            x_Td: [T, d], any floating dtype; T may be zero.

        Returns:
            The routing. `gates` and `logits` carry gradients.
        """
        with _autocast.disabled(x_Td.device.type):
            logits_TE = F.linear(x_Td.float(), self.weight.float())
            expert_ids_TK = self._select(logits_TE.detach())
            log_gates_TK = self._log_gates(logits_TE, expert_ids_TK)
            # In log space the square root has a finite gradient even where the gate underflows to zero.
            gates_TK = torch.exp(log_gates_TK if self.gate == "linear" else 0.5 * log_gates_TK)
            ids = expert_ids_TK.flatten()
            # What bincount does, but of a shape that is known before it runs: compiles without a graph break.
            counts_E = ids.new_zeros(self.n_experts).scatter_add_(0, ids, torch.ones_like(ids))
        return RoutingInfo(expert_ids_TK, gates_TK, logits_TE, counts_E)

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        groups = f", n_groups={self.n_groups}" if self.n_groups > 1 else ""
        return f"{self.width}, n_experts={self.n_experts}, top_k={self.top_k}, {self.scoring}, gate={self.gate}{groups}"

    def _select(self, logits_TE: Tensor) -> Tensor:
        scores_TE = logits_TE.sigmoid() if self.scoring.startswith("sigmoid") else logits_TE.softmax(-1)
        scores_TE = scores_TE + self.balance_bias
        if self.n_groups == 1:
            return torch.topk(scores_TE, self.top_k).indices
        size = self.n_experts // self.n_groups
        best_TGc = torch.topk(scores_TE.unflatten(-1, (self.n_groups, size)), self.top_k // self.n_groups)
        first_G1 = size * torch.arange(self.n_groups, device=scores_TE.device)[:, None]
        # The whole set by descending score, as without groups; stable, so that ties do not depend on the device.
        order_TK = best_TGc.values.flatten(1).argsort(dim=-1, descending=True, stable=True)
        return (best_TGc.indices + first_G1).flatten(1).gather(1, order_TK)

    def _log_gates(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        chosen_TK = logits_TE.gather(1, expert_ids_TK)
        if self.scoring == "softmax-topk":
            return chosen_TK - logits_TE.logsumexp(-1, keepdim=True)
        if self.scoring == "topk-softmax":
            return chosen_TK.log_softmax(-1)
        log_sigmoid_TK = F.logsigmoid(chosen_TK)
        return log_sigmoid_TK if self.scoring == "sigmoid" else log_sigmoid_TK.log_softmax(-1)

    def _apply(self, fn: object, recurse: bool = True) -> Router:
        """Keep the bias in float32 when the module is cast: its updates (about 1e-3) vanish in bfloat16."""
        bias_E = self.balance_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.balance_bias.dtype != torch.float32:
            self.balance_bias = bias_E.to(self.balance_bias.device)
        return self
