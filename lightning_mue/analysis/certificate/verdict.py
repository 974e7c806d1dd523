"""One axis under one rule, and the verdict on it in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_mue.analysis.certificate.measures import Figures, Limits, SizeResult
from lightning_mue.analysis.fits import Estimate

Verdict: TypeAlias = Literal["transfers", "drifts", "cannot tell"]


@dataclass(frozen=True)
class AxisResult:
    """One axis under one rule.

    Attributes:
        rule: The rule.
        axis: Names that move, joined by "+".
        seeds: Seeds of which all figures are means.
        transfers: The base, then the other sizes.
        figures: E, kappa and R(inf).
        verdict: transfers, drifts or cannot tell.
        reason: One sentence.
    """

    rule: str
    axis: str
    seeds: tuple[int, ...]
    transfers: Sequence[SizeResult]
    figures: Figures
    verdict: Verdict
    reason: str

    @property
    def worst(self) -> SizeResult | None:
        """The size with the largest penalty; None where none is known."""
        known = [t for t in self.transfers[1:] if not math.isnan(t.penalty.value)]
        return max(known, key=lambda t: t.penalty.value, default=None)


def judge(transfers: Sequence[SizeResult], seeds: int, limits: Limits) -> tuple[Verdict, str]:
    """The verdict on an axis: what is beyond doubt decides first, then what is missing, then what is too noisy."""
    base, *others = transfers
    beyond = [t for t in others if t.penalty.low > limits.penalty or _least(t.drift) > limits.drift]
    if beyond:
        return "drifts", f"{_costs(max(beyond, key=lambda t: t.penalty.value))}."
    if base.problem:
        return "cannot tell", f"the base has no optimum: {base.problem}"
    for t in others:
        if t.problem:
            return "cannot tell", f"{t.label}: {t.problem}"
    if seeds < 2:
        return "cannot tell", "one seed has no noise to compare with: run at least 3 seeds."
    noisy = [t for t in others if not (t.penalty.high <= limits.penalty and _farthest(t.drift) <= limits.drift)]
    if noisy:
        worst = max(noisy, key=lambda t: t.penalty.high)
        allowed = f"limits {limits.drift:g} octaves and {100 * limits.penalty:g} %"
        return "cannot tell", f"too noisy: {_costs(worst)}; {allowed}. More seeds narrow the intervals."
    return "transfers", (
        f"at every size the optimum stays within {limits.drift:g} octaves and the base's rate costs at most "
        f"{100 * max(t.penalty.high for t in others):.2g} %."
    )


def _costs(t: SizeResult) -> str:
    return f"at {t.label} the optimum is {octaves(t.drift)} octaves off, the base's rate costs {percent(t.penalty)}"


def _least(drift: Estimate) -> float:
    """Octaves that the optimum has moved at least."""
    return max(drift.low, -drift.high)


def _farthest(drift: Estimate) -> float:
    """Octaves that it has moved at most."""
    return max(drift.high, -drift.low)


def percent(estimate: Estimate) -> str:
    """A relative loss in percent, with its interval.

    Example:
        >>> percent(Estimate(0.006, 0.001, 0.0123))
        '0.60 % [0.10, 1.23]'
    """
    return _shown(estimate, ".2f", " %", times=100)


def octaves(estimate: Estimate) -> str:
    """Octaves with their sign, and the interval.

    Example:
        >>> octaves(Estimate(0.5, 0.25, 0.75))
        '+0.50 [+0.25, +0.75]'
    """
    return _shown(estimate, "+.2f")


def plain(estimate: Estimate) -> str:
    """A figure with its interval; "-" where it is not known."""
    return _shown(estimate, ".2g")


def _shown(estimate: Estimate, form: str, unit: str = "", times: float = 1) -> str:
    if math.isnan(estimate.value):
        return "-"
    value, low, high = (format(times * figure, form) for figure in (estimate.value, estimate.low, estimate.high))
    return f"{value}{unit} [{low}, {high}]"
