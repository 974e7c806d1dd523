"""MoELayer's experts on the CPU against a dense SwiGLU of equal active FLOPs, and against sorting and looping over experts.

Forward and backward, T = 4096 tokens, a fresh routing in every call (row counts change, as they do in training). Ratios are
medians over alternating rounds; see shared performance notes for the shapes.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import alternate, ratio, save
from torch import Tensor

from lightning_mue.moe import Experts, Router, SwiGLU

SHAPES = [  # width, experts, top_k, expert width
    (256, 8, 2, 256),
    (256, 32, 4, 128),
    (256, 64, 8, 128),
    (512, 8, 2, 512),
    (512, 8, 2, 256),
    (512, 32, 4, 256),
    (512, 64, 2, 256),
    (512, 64, 8, 128),
    (512, 64, 8, 256),
]
TOKENS = 4096


def loop(experts: Experts, x_Td: Tensor, expert_ids: Tensor, gates: Tensor) -> Tensor:
    """The usual baseline: sort by expert, a contiguous GEMM each, index_add."""
    order = expert_ids.flatten().argsort(stable=True)
    tokens = order // expert_ids.shape[1]
    rows = x_Td[tokens].split(torch.bincount(expert_ids.flatten(), minlength=experts.n_experts).tolist())
    out = [
        (torch.nn.functional.silu(r @ g.T) * (r @ u.T)) @ d.T
        for r, g, u, d in zip(rows, experts.w_gate, experts.w_up, experts.w_down, strict=True)
    ]
    weighted = torch.cat(out) * gates.flatten()[order, None].to(x_Td.dtype)
    return torch.zeros_like(x_Td).index_add(0, tokens, weighted)


def main() -> None:
    """Runs all shapes in float32 and bfloat16."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rows: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for width, n_experts, top_k, hidden in SHAPES:
            torch.manual_seed(0)
            experts = Experts(width, hidden, n_experts, init_std=None).to(dtype)
            dense = SwiGLU(width, top_k * hidden, init_std=None).to(dtype)
            router = Router(width, n_experts, top_k, init_std=None)

            def train(forward, dtype=dtype, width=width, router=router):
                x = torch.randn(TOKENS, width).to(dtype).requires_grad_()
                forward(x, router(x.detach())).sum().backward()

            seconds = alternate(
                {
                    "moe": lambda e=experts, t=train: t(lambda x, r: e(x, r)),
                    "loop": lambda e=experts, t=train: t(lambda x, r: loop(e, x, r.expert_ids, r.gates)),
                    "dense": lambda d=dense, t=train: t(lambda x, r: d(x)),
                },
                rounds,
            )
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "width": width,
                    "experts": n_experts,
                    "top_k": top_k,
                    "expert width": hidden,
                    "time / dense": ratio(seconds, "moe", "dense"),
                    "loop / moe": ratio(seconds, "loop", "moe"),
                }
            )
        part = [row for row in rows if row["dtype"] == str(dtype).removeprefix("torch.")]
        means = {
            key: statistics.geometric_mean(float(row[key]) for row in part) for key in ("time / dense", "loop / moe")
        }
        rows.append({**dict.fromkeys(part[0], ""), "dtype": f"{part[0]['dtype']} geomean", **means})
    save("moe_cpu", rows)


if __name__ == "__main__":
    main()
