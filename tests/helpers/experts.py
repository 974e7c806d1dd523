"""Problems for the experts' kernels, and what they should give: a loop over assignments in float64, with autograd.

The loop knows nothing of rows, plans or tiles: it reads token and expert of each assignment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lightning_mue.kernels.dispatch.op import DispatchPlan
from lightning_mue.kernels.grouped_ffn.op import Problem

FUNCTIONS = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu-tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "gelu-tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z) ** 2,
}


class Case(NamedTuple):
    """A problem in words. `routing`: "any", "one" (all to the last expert), "masked" (some to none), "none" (all to none)."""

    tokens: int
    d: int
    h: int
    experts: int
    top_k: int
    activation: str = "swiglu"
    bias: bool = False
    routing: str = "any"
    bags: bool = False
    layout: str = "rows"


class Made(NamedTuple):
    """A problem, its output's gradient, and the assignments: token and expert (E: none) of each."""

    problem: Problem
    dy: torch.Tensor
    token_of: list[int]
    expert_of: list[int]


def assignments(case: Case, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and expert of each assignment, by token."""
    token_of = torch.arange(case.tokens).repeat_interleave(case.top_k)
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    expert_of = scores.argsort(1)[:, : case.top_k].flatten()
    if case.routing == "one":
        expert_of = torch.full_like(expert_of, case.experts - 1)
    if case.routing in ("masked", "none"):
        chance = torch.rand(case.tokens, generator=generator)[token_of]
        expert_of = expert_of.masked_fill(chance < (0.4 if case.routing == "masked" else 2.0), case.experts)
    if case.bags:  # tokens have different numbers of assignments, some none
        kept = torch.rand(len(token_of), generator=generator) < 0.6
        token_of, expert_of = token_of[kept], expert_of[kept]
    return token_of, expert_of


def plan_of(token_of: torch.Tensor, expert_of: torch.Tensor, case: Case) -> DispatchPlan:
    order = expert_of.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    counts = torch.bincount(expert_of, minlength=case.experts + 1)[: case.experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    bags = None
    if case.bags:
        per_token = torch.bincount(token_of, minlength=case.tokens)
        bags = torch.cat([per_token.new_zeros(1), per_token.cumsum(0)]).int()
    else:
        inverse = inverse.view(case.tokens, case.top_k)
    return DispatchPlan(order.int(), inverse.int(), token_of[order].int(), offsets.int(), bags)


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, with contiguous rows, as a transposed view, or as a slice of a tensor full of NaN."""
    if layout == "columns" and t.ndim > 1:
        return t.mT.contiguous().mT
    if layout == "cut out":
        wide = t.new_full([n + 3 for n in t.shape], torch.nan)
        view = wide[tuple(slice(1, n + 1) for n in t.shape)]
        return view.copy_(t)
    return t


def make(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Made:
    generator = torch.Generator().manual_seed(seed)
    e, d, h, gated = case.experts, case.d, case.h, "glu" in case.activation

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    token_of, expert_of = assignments(case, generator)
    plan = DispatchPlan(
        *(None if t is None else t.to(device) for t in vars(plan_of(token_of, expert_of, case)).values())
    )
    x = laid_out(random(case.tokens, d), case.layout)
    gates = laid_out(torch.rand(plan.inverse.shape, generator=generator).to(device), case.layout)
    w_gate, w_up = (laid_out(random(e, h, d, scale=d**-0.5), case.layout) for _ in range(2))
    w_down = laid_out(random(e, d, h, scale=h**-0.5), case.layout)
    b_gate, b_up = (laid_out(random(e, h), case.layout) if case.bias else None for _ in range(2))
    problem = Problem(
        x,
        gates,
        w_gate if gated else None,
        w_up,
        w_down,
        b_gate if gated else None,
        b_up,
        *vars(plan).values(),
        case.activation,
    )
    return Made(problem, random(case.tokens, d), token_of.tolist(), expert_of.tolist())


def reference(made: Made) -> list[torch.Tensor]:
    """y and the gradients of `Problem.trained`, in float64, on the CPU."""
    names = ("x", "gates", "w_gate", "w_up", "w_down", "b_gate", "b_up")
    p = {n: getattr(made.problem, n) for n in names}
    p = {n: t.detach().cpu().double().contiguous().requires_grad_() for n, t in p.items() if t is not None}
    function = FUNCTIONS[made.problem.activation]
    gates = p["gates"].flatten()
    y = [torch.zeros(p["x"].shape[1], dtype=torch.float64) for _ in p["x"]]
    for j, (t, e) in enumerate(zip(made.token_of, made.expert_of, strict=True)):
        if e == len(p["w_up"]):
            continue
        z = {
            n: p[f"w_{n}"][e] @ p["x"][t] + (p[f"b_{n}"][e] if f"b_{n}" in p else 0)
            for n in ("gate", "up")
            if f"w_{n}" in p
        }
        a = function(z["gate"]) * z["up"] if "gate" in z else function(z["up"])
        y[t] = y[t] + gates[j] * (p["w_down"][e] @ a)
    out = torch.stack(y) if y else p["x"] * 0
    leaves = [p[n] for n in names if n in p]
    if not out.requires_grad:
        return [out, *map(torch.zeros_like, leaves)]
    grads = torch.autograd.grad(out, leaves, made.dy.cpu().double(), allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, by norm; infinite for NaN, and for anything but zeros where zeros are right."""
    assert found.shape == exact.shape, (found.shape, exact.shape)
    wrong = (found.detach().cpu().double() - exact).norm()
    size = exact.norm()
    ratio = (wrong / size).item() if size else (0.0 if wrong == 0 else torch.inf)
    return torch.inf if ratio != ratio else ratio
