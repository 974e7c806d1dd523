"""Sorts the assignments of tokens to experts by expert, as an operator: `lightning_mue::plan_dispatch`.

An *assignment* is one (token, expert) pair. Assignments are listed by token; *rows* are the same pairs listed by expert, so
that every expert's rows are contiguous.

Shape legend: T tokens, K experts per token (top-k), S assignments (T * K in token choice), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.kernels.backends import implementation, resolve_backend


@dataclass(frozen=True)
class DispatchPlan:
    """How assignments map to rows.

    Attributes:
        order: int32 [S]. Row r is assignment ``order[r]``. Within an expert, rows keep the order of the assignments (in
            expert choice, of the places that were given).
        inverse: int32 [T, K] (or [S], see `bags`). Assignment (t, k) is row ``inverse[t, k]``.
        tokens: int32 [S]. Row r reads token ``tokens[r]``.
        offsets: int32 [E + 1]. Expert e owns rows ``offsets[e]`` to ``offsets[e + 1]``. Rows from ``offsets[E]`` on are
            masked (of tokens that are masked out): they belong to no expert, are not computed and count as zero.
        bags: None where every token has K assignments. Else int32 [T + 1]: token t has assignments ``bags[t]`` to
            ``bags[t + 1]``, and `inverse` is flat; assignments from ``bags[T]`` on belong to no token and no expert.
    """

    order: Tensor
    inverse: Tensor
    tokens: Tensor
    offsets: Tensor
    bags: Tensor | None = None


def plan_dispatch(expert_ids: Tensor, counts_E: Tensor, *, backend: str = "auto") -> DispatchPlan:
    """Sort the assignments by expert. Stable, so that the plan is a function of the routing alone.

    Args:
        expert_ids: int64 [T, K], each in [0, E), or E for an assignment to no expert. Not checked.
        counts_E: int64 [E], how many assignments each expert has (as `RoutingInfo.counts`). Not checked.
        backend: One of `BACKENDS`; "grouped_mm" sorts as "torch" does.

    Returns:
        The plan. No shape depends on the routing, and on CUDA nothing is copied to the host.

    Raises:
        ValueError: A shape does not fit, or the backend cannot run here.
    """
    if expert_ids.ndim != 2 or counts_E.ndim != 1:
        found = f"shapes {list(expert_ids.shape)} and {list(counts_E.shape)}"
        do = "Add a dimension to a flat list with ids[:, None], and sum counts over sequences."
        expected = "[tokens, top_k] and [n_experts]"
        raise value_error("expert_ids and counts_E", found=found, expected=expected, do=do)
    # Backends are chosen for floating point; to integers only the device matters.
    chosen = resolve_backend(backend, expert_ids.new_empty(0, dtype=torch.float32))
    return DispatchPlan(*torch.ops.lightning_mue.plan_dispatch.default(expert_ids, counts_E, chosen))


def count_by_expert(expert_ids: Tensor, n_experts: int, n_sequences: int = 1) -> Tensor:
    """How often each expert occurs in each of N equal stretches: int64 [N, E]. Id E, no expert, is left out.

    As `torch.bincount`, but with a shape that is known before it runs.
    """
    ids_NA = expert_ids.reshape(n_sequences, -1)
    counts = ids_NA.new_zeros(n_sequences, n_experts + 1)
    return counts.scatter_add_(1, ids_NA, torch.ones_like(ids_NA))[:, :n_experts].contiguous()


def plan_expert_choice(token_ids_EC: Tensor, n_tokens: int) -> DispatchPlan:
    """The plan where experts choose tokens (arXiv:2202.09368): rows are given, and the assignments are sorted by token.

    Without unused places, row ``e * C + c`` is place (e, c), so that `values.flatten()[plan.inverse]` brings values [E, C]
    (such as gates) into the order of the assignments.

    Args:
        token_ids_EC: int64 [E, C]: row e holds the tokens that expert e chose, each in [0, n_tokens), no token twice;
            negative for a place that is not used. Not checked.
        n_tokens: T.

    Returns:
        The plan, with `bags`. Within an expert, rows keep the order of the places. Unused places are the last assignments,
        from ``bags[T]`` on, and the last rows. No shape depends on the choice, and on CUDA nothing is copied to the host.

    Raises:
        ValueError: token_ids_EC is not a matrix.
    """
    if token_ids_EC.ndim != 2:
        found = f"shape {list(token_ids_EC.shape)}"
        raise value_error("token_ids_EC", found=found, expected="[n_experts, capacity]")
    used_EC = token_ids_EC >= 0
    offsets = F.pad(used_EC.sum(1).cumsum(0), (1, 0))
    used_S, key_S = used_EC.flatten(), token_ids_EC.where(used_EC, n_tokens).flatten()
    rows_S = torch.arange(key_S.numel(), device=key_S.device, dtype=torch.int32)
    until_S = used_S.cumsum(0)
    row_S = torch.where(used_S, until_S - 1, used_S.sum() + rows_S - until_S)  # of each place: used places first
    sorted_S, place_S = key_S.sort(stable=True)
    bags = torch.searchsorted(sorted_S, torch.arange(n_tokens + 1, device=key_S.device), out_int32=True)
    inverse_S = row_S[place_S]
    order_S = torch.empty_like(rows_S).scatter(0, inverse_S, rows_S)
    # An unused row names token 0, which is there to be read.
    tokens_S = torch.empty_like(rows_S).scatter(0, row_S, token_ids_EC.flatten().clamp(min=0).int())
    return DispatchPlan(order_S, inverse_S.int(), tokens_S, offsets.int(), bags)


# Defined without `torch.library.custom_op` for speed, as in kernels/routing/op.py.
torch.library.define(
    "lightning_mue::plan_dispatch",
    "(Tensor expert_ids, Tensor counts, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("lightning_mue::plan_dispatch", "CompositeExplicitAutograd")
def _plan(expert_ids: Tensor, counts: Tensor, backend: str) -> tuple[Tensor, ...]:
    module = implementation("dispatch", "triton" if backend == "triton" else "torch")
    return tuple(module.sort_by_expert(expert_ids, counts))


@torch.library.register_fake("lightning_mue::plan_dispatch")
def _(expert_ids: Tensor, counts: Tensor, backend: str) -> tuple[Tensor, ...]:
    flat = expert_ids.new_empty(expert_ids.numel(), dtype=torch.int32)
    inverse = expert_ids.new_empty(expert_ids.shape, dtype=torch.int32)
    return flat, inverse, torch.empty_like(flat), counts.new_empty(counts.shape[0] + 1, dtype=torch.int32)
