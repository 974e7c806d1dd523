"""The MoE layer, token by token and expert by expert, in float64: slow, obvious, and sharing no code with the package.

Gradients come from autograd over these loops.
"""

from __future__ import annotations

import math

import torch


def gates_of_token(logits_E, bias_E, top_k, scoring, gate, groups=1):
    """The chosen experts of one token and their gates, from the definitions."""
    n_experts = len(logits_E)
    if scoring.startswith("sigmoid"):
        score = [1 / (1 + torch.exp(-logit)) for logit in logits_E]
    else:
        total = sum(torch.exp(logit - logits_E.max().detach()) for logit in logits_E)
        score = [torch.exp(logit - logits_E.max().detach()) / total for logit in logits_E]
    selection = [float(s.detach()) + float(b) for s, b in zip(score, bias_E, strict=True)]
    size, chosen = n_experts // groups, []
    for g in range(groups):
        members = range(g * size, (g + 1) * size)
        chosen += sorted(members, key=selection.__getitem__, reverse=True)[: top_k // groups]
    chosen = sorted(chosen, key=selection.__getitem__, reverse=True)
    values = [score[i] for i in chosen]
    if scoring in ("topk-softmax", "sigmoid-normalized"):
        values = [value / sum(values) for value in values]
    return chosen, [value.sqrt() for value in values] if gate == "sqrt" else values


def _gelu(z):
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def _tanh_gelu(z):
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def activate(name, z, up):
    """The hidden activation from the pre-activations; `z` is None where there is no gate."""
    if name == "swiglu":
        return z / (1 + torch.exp(-z)) * up
    if name.startswith("geglu"):
        return (_tanh_gelu if name.endswith("tanh") else _gelu)(z) * up
    if name.startswith("gelu"):
        return (_tanh_gelu if name.endswith("tanh") else _gelu)(up)
    return torch.where(up > 0, up, 0) ** (2 if name == "relu2" else 1)


def ffn(x_d, p, activation="swiglu"):
    """One network. `p` maps w_gate, w_up, w_down and perhaps b_gate, b_up, b_down to its matrices and vectors."""
    up = p["w_up"] @ x_d + p.get("b_up", 0)
    gate = p["w_gate"] @ x_d + p.get("b_gate", 0) if "w_gate" in p else None
    return p["w_down"] @ activate(activation, gate, up) + p.get("b_down", 0)


def _part(p, prefix, index=...):
    return {name.removeprefix(prefix): t[index] for name, t in p.items() if name.startswith(prefix)}


def moe_forward(
    x_Td, p, *, top_k, scoring, gate, route_scale=1.0, output_multiplier=1.0, activation="swiglu", mask=None, groups=1
):
    """y_Td in float64. `p` maps the names of a MoELayer's state dict to float64 tensors."""
    shared = "shared.w_up" in p
    mix = math.sqrt(0.5) if shared and gate == "sqrt" else 1.0
    rows = []
    for t, x_d in enumerate(x_Td):
        y_d = torch.zeros_like(x_d)
        if mask is None or mask[t]:
            logits, bias = p["router.weight"] @ x_d, p["router.balance_bias"]
            chosen, gates = gates_of_token(logits, bias, top_k, scoring, gate, groups)
            for i, g in zip(chosen, gates, strict=True):
                y_d = y_d + mix * route_scale * g * ffn(x_d, _part(p, "experts.", i), activation)
        if shared:
            gate_of_shared = 1 / (1 + torch.exp(-p["shared_gate.weight"] @ x_d)) if "shared_gate.weight" in p else 1
            y_d = y_d + mix * gate_of_shared * ffn(x_d, _part(p, "shared."), activation)
        rows.append(output_multiplier * y_d)
    return torch.stack(rows) if rows else x_Td * 1.0


def moe_gradients(layer, x_Td, dy_Td, mask=None):
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
        activation=layer.experts.activation,
        mask=mask,
        groups=layer.router.n_groups,
    )
    grads = torch.autograd.grad(y, list(leaves.values()), dy_Td.double(), allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
    return y.detach(), {n: z if g is None else g for n, g, z in zip(leaves, grads, zeros, strict=True)}


def relative_error(found, expected):
    """Frobenius norm of the difference over that of the expected value (or 1e-30)."""
    return ((found.detach().double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
