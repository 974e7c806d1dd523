"""One axis under one rule, and the verdict on it in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_mue.analysis.certificate.measures import Figures, Limits, Transfer
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
    transfers: Sequence[Transfer]
    figures: Figures
    verdict: Verdict
    reason: str

    @property
    def worst(self) -> Transfer | None:
        """The size with the largest penalty; None where none is known."""
        known = [t for t in self.transfers[1:] if not math.isnan(t.penalty.value)]
        return max(known, key=lambda t: t.penalty.value, default=None)


def judge(transfers: Sequence[Transfer], seeds: int, limits: Limits) -> tuple[Verdict, str]:
    """The verdict on an axis: what is beyond doubt decides first, then what is missing, then what is too noisy."""
    base, *others = transfers
    for t in others:
        if t.penalty.low > limits.penalty or t.drift.low > limits.drift or t.drift.high < -limits.drift:
            return (
                "drifts",
                f"at {t.label} the optimum is {octaves(t.drift)} off, the base's rate costs {percent(t.penalty)}.",
            )
    if base.problem:
        return "cannot tell", f"the base has no optimum: {base.problem}"
    for t in others:
        if t.problem:
            return "cannot tell", f"{t.label}: {t.problem}"
    if seeds < 2:
        return "cannot tell", "one seed has no noise to compare with: run at least 3 seeds."
    for t in others:
        noisy = t.penalty.high > limits.penalty or t.drift.high > limits.drift or t.drift.low < -limits.drift
        if noisy:
            return "cannot tell", (
                f"too noisy: at {t.label} the optimum is {octaves(t.drift)} off, the base's rate costs {percent(t.penalty)}; "
                f"limits {limits.drift:g} octaves, {100 * limits.penalty:g} %. More seeds narrow the intervals."
            )
    return "transfers", (
        f"at every size the optimum stays within {limits.drift:g} octaves and the base's rate costs at most "
        f"{100 * max(t.penalty.high for t in others):.2g} %."
    )


def percent(estimate: Estimate) -> str:
    """A relative loss in percent, with its interval.

    Example:
        >>> percent(Estimate(0.006, 0.001, 0.0123))
        '0.6 % [0.1, 1.2]'
    """
    return _written(estimate, 100, " %")


def octaves(estimate: Estimate) -> str:
    """Octaves with their sign, and the interval.

    Example:
        >>> octaves(Estimate(0.5, 0.25, 0.75))
        '+0.50 [+0.25, +0.75]'
    """
    if math.isnan(estimate.value):
        return "-"
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def plain(estimate: Estimate) -> str:
    """A figure with its interval; "-" where it is not known."""
    return _written(estimate, 1, "")


def _written(estimate: Estimate, factor: float, unit: str) -> str:
    if math.isnan(estimate.value):
        return "-"
    low, value, high = (f"{factor * v:.2g}" for v in (estimate.low, estimate.value, estimate.high))
    return f"{value}{unit} [{low}, {high}]"
