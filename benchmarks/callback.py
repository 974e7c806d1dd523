"""What MuECallback costs: the swap of parameter groups in an optimizer step, and the draw of initial weights.

An AdamW step (foreach) of a 12-layer MoE language model, on one list of parameters: plain; with scaled groups swapped in and
out; with the split of the parameters computed again every step, which shows what keeping it saves; and with explicit
param_groups, which shows how much of the cost is that there are more groups, not the swapping.
"""

from __future__ import annotations

import argparse
import copy
import os
import time

import torch
from common import Claim, alternate, parse, ratio, result_name, save
from torch.optim import AdamW

from lightning_mue import MoELanguageModel, param_groups, plan
from lightning_mue.parameterizations import Init, ParameterPlan, ScaledStep
from lightning_mue.parameterizations.applying.drawing import draw_all


def swap(rounds: int) -> list[dict[str, object]]:
    """Ratios of step times, medians over alternating rounds."""
    model = MoELanguageModel(width=384, depth=12, n_heads=6, n_experts=8, expert_width=256)
    scaling = plan(model, base={"width": 64, "n_heads": 1, "depth": 2, "n_experts": 0})
    models = {name: copy.deepcopy(model) for name in ("plain", "swapped", "explicit")}
    optimizers = {
        "plain": AdamW(models["plain"].parameters(), lr=1e-3, foreach=True),
        "swapped": AdamW(models["swapped"].parameters(), lr=1e-3, foreach=True),
        "explicit": AdamW(param_groups(models["explicit"], scaling, lr=1e-3), foreach=True),
    }
    scaled = ScaledStep(optimizers["swapped"], scaling, models["swapped"])
    for one in models.values():
        for p in one.parameters():
            p.grad = torch.randn_like(p)

    def swap_only():
        scaled._before(optimizers["swapped"], (optimizers["swapped"],), {})
        scaled._after(optimizers["swapped"], (optimizers["swapped"],), {})

    def split_anew():
        scaled._shape = []
        swap_only()

    contenders = {name: optimizer.step for name, optimizer in optimizers.items()}
    seconds = alternate({**contenders, "swap only": swap_only, "split anew": split_anew}, rounds)
    tensors, groups = len(list(model.parameters())), len(scaled._parts)
    what = f"{tensors} parameters in {groups} groups: "
    return [
        {"part": "swap", "what": what + "swapping alone / plain step", "ratio": ratio(seconds, "swap only", "plain")},
        {
            "part": "swap",
            "what": "splitting anew and swapping / plain step",
            "ratio": ratio(seconds, "split anew", "plain"),
        },
        {"part": "swap", "what": "step with swapped groups / plain step", "ratio": ratio(seconds, "swapped", "plain")},
        {
            "part": "swap",
            "what": "step with explicit groups / plain step",
            "ratio": ratio(seconds, "explicit", "plain"),
        },
    ]


def draw() -> list[dict[str, object]]:
    """Seconds to draw 1e9 float32 weights in place (4 GB)."""
    tensors = [torch.empty(2**12, 2**12).fill_(1.0) for _ in range(60)]  # touched: the first pass would pay for pages
    init = Init("normal", 0.02)
    pairs = [
        (t, ParameterPlan(f"w{i}", "hidden", tuple(t.shape), None, init, 1, 1, 1, "adamw", ""))
        for i, t in enumerate(tensors)
    ]
    rows: list[dict[str, object]] = []
    for threads in (1, os.cpu_count() or 1):
        start = time.perf_counter()
        draw_all(pairs, 0, threads=threads)
        seconds = time.perf_counter() - start
        count = sum(t.numel() for t in tensors)
        rows.append(
            {"part": "draw", "what": f"seconds to draw {count:.3g} weights, threads: {threads}", "ratio": seconds}
        )
    return rows


def claims(rows: list[dict[str, object]]) -> list[Claim]:
    """A step of scaled groups costs what a plain step costs, and swapping by itself is next to nothing."""
    by_name = {str(row["what"]).split(": ")[-1]: row["ratio"] for row in rows}
    bounds = {"swapping alone / plain step": 0.01, "step with swapped groups / plain step": 1.05}
    return [
        Claim(f"time of {what}", "at most", bound, by_name[what]) for what, bound in bounds.items() if what in by_name
    ]


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--parts", nargs="+", default=["swap", "draw"], choices=["swap", "draw"], help="draw takes 4 GB"
    )
    args = parse(parser)
    rows = [row for part in args.parts for row in (swap(args.rounds) if part == "swap" else draw())]
    save(result_name("callback"), rows, claims, part=["part"], strict=args.strict)


if __name__ == "__main__":
    main()
