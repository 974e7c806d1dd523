"""What MuECallback's swap of parameter groups costs in an optimizer step.

An AdamW step (foreach) of a 12-layer MoE language model, on one list of parameters: plain; with scaled groups swapped in and
out; and with explicit param_groups. The last shows how much of the cost is that there are more groups, not the swapping.
"""

from __future__ import annotations

import argparse
import copy

import torch
from common import alternate, ratio, save
from torch.optim import AdamW

from lightning_mue import MoELanguageModel, param_groups, plan
from lightning_mue.parameterizations import ScaledStep


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
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
    contenders = {name: optimizer.step for name, optimizer in optimizers.items()}

    def swap_only():
        scaled._swap_in(optimizers["swapped"], (), {})
        scaled._swap_out(optimizers["swapped"], (), {})

    seconds = alternate({**contenders, "swap only": swap_only}, rounds)
    save(
        "callback",
        [
            {"what": "swapping alone / plain step", "ratio": ratio(seconds, "swap only", "plain")},
            {"what": "step with swapped groups / plain step", "ratio": ratio(seconds, "swapped", "plain")},
            {
                "what": "step with swapped groups / step with explicit groups",
                "ratio": ratio(seconds, "swapped", "explicit"),
            },
        ],
    )


if __name__ == "__main__":
    main()
