"""What a claim's trials say: the certificate as rows, the noise, and figures with targets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from targets import Claim

from lightning_mue.analysis.cells import SizeTable, cells_of
from lightning_mue.analysis.certificate import Certificate
from lightning_mue.analysis.certificate.measures import SizeResult
from lightning_mue.analysis.certificate.verdict import AxisResult
from lightning_mue.analysis.trials import Trial

#: Rates at most this many octaves from a cell's best one count for the noise: worse ones are noisier, and decide nothing.
_NEAR = 1.1


def rows_of(certificate: Certificate) -> list[dict[str, object]]:
    """One row a rule, axis and size, the base first; NaN becomes None."""
    return [
        {
            "rule": result.rule,
            "axis": result.axis,
            "size": transfer.label,
            "seeds": len(result.seeds),
            "rates": len(transfer.rates),
            "optimum": _plain(transfer.optimum.rate.value if transfer.optimum else math.nan),
            "loss": _plain(transfer.optimum.loss.value if transfer.optimum else math.nan),
            **_estimate("drift", transfer.drift),
            **_estimate("penalty", transfer.penalty),
            "problem": transfer.problem,
            "verdict": result.verdict,
        }
        for result in certificate.results
        for transfer in result.transfers
    ]


def _estimate(name: str, of: Any) -> dict[str, object]:
    return {name: _plain(of.value), f"{name} low": _plain(of.low), f"{name} high": _plain(of.high)}


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def noise_of(trials: Sequence[Trial]) -> dict[str, float]:
    """The relative standard deviations of losses near the optima: of seeds, and of one run around what its seed and rate explain.

    The second is what is left of a comparison of rates whose seeds are paired. Medians over cells.
    """
    seeds, paired = [], []
    for cell in cells_of(trials):
        losses = _near_best(cell)  # [S, R]
        if min(losses.shape) < 2:
            continue
        rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
        freedom = (losses.shape[0] - 1) * (losses.shape[1] - 1)
        paired.append(math.sqrt((rest**2).sum() / freedom) / losses.mean())
        seeds.append(losses.std(0, ddof=1).mean() / losses.mean())
    return {"seeds": float(np.median(seeds)), "paired": float(np.median(paired))} if seeds else {}


def _near_best(cell: SizeTable) -> Any:
    rates, losses = cell.table(sorted(cell.seeds))
    finite = np.isfinite(losses).all(0)
    if not finite.any():
        return losses[:, :0]
    best = rates[np.where(finite, losses.mean(0), math.inf).argmin()]
    return losses[:, finite & (np.abs(np.log2(rates / best)) <= _NEAR)]


def claims_of(
    targets: Sequence[Mapping[str, Any]], certificate: Certificate, others: Mapping[str, Sequence[Trial]]
) -> list[Claim]:
    """The figures of a claim's YAML, each with its target.

    Args:
        targets: Each with ``what``, ``figure`` (one of `FIGURES`), its arguments, and ``at least`` or ``at most``.
        certificate: Of the claim's trials.
        others: Trials of the sweeps that are not certified, by the sweep's name.
    """
    made = []
    for target in targets:
        given = dict(target)
        what, figure = given.pop("what"), FIGURES[given.pop("figure")]
        direction = next(d for d in ("at least", "at most") if d in given)
        bound = float(given.pop(direction))
        made.append(Claim(what, direction, bound, figure(certificate, others, **given)))
    return made


def _worst_penalty(certificate: Certificate, _: object, rule: str, over: str = "", axis: str = "") -> float:
    return _over(lambda r: _greatest(_penalties(certificate, r, axis)), rule, over)


def _mean_penalty(certificate: Certificate, _: object, rule: str, over: str = "", axis: str = "") -> float:
    return _over(lambda r: _mean(_penalties(certificate, r, axis)), rule, over)


def _worst_drift(certificate: Certificate, _: object, rule: str, over: str = "", axis: str = "") -> float:
    return _over(lambda r: _greatest([abs(t.drift.value) for t in _sizes(certificate, r, axis)]), rule, over)


def _loss_over(certificate: Certificate, _: object, rule: str, over: str, axis: str = "") -> float:
    """Greatest ratio of two rules' losses at the base's rate, over the sizes that both have."""
    mine, theirs = (
        {(axis_of.axis, t.label): at_base_rate(t) for axis_of, t in _all_sizes(certificate, r, axis)}
        for r in (rule, over)
    )
    return _greatest([mine[key] / theirs[key] for key in mine if key in theirs])


def _steps_up(certificate: Certificate, _: object, rule: str, axis: str = "") -> float:
    """Greatest relative rise of the loss at the base's rate from one size to the next; negative where every size improves."""
    rises = []
    for result in _results(certificate, rule, axis):
        losses = [result.transfers[0].optimum.loss.value if result.transfers[0].optimum else math.nan]
        losses += [at_base_rate(t) for t in result.transfers[1:]]
        rises += [after / before - 1 for before, after in itertools.pairwise(losses)]
    return _greatest(rises)


def _settings_apart(_: Certificate, others: Mapping[str, Sequence[Trial]], sweep: str) -> float:
    """Greatest relative difference of two losses of one rule, size, seed and rate with different settings."""
    groups: dict[str, list[float]] = {}
    for trial in others.get(sweep, ()):
        groups.setdefault(str((trial.rule, sorted(trial.size.items()), trial.seed, trial.lr)), []).append(trial.loss)
    apart = [max(losses) / min(losses) - 1 for losses in groups.values() if len(losses) > 1]
    return _greatest(apart)


def at_base_rate(transfer: SizeResult) -> float:
    """Loss at the rate that is best at the base."""
    return transfer.optimum.loss.value * (1 + transfer.penalty.value) if transfer.optimum else math.nan


def _penalties(certificate: Certificate, rule: str, axis: str) -> list[float]:
    return [t.penalty.value for t in _sizes(certificate, rule, axis)]


def _sizes(certificate: Certificate, rule: str, axis: str) -> list[SizeResult]:
    return [t for _, t in _all_sizes(certificate, rule, axis)]


def _all_sizes(certificate: Certificate, rule: str, axis: str) -> list[tuple[AxisResult, SizeResult]]:
    return [(result, t) for result in _results(certificate, rule, axis) for t in result.transfers[1:]]


def _results(certificate: Certificate, rule: str, axis: str) -> list[AxisResult]:
    return [r for r in certificate.results if r.rule == rule and axis in ("", r.axis)]


def _over(figure: Callable[[str], float], rule: str, other: str) -> float:
    return figure(rule) / figure(other) if other else figure(rule)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _greatest(values: Sequence[float]) -> float:
    """NaN if one is unknown, or there is none."""
    return max(values) if values and not any(map(math.isnan, values)) else math.nan


FIGURES: Mapping[str, Callable[..., float]] = {
    "worst penalty": _worst_penalty,
    "mean penalty": _mean_penalty,
    "worst drift": _worst_drift,
    "loss over": _loss_over,
    "rise": _steps_up,
    "settings apart": _settings_apart,
}
