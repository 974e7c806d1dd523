"""The routed experts: E feed-forward networks held as stacked weights, dropless.

Shape legend: T tokens, d width, h expert hidden width, E experts, K experts per token (top-k), S assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mue.checks import require_choice, require_non_negative, require_positive, type_error
from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.kernels.backends import BACKENDS
from lightning_mue.kernels.dispatch.op import DispatchPlan
from lightning_mue.kernels.grouped_ffn.op import activation_memory, grouped_ffn
from lightning_mue.moe import autocast
from lightning_mue.moe.feed_forward import make_parameters, reset_parameters
from lightning_mue.moe.router import RoutingInfo
from lightning_mue.parameterizations.rules.roles import Role


class Dispatcher(Protocol):
    """Runs experts that are sharded over ranks: sends tokens to the ranks of their experts, and the outputs back."""

    @property
    def n_ranks(self) -> int:
        """Over how many ranks the experts are sharded; with 1 the dispatcher is not asked to run them."""

    def forward(
        self, experts: Experts, x_Td: Tensor, routing: RoutingInfo, overlap: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """`Experts.forward` over all ranks."""

    def local(self, weight: Tensor) -> Tensor:
        """This rank's experts of a weight, [E / n_ranks, ...]."""


class Experts(nn.Module):
    """E experts; every token gets all of the experts it was routed to, no token is dropped.

    ``y_t = sum_k gates[t, k] * E_i(x_t)`` with ``i = expert_ids[t, k]`` and each E_i as `FeedForward`. GEMMs run in x's
    dtype (under autocast, in autocast's); the sum over k is taken in float32. Repeating a call on as many threads gives
    the same bits.

    Args:
        width: d, size of the input and of the output.
        expert_width: h, hidden width of one expert.
        n_experts: E.
        activation: As for `FeedForward`.
        bias: Whether each expert has biases, zero at first.
        backend: "auto", "triton", "grouped_mm" or "torch": see `lightning_mue.kernels.backends`. Equal up to rounding.
        init_std: Standard deviation of the initial weights; None: ``fan_in^-1/2`` of each.

    Attributes:
        parallel: The dispatcher of experts that are sharded over ranks (set by `parallelize_experts`), or None.

    Raises:
        ValueError: A size is below 1, `init_std` is negative, or the activation or backend is unknown.
    """

    w_gate: nn.Parameter | None
    w_up: nn.Parameter
    w_down: nn.Parameter
    b_gate: nn.Parameter | None
    b_up: nn.Parameter | None
    b_down: nn.Parameter | None

    def __init__(
        self,
        width: int,
        expert_width: int,
        n_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        backend: str = "auto",
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__()
        require_positive(width=width, expert_width=expert_width, n_experts=n_experts)
        require_non_negative(init_std=0.0 if init_std is None else init_std)
        require_choice("activation", activation, tuple(ACTIVATIONS))
        require_choice("backend", backend, BACKENDS)
        self.width, self.expert_width, self.n_experts, self.init_std = width, expert_width, n_experts, init_std
        self.activation, self.bias, self.backend = activation, bias, backend
        self.parallel: Dispatcher | None = None
        self.mue_roles = make_parameters(
            self, (n_experts,), width, expert_width, activation, bias=bias, up=Role.EXPERT_UP, down=Role.EXPERT_DOWN
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew and clears the biases."""
        reset_parameters(self, self.init_std)

    def forward(self, x_Td: Tensor, routing: RoutingInfo, overlap: Callable[[], Tensor] | None = None) -> Tensor:
        """Applies to each token the experts it was routed to.

        Args:
            x_Td: [T, d], of the weights' dtype unless autocast is on.
            routing: As `Router` returns it. Gradients flow to its gates.
            overlap: Computes a tensor [T, d] that is added to the output; under expert parallelism during communication.

        Returns:
            [T, d], of x's dtype. An expert without tokens gets a zero gradient.

        Raises:
            TypeError: x and the weights differ in dtype and autocast is off.
        """
        if (dispatcher := self._dispatcher()) is not None:
            return dispatcher.forward(self, x_Td, routing, overlap)
        plan = routing.plan(self.backend)
        y_Td = self.compute(x_Td, routing.assignment_gates(plan), plan)
        return y_Td if overlap is None else (y_Td + overlap()).to(x_Td.dtype)

    def compute(self, x_Td: Tensor, gates: Tensor, plan: DispatchPlan) -> Tensor:
        """Computes the gate-weighted sum of this rank's experts under a plan over these: [T, d], of x's dtype.

        Gates are of `plan.inverse`'s shape, float32 or float64.

        Raises:
            TypeError: x and the weights differ in dtype and autocast is off.
        """
        dtype = self._compute_dtype(x_Td)
        gates = gates.to(torch.promote_types(dtype, torch.float32))
        w_gate, w_up, w_down, b_gate, b_up, b_down = (
            self._own(weight, dtype)
            for weight in (self.w_gate, self.w_up, self.w_down, self.b_gate, self.b_up, self.b_down)
        )
        y_Td = grouped_ffn(
            x_Td.to(dtype),
            gates,
            w_up,
            w_down,
            plan,
            w_gate=w_gate,
            b_gate=b_gate,
            b_up=b_up,
            activation=self.activation,
            backend=self.backend,
        )
        if b_down is not None:
            y_Td = y_Td + _mixed_biases(b_down, gates, plan).to(dtype)
        return y_Td.to(x_Td.dtype)

    def activation_memory(self, top_k: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
        """Bytes per token that a training step keeps for the backward pass, by what they are for; `dtype` is the GEMMs'."""
        parts = activation_memory(self.width, self.expert_width, top_k, self.activation, dtype)
        if self._dispatcher() is not None:  # the received rows are kept: K d numbers a token in place of d
            parts["total"] += parts["input"] * (top_k - 1)
            parts["input"] *= top_k
        return parts

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        settings = f"{self.width}, expert_width={self.expert_width}, n_experts={self.n_experts}, {self.activation}"
        return f"{settings}{', bias' if self.bias else ''}, backend={self.backend}"

    def _dispatcher(self) -> Dispatcher | None:
        """What runs the experts if they are sharded over several ranks; None if this rank holds all of them."""
        return self.parallel if self.parallel is not None and self.parallel.n_ranks > 1 else None

    def _own(self, weight: Tensor | None, dtype: torch.dtype) -> Any:
        """This rank's experts of a weight, in the type of the GEMMs; None stays None."""
        if weight is None:
            return None
        return (weight if self.parallel is None else self.parallel.local(weight)).to(dtype)

    def _compute_dtype(self, x_Td: Tensor) -> torch.dtype:
        dtype = autocast.compute_dtype(x_Td)
        if dtype is None and x_Td.dtype != self.w_up.dtype:
            do = "Convert one of them, or run under torch.autocast (Lightning: Trainer(precision='bf16-mixed'))."
            expected = f"the dtype of the experts' weights, {self.w_up.dtype}"
            raise type_error("x", found=x_Td.dtype, expected=expected, do=do)
        return dtype or x_Td.dtype


def _mixed_biases(b_down_Ed: Tensor, gates: Tensor, plan: DispatchPlan) -> Tensor:
    """``sum_k gates[t, k] b_down[expert of (t, k)]``: [T, d], of the gates' dtype."""
    expert_S = torch.searchsorted(plan.offsets[1:], plan.inverse.flatten(), right=True, out_int32=True)
    # Padding assignments read a last row of zeros.
    table = F.pad(b_down_Ed.to(gates.dtype), (0, 0, 0, 1))
    if plan.bags is None:
        return F.embedding_bag(expert_S.view_as(gates), table, mode="sum", per_sample_weights=gates)
    return F.embedding_bag(expert_S, table, plan.bags, mode="sum", per_sample_weights=gates, include_last_offset=True)
