"""Checks that ranks that must hold the same tokens do.

Shape legend: T tokens, d width, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_mue.checks import mismatch

#: Tokens in a fingerprint, and signed sums over them.
SAMPLED, PROJECTIONS = 16, 8
#: Length of a fingerprint: the number of tokens, two norms, the sums.
FINGERPRINT = 3 + PROJECTIONS
#: Largest relative difference between replicas. Rounding makes less than 0.01; independent tokens make 2, and tokens with a
#: correlation of 0.96 still make 0.2.
TOLERANCE = 0.1


@torch.no_grad()
def fingerprint(x_Td: Tensor, logits_TE: Tensor) -> Tensor:
    """Numbers that agree between ranks with the same tokens and differ between others: float64 [FINGERPRINT].

    Sums of magnitudes would not do: at large widths they are nearly equal for all batches. Sums with random signs, relative
    to the norm, are of order 1 and differ by as much, at any width.
    """
    few = _few(len(x_Td), x_Td.device)
    parts = [t.index_select(0, few).double().flatten() for t in (x_Td, logits_TE)]
    norms = torch.stack([part.norm() for part in parts])
    units = torch.cat([part / norm.clamp(min=1e-300) for part, norm in zip(parts, norms, strict=True)])
    return torch.cat([norms.new_full((1,), len(x_Td)), norms, units @ _signs(len(units), units.device)])


def check_replicas(fingerprints: list[list[float]]) -> None:
    """Refuses ranks with different tokens: each rank computes a slice of the tokens, so outputs would be silently wrong.

    All ranks compare with the first one, so that either all raise a RuntimeError or none.
    """
    first = fingerprints[0]
    for rank, found in enumerate(fingerprints):
        difference = _difference(first, found)
        if found[:1] != first[:1] or difference > TOLERANCE:  # NaN, in a run that has diverged, is no difference
            sample = f"{first[0]:g} and {found[0]:g} tokens; a sample differs by {difference:.0%} of its norm"
            what = (
                f"'replicated' in parallelize_experts, but different tokens or routes on ranks 0 and {rank} of the mesh"
            )
            expected = f"the same tokens on all ranks (rounding makes less than {TOLERANCE:.0%})"
            do = "If each rank has its own batch, use tokens='split'; else give all ranks the same seed and batches."
            raise RuntimeError(mismatch("tokens", found=f"{what} ({sample})", expected=expected, do=do))


def _difference(a: list[float], b: list[float]) -> float:
    """The difference of two fingerprints relative to their norms; NaN if one of them holds a NaN."""
    sizes = [abs(m - n) / max(m, n, 1e-300) for m, n in zip(a[1:3], b[1:3], strict=True)]
    squares = [(m - n) ** 2 for m, n in zip(a[3:], b[3:], strict=True)]
    worst = max(math.sqrt(sum(squares) / len(squares)), *sizes)
    return math.nan if any(map(math.isnan, a + b)) else worst


def _few(tokens: int, device: torch.device) -> Tensor:
    """Indices of some tokens, irregularly spaced: regularly spaced ones could all be first tokens of sequences, and equal."""
    places = torch.arange(1, SAMPLED + 1 if tokens else 1, device=device, dtype=torch.float64) * (math.sqrt(5) - 1) / 2
    return (places.frac() * tokens).long()


def _signs(n: int, device: torch.device) -> Tensor:
    """+-1 by a hash of the index, the same on every rank: float64 [n, PROJECTIONS]."""
    hashed = torch.arange(1, n + 1, device=device) * 0x5851F42D4C957F2D
    hashed = (hashed ^ (hashed >> 32)) * 0x2545F4914F6CDD1D  # wraps around
    bits = (hashed[:, None] >> torch.arange(40, 40 + PROJECTIONS, device=device)) & 1
    return bits.double() * 2 - 1
