"""The named Newton-Schulz schedules: coefficients, source, and the range of singular values that they guarantee."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_mue.checks import value_error


@dataclass(frozen=True)
class Coefficients:
    """A schedule of odd quintic polynomials `X <- a X + (b XX^T + c (XX^T)^2) X`, one step each.

    Attributes:
        steps: `(a, b, c)` of each step, in order; a and c positive, b negative.
        source: Where the numbers come from.
        floor: Smallest singular value, as a fraction of the matrix's Frobenius norm, that reaches the band.
        band: Lowest and highest value, in exact arithmetic, of the result's singular values that started at or above
            the floor. Those that started below it end between 0 and the upper edge.
    """

    steps: tuple[tuple[float, float, float], ...]
    source: str
    floor: float
    band: tuple[float, float]

    def __post_init__(self) -> None:
        if not self.steps or any(a <= 0 or b >= 0 or c <= 0 for a, b, c in self.steps):
            expected = "one (a, b, c) or more with a > 0, b < 0 and c > 0"
            do = "Only such a polynomial raises small singular values and lowers large ones."
            raise value_error("steps", found=self.steps, expected=expected, do=do)

    @property
    def gain(self) -> float:
        """Factor by which a very small singular value grows: the product of the a."""
        return math.prod(a for a, _, _ in self.steps)


#: The named schedules. The bands are the extrema of the composed polynomial on [floor, 1.01], rounded outwards; the
#: 1% of headroom covers a norm that was rounded down. `tests/optim/orthogonal/test_newton_schulz.py` recomputes them.
PRESETS: dict[str, Coefficients] = {
    "classic": Coefficients(
        steps=((3.4445, -4.7750, 2.0315),) * 5,
        source="Jordan et al., Muon (kellerjordan.github.io/posts/muon), 2024",
        floor=2e-3,
        band=(0.68, 1.21),
    ),
    "scheduled": Coefficients(
        steps=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        source="five-step schedule optimized step by step, published with the Muon speed runs (modded-nanogpt), 2025",
        floor=2.5e-3,
        band=(0.97, 1.15),
    ),
}
