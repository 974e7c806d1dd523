"""Points of a search: Optuna's TPE sampler, asked anew each time with all that is known."""

from __future__ import annotations

import math
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from lightning_mue.analysis.sweep.axes import Range
from lightning_mue.analysis.sweep.curve import Curve
from lightning_mue.analysis.sweep.plan import Point, SweepPlan


def sample(plan: SweepPlan, curve: Curve) -> Point:
    """One more point of a search: what TPE suggests after the points known so far, also those that still run.

    It depends on these points only, so two processes that know the same suggest the same.
    """
    distributions = {name: distribution(span) for name, span in plan.search.items()}
    # constant_liar: points that still run count as bad, so that parallel trials do not crowd together.
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=len(curve), constant_liar=True))
    for point, loss in curve.items():
        params = dict(point.searched) | ({"lr": point.lr} if "lr" in distributions else {})
        known = loss is not None and not math.isnan(loss)
        state = TrialState.COMPLETE if known else TrialState.RUNNING if loss is None else TrialState.FAIL
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=distributions, state=state, value=loss if known else None
            )
        )
    params = study.ask(distributions).params
    lr: Any = params.pop("lr") if "lr" in params else plan.rates[0]
    return Point(float(lr), tuple(params.items()))


def distribution(span: Range) -> BaseDistribution:
    """Optuna's form of a range."""
    if span.scale == "int":
        return IntDistribution(int(span.low), int(span.high))
    return FloatDistribution(span.low, span.high, log=span.scale == "log")
