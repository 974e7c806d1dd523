"""How the size of an MoE's output depends on top-k, at initialization: with square roots of the gates, and with the gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_mue.moe import MoELayer

#: Experts, and numbers of active ones.
EXPERTS, ACTIVE = 64, (2, 4, 8, 16, 32)
_WIDTH, _EXPERT_WIDTH, _TOKENS = 128, 64, 512


def output_rms(gate: str, seed: int, active: Sequence[int] = ACTIVE) -> list[float]:
    """RMS of the output for each top-k, of a layer with the same weights, on tokens of unit variance."""
    found = []
    for top_k in active:
        torch.manual_seed(seed)
        layer = MoELayer(_WIDTH, _EXPERT_WIDTH, EXPERTS, top_k, gate=gate, init_std=None)
        with torch.no_grad():
            output = layer.eval()(torch.randn(1, _TOKENS, _WIDTH))
        found.append(float(output.square().mean().sqrt()))
    return found


def spread(gate: str, seeds: int = 3) -> float:
    """Largest over smallest RMS, over all top-k; the worst of some seeds."""
    each = [output_rms(gate, seed) for seed in range(seeds)]
    return max(max(rms) / min(rms) for rms in each)
