"""The sides of a parameter's matrices, and what a Muon makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

#: How a Muon turns its `lr` into the spectral norm of the update of an [out, in] matrix (theory.md, 5.2).
CONVENTIONS: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda out, fan_in: math.sqrt(out / fan_in),
    "rms": lambda out, fan_in: 0.2 * math.sqrt(max(out, fan_in)),
    "original": lambda out, fan_in: math.sqrt(max(1.0, out / fan_in)),
    "unit": lambda out, fan_in: 1.0,
}


def matrix_sides(shape: Sequence[int]) -> tuple[int, int]:
    """Return `(out, in)` of a matrix, of each matrix of a stack (three dimensions), or of a convolution (more)."""
    return (shape[1], shape[2]) if len(shape) == 3 else (shape[0], math.prod(shape[1:]))
