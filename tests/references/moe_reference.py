"""The MoE layer, token by token and expert by expert, in float64: slow, obvious, and sharing no code with the package.

Gradients come from autograd over these loops.
"""

from __future__ import annotations

import math

import torch


def gates_of_token(logits_E, bias_E, top_k, scoring, gate):
    """The chosen experts of one token and their gates, from the definitions."""
    n_experts = len(logits_E)
    if scoring.startswith("sigmoid"):
        score = [1 / (1 + torch.exp(-logit)) for logit in logits_E]
    else:
        total = sum(torch.exp(logit - logits_E.max().detach()) for logit in logits_E)
        score = [torch.exp(logit - logits_E.max().detach()) / total for logit in logits_E]
    selection = [float(s.detach()) + float(b) for s, b in zip(score, bias_E, strict=True)]
    ranking = sorted(range(n_experts), key=selection.__getitem__, reverse=True)
    chosen = ranking[:top_k]
    values = [score[i] for i in chosen]
    if scoring in ("topk-softmax", "sigmoid-normalized"):
        values = [value / sum(values) for value in values]
    return chosen, [value.sqrt() for value in values] if gate == "sqrt" else values


def swiglu(x_d, w_gate, w_up, w_down):
    a = w_gate @ x_d
    return w_down @ (a / (1 + torch.exp(-a)) * (w_up @ x_d))


def moe_forward(x_Td, p, *, top_k, scoring, gate, route_scale=1.0, output_multiplier=1.0):
    """y_Td in float64. `p` maps the names of a MoELayer's state dict to float64 tensors."""
    shared = "shared.w_gate" in p
    mix = math.sqrt(0.5) if shared and gate == "sqrt" else 1.0
    rows = []
    for x_d in x_Td:
        chosen, gates = gates_of_token(p["router.weight"] @ x_d, p["router.balance_bias"], top_k, scoring, gate)
        y_d = torch.zeros_like(x_d)
        for i, g in zip(chosen, gates, strict=True):
            out = swiglu(x_d, p["experts.w_gate"][i], p["experts.w_up"][i], p["experts.w_down"][i])
            y_d = y_d + mix * route_scale * g * out
        if shared:
            y_d = y_d + mix * swiglu(x_d, p["shared.w_gate"], p["shared.w_up"], p["shared.w_down"])
        rows.append(output_multiplier * y_d)
    return torch.stack(rows) if rows else x_Td * 1.0


def moe_gradients(layer, x_Td, dy_Td):
    """(y, {name: gradient}) in float64 for a MoELayer's weights; the gradient of x is under "x"."""
    p = {name: t.detach().double() for name, t in layer.state_dict().items()}
    x = x_Td.detach().double().requires_grad_()
    leaves = {"x": x} | {name: t.requires_grad_() for name, t in p.items() if name != "router.balance_bias"}
    y = moe_forward(
        x,
        p,
        top_k=layer.router.top_k,
        scoring=layer.router.scoring,
        gate=layer.router.gate,
        route_scale=layer.route_scale,
        output_multiplier=layer.output_multiplier,
    )
    grads = torch.autograd.grad(y, list(leaves.values()), dy_Td.double(), allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
    return y.detach(), {n: z if g is None else g for n, g, z in zip(leaves, grads, zeros, strict=True)}


def relative_error(found, expected):
    """Frobenius norm of the difference over that of the expected value (or 1e-30)."""
    return ((found.detach().double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
