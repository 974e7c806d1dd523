"""What computes a layer of experts on a GPU: this package's backends, and what people use instead.

All compute `y_t = sum_k gates_tk * W_down_e (silu(W_gate_e x_t) * (W_up_e x_t))`, but for `dense`: one SwiGLU of as many
FLOPs a token, which is what a layer of experts would cost if routing were free.

Shape legend: T tokens, d width, h expert hidden width, E experts, K experts per token, S = T K rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mue.kernels.dispatch.op import plan_dispatch
from lightning_mue.kernels.grouped_ffn.op import grouped_ffn


class Shape(NamedTuple):
    """Sizes of one layer of experts and of its input."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int

    @property
    def rows(self) -> int:
        """S."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """Of a forward pass; the backward pass has twice as many."""
        return 6 * self.rows * self.width * self.hidden

    def row_bytes(self, backward: bool, itemsize: int = 2) -> int:
        """Bytes that a routed row makes the best known algorithm move (SonicMoE, arXiv:2512.14080), forward or both passes.

        Forward: x, y, and y again to combine; z (2h) and a written, a read. Backward: dy, x and dy once more, dx, and dx
        again to combine; z, dz three times, gate * a twice. In bfloat16 16d + 28h together. Weights are not counted.
        """
        numbers = 3 * self.width + 4 * self.hidden
        if backward:
            numbers += 5 * self.width + 10 * self.hidden
        return itemsize * numbers

    def __str__(self) -> str:
        return f"d {self.width}, h {self.hidden}, E {self.experts}, K {self.top_k}, T {self.tokens}"


class Routed(NamedTuple):
    """One input with its routing, as a router hands it to experts.

    Attributes:
        x: [T, d], a leaf that requires a gradient.
        gates: float32 [T, K], likewise.
        expert_ids: int64 [T, K].
        counts: int64 [E].
        dy: [T, d], gradient of the output.
    """

    x: Tensor
    gates: Tensor
    expert_ids: Tensor
    counts: Tensor
    dy: Tensor


class Contender(NamedTuple):
    """A layer of experts.

    Attributes:
        forward: From an input to [T, d], or to that and an auxiliary loss.
        weights: What has a gradient besides the input.
    """

    forward: Callable[[Routed], Tensor | tuple[Tensor, Tensor]]
    weights: list[Tensor]

    def train(self, routed: Routed) -> list[Tensor | None]:
        """Forward and backward: the output, and the gradients of x, the gates and the weights."""
        outputs = self.forward(routed)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [routed.x, routed.gates, *self.weights]
        grads = torch.autograd.grad(outputs, leaves, (routed.dy, None)[: len(outputs)], allow_unused=True)
        return [outputs[0].detach(), *grads]


class Weights(NamedTuple):
    """Stacked weights of E SwiGLU experts: [E, h, d] twice, and [E, d, h]."""

    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> Weights:
        """Of variance 1 / fan_in, requiring gradients."""
        sizes = [(shape.hidden, shape.width)] * 2 + [(shape.width, shape.hidden)]
        stacks = (torch.randn(shape.experts, *size, device=device) * size[1] ** -0.5 for size in sizes)
        return cls(*(w.to(dtype).requires_grad_() for w in stacks))


def contenders(shape: Shape, weights: Weights) -> dict[str, Callable[[], Contender]]:
    """All of them by name, made when called: some need a library that may be absent."""
    return {
        "triton": lambda: ours(weights, "triton"),
        "grouped_mm": lambda: ours(weights, "grouped_mm"),
        "torch": lambda: ours(weights, "torch"),
        "transformers": lambda: transformers_experts(shape, weights),
        "composition": lambda: composition(shape, weights),
        "loop": lambda: loop(weights),
        "dense": lambda: dense(shape, weights),
        "dense fused": lambda: dense(shape, weights, fused=True),
    }


def ours(weights: Weights, backend: str) -> Contender:
    """This package's operator, with the sorting; the counts come from the router."""

    def forward(r: Routed) -> Tensor:
        plan = plan_dispatch(r.expert_ids, r.counts, backend="torch" if backend == "grouped_mm" else backend)
        return grouped_ffn(r.x, r.gates, weights.w_up, weights.w_down, plan, w_gate=weights.w_gate, backend=backend)

    return Contender(forward, list(weights))


def gate_up(weights: Weights) -> Tensor:
    """[E, 2h, d], the layout of transformers."""
    return torch.cat([weights.w_gate.detach(), weights.w_up.detach()], 1).requires_grad_()


def grouped_product(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Call torch's grouped GEMM, under the name that this version has for it."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return product(a, b, offs=offsets)


def composition(shape: Shape, weights: Weights) -> Contender:
    """Sort, gather, two grouped GEMMs, un-permute, weighted sum: what one writes with torch's grouped_mm."""
    both, down = gate_up(weights), weights.w_down

    def forward(r: Routed) -> Tensor:
        order_S = r.expert_ids.flatten().argsort()
        offsets_E = r.counts.cumsum(0).int()
        z_S2h = grouped_product(r.x[order_S // shape.top_k], both.mT, offsets_E)
        z_gate_Sh, z_up_Sh = z_S2h.chunk(2, -1)
        y_Sd = grouped_product(F.silu(z_gate_Sh) * z_up_Sh, down.mT, offsets_E)
        inverse_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(shape.rows, device=order_S.device))
        gates_TK1 = r.gates.to(y_Sd.dtype)[..., None]
        return (y_Sd[inverse_S].view(shape.tokens, shape.top_k, -1) * gates_TK1).sum(1)

    return Contender(forward, [both, down])


def transformers_experts(shape: Shape, weights: Weights) -> Contender:
    """Mixtral's experts with transformers' grouped_mm; gates in x's type, as its newer models pass them (that is faster)."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=shape.width, intermediate_size=shape.hidden, num_local_experts=shape.experts, hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj = torch.nn.Parameter(gate_up(weights))
    module.down_proj = torch.nn.Parameter(weights.w_down)
    return Contender(lambda r: module(r.x, r.expert_ids, r.gates.to(r.x.dtype)), list(module.parameters()))


def loop(weights: Weights) -> Contender:
    """Sort by expert, contiguous GEMMs for each, index_add; the host waits for the counts."""

    def forward(r: Routed) -> Tensor:
        order_S = r.expert_ids.flatten().argsort()
        tokens_S = order_S // r.expert_ids.shape[1]
        rows = r.x[tokens_S].split(r.counts.tolist())
        out = [(F.silu(x @ gate.T) * (x @ up.T)) @ down.T for x, gate, up, down in zip(rows, *weights, strict=True)]
        weighted_Sd = torch.cat(out) * r.gates.flatten()[order_S, None].to(r.x.dtype)
        return torch.zeros_like(r.x).index_add(0, tokens_S, weighted_Sd)

    return Contender(forward, list(weights))


def swiglu(z_gate: Tensor, z_up: Tensor) -> Tensor:
    """The hidden activation."""
    return F.silu(z_gate) * z_up


def dense(shape: Shape, weights: Weights, *, fused: bool = False) -> Contender:
    """A dense SwiGLU of equal FLOPs: hidden width K h; its activation in one kernel a pass if `fused`."""
    activation = torch.compile(swiglu, dynamic=False) if fused else swiglu
    hidden = shape.top_k * shape.hidden
    gate, up, down = (
        torch.randn(size, device=weights.w_up.device).mul_(size[1] ** -0.5).to(weights.w_up.dtype).requires_grad_()
        for size in ((hidden, shape.width), (hidden, shape.width), (shape.width, hidden))
    )
    return Contender(lambda r: activation(r.x @ gate.T, r.x @ up.T) @ down.T, [gate, up, down])


def our_layer(shape: Shape, device: torch.device, backend: str) -> Contender:
    """The whole layer in bfloat16, with its auxiliary loss."""
    from lightning_mue.moe import MoELayer

    sizes = (shape.width, shape.hidden, shape.experts, shape.top_k)
    with torch.device(device):
        layer = MoELayer(*sizes, backend=backend, init_std=None).to(torch.bfloat16)

    def forward(r: Routed) -> tuple[Tensor, Tensor]:
        return layer(r.x), layer.aux_loss

    return Contender(forward, list(layer.parameters()))


def transformers_layer(shape: Shape, device: torch.device) -> Contender:
    """Transformers' Qwen3-MoE block with its grouped_mm experts, in bfloat16; it leaves the auxiliary loss to the model."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.width,
        moe_intermediate_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        block = Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(r: Routed) -> Tensor:
        y = block(r.x[None])
        return (y[0] if isinstance(y, tuple) else y)[0]

    return Contender(forward, list(block.parameters()))


def random_routing(
    shape: Shape, dtype: torch.dtype, device: torch.device, kind: str = "balanced", top: float = 0.25
) -> Routed:
    """A fresh input and a fresh routing.

    Args:
        shape: Sizes.
        dtype: Of x and dy.
        device: Where.
        kind: "balanced": every token draws K different experts. "hot": expert 0 gets exactly the share `top` of all
            rows; for 1 / top < K that is more than one row a token, so that some tokens draw it repeatedly. "everybody":
            every token draws expert 0 once, which is the most that top-k routing can give to one expert.
        top: The share of "hot".
    """
    size = (shape.tokens, shape.top_k)
    if kind == "balanced" or shape.experts == shape.top_k:
        ids_TK = torch.rand(shape.tokens, shape.experts, device=device).topk(shape.top_k).indices
    else:
        others = torch.rand(shape.tokens, shape.experts - 1, device=device)
        ids_TK = others.topk(shape.top_k).indices + 1
        if kind == "everybody":
            ids_TK[:, 0] = 0
        else:
            hot = int(top * shape.rows)
            # Over tokens first: only where there are more hot rows than tokens does one token get several.
            place = torch.randperm(shape.tokens, device=device).repeat(shape.top_k)[:hot]
            slot = torch.arange(hot, device=device) // shape.tokens
            ids_TK[place, slot] = 0
    counts_E = torch.bincount(ids_TK.flatten(), minlength=shape.experts)
    gates_TK = torch.rand(size, device=device, dtype=torch.promote_types(dtype, torch.float32)) + 0.1
    gates_TK = gates_TK / gates_TK.sum(1, keepdim=True)
    x_Td, dy_Td = (torch.randn(shape.tokens, shape.width, device=device).to(dtype) for _ in range(2))
    return Routed(x_Td.requires_grad_(), gates_TK.requires_grad_(), ids_TK, counts_E, dy_Td)
