"""Routing as operators: the router's logits, and the choice of experts with its gates, counts and statistics.

    logits = x W^T                                              `router_logits`, in logits.py
    experts, gates, counts, sums for the auxiliary losses       `route`

Each has one hand-written backward pass and saves its inputs by reference. Implementations stand behind `route`
(`kernels.backends`): pytorch.py for every device and type, triton.py for float32 on CUDA; and host.py, in numpy, for the CPU.
Nothing is copied to the host on CUDA, and no shape depends on the routing.

Shape legend: T tokens, d width, E experts, K experts per token (top-k), N sequences of T / N tokens.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mue.checks import require_choice, type_error, value_error
from lightning_mue.kernels.backends import implementation, resolve_backend
from lightning_mue.kernels.routing.logits import no_second_derivative, router_logits

__all__ = ["GATES", "SCORINGS", "Routed", "route", "router_logits"]

SCORINGS = ("softmax-topk", "topk-softmax", "sigmoid", "sigmoid-normalized")
GATES = ("linear", "sqrt")


class Routed(NamedTuple):
    """One routing decision for T tokens.

    Attributes:
        expert_ids: int64 [T, K], the chosen experts, all different, by descending selection score and, where scores are
            equal, by ascending index. E for a masked token.
        gates: float32 [T, K] (float64 for float64 logits), the weight of each chosen expert; 0 for a masked token.
        counts: int64 [N, E], how many of a sequence's assignments went to each expert.
        probability_sum: [N, E], of gates' dtype: sum over a sequence's tokens of softmax(logits).
        z_sum: [N], of gates' dtype: sum over a sequence's tokens of logsumexp(logits)^2.
    """

    expert_ids: Tensor
    gates: Tensor
    counts: Tensor
    probability_sum: Tensor
    z_sum: Tensor


class Settings(NamedTuple):
    """What a route depends on besides tensors; as the arguments of `route`."""

    top_k: int
    scoring: str
    gate: str
    n_groups: int
    n_sequences: int


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    scoring: str,
    gate: str,
    n_groups: int = 1,
    mask_T: Tensor | None = None,
    n_sequences: int = 1,
    backend: str = "auto",
) -> Routed:
    """Choose the K experts of highest ``score + bias`` for every token, and compute their gates.

    | scoring              | score                   | gate of i in the chosen set A |
    |----------------------|-------------------------|-------------------------------|
    | "softmax-topk"       | softmax(logits)         | softmax(logits)_i             |
    | "topk-softmax"       | softmax(logits)         | softmax of logits over A      |
    | "sigmoid"            | sigmoid(logits)         | sigmoid(logits_i)             |
    | "sigmoid-normalized" | sigmoid(logits)         | sigmoid(logits_i) / sum over A |

    ``gate="sqrt"`` takes the square root (SqrtGate, arXiv:2603.28743), in log space: its gradient stays finite where the
    gate itself underflows. The bias (arXiv:2408.15664) takes part in the selection only; while it is all zero, logits are
    compared directly: the order is the same, without ties from rounding. With G groups of E/G neighbouring experts,
    K/G of each are chosen (arXiv:2605.23893); gates are normalized over the whole set.

    Gates, `probability_sum` and `z_sum` are differentiable in the logits. A token with a NaN logit gets NaN gates and valid,
    different ids, and changes no other token's route.

    Args:
        logits_TE: [T, E], float32 or float64; T may be 0.
        bias_E: [E], floating.
        top_k: K, 1 to E.
        scoring: One of `SCORINGS`.
        gate: One of `GATES`.
        n_groups: G, a divisor of E and of K.
        mask_T: bool [T], True for real tokens. The others (padding) get id E and gate 0, count nowhere, and get no
            gradient, even if their logits are NaN. None: all are real.
        n_sequences: N; the tokens are N sequences of equal length, one after the other, each with statistics of its own.
        backend: One of `BACKENDS`; "grouped_mm" routes as "torch" does.

    Raises:
        TypeError: The logits are neither float32 nor float64, or the mask is not bool.
        ValueError: An argument is out of range or a shape does not fit; the message names it.
    """
    _check(logits_TE, bias_E, mask_T, Settings(top_k, scoring, gate, n_groups, n_sequences))
    chosen = resolve_backend(backend, logits_TE)
    if n_sequences > _MOST_SEQUENCES:
        chosen = "torch"
    gates_TK, ids_TK, *sums, _ = torch.ops.lightning_mue.route.default(
        logits_TE, bias_E, mask_T, top_k, scoring, gate, n_groups, n_sequences, chosen
    )
    return Routed(ids_TK, gates_TK, *sums)


_MOST_SEQUENCES = 65535  # of a kernel's grid, CUDA's limit in the second dimension


def _check(logits_TE: Tensor, bias_E: Tensor, mask_T: Tensor | None, s: Settings) -> None:
    if logits_TE.dtype not in (torch.float32, torch.float64):
        do = "Use router_logits or .float()."
        raise type_error("logits_TE", found=logits_TE.dtype, expected="float32 or float64", do=do)
    if logits_TE.ndim != 2 or bias_E.shape != logits_TE.shape[1:]:
        found = f"shapes {list(logits_TE.shape)} and {list(bias_E.shape)}"
        raise value_error("logits_TE and bias_E", found=found, expected="[tokens, n_experts] and [n_experts]")
    tokens, n_experts = logits_TE.shape
    require_choice("scoring", s.scoring, SCORINGS)
    require_choice("gate", s.gate, GATES)
    if not 1 <= s.top_k <= n_experts:
        raise value_error("top_k", found=s.top_k, expected=f"1 to n_experts={n_experts}")
    if s.n_groups < 1 or n_experts % s.n_groups or s.top_k % s.n_groups:
        expected = f"a divisor of n_experts={n_experts} and of top_k={s.top_k}"
        raise value_error("n_groups", found=s.n_groups, expected=expected, do="Use 1 for no groups.")
    if s.n_sequences != 1 and (s.n_sequences < 1 or tokens % s.n_sequences):
        expected = f"a divisor of the number of tokens, {tokens}"
        do = "Pass the number of sequences of equal length, or 1."
        raise value_error("n_sequences", found=s.n_sequences, expected=expected, do=do)
    if mask_T is not None and mask_T.dtype != torch.bool:
        expected = "torch.bool, True for real tokens"
        raise type_error("mask_T", found=mask_T.dtype, expected=expected, do="Use mask.bool().")
    if mask_T is not None and mask_T.shape != logits_TE.shape[:1]:
        found, expected = f"shape {list(mask_T.shape)}", f"[{tokens}], one entry per token"
        raise value_error("mask_T", found=found, expected=expected, do="Flatten it.")


def _module(backend: str, logits: Tensor) -> ModuleType:
    if backend != "triton" and logits.device.type == "cpu":
        return import_module("lightning_mue.kernels.routing.host")
    return implementation("routing", "triton" if backend == "triton" else "torch")


# Defined without `torch.library.custom_op`, which adds some 30 us to a call: routing itself takes little more.
torch.library.define(
    "lightning_mue::route",
    "(Tensor logits, Tensor bias, Tensor? mask, int top_k, str scoring, str gate, int n_groups, SymInt n_sequences, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "lightning_mue::route_backward",
    "(Tensor? dgates, Tensor? dprobability, Tensor? dz, Tensor logits, Tensor expert_ids, Tensor gates, Tensor log_sum, "
    "Tensor? mask, int top_k, str scoring, str gate, int n_groups, SymInt n_sequences, str backend) -> Tensor",
)


@torch.library.impl("lightning_mue::route", "CompositeExplicitAutograd")
def _forward(logits: Tensor, bias: Tensor, mask: Tensor | None, *settings: Any) -> tuple[Tensor, ...]:
    """Return the gates, the ids, the other fields of `Routed`, and each token's logsumexp [T] (0 for a masked one)."""
    *values, backend = settings
    return tuple(_module(backend, logits).forward(logits.contiguous(), bias, mask, Settings(*values)))


@torch.library.register_fake("lightning_mue::route")
def _(logits: Tensor, bias: Tensor, mask: Tensor | None, *settings: Any) -> tuple[Tensor, ...]:
    (tokens, n_experts), s = logits.shape, Settings(*settings[:-1])
    ids = logits.new_empty(tokens, s.top_k, dtype=torch.int64)
    counts = logits.new_empty(s.n_sequences, n_experts, dtype=torch.int64)
    gates, probability_sum = logits.new_empty(ids.shape), logits.new_empty(counts.shape)
    return gates, ids, counts, probability_sum, logits.new_empty(s.n_sequences), logits.new_empty(tokens)


@torch.library.impl("lightning_mue::route_backward", "CompositeExplicitAutograd")
def _backward(
    dgates: Tensor | None, dprobability: Tensor | None, dz: Tensor | None, logits: Tensor, *rest: Any
) -> Tensor:
    ids, gates, log_sum, mask, *values, backend = rest
    grads = [None if t is None else t.contiguous() for t in (dgates, dprobability, dz)]
    dlogits: Tensor = _module(backend, logits).backward(
        *grads, logits.contiguous(), ids, gates, log_sum, mask, Settings(*values)
    )
    return dlogits


@torch.library.register_fake("lightning_mue::route_backward")
def _(dgates: Tensor | None, dprobability: Tensor | None, dz: Tensor | None, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, mask, *ctx.settings = inputs
    gates, ids, counts, _, _, log_sum = output
    ctx.mark_non_differentiable(ids, counts, log_sum)
    ctx.set_materialize_grads(False)  # a statistic that is in no loss then costs nothing
    ctx.save_for_backward(logits, ids, gates, log_sum, mask)


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dgates, _, _, dprobability, dz, _ = grads
    if dgates is None and dprobability is None and dz is None:
        return (None,) * 9
    dlogits = torch.ops.lightning_mue.route_backward.default(
        dgates, dprobability, dz, *ctx.saved_tensors, *ctx.settings
    )
    return (dlogits, *[None] * 8)


torch.library.register_autograd("lightning_mue::route", _autograd, setup_context=_save_inputs)
torch.library.register_autograd("lightning_mue::route_backward", no_second_derivative)
